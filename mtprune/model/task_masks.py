"""Task masks: the weights that each task alone would keep.

`finalize()` leaves plain modules, so nothing in the model says which task voted for which weight.
Taking one task's subnetwork out of a model later needs that. One bit is kept for each weight and
task, as long as the model lives; a copy of the model, or one loaded from a file, has none.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mtprune.bits import unpack_bits
from mtprune.model.layers import Layer
from mtprune.model.parts import Part

__all__ = ["PackedTaskMasks", "TaskMasks", "recall_task_masks", "remember_task_masks"]

TaskMasks = Mapping[str, Mapping[str, Tensor]]
"""For each task, by parameter name, the weights it would keep: True = keep."""


@dataclass(frozen=True)
class PackedTaskMasks:
    """Task masks as bits.

    Attributes:
        bits: For each task, by parameter name.
        parts: What of each layer they are masks of.
    """

    bits: Mapping[str, Mapping[str, Tensor]]
    parts: Mapping[str, Part]

    @classmethod
    def of(
        cls,
        tasks: Iterable[str],
        layers: Sequence[Layer],
        bits: Sequence[Mapping[str, Tensor]],
    ) -> "PackedTaskMasks":
        """The task masks of a model.

        Args:
            tasks: All tasks.
            layers: The layers.
            bits: For each layer, the packed mask of each task that uses it.
        """
        pairs = list(zip(layers, bits, strict=True))
        by_task = {
            task: {layer.name: own[task] for layer, own in pairs if task in own} for task in tasks
        }
        return cls(by_task, {layer.name: layer.part for layer in layers})

    def unpack(self) -> dict[str, dict[str, Tensor]]:
        """The masks again, bool, in the shapes of their layers."""
        return {
            task: {
                name: self.parts[name].shown(unpack_bits(bits, self.parts[name].shape))
                for name, bits in masks.items()
            }
            for task, masks in self.bits.items()
        }


_REMEMBERED: "weakref.WeakKeyDictionary[nn.Module, PackedTaskMasks]" = weakref.WeakKeyDictionary()


def remember_task_masks(model: nn.Module, masks: PackedTaskMasks) -> None:
    """Remember the task masks of a model."""
    _REMEMBERED[model] = masks


def recall_task_masks(model: nn.Module) -> dict[str, dict[str, Tensor]] | None:
    """The task masks that are remembered for a model; None if there are none.

    Example:
        >>> recall_task_masks(nn.Linear(2, 2)) is None
        True
    """
    return _REMEMBERED[model].unpack() if model in _REMEMBERED else None
