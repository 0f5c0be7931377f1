"""What becomes of a pruner that is given a tampered checkpoint: refused, or sound afterwards."""

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from mtprune import (
    NM,
    Block,
    Cubic,
    Linear,
    LowRank,
    OneShot,
    Refit,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    recipes,
    saliency,
)
from mtprune.weighting import Noise
from tests import checkpoints, nets
from tests.tampering import alike, tampered

RISE = Cubic(begin=2, end=8, every=2)

# The method of a run, and the step at which its checkpoint is taken: between updates, with some
# evidence seen where observations span steps.
KINDS: dict[str, tuple[Any, int]] = {
    "before anything": (Vote(0.7, schedule=OneShot(3)), 0),
    "gradual": (Vote(0.7, schedule=RISE, observations=2), 5),
    "dynamic": (nets.dynamic(), 5),
    "automatic": (Vote(0.7, schedule=OneShot(7), observations="auto"), 5),
    "movement": (recipes.movement(0.7, 10), 5),
    "learned thresholds": (
        SoftThreshold(
            0.7,
            schedule=Linear(0, 9, 2),
            observations=2,
            allocation="learned",
            weighting="pruning_sensitivity",
            debias=True,
        ),
        5,
    ),
    "steered thresholds": (
        SoftThreshold(0.7, schedule=Linear(0, 9, 1), control="pi", weighting=Noise(1, 2)),
        5,
    ),
    "sigmoid thresholds": (SigmoidThreshold(0.5, end=9, init=-3.0, lr=0.2), 5),
    "ranks": (LowRank(0.5, schedule=RISE), 5),
    "learned ranks": (LowRank(0.5, gates="learned", schedule=Linear(0, 9, 1)), 5),
    "finished": (Vote(0.7, schedule=OneShot(1)), 5),
    "with a voter": (
        Vote(0.7, schedule=RISE, voters=(saliency.magnitude,), priority={"a": 2.0}),
        5,
    ),
    "blocks": (Vote(0.5, schedule=RISE, granularity=Block(2, 2)), 5),
    "patterns": (Vote(schedule=RISE, granularity=NM(1, 2)), 5),
    "per component": (Vote(0.5, schedule=RISE, allocation={"shared": 0.5}), 5),
    "one sweep": (Vote(0.7, schedule=RISE, observations=3, disentangled=False), 5),
    "refitted": (Vote(0.7, schedule=RISE, refit=Refit(samples=16)), 5),
    "thresholds per component": (
        SoftThreshold(0.5, schedule=Linear(0, 9, 2), budget_unit={"shared": 0.5}),
        5,
    ),
    "fixed thresholds": (SoftThreshold(0.7, schedule=Linear(0, 4, 1), per="layer"), 6),
    "fixed ranks": (LowRank(0.5, gates="learned", schedule=Linear(0, 4, 1)), 6),
}


def start(kind: str, backend: str = "prune", seed: int = 0) -> nets.Run:
    """The run of a kind, before its first step."""
    device = torch.device("cpu")
    return nets.Run(nets.build("plain", device, seed=seed), KINDS[kind][0], backend)


def checkpoint(kind: str, backend: str = "prune") -> dict[str, Any]:
    """The pruner's state in the midst of a run of a kind."""
    run = start(kind, backend)
    run.train(KINDS[kind][1])
    state: dict[str, Any] = copy.deepcopy(run.pruner.state_dict())
    return state


def everything(run: nets.Run) -> dict[str, Any]:
    """All that must stay as it is when a checkpoint is refused."""
    parts = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "pruner": run.pruner.state_dict(),
        "random": torch.get_rng_state(),
        "names": [name for name, _ in run.model.named_parameters()],
        "objects": [id(parameter) for parameter in run.model.parameters()],
        "hooks": [
            (len(module._forward_pre_hooks), len(module._forward_hooks))
            for module in run.model.modules()
        ],
    }
    return copy.deepcopy(parts)


def outcome(
    kind: str, state: Mapping[str, Any], seed: int, *, sealed: bool, backend: str = "prune"
) -> tuple[str, str]:
    """What came of a tampered checkpoint, and what exactly.

    Args:
        kind: Of the run.
        state: Its checkpoint, whole.
        seed: Of the tampering.
        sealed: Whether the fingerprint is made anew, as somebody would who means harm.
        backend: Of the run.

    Returns:
        ``"refused"``, ``"sound"`` (it was taken, and the run goes on as it should), ``"accepted"``
        (damage was not seen), ``"changed"`` (refused, and something had changed), ``"raw"`` (an
        error of somebody else's) or ``"unsound"`` (it was taken, and then the run broke).
    """
    bad, what = tampered(copy.deepcopy(dict(state)), seed)
    if sealed and isinstance(bad, dict):
        try:
            bad = checkpoints.resealed(bad)
        except (RuntimeError, RecursionError, NotImplementedError):  # of what has no fingerprint
            sealed = False
    run = start(kind, backend, seed=1).train(KINDS[kind][1])
    before = everything(run)
    try:
        run.pruner.load_state_dict(bad)
    except ValueError as error:
        if "heckpoint" not in str(error) and "state_dict of a MultitaskPruner" not in str(error):
            return "raw", f"{what}: {error!r}"
        if not alike(everything(run), before):
            return "changed", f"{what}: {error!r}"
        return "refused", what
    except Exception as error:
        return "raw", f"{what}: {type(error).__name__}: {error}"
    if not sealed:
        return "accepted", what
    return _goes_on(run, what)


def _goes_on(run: nets.Run, what: str) -> tuple[str, str]:
    """Whether a run that took a checkpoint ends as it says, or stops with a word of ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # evidence may have become another
            run.pruner.report()
            run.train(12)
            run.pruner.finalize()
    except RuntimeError as error:
        ours = ("finite", "is due but", "no update to learn from", "is used by", "all zero")
        if any(word in str(error) for word in ours):
            return "sound", f"{what}: {error}"
        return "unsound", f"{what}: {error!r}"
    except Exception as error:
        return "unsound", f"{what}: {type(error).__name__}: {error}"
    masks = run.pruner.masks
    weights = dict(run.model.named_parameters())
    spilt = [name for name, mask in masks.items() if bool((weights[name][~mask] != 0).any())]
    return (
        ("unsound", f"{what}: {spilt} hold weights that are masked") if spilt else ("sound", what)
    )
