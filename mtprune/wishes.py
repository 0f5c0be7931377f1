"""Wishes: what each task alone would keep, remembered for a model after its pruner is done.

`finalize()` leaves plain modules, so nothing in the model says who voted for what. What takes a
subnetwork out of it later asks here. Kept are one bit for each weight and task, as long as the
model lives; a copy of the model, or one loaded from a file, has none.
"""

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

from mtprune.masking import unpack

__all__ = ["TaskMasks", "leave", "left"]

TaskMasks = Mapping[str, Mapping[str, Tensor]]
"""For each task, by parameter name, what it would keep: True = keep."""

_LEFT: "weakref.WeakKeyDictionary[nn.Module, tuple[TaskMasks, Mapping[str, tuple[int, ...]]]]" = (
    weakref.WeakKeyDictionary()
)


def leave(model: nn.Module, packed: TaskMasks, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Remember the wishes for a model.

    Args:
        model: The model.
        packed: Its task masks, packed to bits.
        shapes: Of its layers.
    """
    _LEFT[model] = (packed, shapes)


def left(model: nn.Module) -> dict[str, dict[str, Tensor]] | None:
    """The task masks that were left for a model; None if there are none.

    Example:
        >>> left(nn.Linear(2, 2)) is None
        True
    """
    if model not in _LEFT:
        return None
    packed, shapes = _LEFT[model]
    return {
        task: {name: unpack(bits, shapes[name]) for name, bits in masks.items()}
        for task, masks in packed.items()
    }
