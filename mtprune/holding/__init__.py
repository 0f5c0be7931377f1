"""Holding: how decisions take hold of a model, and let go."""

from torch import nn

from mtprune import checks
from mtprune.holding.base import Decision, Hold, MaskHold, Masks, View
from mtprune.holding.inplace import InplaceMasking
from mtprune.holding.masking import Masking
from mtprune.holding.phases import OpenHold, Phased
from mtprune.holding.prune import PruneMasking

__all__ = [
    "BACKENDS",
    "Decision",
    "Hold",
    "MaskHold",
    "Masking",
    "Masks",
    "OpenHold",
    "Phased",
    "View",
    "make_masking",
]

BACKENDS = {"prune": PruneMasking, "inplace": InplaceMasking}
"""The back-ends by name."""


def make_masking(backend: str, model: nn.Module) -> Masking:
    """The back-end of that name.

    Raises:
        ValueError: If there is none.
    """
    checks.one_of("backend", backend, tuple(BACKENDS))
    masking: Masking = BACKENDS[backend](model)
    return masking
