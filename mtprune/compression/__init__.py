"""Compression: sparse models that run faster, checked, saved and loaded."""

from mtprune.compression.batchnorm import recalibrate_bn
from mtprune.compression.build import compress, plan_of
from mtprune.compression.carry import carry_optimizer
from mtprune.compression.plan import Cut, Measured, Plan, Removal, Row
from mtprune.compression.storage import load, save

__all__ = [
    "Cut",
    "Measured",
    "Plan",
    "Removal",
    "Row",
    "carry_optimizer",
    "compress",
    "load",
    "plan_of",
    "recalibrate_bn",
    "save",
]
