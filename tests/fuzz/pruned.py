"""Compressions of random nets that were pruned, or given zeros, and their outputs elsewhere.

Elsewhere: on inputs of other values, sizes and numbers of rows than `compress` has seen, and row by
row. A subnetwork of some tasks is compared with the whole model without the weights that none of
them voted for.
"""

import copy
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import mtprune
from tests.compression.fakes import prefer
from tests.fuzz import engine, live, nets
from tests.fuzz.cases import from_json, simpler, to_json
from tests.fuzz.nets import NetCase
from tests.fuzz.outcomes import check, differs, refusable

FORMS = ("dense", "rows", "thin", "sparse", "csr", "rank")


@dataclass(frozen=True)
class Case:
    """A compression.

    Attributes:
        net: The net.
        zeros: Where they are: ``"scattered"``, in ``"rows"`` or ``"columns"`` that are dead, in
            ``"both"``, in all of a ``"layer"``; of no weight, but matrices have a low ``"rank"``;
            or where a ``"vote"`` of weights, or of ``"channels"``, has put them.
        share: How many.
        bias: Biases: ``"random"``, ``"one"``, or as they are, ``"small"``.
        groups: The units: ``"auto"``, ``"none"`` or ``"channel"``.
        tasks: How many tasks stay; 0 for all.
        form: The form that is fastest.
        portable: Whether only portable forms are taken.
        rows: Of the example inputs.
        examples: How many of them, each with a row more.
        tolerance: Whether a tolerance is given.
        replay: Whether its plan must give the same model.
        saved: Whether the model must be the same after it was saved and loaded.
    """

    net: NetCase = field(default_factory=NetCase)
    zeros: str = "scattered"
    share: float = 0.5
    bias: str = "small"
    groups: str = "none"
    tasks: int = 0
    form: str = "dense"
    portable: bool = False
    rows: int = 4
    examples: int = 1
    tolerance: bool = False
    replay: bool = False
    saved: bool = False


def draw(chance: Random) -> Case:
    net = nets.draw(chance)
    zeros = chance.choice(
        ["scattered", "rows", "columns", "both", "layer", "rank", "vote", "channels"]
    )
    some = zeros == "vote" and net.returns == "dict" and net.tasks > 1 and chance.random() < 0.5
    groups = chance.choice(["auto", "none", "channel"])
    return Case(
        net=net,
        zeros=zeros,
        share=chance.choice([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]),
        bias=chance.choice(["small", "random", "one"]),
        groups="channel" if zeros == "channels" else groups,
        tasks=chance.randrange(1, net.tasks) if some else 0,
        form=chance.choice(FORMS),
        portable=chance.random() < 0.2,
        rows=chance.choice([1, 1, 2, 4]),
        examples=chance.choice([1, 1, 2]),
        tolerance=chance.random() < 0.1,
        replay=chance.random() < 0.3,
        saved=chance.random() < 0.4,
    )


class Pruned:
    """Compressions."""

    def draw(self, dice: Random) -> engine.Case:
        """A random one."""
        return to_json(draw(dice))

    def run(self, case: engine.Case) -> engine.Outcome:
        """Compress, and compare."""
        run(from_json(Case, case))
        return engine.Outcome("passed")

    def simpler(self, case: engine.Case) -> Iterator[engine.Case]:
        """Cases with something as it is by default."""
        return map(to_json, simpler(from_json(Case, case)))


def run(case: Case) -> None:
    model, wanted, options = _sparse(case)
    examples = [nets.inputs(case.net, case.rows + i, i) for i in range(case.examples)]
    given: Any = examples if case.examples > 1 else examples[0]
    if case.groups == "channel":
        with refusable(lambda: live.of_model(model)):
            options["groups"] = mtprune.Channel(examples[0])
    elif case.groups == "none":
        options["groups"] = ()
    if case.tolerance:
        options["tolerance"] = 1e-4
    options["portable"] = case.portable
    before = live.of_model(model)
    with refusable(lambda: live.of_model(model)):
        fast = mtprune.compress(model, given, measure=prefer(case.form), **options)
    difference = differs(before, live.of_model(model))
    check(not difference, f"compress() changes {difference} of the model it was given")
    _compare(case, wanted, fast)
    plan = mtprune.plan_of(fast)
    str(plan)
    if case.replay:
        again = mtprune.Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
        kept = {name: options[name] for name in ("tasks", "tolerance") if name in options}
        _same(case, fast, mtprune.compress(model, given, plan=again, **kept), "by its plan")
    if case.saved:
        with tempfile.TemporaryDirectory() as folder:
            mtprune.save(fast, folder)
            _same(case, fast, mtprune.load(folder, nets.build(case.net, 1)), "after loading")


