"""`LowRank`: what is kept, for whom; ranks that hold; gates that learn."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mtprune
from mtprune import (
    Cubic,
    Hold,
    Linear,
    LowRank,
    MultitaskPruner,
    OneShot,
    Regrow,
    recipes,
    votes,
)
from mtprune.methods import gates
from mtprune.model import factors
from tests import checkpoints, nets
from tests.compression.fakes import prefer
from tests.nets import Run, build, evaluate, read, same
from tests.pairs import pairs
from tests.runs import record
from tests.test_resume import ORDERS, assert_ends_like, load, through_a_file

GRADUAL = Cubic(begin=2, end=8, every=2)
METHODS = {
    "static": lambda: LowRank(0.6),
    "gradual": lambda: LowRank(0.6, schedule=GRADUAL),
    "learned": lambda: LowRank(0.6, "learned", schedule=Cubic(begin=1, end=8, every=1)),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
FACTORED_NETS = (
    "plain",
    "conv_bn",
    "channels_last",
    "skipped_layer",
    "called_twice",
    "frozen_trunk",
    "single_weight",
    "bfloat16",
)


class Two(nn.Module):
    """A trunk of two layers and a head for each of the tasks."""

    def __init__(self, tasks=("a", "b"), width=24):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 16), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(16, 2) for task in tasks})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


def loss_of(task, scale=1.0):
    k = ord(task[0])

    def loss(outputs, x):
        return scale * (outputs[task] - (k % 3 + 1) * x[:, k % 5 : k % 5 + 2]).square().mean()

    return loss


class Loop:
    def __init__(
        self, method, tasks=("a", "b"), scales=None, backend="inplace", model=None, **options
    ):
        torch.manual_seed(0)
        self.model = Two(tuple(sorted(tasks))) if model is None else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        losses = {task: loss_of(task, (scales or {}).get(task, 1.0)) for task in tasks}
        options.setdefault("exclude", "heads")
        self.pruner = MultitaskPruner(
            self.model,
            losses,
            "trunk",
            method=method,
            optimizer=self.optimizer,
            backend=backend,
            **options,
        )
        self.at = 0

    def batch(self):
        return torch.randn(64, 12, generator=torch.Generator().manual_seed(self.at))

    def step(self, train=True):
        x = self.batch()
        self.optimizer.zero_grad()
        losses = self.pruner.observe(self.model(x), x)
        if train:
            torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()  # which moves nothing that has no gradient
        self.at += 1
        return self.pruner.step()

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    @property
    def ranks(self):
        return [row.rank for row in self.pruner.report().layers]


def linear(*pairs):
    """One layer of known singular triples, and a head per task that reads some outputs."""
    weight = torch.zeros(6, 4)
    for i, value in pairs:
        weight[i, i] = value
    layer = nn.Linear(4, 6, bias=False)
    layer.weight.data = weight
    return layer


def decide(layer, gradients, method):
    """What a method keeps of one layer, from given gradients of each task."""
    pruner = MultitaskPruner(nn.ModuleDict({"l": layer}), list(gradients), "l", method=method)
    losses = {task: (layer.weight * g).sum() for task, g in gradients.items()}
    pruner.observe_losses(losses)
    pruner.step()
    return pruner


# Literals.


def test_a_component_is_worth_the_derivative_of_the_loss_in_its_gate():
    layer = linear((0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0))
    # |dL/dz| = |s_k u_k' G v_k|: 4 * 0.1, 3 * 1, 2 * -2, 1 * 1.
    grad = torch.zeros(6, 4)
    for i, g in enumerate((0.1, 1.0, -2.0, 1.0)):
        grad[i, i] = g
    pruner = decide(layer, {"a": grad}, LowRank(0.16))  # 20 of 24: two components of 10
    assert pruner.report().layers[0].rank == 2
    assert torch.allclose(layer.weight, linear((1, 3.0), (2, 2.0)).weight, atol=1e-6)
    assert pruner.sparsity == 4 / 24


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_the_derivative_is_that_of_autograd(shape):
    weight, grad = torch.randn(shape), torch.randn(shape)
    _, vectors = factors.directions(weight)
    v = vectors.float()
    z = torch.ones(min(shape), requires_grad=True)
    gated = factors.spread(factors.rotate(weight, v) * factors.per_direction(z, shape), v, shape)
    (gated * grad).sum().backward()
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = weight
    pruner = MultitaskPruner(nn.ModuleDict({"l": layer}), ["a"], "l", method=LowRank(0.5))
    pruner.observe_losses({"a": (layer.weight * grad).sum()})
    found = checkpoints.scores(pruner)["a"]["l.weight"]
    assert torch.allclose(found, z.grad.abs(), atol=1e-5)


def test_single_tasks_keep_their_own_and_a_vote_keeps_the_union():
    """Two tasks that read disjoint halves of the outputs of one layer."""

    def grad(*rows):
        g = torch.zeros(8, 8)
        for i in rows:
            g[i, i] = 1.0
        return g

    def weight():
        layer = nn.Linear(8, 8, bias=False)
        layer.weight.data = torch.diag(torch.arange(8.0, 0.0, -1.0))
        return layer

    def kept(gradients, count, vote=votes.unanimous):
        layer = weight()
        method = LowRank(1 - count * 16 / 64, vote=vote, floor=0.0)
        decide(layer, gradients, method)
        return layer.weight.diag().abs().gt(1e-5).nonzero().flatten().tolist()

    one, other = grad(0, 5), grad(2, 7)
    assert kept({"a": one}, 2) == [0, 5]
    assert kept({"b": other}, 2) == [2, 7]
    # Break-even is at rank 4, so the union of four is not told from all: three of them are.
    union = kept({"a": one, "b": other}, 3)
    assert len(union) == 3
    assert set(union) < {0, 2, 5, 7}
    assert {0, 5} & set(union)
    assert {2, 7} & set(union)


def test_planted_rank_is_found_and_nothing_is_lost(backend):
    loop = Loop(LowRank(0.0), backend=backend)
    first = loop.model.trunk[0]
    with torch.no_grad():
        left, right = factors.factors(first.weight.double(), 5)
        first.weight.copy_(left @ right)
    before, x = first.weight.detach().clone(), loop.batch()
    expected = loop.model(x)["a"]
    loop.pruner.finalize()
    pruner = MultitaskPruner(
        loop.model,
        {t: loss_of(t) for t in "ab"},
        "trunk.0",
        method=LowRank(1 - 5 * 36 / 288),
        exclude=["heads", "trunk.2"],
        backend=backend,
    )
    pruner.observe(loop.model(x), x)
    assert pruner.step() is True
    assert pruner.report().layers[0].rank == 5
    assert torch.allclose(first.weight, before, atol=1e-6)
    assert torch.allclose(loop.model(x)["a"], expected, atol=1e-5)


def test_duplicated_neurons_are_the_first_to_go():
    layer = nn.Linear(12, 16, bias=False)
    with torch.no_grad():
        layer.weight[4:] = layer.weight[:4].repeat(3, 1)
    before = layer.weight.detach().clone()
    decide(layer, {"a": torch.randn(16, 12)}, LowRank(1 - 4 * 28 / 192))
    assert torch.allclose(layer.weight, before, atol=1e-6)


# Budgets.


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["saliency", "learned"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.75, 0.9])
def test_a_short_run_meets_its_budget(sparsity, gates, backend):
    loop = Loop(recipes.flop(sparsity, 60, gates=gates), backend=backend).train(60)
    report = loop.pruner.report()
    total = 24 * 12 + 24 * 16
    assert report.parameters == total
    budget = total - round(sparsity * total)
    assert 0 <= budget - report.kept < 40  # less than the dearest component
    assert loop.pruner.sparsity == report.sparsity == (total - report.kept) / total
    assert report.kept == sum(
        factors.parameters(shape, r)
        for shape, r in zip([(24, 12), (16, 24)], loop.ranks, strict=True)
    )
    loop.pruner.finalize()
    found = [factors.numerical_rank(loop.model.trunk[i].weight) for i in (0, 2)]
    assert found == loop.ranks
    assert loop.pruner.sparsity == report.sparsity


@pytest.mark.parametrize(("floor", "expected"), [(1.0, [2, 2]), (0.5, [1, 3]), (0.0, [1, 3])])
def test_a_floor_of_one_is_the_same_share_everywhere(floor, expected):
    one, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    model = nn.ModuleList([one, other])
    pruner = MultitaskPruner(model, ["a"], method=LowRank(0.5, floor=floor))
    grad = torch.randn(8, 8)
    pruner.observe_losses({"a": (one.weight * grad).sum() + 1e3 * (other.weight * grad).sum()})
    pruner.step()
    assert [row.rank for row in pruner.report().layers] == expected


def test_every_layer_keeps_a_rank_unless_asked_not_to():
    loop = Loop(LowRank(0.88, floor=0.0))
    loop.step()
    assert min(loop.ranks) >= 1
    model = Two()
    with torch.no_grad():
        model.trunk[0].weight.mul_(1e-3)
    loop = Loop(LowRank(0.9, floor=0.0, min_rank=0), model=model)
    loop.step()
    assert 0 in loop.ranks
    x = loop.batch()
    expected = loop.model(x)
    loop.pruner.finalize()
    assert all(torch.equal(loop.model(x)[task], expected[task]) for task in "ab")
    assert loop.model.trunk[loop.ranks.index(0) * 2].weight.abs().max() < 1e-6


def test_nothing_asked_is_nothing_changed(backend):
    loop = Loop(LowRank(0.0), backend=backend)
    before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    loop.step(train=False)
    loop.pruner.finalize()
    assert loop.pruner.sparsity == 0.0
    assert same(before, {n: p.detach() for n, p in loop.model.named_parameters()})


# Tasks.


def spans(loop):
    """The weights that are left: what was kept, whatever the basis."""
    return [layer.weight.detach().clone() for layer in (loop.model.trunk[0], loop.model.trunk[2])]


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["saliency", "learned"])
def test_the_order_of_tasks_does_not_matter(gates):
    found = []
    for tasks in itertools.permutations(("a", "b", "d")):
        loop = Loop(recipes.flop(0.6, 20, gates=gates), tasks)
        for _ in range(18):
            loop.step(train=False)
        found.append((loop.ranks, spans(loop)))
    for other, weights_ in found[1:]:
        assert other == found[0][0]
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(weights_, found[0][1], strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["saliency", "learned"])
@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_the_scale_of_a_loss_has_no_say(gates, scale):
    found = []
    for scales in ({}, {"a": scale}):
        loop = Loop(recipes.flop(0.6, 20, gates=gates), scales=scales)
        for _ in range(18):
            loop.step(train=False)
        found.append((loop.ranks, spans(loop)))
    assert found[0][0] == found[1][0]
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True)
    )


def test_in_joint_scoring_it_has():
    found = []
    for scales in ({}, {"a": 1e6}):
        loop = Loop(LowRank(0.6, disentangled=False), scales=scales)
        loop.step()
        found.append(spans(loop))
    assert not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "vote", [votes.unanimous, votes.mean, votes.intersection, votes.at_least(3)]
)
def test_of_one_task_every_vote_is_the_same(vote):
    method = LowRank(0.6, vote=vote, schedule=GRADUAL)
    loop = Loop(method, tasks=("a",)).train(9)
    joint = Loop(LowRank(0.6, schedule=GRADUAL, disentangled=False), tasks=("a",)).train(9)
    assert all(torch.equal(a, b) for a, b in zip(spans(loop), spans(joint), strict=True))


def test_a_task_without_weight_is_a_task_that_is_absent():
    with_zero = Loop(LowRank(0.6), tasks=("a", "b"), scales={"b": 0.0})
    with pytest.raises(RuntimeError, match="used by task 'a' alone"):
        with_zero.step(), with_zero.step()


def test_the_report_says_for_whom():
    loop = Loop(LowRank(0.6))
    loop.step()
    report = loop.pruner.report()
    for row in report.layers:
        assert set(row.want) == {"a", "b"}
        assert all(0.0 < share <= 1.0 for share in row.want.values())
        assert (row.macs, row.macs_kept) == (row.parameters, row.kept)
    assert report.macs_sparsity == report.sparsity
    text = report.table(layers=True)
    assert f"{report.layers[0].rank} of 12" in text
    assert report.to_dict()["layers"][1]["full_rank"] == 16


def test_tasks_may_come_one_by_one():
    loop = Loop(LowRank(0.6, schedule=OneShot(4)))
    for at in range(6):
        x = loop.batch()
        task = "ab"[at % 2]
        loss = loop.pruner.observe(loop.model(x), x, tasks=[task])[task]
        loop.optimizer.zero_grad()
        loss.backward()
        loop.optimizer.step()
        loop.pruner.step()
        loop.at += 1
    assert loop.pruner.sparsity >= 0.6
    assert loop.pruner.report().step == 4


# How ranks hold.


@EVERY_METHOD
def test_ranks_hold_after_every_step(method, backend):
    loop = Loop(METHODS[method](), backend=backend)
    for _ in range(12):
        loop.step()
        if loop.pruner.sparsity:
            found = [factors.numerical_rank(loop.model.trunk[i].weight) for i in (0, 2)]
            assert found == loop.ranks
            assert found < [12, 16]
    assert loop.pruner.sparsity >= 0.6


@pytest.mark.parametrize(
    ("name", "method", "backend"), pairs(FACTORED_NETS, METHODS, ["prune", "inplace"])
)
def test_nets_of_the_shelf(name, method, backend, device):
    run = Run(build(name, device), METHODS[method](), backend)
    before = [(n, id(p)) for n, p in run.model.named_parameters(remove_duplicate=False)]
    run.train(10)
    total = run.pruner.report().parameters
    saved = total - run.pruner.report().kept
    dearest = max(map(factors.price, checkpoints.shapes(run.pruner).values()))
    assert saved >= round(0.6 * total) or min(ranks_of(run)) == 1
    assert saved - round(0.6 * total) < dearest
    assert before == [(n, id(p)) for n, p in run.model.named_parameters(remove_duplicate=False)]
    assert all(bool(mask.all()) for mask in run.pruner.masks.values())
    assert not prune.is_pruned(run.model)
    batch = run.net.make_batch(99)
    outputs = evaluate(run.model, batch)
    run.pruner.finalize()
    for expected, got in zip(outputs, evaluate(run.model, batch), strict=True):
        assert torch.equal(expected, got)


def ranks_of(run):
    return [row.rank for row in run.pruner.report().layers]


def test_other_layers_are_left_dense_and_named():
    net = build("attention")
    run = Run(net, LowRank(0.5)).train(2)
    left = run.pruner.report().left_alone
    assert left
    why = "only nn.Linear, nn.Conv1d to nn.Conv3d and experts can become two layers"
    assert all(reason == why for reason in left.values())
    assert any(name.endswith("in_proj_weight") for name in left)
    rows = run.pruner.report().layers
    owners = [run.model.get_submodule(row.name.removesuffix(".weight")) for row in rows]
    assert owners
    assert all(isinstance(module, nn.Linear) for module in owners)


def test_tied_weights_are_left_dense():
    run = Run(build("tied"), LowRank(0.5)).train(2)
    assert "its weight is tied to another" in run.pruner.report().left_alone.values()


def test_both_back_ends_are_one():
    one, other = (Loop(METHODS["gradual"](), backend=b).train(12) for b in ("prune", "inplace"))
    assert same(one.model.state_dict(), other.model.state_dict())


def test_without_an_optimizer_steps_are_counted():
    run = Run(build("plain"), METHODS["gradual"](), optimizer=nets.sgd, given=False).train(10)
    lowered = 0
    for row in run.pruner.report().layers:
        weight = read(run.model, row.name)
        if factors.most(weight.shape) >= row.rank:
            assert factors.numerical_rank(weight) == row.rank
            lowered += 1
    assert lowered


def test_a_step_after_the_last_update_does_not_escape_finalize():
    loop = Loop(LowRank(0.6)).train(2)
    with torch.no_grad():
        loop.model.trunk[0].weight.add_(torch.randn(24, 12))
    loop.pruner.finalize()
    assert factors.numerical_rank(loop.model.trunk[0].weight) == loop.ranks[0]


def test_a_copy_in_training_goes_on_alike():
    loop = Loop(METHODS["gradual"]()).train(5)
    twin = copy.deepcopy(loop.model)
    x = loop.batch()
    assert torch.equal(twin(x)["a"], loop.model(x)["a"])
    assert list(twin.state_dict()) == list(Two().state_dict())


def test_scaled_losses_give_the_same_ranks():
    class Scaler:
        def get_scale(self):
            return 1024.0

    found = []
    for scaler in (None, Scaler()):
        loop = Loop(LowRank(0.6))
        x = loop.batch()
        loop.pruner.observe(loop.model(x), x, scaler=scaler)
        loop.pruner.step()
        found.append(spans(loop))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_folded_backward_is_the_same():
    found = []
    for fold in (False, True):
        loop = Loop(LowRank(0.6))
        for _ in range(3):
            x = loop.batch()
            loop.optimizer.zero_grad()
            losses = loop.pruner.observe(loop.model(x), x, fold=fold)
            if not fold:
                sum(losses.values()).backward()
            loop.optimizer.step()
            loop.pruner.step()
            loop.at += 1
        found.append(spans(loop))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_pruning_over_batches():
    loop = Loop(METHODS["gradual"]())
    x = loop.batch()
    report = loop.pruner.prune([x, x], progress=False)
    assert report.sparsity >= 0.6
    loop = Loop(METHODS["learned"]())
    with pytest.raises(RuntimeError, match="has had no update to learn from"):
        loop.pruner.prune([x, x], progress=False)


# Checkpoints.


def by(method):
    return Loop(METHODS[method]())


@pytest.mark.parametrize(
    ("at", "order"), [*((4, order) for order in ORDERS), (1, ORDERS[0]), (9, ORDERS[0])]
)
@EVERY_METHOD
def test_a_resumed_run_is_the_uninterrupted_run(method, at, order):
    whole = record(by, method)
    state = through_a_file(whole.at(at).checkpoint)
    resumed = load(by(method), state, order).train(12 - at)
    assert_ends_like(resumed, whole.at(12))
    assert whole.at(12).sparsity == resumed.pruner.sparsity


def test_a_state_saved_after_the_end_still_holds_the_ranks():
    loop = Loop(METHODS["gradual"]()).train(10)
    loop.pruner.finalize()
    resumed = Loop(METHODS["gradual"]())
    resumed.model.load_state_dict(loop.model.state_dict())
    resumed.pruner.load_state_dict(loop.pruner.state_dict())
    resumed.at = 10
    resumed.train(3)
    assert resumed.pruner.sparsity == loop.pruner.sparsity
    assert [factors.numerical_rank(resumed.model.trunk[i].weight) for i in (0, 2)] == loop.ranks


# Learned gates.


def test_gates_start_open_and_change_nothing():
    loop = Loop(LowRank(0.5, "learned", schedule=Cubic(0, 50, 1), rate=1e-6))
    before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    loop.step(train=False)
    assert list(checkpoints.gates(loop.pruner)) == ["trunk.0.weight", "trunk.2.weight"]
    for name, weight in loop.model.named_parameters():
        assert torch.allclose(weight, before[name], atol=1e-5)
    assert loop.pruner.sparsity == 0.0


@pytest.mark.long
@pytest.mark.slow
def test_gates_close_until_the_constraint_is_met():
    loop = Loop(
        LowRank(0.6, "learned", schedule=Hold(Linear(0, 100, 1), until=300, every=1), floor=0.0)
    )
    shares, seconds = [], []
    for _ in range(290):
        loop.step()
        memory = checkpoints.memory(loop.pruner)
        seconds.append(memory["multipliers"][1])
        cost = {"trunk.0.weight": 36.0, "trunk.2.weight": 40.0}
        open_ = sum(
            cost[n] * float(gates.open_probability(x).sum()) for n, x in memory["log_alpha"].items()
        )
        shares.append(open_ / 672)
    assert seconds == sorted(seconds)  # the second multiplier only grows
    assert seconds[0] >= 0.0
    assert abs(shares[-1] - 0.4) < 0.1
    assert loop.pruner.sparsity == 0.0  # nothing is removed before the last update
    loop.train(12)
    assert 0.0 <= loop.pruner.sparsity - 0.6 < 40 / 672


@pytest.mark.slow
def test_what_a_layer_is_sure_of_does_not_fade():
    method = LowRank(0.6, "learned", schedule=Linear(0, 100, 1), floor=1.0, min_rank=0)
    still = Loop(dataclasses.replace(method, rate=1e-12)).train(1)
    start = checkpoints.memory(still.pruner)["log_alpha"]
    loop = Loop(method).train(90)
    for name, x in checkpoints.memory(loop.pruner)["log_alpha"].items():
        high, wide = read(loop.model, name).shape
        sure = int(0.4 * high * wide / (high + wide))
        assert int((x >= start[name].max() - 1e-9).sum()) >= sure > 0


@pytest.mark.slow
def test_gates_find_what_matters():
    """A layer of which the loss reads three directions, none of them large."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 16, bias=False)
    with torch.no_grad():
        left, _ = torch.linalg.qr(torch.randn(16, 12))
        right, _ = torch.linalg.qr(torch.randn(12, 12))
        layer.weight.copy_(left @ torch.linspace(3, 1, 12).diag() @ right.t())
    target = layer.weight.detach().clone()
    read = left[:, [3, 7, 11]] @ left[:, [3, 7, 11]].t()
    model = nn.ModuleDict({"l": layer})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    schedule = Hold(Linear(0, 60, 1), until=150, every=1)
    method = LowRank(1 - 3 * 28 / 192, "learned", schedule=schedule, floor=0.0)
    pruner = MultitaskPruner(model, ["a", "b"], "l", method=method, optimizer=optimizer)
    for _ in range(152):
        x = torch.randn(128, 12)
        off = (x @ (layer.weight - target).t() + torch.randn(128, 16)) @ read
        losses = {"a": off.square().mean(), "b": 5 * off.abs().mean()}
        pruner.observe_losses(losses)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        pruner.step()
    assert pruner.report().layers[0].rank == 3
    kept = torch.linalg.svd(layer.weight.detach().double())[0][:, :3].float()
    assert float((read @ kept).norm()) == pytest.approx(3**0.5, abs=0.1)


