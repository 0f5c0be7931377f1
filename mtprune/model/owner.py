"""Owners: a model has one live pruner at most."""

import weakref

from torch import nn

__all__ = ["check_free", "claim", "free"]

_OWNERS: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]]" = weakref.WeakKeyDictionary()


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
    _OWNERS[model] = weakref.ref(owner)


def free(model: nn.Module) -> None:
    """Let another pruner be built on a model."""
    _OWNERS.pop(model, None)
