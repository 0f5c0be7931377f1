"""Held: what is made of the parts of a sparse weight, once, and kept as long as they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["held"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Held:
    """What was made, and of what."""

    storage: StorageWeakRef
    marks: tuple[Any, ...]
    copies: tuple[Tensor, ...]
    made: Any


_HELD: dict[tuple[int, int, str], _Held] = {}
"""By the memory of the values, not by their tensor: a compiled model makes tensors anew."""


def held(kind: str, parts: Sequence[Tensor], shape: tuple[int, ...], make: Callable[[], T]) -> T:
    """What is made of these parts: made once, and anew for parts that were changed.

    Writes that torch does not count, by ``data`` or NumPy, are not seen. To parts that were made in
    inference mode it counts none; those are compared with what they were.

    Args:
        kind: What is made.
        parts: The parts of a sparse weight, its values last.
        shape: What it depends on besides.
        make: What makes it.

    Example:
        >>> parts = torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1)
        >>> held("sum", parts, (), lambda: 1), held("sum", parts, (), lambda: 2)
        (1, 1)
        >>> parts[2].mul_(2), held("sum", parts, (), lambda: 3)
        (tensor([2.]), 3)
    """
    values = parts[-1]
    storage = values.untyped_storage()
    key = (storage._cdata, values.data_ptr(), kind)
    marks = (*shape, *map(_mark, parts))
    found = _HELD.get(key)
    if found is None or found.marks != marks or not _are(_uncounted(parts), found.copies):
        for other in [k for k, entry in list(_HELD.items()) if entry.storage.expired()]:
            _HELD.pop(other, None)
        copies = tuple(part.clone() for part in _uncounted(parts))
        found = _HELD[key] = _Held(StorageWeakRef(storage), marks, copies, make())
    made: T = found.made
    return made


def _mark(part: Tensor) -> tuple[Any, ...]:
    version = None if part.is_inference() else part._version
    return part.data_ptr(), version, part.dtype, part.shape, part.stride()


def _uncounted(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts of which torch does not count how often they were written to."""
    return [part for part in parts if part.is_inference()]


def _are(parts: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    return all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))
