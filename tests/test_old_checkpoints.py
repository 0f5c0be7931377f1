"""Checkpoints of version 1 load, and the run goes on as it went on in mtprune 0.1.0.

``fixtures/write_checkpoint_v1.py`` wrote them: for each case the state of model, optimizer and
pruner in the middle of a run, the batches, and what mtprune 0.1.0 then did. Weights and batches
are small dyadic numbers, and the losses are linear in the outputs, so that float32 loses nothing
and weights are the same to the last bit on every machine. Where a method takes a logarithm, a norm
or a singular vector weights are compared with a tolerance, and masks all the same to the bit.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtprune import (
    NM,
    Block,
    Cubic,
    Grouped,
    Hold,
    Linear,
    LowRank,
    MultitaskPruner,
    OneShot,
    Regrow,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    saliency,
)
from mtprune.structure import Group, Member
from mtprune.weighting import Noise

PATH = Path(__file__).parent / "fixtures" / "checkpoint_v1.pt"
TASKS = ("a", "b")
SHARED = ["right"]
BACKENDS = ("prune", "inplace")
ORDERS = list(itertools.permutations(("model", "optimizer", "pruner")))
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Net(nn.Module):
    """Task a reads both layers, task b only the right one, and nobody the spare; all is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 4, bias=False)
        self.right = nn.Linear(8, 4)
        self.a = nn.Linear(4, 2)
        self.b = nn.Linear(4, 2, bias=False)
        self.spare = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        right = self.right(x)
        return {"a": self.a(self.left(x) + right), "b": self.b(right)}


def product(task: str) -> Callable[[Any, Any], Tensor]:
    """Linear in the outputs, and far from 0."""
    return lambda outputs, batch: (outputs[task] * batch[task]).sum() + 64


def units() -> Grouped:
    """A unit is a row of both layers and the columns that read it."""
    rows = tuple(range(4))
    made = [Member(name, 0, rows) for name in ("left.weight", "right.weight", "right.bias")]
    read = [Member(name, 1, rows, "in") for name in ("a.weight", "b.weight")]
    return Grouped([Group("features", 4, (*made, *read))])


@dataclass(frozen=True)
class Case:
    """A run, and when its checkpoint was taken.

    Attributes:
        method: The method.
        at: How many steps of the run the checkpoint holds.
        steps: How many came after it.
        alike: How many of these go on as they did, where a mistake has been mended since; None for
            all.
        exact: Whether weights are the same to the last bit on every machine.
        lr: The learning rate.
        momentum: The momentum.
        weigh: Whether the loss is what `weigh` makes of those of the tasks.
        singly: Whether every batch is for one task.
        finalized: Whether the pruner was finalized before it was saved.
        backends: Where it ran.
        options: Of the pruner.
    """

    method: Any
    at: int
    steps: int
    alike: int | None = None
    exact: bool = True
    lr: float = 0.5
    momentum: float = 0.0
    weigh: bool = False
    singly: bool = False
    finalized: bool = False
    backends: tuple[str, ...] = BACKENDS
    options: dict[str, Any] = field(default_factory=dict)


RISE = Cubic(begin=1, end=7, every=2)
SLOW = Linear(begin=0, end=7, every=1)

