"""Paths: what a module has at a dotted name."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["at", "in_runs", "is_at", "numbers"]


def at(module: Any, path: str) -> Any:
    """The attribute at a path, or None."""
    value: Any = module
    for attribute in path.split("."):
        value = getattr(value, attribute, None)
    return value


def is_at(module: Any, path: str, value: Any) -> bool:
    """Whether the attribute at a path is this number, bool or None."""
    found = at(module, path)
    return not isinstance(found, Tensor) and bool(found == value)


def numbers(module: Any, paths: Sequence[str]) -> list[int]:
    """The whole numbers that a module has at these paths."""
    values = (at(module, path) for path in paths)
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def in_runs(length: int, count: int) -> tuple[int, ...]:
    """The unit of each index if units lie one after the other and are equally long.

    Example:
        >>> in_runs(6, 3)
        (0, 0, 1, 1, 2, 2)
    """
    return tuple(i * count // length for i in range(length))
