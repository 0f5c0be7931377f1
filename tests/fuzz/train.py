"""Training: random nets, methods and loops, and what must be true of every run."""

import copy
import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mtprune import (
    NM,
    Block,
    Cubic,
    Linear,
    LowRank,
    MultitaskPruner,
    OneShot,
    PerTaskKeep,
    Regrow,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    recipes,
    saliency,
    votes,
)
from tests.fuzz.engine import Case, Outcome
from tests.fuzz.random_nets import RandomNet, draw_net, inputs, simpler_nets
from tests.tampering import alike

STEPS = 9

SCHEDULES = {
    "once": lambda: OneShot(3),
    "first": lambda: OneShot(0),
    "cubic": lambda: Cubic(begin=1, end=7, every=2),
    "linear": lambda: Linear(begin=0, end=6, every=3),
    "regrow": lambda: Regrow(every=2, end=8),
}
SALIENCIES = {
    "taylor": saliency.taylor,
    "sized": saliency.taylor_magnitude,
    "magnitude": saliency.magnitude,
    "fisher": saliency.fisher,
    "gradient": saliency.gradient,
    "movement": saliency.movement,
    "random": saliency.random,
}
VOTES = {
    "unanimous": votes.unanimous,
    "majority": votes.majority,
    "two": votes.at_least(2),
    "mean": votes.mean,
    "intersection": votes.intersection,
}
UNITS = {"block": lambda: Block(2, 2), "pattern": lambda: NM(2, 4)}


class Train:
    """Runs of a few steps."""

    def draw(self, dice: random.Random) -> Case:
        """A net, a method and a loop."""
        kind = dice.choice(
            ("vote", "vote", "vote", "vote", "soft", "sigmoid", "rank", "gates", "movement", "best")
        )
        case: Case = {
            "net": draw_net(dice),
            "kind": kind,
            "sparsity": dice.choice((0.0, 0.3, 0.5, 0.7, 0.9, 0.97)),
            "backend": dice.choice(("prune", "inplace")),
            "optimizer": dice.choice(("sgd", "adam", "none")),
            "shared": dice.choice(("auto", "auto", "glob", "module", "wrong")),
            "batches": dice.choice(("all", "all", "single", "missing")),
            "saved": dice.choice((None, 0, 2, 4, 6)),
            "bf16": dice.random() < 0.1,
            "accumulate": dice.choice((1, 1, 2)),
            "seed": dice.randint(0, 99),
        }
        if kind == "vote":
            case |= {
                "schedule": dice.choice(list(SCHEDULES)),
                "saliency": dice.choice(list(SALIENCIES)),
                "vote": dice.choice(list(VOTES)),
                "allocation": dice.choice(("floor", "global", "uniform", "erk")),
                "observations": dice.choice((1, 1, 2, "auto")),
                "apart": dice.random() < 0.8,
                "voters": dice.random() < 0.2,
                "units": dice.choice((None, None, None, *UNITS)),
                "keep": dice.random() < 0.1,
                "min_keep": dice.choice((0, 1, 1, 3)),
            }
        elif kind == "soft":
            case |= {
                "allocation": dice.choice(("uniform", "learned")),
                "per": dice.choice(("component", "layer")),
                "control": dice.choice(("exact", "pi")),
                "grad_mode": dice.choice(("str", "ste", "anneal")),
                "debias": dice.random() < 0.5,
                "weighting": dice.choice(("uniform", "noise", "pruning_sensitivity")),
            }
        return case

    def run(self, case: Case) -> Outcome:
        """Train, stop and go on, bake in; look at all that must hold."""
        run = Run(case)
        run.train(STEPS)
        problems = run.problems()
        if problems:
            return Outcome("wrong", problems)
        if case["saved"] is not None:
            problems = resumed(case, run)
        other = "inplace" if case["backend"] == "prune" else "prune"
        twin = Run({**case, "backend": other}).train(STEPS)
        if not problems and not near(run, twin, case):
            problems = "the back-ends have other masks"
        return Outcome("wrong", problems) if problems else run.finish()

    def simpler(self, case: Case) -> Iterable[Case]:
        """Smaller nets first, then options as they are by default."""
        for net in simpler_nets(case["net"]):
            yield {**case, "net": net}
        plain = {
            "saved": None,
            "bf16": False,
            "accumulate": 1,
            "batches": "all",
            "shared": "auto",
            "optimizer": "sgd",
            "backend": "prune",
            "schedule": "once",
            "saliency": "taylor",
            "vote": "unanimous",
            "allocation": "uniform" if case["kind"] == "soft" else "floor",
            "observations": 1,
            "apart": True,
            "voters": False,
            "units": None,
            "keep": False,
            "min_keep": 1,
            "control": "exact",
            "per": "component",
            "grad_mode": "ste",
            "debias": False,
            "weighting": "uniform",
        }
        for name, value in plain.items():
            if name in case and case[name] != value:
                yield {**case, name: value}


