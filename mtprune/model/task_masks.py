"""Task masks: the weights that each task alone would keep.

`finalize()` leaves plain modules, so nothing in the model says which task voted for which weight.
Taking one task's subnetwork out of a model later needs that. One bit is kept for each weight and
task, as long as the model lives; a copy of the model, or one loaded from a file, has none.
"""

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

from mtprune.bits import unpack_bits

__all__ = ["TaskMasks", "recall_task_masks", "remember_task_masks"]

TaskMasks = Mapping[str, Mapping[str, Tensor]]
"""For each task, by parameter name, the weights it would keep: True = keep."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of layers, by parameter name."""

_REMEMBERED: "weakref.WeakKeyDictionary[nn.Module, tuple[TaskMasks, Shapes]]" = (
    weakref.WeakKeyDictionary()
)


def remember_task_masks(model: nn.Module, packed: TaskMasks, shapes: Shapes) -> None:
    """Remember the task masks of a model.

    Args:
        model: The model.
        packed: Its task masks, packed to bits.
        shapes: Of its layers.
    """
    _REMEMBERED[model] = (packed, shapes)


def recall_task_masks(model: nn.Module) -> dict[str, dict[str, Tensor]] | None:
    """The task masks that are remembered for a model; None if there are none.

    Example:
        >>> recall_task_masks(nn.Linear(2, 2)) is None
        True
    """
    if model not in _REMEMBERED:
        return None
    packed, shapes = _REMEMBERED[model]
    return {
        task: {name: unpack_bits(bits, shapes[name]) for name, bits in masks.items()}
        for task, masks in packed.items()
    }