def _sparse(case: Case) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The model, one with the outputs that are wanted, and arguments that follow from them."""
    model = nets.build(case.net)
    random = torch.Generator().manual_seed(case.net.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and case.bias != "small":
                values = torch.randn(parameter.shape, generator=random)
                parameter.copy_(values if case.bias == "random" else torch.ones_like(values))
            elif case.zeros == "rank" and parameter.dim() > 1 and "embed" not in name:
                flat = parameter.flatten(1)
                parameter.copy_((flat[:, :1] @ flat[:1]).view_as(parameter))
            elif parameter.dim() > 1 and case.zeros not in ("rank", "vote", "channels"):
                parameter.mul_(_mask(case, parameter, random))
        for i in range(2):  # running statistics of their own
            model(nets.inputs(case.net, 6, 50 + i))
    if case.zeros not in ("vote", "channels"):
        return model.eval(), model, {}
    return _voted(case, model)


def _mask(case: Case, weight: Tensor, random: torch.Generator) -> Tensor:
    """Zeros of a weight, as the case has them."""
    keep = torch.rand(weight.shape, generator=random) >= case.share
    rows, columns = keep.flatten(1)[:, 0], keep.flatten(1)[0][: weight.shape[1]]
    tail = [1] * (weight.dim() - 2)
    first, second = rows.view(-1, 1, *tail), columns.view(1, -1, *tail)
    whole = torch.ones(()) * float(torch.rand((), generator=random) >= case.share / 2)
    found = {"rows": first, "columns": second, "both": first & second, "layer": whole}
    return found.get(case.zeros, keep).to(weight.dtype)


def _voted(case: Case, model: nets.Model) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A model that was pruned, and what the chosen tasks alone would have of it."""
    units: dict[str, Any] = {}
    if case.zeros == "channels":
        with refusable(lambda: live.of_model(model)):
            units["granularity"] = mtprune.Channel(nets.inputs(case.net, 2, 0))
    share = min(case.share, 0.95)
    with refusable(lambda: live.of_model(model)):
        pruner = mtprune.MultitaskPruner(
            model,
            nets.losses(case.net),
            nets.shared(case.net, model),
            method=mtprune.Vote(share, min_keep=0, **units),
            include=nets.included(case.net, model),
        )
    with refusable(lambda: live.of_model(model)):
        pruner.prune([nets.batch(case.net, 6, 70)], forward=lambda m, b: m(b["x"]), progress=False)
    pruner.finalize()
    model.eval()
    if not case.tasks:
        return model, model, {}
    chosen = case.net.names[: case.tasks]
    wanted = copy.deepcopy(model)
    masks = pruner.task_masks
    with torch.no_grad():
        for name, parameter in wanted.named_parameters():
            votes = [masks[task][name] for task in chosen if name in masks[task]]
            if votes:
                parameter.mul_(torch.stack(votes).any(0).to(parameter.dtype))
    return model, wanted, {"tasks": chosen}


@torch.no_grad()
def _compare(case: Case, wanted: nn.Module, fast: nn.Module) -> None:
    """Outputs on inputs that were not shown are those that are wanted, whole and row by row."""
    for rows, seed, scale in ((1, 11, 1.0), (3, 12, 0.1), (7, 13, 3.0), (4, 14, 0.0)):
        x = nets.inputs(case.net, rows, seed, scale)
        expected, got = wanted(x), fast(x)
        singly = [fast(row) for row in x.split(1)]
        for i in range(case.tasks or case.net.tasks):
            task = case.net.names[i]
            one, other = (nets.output_of(case.net, out, i) for out in (expected, got))
            told = f"'{task}' is off on {rows} rows of size {scale}"
            check(_near(one, other), told)
            apart = torch.cat([nets.output_of(case.net, out, i) for out in singly])
            check(_near(one, apart), f"{told}, row by row")


def _near(one: Tensor, other: Tensor) -> bool:
    """Whether outputs are the same but for rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    limit = 1e-9 if one.dtype == torch.float64 else 1e-4
    return float((one - other).norm()) <= limit * (float(one.norm()) + 0.1)


@torch.no_grad()
def _same(case: Case, fast: nn.Module, again: nn.Module, how: str) -> None:
    x = nets.inputs(case.net, 5, 21)
    difference = differs(live.copied(fast(x)), live.copied(again(x)))
    check(not difference, f"{how} the model has other outputs: {difference}")
