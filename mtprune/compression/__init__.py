"""Compression: sparse models that run faster, checked, saved and loaded."""

from mtprune.compression.batchnorm import recalibrate_bn
from mtprune.compression.build import compress, plan_of
from mtprune.compression.plan import Measured, Plan, Row
from mtprune.compression.storage import load, save

__all__ = ["Measured", "Plan", "Row", "compress", "load", "plan_of", "recalibrate_bn", "save"]
