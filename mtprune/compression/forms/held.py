"""Held: the dense weight of a sparse one, made at first use where there is no native code."""

from collections.abc import Callable, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["held"]

_Marks = tuple[Any, ...]

_HELD: MutableMapping[Tensor, tuple[_Marks, Tensor]] = WeakIdKeyDictionary()
"""For the values of each sparse weight: what its parts were, and the dense weight of them."""


def held(
    parts: tuple[Tensor, Tensor, Tensor], shape: tuple[int, ...], make: Callable[[], Tensor]
) -> Tensor:
    """The dense weight of these parts: made once, and anew for parts that were changed.

    It is kept as long as the parts are. Writes that torch does not count, by ``data`` or NumPy, are
    not seen.

    Args:
        parts: The parts of a sparse weight, its values last.
        shape: What the dense weight depends on besides.
        make: What makes it.

    Example:
        >>> import torch
        >>> parts = torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1)
        >>> held(parts, (), lambda: torch.ones(1)) is held(parts, (), lambda: torch.ones(1))
        True
        >>> parts[2].mul_(2), held(parts, (), lambda: torch.zeros(1))
        (tensor([2.]), tensor([0.]))
    """
    if any(part.is_inference() for part in parts):
        return make()  # torch does not count what is written to them
    marks = (*shape, *((part.data_ptr(), part._version, part.dtype) for part in parts))
    found = _HELD.get(parts[2])
    if found is None or found[0] != marks:
        found = _HELD[parts[2]] = marks, make()
    return found[1]
