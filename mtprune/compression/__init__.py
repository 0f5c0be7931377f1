"""Compression: sparse models that run faster, checked, saved and loaded."""

from mtprune.compression.batchnorm import recalibrate_bn
from mtprune.compression.build import compress, plan_of
from mtprune.compression.carry import carry_optimizer
from mtprune.compression.extract import Subnetwork
from mtprune.compression.plan import Cut, Measured, Plan, Removal, Row
from mtprune.compression.sizes import Sizes, measure
from mtprune.compression.storage import load, save

__all__ = [
    "Cut",
    "Measured",
    "Plan",
    "Removal",
    "Row",
    "Sizes",
    "Subnetwork",
    "carry_optimizer",
    "compress",
    "load",
    "measure",
    "plan_of",
    "recalibrate_bn",
    "save",
]
