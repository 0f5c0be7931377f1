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
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from mtprune import saliency, votes
from mtprune.allocation import Erk, Floor, PerOutput
from mtprune.granularity import NM, Block, Channel, Element, Expert, Grouped, Head, Neuron
from mtprune.integrations.import_hook import when_imported as _when_imported
from mtprune.methods.vote import PerTaskKeep, Vote
from mtprune.pruner import MultitaskPruner
from mtprune.refitting import Refit
from mtprune.report import Report
from mtprune.schedule import Cubic, Hold, Linear, OneShot, Regrow, Rounds

if _TYPE_CHECKING:
    from mtprune import (
        affinity,
        budget,
        choosing,
        metrics,
        plots,
        recipes,
        sampling,
        testing,
        weighting,
    )
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
    from mtprune.integrations.hub import push_to_hub
    from mtprune.methods import LowRank, SigmoidThreshold, SoftThreshold
    from mtprune.named import METHODS
    from mtprune.notation import method_from
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


_MODULES = (
    "affinity",
    "budget",
    "choosing",
    "metrics",
    "plots",
    "recipes",
    "sampling",
    "testing",
    "weighting",
)
_LATER = {
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
    "integrations.hub": ("push_to_hub",),
    "methods": ("LowRank", "SigmoidThreshold", "SoftThreshold"),
    "named": ("METHODS",),
    "notation": ("method_from",),
    "studying": ("Study", "study"),
    "sweeping": ("sweep",),
}


def __getattr__(name: str) -> _Any:
    """What most runs do not need is imported when somebody asks for it."""
    if name in _MODULES:
        return _import_module(f"mtprune.{name}")
    for module, names in _LATER.items():
        if name in names:
            return getattr(_import_module(f"mtprune.{module}"), name)
    if name == "__version__":
        return _import_module("importlib.metadata").version("mtprune")
    raise AttributeError(f"module 'mtprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    """The API, without the modules behind it."""
    return [*__all__, "__version__"]


# So that from_pretrained knows compressed models.
_when_imported(
    "transformers.quantizers.auto", lambda: _import_module("mtprune.integrations.pretrained")
)
