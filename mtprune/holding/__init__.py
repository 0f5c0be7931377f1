"""Holding: how decisions take hold of a model, and let go."""

from torch import nn

from mtprune.holding.base import Decision, Hold, MaskHold, Masks, View
from mtprune.holding.inplace import InplaceMasking
from mtprune.holding.low_rank import LowRankHold, LowRanks
from mtprune.holding.masking import Masking
from mtprune.holding.phases import OpenHold, Phased
from mtprune.holding.prune import PruneMasking
from mtprune.holding.regrow import RegrowHold
from mtprune.holding.soft import EDGE, SoftHold, SoftThresholds, Watch
from mtprune.holding.straight_through import StraightThrough

__all__ = [
    "BACKENDS",
    "EDGE",
    "Decision",
    "Hold",
    "LowRankHold",
    "LowRanks",
    "MaskHold",
    "Masking",
    "Masks",
    "OpenHold",
    "Phased",
    "RegrowHold",
    "SoftHold",
    "SoftThresholds",
    "StraightThrough",
    "View",
    "Watch",
    "make_masking",
]

BACKENDS = {"prune": PruneMasking, "inplace": InplaceMasking}


def make_masking(backend: str, model: nn.Module) -> Masking:
    """The back-end of that name.

    Raises:
        ValueError: If there is none.
    """
    if backend not in tuple(BACKENDS):
        raise ValueError(f"`backend` must be one of {tuple(BACKENDS)}. Got {backend!r}.")
    masking: Masking = BACKENDS[backend](model)
    return masking
