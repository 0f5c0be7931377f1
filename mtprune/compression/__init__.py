"""Compression: from a sparse model to one that runs faster, checked, saved and loaded.

`compress` runs the steps in this order: ``extract`` (the part for some tasks), ``shrink`` (dead
units leave, by ``removal``), ``choose`` (every layer takes one of the ``forms``), ``verify`` (the
outputs are the same). A `Plan` records the result, and replays it.
"""

from mtprune.compression.batchnorm import recalibrate_bn
from mtprune.compression.carry import carry_optimizer
from mtprune.compression.compress import compress, plan_of
from mtprune.compression.extract import Subnetwork
from mtprune.compression.measure import Sizes, measure
from mtprune.compression.plan import Cut, Measured, Plan, Removal, Row, Taken
from mtprune.compression.refit import Refitting, refit
from mtprune.compression.storage import load, save
from mtprune.compression.switching import switch_tasks

__all__ = [
    "Cut",
    "Measured",
    "Plan",
    "Refitting",
    "Removal",
    "Row",
    "Sizes",
    "Subnetwork",
    "Taken",
    "carry_optimizer",
    "compress",
    "load",
    "measure",
    "plan_of",
    "recalibrate_bn",
    "refit",
    "save",
    "switch_tasks",
]