CASES = {
    "vote before any mask": Case(
        Vote(0.5, schedule=RISE, observations=2), 1, 4, backends=("prune",)
    ),
    "vote, evidence of one observation": Case(
        Vote(0.5, schedule=RISE, observations=2), 5, 4, momentum=0.5
    ),
    "vote, a task in every batch": Case(
        Vote(0.75, schedule=OneShot(4), observations=2), 2, 5, singly=True, backends=("inplace",)
    ),
    "vote, one sweep for the sum": Case(
        Vote(0.5, schedule=RISE, observations=2, disentangled=False), 5, 4, backends=("prune",)
    ),
    "vote, scores in bfloat16": Case(
        Vote(0.5, schedule=RISE, observations=2),
        5,
        4,
        backends=("prune",),
        options={"score_dtype": torch.bfloat16},
    ),
    "vote until masks are stable": Case(
        Vote(0.125, schedule=OneShot(3), observations="auto"), 9, 6, lr=0.0, backends=("inplace",)
    ),
    "vote, finalized": Case(Vote(0.5, schedule=RISE), 9, 3, finalized=True, backends=("inplace",)),
    "regrow": Case(
        Vote(
            0.5,
            saliency=saliency.gradient,
            allocation="erk",
            schedule=Regrow(every=2, end=9, fraction=0.5),
            observations=2,
        ),
        3,
        5,
        momentum=0.5,
    ),
    "regrow at random": Case(
        Vote(0.5, saliency=saliency.random, allocation="uniform", schedule=Regrow(2, 9)),
        3,
        5,
        backends=("inplace",),
    ),
    "straight through": Case(
        Vote(
            0.5,
            saliency=saliency.movement,
            schedule=Hold(Cubic(1, 5, 2), until=9, every=2),
            straight_through=True,
        ),
        4,
        6,
    ),
    "patterns": Case(
        Vote(granularity=NM(2, 4), schedule=RISE, observations=2), 5, 4, backends=("prune",)
    ),
    "blocks": Case(
        Vote(0.5, granularity=Block(2, 2), schedule=RISE, observations=2),
        5,
        4,
        backends=("inplace",),
    ),
    "units": Case(
        Vote(0.5, granularity=units(), schedule=Linear(1, 7, 2), observations=2),
        5,
        4,
        backends=("prune",),
    ),
    "soft thresholds, rising": Case(SoftThreshold(0.5, schedule=SLOW, scale="none"), 3, 6),
    "soft thresholds, fixed": Case(
        SoftThreshold(0.5, schedule=Linear(0, 3, 1), scale="none"), 5, 3, backends=("prune",)
    ),
    "soft thresholds, learned": Case(
        SoftThreshold(
            0.5,
            schedule=Linear(0, 12, 3),
            observations=2,
            allocation="learned",
            rate=0.1,
            weighting="pruning_sensitivity",
            debias=True,
        ),
        8,
        5,
        alike=1,  # up to an update whose sensitivities left out what debias gives back
        exact=False,
        lr=0.125,
        weigh=True,
        backends=("prune",),
    ),
    "soft thresholds, controlled": Case(
        SoftThreshold(
            0.5,
            schedule=SLOW,
            per="layer",
            grad_mode="anneal",
            control="pi",
            weighting=Noise(begin=1, window=2),
        ),
        4,
        6,
        exact=False,
        lr=0.125,
        weigh=True,
        backends=("inplace",),
    ),
    "sigmoid thresholds": Case(
        SigmoidThreshold(0.5, end=8, init=-3.0, lr=0.25, weighting="uniform"),
        4,
        6,
        exact=False,
        lr=0.125,
        backends=("prune",),
    ),
    "ranks, after an update": Case(
        LowRank(0.5, schedule=RISE, observations=2),
        5,
        4,
        exact=False,
        lr=0.125,
        backends=("inplace",),
    ),
    "ranks, final": Case(
        LowRank(0.5, schedule=RISE), 8, 3, exact=False, lr=0.125, backends=("inplace",)
    ),
    "ranks, learned gates": Case(
        LowRank(0.5, "learned", schedule=Linear(0, 7, 1)),
        4,
        5,
        exact=False,
        lr=0.125,
        backends=("inplace",),
    ),
}


class Run:
    """A case in training."""

    def __init__(self, case: Case, backend: str, batches: dict[str, Tensor]) -> None:
        self.case, self.batches, self.at = case, batches, 0
        self.model = Net().to(batches["x"].dtype)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=case.lr, momentum=case.momentum
        )
        self.pruner = MultitaskPruner(
            self.model,
            {task: product(task) for task in TASKS},
            SHARED,
            method=case.method,
            optimizer=self.optimizer,
            backend=backend,
            **case.options,
        )

    def step(self) -> bool:
        """One step of training; whether masks changed."""
        self.optimizer.zero_grad()
        batch = {name: of_all[self.at] for name, of_all in self.batches.items()}
        outputs = self.model(batch["x"])
        tasks = [TASKS[self.at % 2]] if self.case.singly else None
        losses = self.pruner.observe(outputs, batch, tasks=tasks)
        if self.case.weigh:
            self.pruner.weigh(losses).backward()
        else:
            torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        self.at += 1
        return self.pruner.step()

    def state(self) -> dict[str, Any]:
        """The checkpoint."""
        parts = {part: getattr(self, part).state_dict() for part in ORDERS[0]}
        return {**parts, "at": self.at}

    def load(self, state: dict[str, Any], order: tuple[str, ...] = ORDERS[0]) -> None:
        """Go on from a checkpoint."""
        for part in order:
            getattr(self, part).load_state_dict(state[part])
        self.at = state["at"]

    def weights(self) -> Tensor:
        """All parameters as the optimizer has them, in order of their plain names, ``[n]``."""
        named = {n.removesuffix("_orig"): p.detach() for n, p in self.model.named_parameters()}
        return torch.cat([named[name].reshape(-1) for name in sorted(named)])

    def told(self) -> dict[str, Any]:
        """What there is to read of the pruner."""
        return {
            "masks": as_text(self.pruner.masks),
            "sparsity": self.pruner.sparsity,
            "report": self.pruner.report().to_dict(),
        }


def as_text(masks: dict[str, Tensor]) -> dict[str, str]:
    """A digit for each weight: 1 = keep."""
    return {n: "".join(str(int(keep)) for keep in mask.flatten()) for n, mask in masks.items()}