def method_of(case: Mapping[str, Any]) -> Any:
    """The method of a case."""
    sparsity, kind = case["sparsity"], case["kind"]
    if kind == "vote":
        amount: Any = PerTaskKeep(max(1 - sparsity, 0.01)) if case["keep"] else sparsity
        if case["units"] == "pattern":
            amount = None
        units = {"granularity": UNITS[case["units"]]()} if case["units"] else {}
        return Vote(
            amount,
            saliency=SALIENCIES[case["saliency"]],
            vote=VOTES[case["vote"]],
            schedule=SCHEDULES[case["schedule"]](),
            allocation=case["allocation"],
            observations=case["observations"],
            disentangled=case["apart"],
            voters=(saliency.magnitude,) if case["voters"] else (),
            min_keep=case["min_keep"],
            **units,
        )
    if kind == "soft":
        names = ("allocation", "per", "control", "grad_mode", "debias", "weighting")
        fields = {name: case[name] for name in names}
        return SoftThreshold(sparsity, schedule=Cubic(begin=1, end=7, every=2), **fields)
    if kind == "sigmoid":
        return SigmoidThreshold(sparsity, end=8, init=-3.0, lr=0.1)
    if kind == "rank":
        return LowRank(sparsity, schedule=Cubic(begin=1, end=7, every=2))
    if kind == "gates":
        return LowRank(sparsity, gates="learned", schedule=Linear(begin=0, end=7, every=1))
    if kind == "movement":
        return recipes.movement(sparsity, STEPS)
    return recipes.best(sparsity, STEPS)


