"""Owners: a model has one live pruner at most."""

import weakref
from collections.abc import Callable

from torch import nn

__all__ = ["check_free", "claim", "free", "leave"]

_OWNERS: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]]" = weakref.WeakKeyDictionary()
_LEFT: "weakref.WeakKeyDictionary[nn.Module, Callable[[], None]]" = weakref.WeakKeyDictionary()


def check_free(model: nn.Module) -> None:
    """Refuse a model that has a live pruner.

    Raises:
        ValueError: If it has.
    """
    owner = _OWNERS.get(model)
    if owner is not None and owner() is not None:
        raise ValueError(
            "This model already has a live pruner. Call its finalize() before building another."
        )


def claim(model: nn.Module, owner: object) -> None:
    """Make a pruner the owner of a model, for as long as it lives."""
    free(model)
    _OWNERS[model] = weakref.ref(owner)


def leave(model: nn.Module, end: Callable[[], None]) -> None:
    """Say how what a pruner does for a model ends, which may go on when the pruner is gone."""
    _LEFT[model] = end


def free(model: nn.Module) -> None:
    """Let another pruner be built on a model; what was left to be done for it ends."""
    _OWNERS.pop(model, None)
    end = _LEFT.pop(model, None)
    if end is not None:
        end()