def owned(value: Any) -> Any:
    """The same containers, with tensors of their own: the file holds equal ones once."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: owned(inner) for key, inner in value.items()}
    return [owned(inner) for inner in value] if isinstance(value, list) else value


def assert_says(now: Any, then: Any, exact: bool, at: str = "") -> None:
    """All that was said then is said now; more may be."""
    if isinstance(then, dict):
        assert set(then) <= set(now), at
        for key, value in then.items():
            assert_says(now[key], value, exact, f"{at}/{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), at
        for i, value in enumerate(then):
            assert_says(now[i], value, exact, f"{at}[{i}]")
    elif isinstance(then, float) and not exact:
        assert now == pytest.approx(then, rel=1e-4, abs=1e-6), at
    else:
        assert now == then, at


def assert_weighs(now: Tensor, then: Tensor, exact: bool) -> None:
    torch.testing.assert_close(now, then, **({"rtol": 0, "atol": 0} if exact else TOLERANCE))


@pytest.fixture(scope="module")
def fixture() -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(PATH, weights_only=True)
    return loaded


RUNS = [
    pytest.param(name, backend, id=f"{name.replace(', ', '-').replace(' ', '_')}-{backend}")
    for name, case in CASES.items()
    for backend in case.backends
]


@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[-1]], ids="_".join)
@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_a_run_goes_on_as_it_did(fixture, name, backend, order):
    case, saved = CASES[name], owned(fixture["cases"][name][backend])
    assert saved["pruner"]["version"] == 1
    run = Run(case, backend, fixture["batches"])
    run.load(saved, order)
    then = saved["then"]
    for report in (then["start"]["report"], then["report"]):
        if "granularity=NM(" in report["method"]:  # it fixes the sparsity, which was written out
            report["method"] = report["method"].replace("sparsity=0.5, ", "")
    assert_says(run.told(), then["start"], exact=True)
    told = list(zip(then["changed"], then["masks"], then["sparsity"], strict=True))
    for changed, masks, sparsity in told[: case.alike]:
        assert run.step() == changed
        assert as_text(run.pruner.masks) == masks
        assert run.pruner.sparsity == sparsity
    if case.alike is not None:
        for _, _, sparsity in told[case.alike :]:
            run.step()
            assert run.pruner.sparsity == pytest.approx(sparsity, abs=0.1)
        return
    assert_weighs(run.weights(), then["weights"], case.exact)
    assert_says(run.pruner.report().to_dict(), then["report"], case.exact)
    if then["task_masks"] is None:
        with pytest.raises(RuntimeError, match="Checkpoints do not hold task masks"):
            _ = run.pruner.task_masks
    else:
        assert {t: as_text(m) for t, m in run.pruner.task_masks.items()} == then["task_masks"]
    run.pruner.finalize()
    assert list(run.model.state_dict()) == then["names"]
    assert_weighs(run.weights(), then["final"], case.exact)
    assert as_text(run.pruner.masks) == then["masks"][-1]


@pytest.mark.parametrize("order", ORDERS, ids="_".join)
@pytest.mark.parametrize(("source", "target"), [BACKENDS, BACKENDS[::-1]], ids="_to_".join)
def test_it_moves_to_the_other_backend(fixture, source, target, order):
    name = "vote, evidence of one observation"
    saved = owned(fixture["cases"][name][source])
    run = Run(CASES[name], target, fixture["batches"])
    run.load(saved, order)
    for masks in saved["then"]["masks"]:
        run.step()
        assert as_text(run.pruner.masks) == masks
    run.pruner.finalize()
    assert_weighs(run.weights(), saved["then"]["final"], exact=True)


def test_the_fixture_holds_every_kind_of_state(fixture):
    """Each kind of state that version 1 knows is in one of the checkpoints, and not empty."""
    runs = [run for saved in fixture["cases"].values() for run in saved.values()]
    assert {name: tuple(saved) for name, saved in fixture["cases"].items()} == {
        name: case.backends for name, case in CASES.items()
    }
    states = [run["pruner"] for run in runs]
    assert {state["users"] is None for state in states} == {True, False}
    for key in ("masks", "soft", "loose", "weigher", "memory", "singly"):
        assert {bool(state[key]) for state in states} == {True, False}, key
    for key, inner in (
        ("evidence", {"scores", "counts", "reached", "walked", "finite", "losses"}),
        ("kept", {"scores"}),
        ("stability", {"snapshots"}),
        ("ranks", {"vectors", "gates", "ranks", "spans"}),
        ("soft", {"thresholds", "gains", "leak"}),
    ):
        assert {k for state in states for k, v in state[key].items() if not_empty(v)} >= inner, key
    assert any(state["soft"]["seen"].any() for state in states if state["soft"])
    assert any(run["optimizer"]["state"] for run in runs)
    assert len({bytes(state["generator"].tolist()) for state in states}) > 1
    seen = [state["evidence"]["scores"] for state in states]
    assert any(set(scores) == {"(all tasks)"} for scores in seen)
    assert {t.dtype for s in seen for by_name in s.values() for t in by_name.values()} == {
        torch.float32,
        torch.bfloat16,
    }


def not_empty(value: Any) -> bool:
    return bool(value.numel() if isinstance(value, Tensor) else value)