def test_the_step_of_the_gates_goes_down_the_lagrangian():
    """In logit p, per parameter: minus the derivative in p, by autograd, times C / c."""
    method = LowRank(0.6, "learned", schedule=Linear(0, 100, 1), rate=0.01, floor=0.0, min_rank=0)
    loop = Loop(method)
    loop.train(30)
    before = checkpoints.memory(loop.pruner)
    loop.step()
    after = checkpoints.memory(loop.pruner)
    names = list(before["log_alpha"])
    x = torch.cat([before["log_alpha"][name] for name in names])
    cost = torch.tensor([36.0] * 12 + [40.0] * 16).double()
    p = gates.open_probability(x).requires_grad_()
    saved = 1 - (cost * p).sum() / cost.sum()
    due = loop.pruner.report().step / 100 * (1 - 0.4 * 672 / float(cost.sum()))
    l1, l2 = before["multipliers"]
    worth = after["worth"] / (1 - 0.9 ** after["count"])
    gap = saved - due
    (l1 * gap + l2 * gap**2 - (cost * worth * p).sum() / cost.sum()).backward()
    moved = torch.cat([after["log_alpha"][name] for name in names]) - x
    assert torch.allclose(moved, -0.01 * p.grad * cost.sum() / cost, atol=1e-9)
    gap = gap.item()
    assert after["multipliers"] == pytest.approx([l1 + 0.01 * gap, l2 + 0.01 * gap**2])


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sparsity": 90}, ValueError, r"Did you mean 0\.9"),
        ({"gates": "hard"}, ValueError, "`gates` must be 'saliency' or 'learned'. Got 'hard'"),
        ({"vote": 3}, TypeError, "`vote` must be a function"),
        ({"vote": votes.at_least}, TypeError, r"must be at_least\(m\)"),
        ({"schedule": OneShot}, TypeError, "`schedule` must be a schedule"),
        ({"schedule": Regrow(10, 100)}, ValueError, "Ranks need a schedule that ends"),
        ({"gates": "learned"}, ValueError, "gates='learned' needs time to learn"),
        ({"floor": 1.5}, ValueError, r"`floor` is a share, in \[0, 1\]. Got 1.5"),
        ({"min_rank": -1}, ValueError, "`min_rank` must be a whole number, at least 0. Got -1"),
        ({"observations": "auto"}, ValueError, "`observations` must be a whole number, at least 1"),
        ({"rate": 0.0}, ValueError, "`rate` must be positive"),
        ({"budget_unit": "flops"}, ValueError, "`budget_unit` must be 'params' or 'macs'. Got 'fl"),
        ({"budget_unit": "macs"}, ValueError, "budget_unit='macs' needs `example_inputs`"),
    ],
)
def test_mistakes(arguments, error, match):
    with pytest.raises(error, match=match):
        LowRank(**{"sparsity": 0.5, **arguments})


