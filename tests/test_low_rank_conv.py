"""`LowRank` of convolutions: what a matrix is, what it costs, and what it becomes."""

import copy
from dataclasses import replace
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mtprune
from mtprune import Cubic, Linear, LowRank, MultitaskPruner, OneShot, recipes
from mtprune.compression.forms import Rank
from mtprune.model import factors
from tests import checkpoints
from tests.checkpoints import resealed
from tests.compression.fakes import prefer
from tests.pairs import pairs
from tests.runs import record
from tests.test_resume import ORDERS, assert_ends_like, load, through_a_file

METHODS = {
    "static": lambda: LowRank(0.6),
    "gradual": lambda: LowRank(0.6, schedule=Cubic(begin=2, end=8, every=2)),
    "learned": lambda: LowRank(0.6, "learned", schedule=Linear(0, 8, 1)),
}
SHAPES = {
    "1d": (nn.Conv1d, 5, 3, 2),
    "2d": (nn.Conv2d, 8, 3, 3),
    "tall": (nn.Conv2d, 20, 1, 3),
    "square": (nn.Conv2d, 18, 2, 3),
    "1x1": (nn.Conv2d, 6, 9, 1),
    "3d": (nn.Conv3d, 9, 2, 2),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)


class Pixels(nn.Module):
    """A trunk of convolutions, and heads that are convolutions too: nothing is linear."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect", bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 12, 1),
            nn.ReLU(),
            nn.Conv2d(12, 10, (1, 3), dilation=2),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({task: nn.Conv2d(10, 4, 1) for task in "ab"})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


FACTORED = (
    "trunk.0.weight",
    "trunk.4.weight",
    "trunk.6.weight",
    "heads.a.weight",
    "heads.b.weight",
)


def loss_of(task):
    def loss(outputs, x):
        goal = x.mean((2, 3)).sum(1) if task == "a" else x.amax((1, 2, 3))
        return (outputs[task].mean((1, 2, 3)) - goal).square().mean() + outputs[task].var()

    return loss


class Loop:
    def __init__(self, method, backend="inplace", model=None, compiler=None, **options):
        torch.manual_seed(0)
        self.model = Pixels() if model is None else model
        self.call = torch.compile(self.model, backend=compiler) if compiler else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.pruner = MultitaskPruner(
            self.model,
            {task: loss_of(task) for task in "ab"},
            "trunk",
            method=method,
            optimizer=self.optimizer,
            backend=backend,
            **options,
        )
        self.at = 0

    def batch(self):
        return torch.randn(4, 3, 9, 11, generator=torch.Generator().manual_seed(self.at))

    def step(self):
        x = self.batch()
        self.optimizer.zero_grad()
        losses = self.pruner.observe(self.call(x), x)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        self.at += 1
        return self.pruner.step()

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def weight(self, name):
        return self.model.get_parameter(name).detach()


def conv(shape):
    kind, outputs, inputs, size = SHAPES[shape]
    return kind(inputs, outputs, size, bias=False)


# Closed forms.


@EVERY_SHAPE
def test_the_derivative_in_the_gates_is_that_of_autograd(shape):
    layer = conv(shape)
    weight, grad = layer.weight.detach().clone(), torch.randn_like(layer.weight)
    flat = weight.flatten(1)
    left, values, right = torch.linalg.svd(flat.double(), full_matrices=False)
    z = torch.ones(len(values), dtype=torch.float64, requires_grad=True)
    ((left * (z * values)) @ right * grad.flatten(1)).sum().backward()
    pruner = MultitaskPruner(nn.ModuleDict({"l": layer}), ["a"], "l", method=LowRank(0.5))
    pruner.observe_losses({"a": (layer.weight * grad).sum()})
    found = checkpoints.scores(pruner)["a"]["l.weight"]
    assert torch.allclose(found.double(), z.grad.abs(), atol=1e-5)


@EVERY_SHAPE
def test_what_is_left_is_the_best_of_that_rank(shape):
    layer = conv(shape)
    weight = layer.weight.detach().clone()
    flat = weight.flatten(1).double()
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    method = LowRank(1 - 2 * factors.price(weight.shape) / weight.numel(), floor=0.0)
    pruner = MultitaskPruner(nn.ModuleDict({"l": layer}), ["a"], "l", method=method)
    # The derivative in a gate is then s^2: the largest directions are worth most.
    pruner.observe_losses({"a": layer.weight.square().sum() / 2})
    pruner.step()
    (row,) = pruner.report().layers
    assert (row.rank, row.full_rank) == (2, min(flat.shape))
    assert row.kept == 2 * sum(flat.shape)
    best = (left[:, :2] * values[:2]) @ right[:2]
    assert layer.weight.shape == weight.shape
    assert torch.allclose(layer.weight.flatten(1).double(), best, atol=1e-5)


def test_two_convolutions_are_the_projected_one():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, 2, 1, 2, padding_mode="circular")
    pruner = MultitaskPruner(nn.ModuleDict({"l": layer}), ["a"], "l", method=LowRank(0.6))
    x = torch.randn(2, 3, 9, 7)
    pruner.observe_losses({"a": layer(x).square().mean()})
    pruner.step()
    pruner.finalize()
    rank = pruner.report().layers[0].rank
    assert rank == 2  # 70 of 216 parameters; 105 are more than 86
    up, down = factors.factors(layer.weight, rank)
    padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    hidden = F.conv2d(padded, down.view(rank, 3, 3, 3), stride=2, dilation=2)
    again = F.conv2d(hidden, up[:, :, None, None], layer.bias)
    assert torch.allclose(again, layer(x), atol=1e-5)


# Budgets.


@pytest.mark.parametrize(
    ("sparsity", "method", "backend"), pairs([0.0, 0.3, 0.6, 0.9], METHODS, ["prune", "inplace"])
)
def test_the_budget_is_met_to_less_than_a_direction(method, sparsity, backend):
    loop = Loop(replace(METHODS[method](), sparsity=sparsity), backend).train(10)
    report = loop.pruner.report()
    sizes = {name: tuple(loop.weight(name).shape) for name in FACTORED}
    assert [row.name for row in report.layers] == list(FACTORED)
    total = sum(map(prod, sizes.values()))
    assert report.parameters == total
    dearest = max(map(factors.price, sizes.values()))
    assert 0 <= total - round(sparsity * total) - report.kept < dearest
    for row in report.layers:
        high, wide = sizes[row.name][0], prod(sizes[row.name][1:])
        assert row.kept == min(row.rank * (high + wide), high * wide)
        assert row.full_rank == min(high, wide)
        assert factors.numerical_rank(loop.weight(row.name)) == row.rank
    kept = {row.name: row.rank for row in report.layers}
    loop.pruner.finalize()
    assert {name: factors.numerical_rank(loop.weight(name)) for name in FACTORED} == kept
    assert loop.pruner.sparsity == report.sparsity


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("gates", ["saliency", "learned"])
def test_planted_ranks_are_recovered(gates, rank):
    """A net that was of low rank, and noise so small that no loss tells of it."""
    torch.manual_seed(rank)
    model = Pixels()
    planted = {"trunk.0.weight": rank, "trunk.4.weight": 4 - rank, "trunk.6.weight": 2}
    before = {}
    with torch.no_grad():
        for name, count in planted.items():
            weight = model.get_parameter(name)
            left, right = factors.factors(weight, count)
            before[name] = (left @ right).view_as(weight)
            weight.copy_(before[name] + 1e-6 * torch.randn_like(weight))
    sizes = {name: tuple(model.get_parameter(name).shape) for name in planted}
    cost = sum(factors.price(sizes[name]) * count for name, count in planted.items())
    sparsity = 1 - cost / sum(map(prod, sizes.values()))
    schedule = OneShot() if gates == "saliency" else Linear(0, 40, 1)
    method = LowRank(sparsity, gates, schedule=schedule, floor=0.0)
    loop = Loop(method, model=model, exclude="heads")
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    loop.train(2 if gates == "saliency" else 42)
    assert {row.name: row.rank for row in loop.pruner.report().layers} == planted
    for name, weight in before.items():
        found = loop.weight(name)
        if gates == "saliency":
            assert torch.allclose(found, weight, atol=1e-4)
        else:  # what is left has faded, and was not trained to recover; its directions are those
            both = torch.cat([found.flatten(1), weight.flatten(1)], 1).double()
            assert int(torch.linalg.matrix_rank(both, rtol=1e-3)) == planted[name]


def test_what_is_no_single_matrix_is_left_dense_and_named():
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(5, 4),
            "plain": nn.Conv1d(4, 6, 3),
            "grouped": nn.Conv1d(6, 6, 3, groups=2),
            "depthwise": nn.Conv1d(6, 6, 3, groups=6),
            "up": nn.ConvTranspose1d(6, 4, 3),
            "tied": nn.Conv1d(4, 4, 1),
            "other": nn.Conv1d(4, 4, 1),
        }
    )
    model["other"].weight = model["tied"].weight
    pruner = MultitaskPruner(
        model, ["a"], "plain", method=LowRank(0.5), include="words.weight", exclude=()
    )
    assert list(checkpoints.shapes(pruner)) == ["plain.weight"]
    groups = "a convolution with groups is no single matrix"
    kinds = "only nn.Linear, nn.Conv1d to nn.Conv3d and experts can become two layers"
    assert pruner.report().left_alone == {
        "words.weight": kinds,
        "grouped.weight": groups,
        "depthwise.weight": groups,
        "up.weight": kinds,
        "tied.weight": "its weight is tied to another",
    }


# Multiply-adds.


def test_multiply_adds_are_told_of_rows_only_unless_measured():
    loop = Loop(LowRank(0.6)).train(2)
    report = loop.pruner.report()
    assert {row.macs for row in report.layers} == {None}
    assert report.macs_sparsity is None
    assert report.sparsity >= 0.6


def measured(method, at=2):
    """A net that was pruned, its report, and the multiply-adds of what it becomes."""
    loop = Loop(method).train(at)
    loop.pruner.finalize()
    model, x = loop.model.eval(), loop.batch()[:1]
    fast = mtprune.compress(model, x, measure=prefer("rank"))
    rows = {f"{r.layer}.weight": r.choice for r in mtprune.plan_of(fast).rows}
    sizes = mtprune.measure(fast, x, against=model, rounds=20)
    return loop, rows, sizes


@pytest.mark.parametrize("method", ["static", "learned"])
def test_a_budget_of_multiply_adds_is_that_of_the_compressed_net(method):
    x = torch.randn(1, 3, 9, 11)
    chosen = replace(METHODS[method](), budget_unit="macs", example_inputs=x)
    loop, rows, sizes = measured(chosen, at=10)
    report = loop.pruner.report()
    positions = {"trunk.0.weight": 5 * 6, "trunk.4.weight": 5 * 6}
    positions |= dict.fromkeys(FACTORED[2:], 5 * 2)
    total = saved = 0
    for row in report.layers:
        assert row.macs == positions[row.name] * row.parameters
        assert row.macs_kept == positions[row.name] * row.kept
        assert rows[row.name] == ("rank" if row.kept < row.parameters else "dense")
        total, saved = total + row.macs, saved + row.macs - row.macs_kept
    dearest = max(positions[name] * factors.price(loop.weight(name).shape) for name in FACTORED)
    assert 0 <= saved - round(0.6 * total) < dearest
    grouped = 5 * 6 * loop.weight("trunk.3.weight").numel()
    assert sizes.macs == total - saved + grouped
    assert report.macs_sparsity == saved / (total + grouped)


def test_multiply_adds_spare_layers_with_few_positions():
    x = torch.randn(1, 3, 9, 11)
    ranks = []
    for options in ({}, {"budget_unit": "macs", "example_inputs": x}):
        loop = Loop(LowRank(0.6, floor=0.0, **options)).train(2)
        ranks.append({row.name: row.rank for row in loop.pruner.report().layers})
    assert ranks[1]["trunk.6.weight"] > ranks[0]["trunk.6.weight"]
    assert ranks[1]["trunk.0.weight"] <= ranks[0]["trunk.0.weight"]


# The rest of a run.


def by(method, backend):
    return Loop(METHODS[method](), backend)


@pytest.mark.parametrize(
    ("method", "at", "backend"), pairs(METHODS, [1, 4, 9], ["prune", "inplace"])
)
def test_a_resumed_run_is_the_uninterrupted_run(method, at, backend):
    whole = record(by, method, backend)
    state = through_a_file(whole.at(at).checkpoint)
    resumed = load(by(method, backend), state, ORDERS[at % len(ORDERS)]).train(12 - at)
    assert_ends_like(resumed, whole.at(12))


def only_linear(method, layer):
    return "" if type(layer.places[0][0]) is nn.Linear else "only nn.Linear can become two layers"


class Mixed(Pixels):
    """The same with heads that are linear."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({task: nn.Linear(10, 8) for task in "ab"})

    def forward(self, x):
        hidden = self.trunk(x).flatten(2).mT
        return {task: head(hidden).mT[..., None] for task, head in self.heads.items()}