class Run:
    """A net in training, as a case has it."""

    def __init__(self, case: Mapping[str, Any], seed: int = 0) -> None:
        self.case = case
        self.model = RandomNet(case["net"], seed)
        self.objects = [id(parameter) for parameter in self.model.parameters()]
        self.names = list(self.model.state_dict())
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW, "none": torch.optim.SGD}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make[case["optimizer"]](trained, lr=0.01)
        shared = {
            "auto": "auto",
            "glob": "pieces*",
            "module": [self.model.pieces],
            "wrong": [self.model.heads],
        }
        tasks = {task: Loss(task) for task in self.model.places}
        self.pruner = MultitaskPruner(
            self.model,
            tasks,
            shared[case["shared"]],
            method=method_of(case),
            optimizer=None if case["optimizer"] == "none" else self.optimizer,
            backend=case["backend"],
            seed=case["seed"],
        )
        self.at = 0
        self.state: dict[str, Any] | None = None

    def train(self, until: int) -> "Run":
        """Steps up to a number; the state is kept at the one that is saved."""
        while self.at < until:
            if self.at == self.case["saved"]:
                self.state = copy.deepcopy(self.parts())
            self.step()
        return self

    def step(self) -> None:
        """One step."""
        names = list(self.model.places)
        tasks = None
        if self.case["batches"] == "single":
            tasks = [names[self.at % len(names)]]
        elif self.case["batches"] == "missing" and self.at % 3 == 1:
            tasks = names[:1]
        self.optimizer.zero_grad()
        for part in range(self.case["accumulate"]):
            torch.manual_seed(1000 * part + self.at)
            x = inputs(100 * part + self.at + self.case["seed"])
            with torch.autocast("cpu", torch.bfloat16, enabled=self.case["bf16"]):
                outputs = self.model(x)
            before = self.traces()
            losses = self.pruner.observe(outputs, {"x": x}, tasks=tasks)
            if not alike(before, self.traces()):
                raise AssertionError("observe has left a trace")
            self.pruner.weigh(losses).backward()
        self.optimizer.step()
        self.pruner.step()
        self.at += 1

    def traces(self) -> dict[str, Any]:
        """What `observe` must leave as it was."""
        return {
            "grads": [None if p.grad is None else p.grad.clone() for p in self.model.parameters()],
            "buffers": [
                b.clone() for n, b in self.model.named_buffers() if not n.endswith("_mask")
            ],
            "random": torch.get_rng_state(),
        }

    def parts(self) -> dict[str, Any]:
        """All that a checkpoint has."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
        }

    def problems(self) -> str:
        """What is not as it must be at the end of training; empty if all is."""
        masks, report = self.pruner.masks, self.pruner.report()
        if [id(p) for p in self.model.parameters()] != self.objects:
            return "a Parameter was replaced"
        kept = sum(int(mask.sum()) for mask in masks.values())
        total = sum(mask.numel() for mask in masks.values())
        if self.case["kind"] in ("rank", "gates"):
            return "" if kept == total else "ranks have masks"
        if report.step is None:
            return "" if kept == total else "masks without an update"
        if self.case["kind"] != "sigmoid" and report.kept != kept and self.settled:
            return f"the report says {report.kept} and masks keep {kept}"
        exact = (
            self.case["kind"] in ("vote", "soft", "best", "movement")
            and not self.case.get("keep")
            and not self.case.get("units")
            and self.settled
        )
        if exact and total - kept != round(self.case["sparsity"] * total):
            return f"{total - kept} zeros of {total} at {self.case['sparsity']}"
        least = self.case.get("min_keep", 1)
        if exact and least and kept >= least * len(masks):
            empty = [name for name, mask in masks.items() if not bool(mask.any())]
            if empty:
                return f"{empty} are empty"
        if not 0.0 <= report.coverage <= 1.0:
            return f"coverage {report.coverage}"
        return ""

    @property
    def settled(self) -> bool:
        """Whether the last update has been made."""
        step = self.pruner.report().step
        schedule = self.pruner._method.schedule
        return step is not None and schedule.next_update(step) is None

    def finish(self) -> Outcome:
        """Bake the masks in, and compare."""
        masks = self.pruner.masks
        x = inputs(777)
        self.model.eval()
        with torch.no_grad():
            before = {name: out.clone() for name, out in self.model(x).items()}
        self.pruner.finalize()
        with torch.no_grad():
            after = self.model(x)
        for name, out in before.items():
            if not torch.allclose(out, after[name], rtol=1e-5, atol=1e-6, equal_nan=True):
                return Outcome("wrong", f"finalize changes outputs of '{name}'")
        if list(self.model.state_dict()) != self.names:
            return Outcome("wrong", "finalize leaves other names")
        weights = dict(self.model.named_parameters())
        for name, mask in masks.items():
            if bool((weights[name][~mask] != 0).any()):
                return Outcome("wrong", f"'{name}' is not zero where it is masked")
        return Outcome("passed")


class Loss:
    """The loss of a task."""

    def __init__(self, task: str) -> None:
        self.task = task

    def __call__(self, outputs: Mapping[str, Tensor], batch: Any) -> Tensor:
        return self.of(outputs[self.task].float())

    def of(self, output: Tensor) -> Tensor:
        """The loss of an output."""
        target = torch.arange(output.numel()).view_as(output).sin()
        return (output - target).square().mean()


def resumed(case: Mapping[str, Any], run: Run) -> str:
    """What a run that goes on from a checkpoint has otherwise; empty if nothing."""
    if run.state is None:
        return ""
    again = Run(case, seed=1)
    again.model.load_state_dict(run.state["model"])
    again.optimizer.load_state_dict(run.state["optimizer"])
    again.pruner.load_state_dict(run.state["pruner"])
    again.at = case["saved"]
    again.train(STEPS)
    if not alike(weights_of(run), weights_of(again)):
        return "a resumed run has other weights"
    if not alike(run.pruner.state_dict(), again.pruner.state_dict()):
        return "a resumed pruner has another state"
    return ""


def weights_of(run: Run) -> dict[str, Tensor]:
    """All parameters under their plain names."""
    return {n.removesuffix("_orig"): p.detach() for n, p in run.model.named_parameters()}


def near(run: Run, twin: Run, case: Mapping[str, Any]) -> bool:
    """Whether the masks of two back-ends are the same, but for what rounding decides."""
    one, other = run.pruner.masks, twin.pruner.masks
    if case["bf16"] or case["accumulate"] > 1:
        return one.keys() == other.keys()
    total = sum(mask.numel() for mask in one.values())
    off = sum(int((mask != other[name]).sum()) for name, mask in one.items())
    return one.keys() == other.keys() and off <= math.ceil(0.02 * total)