@pytest.mark.parametrize("method", [LowRank(0.5), recipes.flop(0.5, 100)])
def test_a_model_with_nothing_to_factor(method):
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3),
        *(nn.Conv2d(4, 4, 3, groups=4) for _ in range(5)),
        nn.LSTM(4, 4),
    )
    message = (
        r"LowRank can prune none of these layers: '0\.weight' \(ConvTranspose2d: only nn\.Linear, "
        r"nn\.Conv1d to nn\.Conv3d and experts can become two layers\); '1\.weight', '2\.weight', "
        r"'3\.weight' and 2 more \(Conv2d: a convolution with groups is no single matrix\); "
        r"'6\.weight_ih_l0', .* \(LSTM: only .*\)\. Take another method for this model: "
        r"mtprune\.Vote\(sparsity\) prunes single weights of Linear, Bilinear, "
    )
    with pytest.raises(ValueError, match=message):
        MultitaskPruner(model, ["a"], method=method)


def test_weights_that_are_not_finite():
    loop = Loop(LowRank(0.5))
    x = loop.batch()
    outputs = loop.model(x)
    with torch.no_grad():
        loop.model.trunk[0].weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"Weights of 'trunk\.0\.weight' are not finite"):
        loop.pruner.observe(outputs, x)


def test_losses_that_are_not_finite():
    loop = Loop(LowRank(0.5), scales={"a": float("inf")})
    with pytest.raises(RuntimeError, match="Loss of task 'a' is not finite"):
        loop.step(train=False)
    assert loop.pruner.sparsity == 0.0


