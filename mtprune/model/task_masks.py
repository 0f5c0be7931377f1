"""Task masks: the weights that each task alone would keep.

`finalize()` leaves plain modules, so nothing in the model says which task voted for which weight.
Taking one task's subnetwork out of a model later needs that. One bit is kept for each weight and
task, as long as the model lives; a copy of the model, or one loaded from a file, has none.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtprune.bits import pack_bits, unpack_bits
from mtprune.model.layers import Layer
from mtprune.model.names import own_name
from mtprune.model.parts import Part

__all__ = [
    "PackedTaskMasks",
    "TaskMasks",
    "check_tasks",
    "masked_parameters",
    "merged_task_masks",
    "recall_task_masks",
    "remember_task_masks",
    "remembered_task_masks",
]

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

    @classmethod
    def pack(cls, masks: TaskMasks) -> "PackedTaskMasks":
        """The same as bits.

        Example:
            >>> masks = {"seg": {"weight": torch.tensor([True, False])}}
            >>> PackedTaskMasks.pack(masks).unpack()
            {'seg': {'weight': tensor([ True, False])}}
        """
        return cls(
            {task: {name: pack_bits(m) for name, m in own.items()} for task, own in masks.items()},
            {name: Part(tuple(m.shape)) for own in masks.values() for name, m in own.items()},
        )

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


def remembered_task_masks(model: nn.Module) -> PackedTaskMasks | None:
    """The same as `recall_task_masks`, as bits."""
    return _REMEMBERED.get(model)


def recall_task_masks(model: nn.Module) -> dict[str, dict[str, Tensor]] | None:
    """The task masks that are remembered for a model; None if there are none.

    Example:
        >>> recall_task_masks(nn.Linear(2, 2)) is None
        True
    """
    return _REMEMBERED[model].unpack() if model in _REMEMBERED else None


def check_tasks(tasks: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Tasks that were chosen, each once.

    Args:
        tasks: The tasks.
        known: Those that there are.

    Raises:
        ValueError: If they are none, or others.
    """
    known = list(known)
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"`tasks` must be a list of some of {known}. Got {tasks!r}.")
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"`tasks` names {unknown}. Known here: {known}.")
    return tuple(dict.fromkeys(tasks))


def merged_task_masks(masks: TaskMasks, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The weights that at least one of some tasks would keep, by parameter name.

    Parameters that only other tasks use are there too, without a weight that is kept.
    """
    merged = {}
    for name, like in {name: mask for own in masks.values() for name, mask in own.items()}.items():
        merged[name] = torch.zeros_like(like)
        for vote in (masks[task][name] for task in tasks if name in masks[task]):
            merged[name] |= vote.to(like.device)
    return merged


def masked_parameters(model: nn.Module, masks: TaskMasks) -> dict[str, nn.Parameter]:
    """The parameters that task masks are of, by name.

    Args:
        model: The model.
        masks: The masks.

    Raises:
        ValueError: If the model has no such parameter.
    """
    parameters = {own_name(model, name): p for name, p in model.named_parameters()}
    masked = {}
    for name, mask in ((name, mask) for own in masks.values() for name, mask in own.items()):
        found = parameters.get(name)
        if found is None or found.shape != mask.shape:
            got = "no such parameter" if found is None else f"shape {tuple(found.shape)}"
            raise ValueError(
                f"`task_masks` are of another model: they have '{name}' with shape "
                f"{tuple(mask.shape)}, and this model has {got}."
            )
        masked[name] = found
    return masked