def test_a_run_in_which_convolutions_stayed_dense_goes_on_without_them(monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(LowRank, "fits", only_linear)
        whole = Loop(METHODS["gradual"](), model=Mixed()).train(5)
        parts = {
            part: getattr(whole, part).state_dict() for part in ("model", "optimizer", "pruner")
        }
        state = through_a_file({**parts, "at": whole.at})
        whole.train(5)
    with pytest.raises(ValueError, match=r"trunk\.0\.weight"):
        load(Loop(METHODS["gradual"](), model=Mixed()), state)
    convs = ["trunk.0", "trunk.4", "trunk.6"]
    again = load(Loop(METHODS["gradual"](), model=Mixed(), exclude=convs), state).train(5)
    assert all(map(torch.equal, again.model.parameters(), whole.model.parameters()))


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (
            "gradual",
            lambda hold: hold["spans"]["trunk.0.weight"].__setitem__(0, torch.zeros(27, 3)),
            r"'hold\.spans\.trunk\.0\.weight\.0' must be a dense .* of shape \(8, \d\)\. Got",
        ),
        (
            "gradual",
            lambda hold: hold["ranks"].update({"trunk.0.weight": 9}),
            r"'hold\.ranks\.trunk\.0\.weight' must be a whole number, from 0 to 8\. Got 9",
        ),
        (
            "gradual",
            lambda hold: hold["ranks"].update({"trunk.3.weight": 1}),
            r"'hold\.ranks' must .*trunk\.3\.weight",
        ),
        (
            "learned",
            lambda hold: hold["gates"].update({"trunk.4.weight": torch.ones(12)}),
            r"'hold\.gates\.trunk\.4\.weight' must be a dense .* of shape \(8,\)\. Got",
        ),
    ],
)
def test_untrue_checkpoints_are_refused(method, change, message):
    state = Loop(METHODS[method]()).train(5).pruner.state_dict()
    change(state["hold"])
    fresh = Loop(METHODS[method]())
    before = fresh.pruner.state_dict()
    with pytest.raises(ValueError, match=message):
        fresh.pruner.load_state_dict(resealed(state))
    assert fresh.pruner.state_dict()["hold"] == before["hold"]