# The recipe.


def test_flop_in_fractions_of_the_run():
    assert recipes.flop(0.5, 1_000) == LowRank(
        0.5, "learned", schedule=Hold(Linear(100, 450, 3), until=800, every=3)
    )
    assert recipes.flop(0.5, 1_000, gates="saliency", disentangled=False, floor=0.0) == LowRank(
        0.5, schedule=Cubic(100, 800, 70), floor=0.0, disentangled=False
    )
    assert recipes.flop(0.5, 2).schedule.next_update(-1) is not None
    with pytest.raises(ValueError, match="leave nothing of the run"):
        recipes.flop(0.5, 100, warmup=0.5, cooldown=0.5)


@pytest.mark.parametrize("gates", ["saliency", "learned"])
def test_the_export_is_the_pruned_model(gates):
    loop = Loop(recipes.flop(0.7, 40, gates=gates), exclude=()).train(40)
    loop.pruner.finalize()
    x = loop.batch()
    fast = mtprune.compress(loop.model, x, measure=prefer("rank"))
    plan = mtprune.plan_of(fast)
    assert plan["trunk.0"].choice == plan["trunk.2"].choice == "rank"
    assert [fast.trunk[i].down.out_features for i in (0, 2)] == loop.ranks[:2]
    with torch.no_grad():
        for task, expected in loop.model(x).items():
            assert (fast(x)[task] - expected).norm() / expected.norm() < 1e-5
