"""Methods: the ways masks come about. Each is a frozen value; the pruner holds all state."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtprune.holding import Decision, MaskHold, Masking, Masks
from mtprune.methods.base import Ballot, Method, Needs, describe
from mtprune.methods.vote import PerTaskKeep, Vote

if TYPE_CHECKING:
    from mtprune.methods.low_rank import LowRank
    from mtprune.methods.sigmoid_threshold import SigmoidThreshold
    from mtprune.methods.soft_threshold import SoftThreshold

__all__ = [
    "Ballot",
    "Decision",
    "LowRank",
    "MaskHold",
    "Masking",
    "Masks",
    "Method",
    "Needs",
    "PerTaskKeep",
    "SigmoidThreshold",
    "SoftThreshold",
    "Vote",
    "describe",
]

_OTHERS = {
    "LowRank": "low_rank",
    "SigmoidThreshold": "sigmoid_threshold",
    "SoftThreshold": "soft_threshold",
}


def __getattr__(name: str) -> Any:
    """A method is imported when somebody asks for it: most runs need one."""
    if name in _OTHERS:
        return getattr(import_module(f"mtprune.methods.{_OTHERS[name]}"), name)
    raise AttributeError(f"module 'mtprune.methods' has no attribute '{name}'")