def test_memory_in_channels_last_is_kept():
    model = Pixels().to(memory_format=torch.channels_last)
    straight = Loop(METHODS["gradual"](), model=copy.deepcopy(model)).train(10)
    ranks = {row.name: row.rank for row in straight.pruner.report().layers}
    assert straight.pruner.sparsity >= 0.6
    for name, rank in ranks.items():
        weight = straight.weight(name)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert factors.numerical_rank(weight) == rank


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
def test_a_compiled_net_has_the_same_ranks():
    plain, compiled = (
        Loop(METHODS["gradual"](), model=Pixels(), compiler=compiler).train(9)
        for compiler in (None, "eager")
    )
    assert plain.pruner.report().layers == compiled.pruner.report().layers


@pytest.mark.parametrize("gates", ["saliency", "learned"])
def test_the_recipe_saves_what_the_compressed_net_lacks(gates, tmp_path):
    pytest.importorskip("safetensors")
    loop = Loop(recipes.flop(0.7, 20, gates=gates)).train(20)
    report = loop.pruner.report()
    loop.pruner.finalize()
    model, x = loop.model.eval(), loop.batch()
    fast = mtprune.compress(model, x, measure=prefer("rank"))
    factored = {n for n, module in fast.named_modules() if isinstance(module, Rank)}
    assert factored == {
        r.name.removesuffix(".weight") for r in report.layers if r.kept < r.parameters
    }
    numbers = [sum(p.numel() for p in m.parameters()) for m in (model, fast)]
    assert numbers[0] - numbers[1] == report.parameters - report.kept
    mtprune.save(fast, tmp_path)
    loaded = mtprune.load(tmp_path, Pixels())
    for task, expected in model(x).items():
        assert (fast(x)[task] - expected).norm() / expected.norm() < 1e-5
        assert torch.equal(loaded(x)[task], fast(x)[task])
