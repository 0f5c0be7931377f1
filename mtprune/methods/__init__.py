"""Methods: the ways masks come about. Each is a frozen value; the pruner holds all state."""

from mtprune.holding import Decision, Hold, MaskHold, Masking, Masks
from mtprune.methods.base import Ballot, Method, Needs, describe
from mtprune.methods.low_rank import LowRank
from mtprune.methods.sigmoid_threshold import SigmoidThreshold
from mtprune.methods.soft_threshold import SoftThreshold
from mtprune.methods.vote import PerTaskKeep, Vote

__all__ = [
    "Ballot",
    "Decision",
    "Hold",
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
