"""Settings: numbers that a block reads from a configuration which all blocks share."""

from typing import Any

from torch import nn

from mtprune.compression.entries import thing_at

__all__ = ["OwnSettings", "can_own", "own"]


class OwnSettings:
    """A configuration as one block sees it: some numbers are its own, the rest is what all share.

    What is set on it becomes its own. What is not is read from the shared one at every look, so
    that what is changed there later, the kind of attention for instance, holds for the block too.

    Args:
        shared: The configuration.

    Example:
        >>> from types import SimpleNamespace
        >>> shared = SimpleNamespace(heads=4, kind="eager")
        >>> mine = OwnSettings(shared)
        >>> mine.heads, shared.kind = 2, "sdpa"
        >>> mine.heads, mine.kind, shared.heads
        (2, 'sdpa', 4)
    """

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def __getattr__(self, name: str) -> Any:
        """What the shared configuration has under a name."""
        # While it is copied it has nothing yet, and special methods are those of its own class.
        if name == "shared" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.shared, name)


def own(model: nn.Module, path: str) -> Any:
    """What holds a number that is about to change: a module, or a module's own settings.

    Args:
        model: The model.
        path: The path of a module, or of a configuration that a module keeps; this becomes the
            module's own, if it is not yet.
    """
    holder = thing_at(model, path) if path else model
    if isinstance(holder, (nn.Module, OwnSettings)):
        return holder
    owner, _, name = path.rpartition(".")
    settings = OwnSettings(holder)
    setattr(model.get_submodule(owner), name, settings)
    return settings


def can_own(model: nn.Module, path: str) -> bool:
    """Whether `own` finds something that may hold numbers of units."""
    holder = thing_at(model, path) if path else model
    owner, _, name = path.rpartition(".")
    module = thing_at(model, owner) if owner else model
    is_kept = isinstance(module, nn.Module) and name in vars(module) and not name.startswith("_")
    return isinstance(holder, nn.Module) or (is_kept and hasattr(holder, "__dict__"))
