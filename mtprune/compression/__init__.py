"""Compression: sparse models that run faster, checked, saved and loaded."""

from mtprune.compression.batchnorm import recalibrate_bn
from mtprune.compression.build import compress, plan_of
from mtprune.compression.extract import Subnetwork
from mtprune.compression.plan import Measured, Plan, Row
from mtprune.compression.sizes import Sizes, measure
from mtprune.compression.storage import load, save

__all__ = [
    "Measured",
    "Plan",
    "Row",
    "Sizes",
    "Subnetwork",
    "compress",
    "load",
    "measure",
    "plan_of",
    "recalibrate_bn",
    "save",
]
