"""Pruning for multitask PyTorch networks: every task votes, no task is left behind.

>>> import torch, mtprune
>>> model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(8, 8), "left": torch.nn.Linear(8, 1),
...                              "right": torch.nn.Linear(8, 1)})
>>> def forward(model, x):
...     hidden = model["trunk"](x).relu()
...     return {"left": model["left"](hidden), "right": model["right"](hidden)}
>>> pruner = mtprune.MultitaskPruner(
...     model,
...     task_losses={"left": lambda out, x: (out["left"] - 1).square().mean(),
...                  "right": lambda out, x: out["right"].abs().mean()},
...     shared_modules=[model["trunk"]],
...     method=mtprune.Vote(sparsity=0.75),
... )
>>> report = pruner.prune([torch.randn(32, 8)], forward=forward, progress=False)
>>> report.kept, report.sparsity
(20, 0.75)
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from mtprune.integrations.import_hook import when_imported as _when_imported

if _TYPE_CHECKING:
    from mtprune import (
        affinity,
        budget,
        choosing,
        latency,
        metrics,
        plots,
        recipes,
        saliency,
        sampling,
        testing,
        votes,
        weighting,
    )
    from mtprune.allocation import Erk, Floor, PerOutput
    from mtprune.cards import Card
    from mtprune.choosing import Choice, choose
    from mtprune.compression import (
        Plan,
        Sizes,
        carry_optimizer,
        compress,
        load,
        measure,
        plan_of,
        recalibrate_bn,
        refit,
        save,
        switch_tasks,
    )
    from mtprune.curves import Sweep
    from mtprune.explaining import explained, priorities
    from mtprune.granularity import NM, Block, Channel, Element, Expert, Grouped, Head, Neuron
    from mtprune.integrations.hub import push_to_hub
    from mtprune.methods import LowRank, SigmoidThreshold, SoftThreshold
    from mtprune.methods.vote import PerTaskKeep, Vote
    from mtprune.named import METHODS
    from mtprune.notation import method_from
    from mtprune.pruner import MultitaskPruner
    from mtprune.refitting import Refit
    from mtprune.report import Report
    from mtprune.schedule import Cubic, Hold, Linear, OneShot, Regrow, Rounds
    from mtprune.studying import Study, study
    from mtprune.sweeping import sweep

__all__ = [
    "METHODS",
    "NM",
    "Block",
    "Card",
    "Channel",
    "Choice",
    "Cubic",
    "Element",
    "Erk",
    "Expert",
    "Floor",
    "Grouped",
    "Head",
    "Hold",
    "Linear",
    "LowRank",
    "MultitaskPruner",
    "Neuron",
    "OneShot",
    "PerOutput",
    "PerTaskKeep",
    "Plan",
    "Refit",
    "Regrow",
    "Report",
    "Rounds",
    "SigmoidThreshold",
    "Sizes",
    "SoftThreshold",
    "Study",
    "Sweep",
    "Vote",
    "affinity",
    "budget",
    "carry_optimizer",
    "choose",
    "choosing",
    "compress",
    "explained",
    "latency",
    "load",
    "measure",
    "method_from",
    "metrics",
    "plan_of",
    "plots",
    "priorities",
    "push_to_hub",
    "recalibrate_bn",
    "recipes",
    "refit",
    "saliency",
    "sampling",
    "save",
    "study",
    "sweep",
    "switch_tasks",
    "testing",
    "votes",
    "weighting",
]


_NAMES = {
    "allocation": ("Erk", "Floor", "PerOutput"),
    "cards": ("Card",),
    "choosing": ("Choice", "choose"),
    "compression": (
        "Plan",
        "Sizes",
        "carry_optimizer",
        "compress",
        "load",
        "measure",
        "plan_of",
        "recalibrate_bn",
        "refit",
        "save",
        "switch_tasks",
    ),
    "curves": ("Sweep",),
    "explaining": ("explained", "priorities"),
    "granularity": ("NM", "Block", "Channel", "Element", "Expert", "Grouped", "Head", "Neuron"),
    "integrations.hub": ("push_to_hub",),
    "methods": ("LowRank", "SigmoidThreshold", "SoftThreshold"),
    "methods.vote": ("PerTaskKeep", "Vote"),
    "named": ("METHODS",),
    "notation": ("method_from",),
    "pruner": ("MultitaskPruner",),
    "refitting": ("Refit",),
    "report": ("Report",),
    "schedule": ("Cubic", "Hold", "Linear", "OneShot", "Regrow", "Rounds"),
    "studying": ("Study", "study"),
    "sweeping": ("sweep",),
}


def __getattr__(name: str) -> _Any:
    """What is here is imported when somebody asks for it: no program needs all of it."""
    for module, names in _NAMES.items():
        if name in names:
            return getattr(_import_module(f"mtprune.{module}"), name)
    if name == "__version__":
        return _import_module("importlib.metadata").version("mtprune")
    if not name.startswith("_") and _find_spec(f"mtprune.{name}") is not None:
        return _import_module(f"mtprune.{name}")
    raise AttributeError(f"module 'mtprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The API, without the modules behind it."""
    return [*__all__, "__version__"]


# So that from_pretrained knows compressed models.
_when_imported(
    "transformers.quantizers.auto", lambda: _import_module("mtprune.integrations.pretrained")
)
