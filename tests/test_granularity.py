"""Granularities: literals, and what must be true of all of them on every net."""

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtprune
from mtprune import (
    NM,
    Block,
    Channel,
    Cubic,
    Element,
    Grouped,
    Head,
    Linear,
    MultitaskPruner,
    Neuron,
    PerTaskKeep,
    Regrow,
    Vote,
    affinity,
    recipes,
    saliency,
    votes,
)
from mtprune.structure import NOBODY, Group, Member
from tests.nets import Run, build, each, same, size, zeros
from tests.oracles import unit_masks, unit_sums
from tests.pairs import pairs
from tests.runs import record
from tests.test_resume import assert_ends_like, load, through_a_file

# --- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_the_mask_of_blocks_is_a_kronecker_product(rows, columns):
    """Oracle O16, for edges that are cut too."""
    high, wide = 6, 10
    block = Block(rows, columns)
    units = torch.rand(-(-high // rows), -(-wide // columns)) > 0.5
    whole = torch.kron(units, torch.ones(rows, columns, dtype=torch.bool))[:high, :wide]
    assert torch.equal(block.spread(units.reshape(-1), (high, wide)), whole)
    assert torch.equal(block.spread(units.reshape(-1), (high, 2, 5)), whole.view(high, 2, 5))


def test_blocks_add_up_what_is_in_them():
    values = torch.arange(12.0).view(3, 2, 2)  # seen as [3, 4]
    assert Block(2, 3).pool(values).tolist() == [
        0 + 1 + 2 + 4 + 5 + 6,
        3 + 7,
        8 + 9 + 10,
        11,
    ]
    assert Block(9, 9).pool(values).tolist() == [66.0]
    assert Block(1, 1).pool(values).tolist() == list(range(12))
    assert Block(2, 1).pool(torch.tensor([1.0, 2, 4])).tolist() == [3.0, 4.0]


def test_a_pattern_runs_along_input_channels_at_each_place_of_the_kernel():
    worth = torch.zeros(1, 4, 2)
    worth[0, :, 0] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    worth[0, :, 1] = torch.tensor([0.4, 0.1, 0.1, 0.1])
    mask = NM(2, 4).best(worth, 2)
    assert mask[0, :, 0].tolist() == [False, True, True, False]
    assert mask[0, :, 1].tolist() == [True, True, False, False]


def test_what_no_pattern_fits_is_told_apart():
    model = nn.ModuleDict(
        {
            "fits": nn.Conv2d(8, 2, 3),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "odd": nn.Linear(6, 8),
            "up": nn.ConvTranspose1d(8, 8, 3),
        }
    )
    pruner = MultitaskPruner(model, ["a"], method=Vote(granularity=NM(2, 4)))
    report = pruner.report()
    assert [row.name for row in report.layers] == ["fits.weight"]
    assert report.left_alone == {
        "depthwise.weight": "its 1 inputs are not a multiple of 4",
        "odd.weight": "its 6 inputs are not a multiple of 4",
        "up.weight": "2 of 4 inputs is not for ConvTranspose1d",
    }


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Block(0, 2), ValueError, "`rows` must be a whole number, at least 1. Got 0"),
        (lambda: Block(2, 1.5), ValueError, "`columns` must be a whole number.* Got 1.5"),
        (lambda: Block(True, 1), ValueError, "`rows` must be a whole number.* Got True"),
        (lambda: NM(0, 4), ValueError, "`n` must be a whole number, at least 1. Got 0"),
        (lambda: NM(4, 4), ValueError, "`n` must be less than `m`. Got 4 of 4"),
        (lambda: Grouped([]), TypeError, "`given` must be groups"),
        (lambda: Grouped(iter(())), TypeError, "`given` must be groups"),
        (lambda: Grouped(["a"]), TypeError, r"`given` must be groups .*Got \('a',\)"),
        (lambda: Vote(0.5, granularity=()), TypeError, "`granularity` is empty"),
        (lambda: Vote(0.5, granularity=Block), TypeError, "`granularity` must be a granularity"),
        (
            lambda: Vote(0.5, granularity=(Block(2, 2),)),
            TypeError,
            r"In a tuple, `granularity` must span layers.* Got Block\(rows=2, columns=2\)",
        ),
        (
            lambda: Vote(0.9, granularity=NM(2, 4)),
            ValueError,
            r"NM\(n=2, m=4\) fixes the sparsity: it is 0\.5\. Leave sparsity=0\.9 out",
        ),
        (lambda: Vote(macs=0.5, granularity=NM()), ValueError, "fixes the .* Leave macs=0.5 out"),
        (
            lambda: Vote(PerTaskKeep(0.5), granularity=NM()),
            ValueError,
            r"fixes the .* Leave sparsity=PerTaskKeep",
        ),
        (
            lambda: Vote(granularity=NM(), allocation="global"),
            ValueError,
            r"NM\(n=2, m=4\) keeps the same share of every layer: leave `allocation` out",
        ),
        (
            lambda: Vote(0.5, granularity=Block(2, 2), schedule=Regrow(1, 9), allocation="erk"),
            ValueError,
            r"Regrow exchanges single weights; Block\(rows=2, columns=2\) prunes",
        ),
        (
            lambda: Vote(0.5, granularity=Block(2, 2), allocation={"shared": 0.5}),
            ValueError,
            "An allocation by component counts single weights, and a unit of Block",
        ),
        (
            lambda: Vote(0.5, macs=0.5, granularity=Block(2, 2)),
            ValueError,
            "One of `sparsity`, `macs`, `speedup` and `latency` says .* Got sparsity and macs",
        ),
        (lambda: Vote(macs=0), ValueError, r"`macs` is what stays, in \(0, 1\]. Got 0"),
        (lambda: Vote(macs=50), ValueError, r"`macs` is .* Got 50. Did you mean 0\.5\?"),
        (lambda: Vote(macs="half"), TypeError, "`macs` must be a number. Got 'half'"),
        (lambda: Vote(speedup=0.5), ValueError, "`speedup` must be at least 1. Got 0.5"),
        (lambda: Vote(speedup=2.0), ValueError, "`speedup` needs units that can be left out"),
        (
            lambda: Vote(speedup=2.0, granularity=Block(4, 4)),
            ValueError,
            "`speedup` needs `example_inputs`: what the model is called with",
        ),
    ],
)
def test_what_means_nothing_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_pattern_says_its_sparsity():
    assert Vote(granularity=NM(2, 4)).target == 0.5
    assert Vote(granularity=NM(2, 4)).sparsity is None
    assert Vote(2 / 3, granularity=NM(1, 3)).target == Vote(granularity=NM(1, 3)).target
    assert dataclasses.replace(Vote(granularity=NM(2, 4)), granularity=NM(1, 4)).target == 0.75


def test_methods_with_units_are_values_and_say_what_they_are():
    group = Group("hidden", 2, (Member("0.weight", 0, (0, 1)),))
    method = Vote(0.5, granularity=(Grouped(group),))
    assert method == dataclasses.replace(method)
    assert method.granularity == (Grouped([group]),)
    assert hash(method.granularity) == hash((Grouped([group]),))
    assert Grouped(group) != Grouped([group, Group("more", 2, (Member("2.weight", 0, (0, 1)),))])
    assert dataclasses.replace(Grouped(group)).names == ("hidden",)
    assert mtprune.methods.describe(method, defaults=False) == (
        "Vote(sparsity=0.5, granularity=(Grouped(names=('hidden',)),))"
    )


# --- A net by hand -------------------------------------------------------------------------------


class Two(nn.Module):
    """Six inputs, two hidden layers of 8 and 4, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.mid = nn.Linear(8, 4)
        self.a = nn.Linear(4, 1)
        self.b = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.mid(self.up(x).relu()).relu()
        return {"a": self.a(hidden), "b": self.b(hidden)}


def members(up: str, *down: str, size: int) -> tuple[Member, ...]:
    units = tuple(range(size))
    readers = tuple(Member(f"{name}.weight", 1, units, "in") for name in down)
    return (Member(f"{up}.weight", 0, units), Member(f"{up}.bias", 0, units), *readers)


HIDDEN = Group("hidden", 8, members("up", "mid", size=8))
FEATURES = Group("features", 4, members("mid", "a", "b", size=4))
LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "a": lambda outputs, x: (outputs["a"] - 1).square().mean(),
    "b": lambda outputs, x: outputs["b"].abs().mean(),
}


def prune(method, model=None, *, losses=LOSSES, shared=("up", "mid"), batches=1, **options):
    model = Two() if model is None else model
    pruner = MultitaskPruner(model, losses, list(shared), method=method, **options)
    data = [torch.randn(16, 6, generator=torch.Generator().manual_seed(i)) for i in range(batches)]
    pruner.prune(data, progress=False)
    return pruner


def test_saliency_is_the_sum_over_all_places_of_a_unit():
    """By hand, from gradients; the least salient half of the neurons goes."""
    torch.manual_seed(3)
    model = Two()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    worth = []
    for loss in LOSSES.values():
        model.zero_grad()
        loss(model(x), x).backward()
        rows = (model.up.weight * model.up.weight.grad).abs().sum(1)
        worth.append(rows + (model.mid.weight * model.mid.weight.grad).abs().sum(0))
    rank = torch.stack(worth).argsort(1).argsort(1)
    best = rank.amax(0)
    order = sorted(range(8), key=lambda i: (-int(best[i]), i))
    pruner = prune(Vote(0.5, granularity=Grouped(HIDDEN)), model)
    kept = pruner.masks["up.weight"][:, 0].nonzero().flatten().tolist()
    assert kept == sorted(order[:4])
    assert pruner.sparsity == 0.5
    assert torch.equal(pruner.masks["mid.weight"][0], pruner.masks["up.weight"][:, 0])
    [group] = pruner.report().groups
    assert (group.name, group.units, group.kept) == ("hidden", 8, 4)
    assert "hidden      8     4" in str(pruner.report())
    assert "Left alone: a.weight, b.weight (no unit lies in it)." in str(pruner.report())
    assert list(pruner.masks) == ["up.weight", "mid.weight"]


def test_a_tuple_shares_one_budget():
    both = Vote(0.4, granularity=Grouped([HIDDEN, FEATURES]))
    pair = Vote(0.4, granularity=(Grouped(HIDDEN), Grouped(FEATURES)))
    torch.manual_seed(5)
    state = Two().state_dict()

    def masks(method):
        model = Two()
        model.load_state_dict(state)
        return prune(method, model).masks

    assert same(masks(both), masks(pair))


def test_the_sparsity_is_that_of_the_weights_even_where_units_cross():
    """A weight of `mid` goes with its row or its column, and is counted once."""
    for sparsity in (0.0, 0.2, 0.5, 0.8):
        pruner = prune(Vote(sparsity, granularity=Grouped([HIDDEN, FEATURES])))
        masks = pruner.masks
        assert pruner.sparsity == zeros(masks) / size(masks)
        wanted = round(sparsity * 88)
        assert wanted <= zeros(masks) < wanted + 10  # the largest unit: 6 + 4 weights
        hidden = masks["up.weight"][:, 0]
        features = masks["a.weight"][0]
        assert torch.equal(masks["mid.weight"], features[:, None] & hidden)
        assert hidden.any()
        assert features.any()
        pruner.finalize()


def planted(seed: int = 0) -> Two:
    """Task a reads what neurons 0 to 3 make, task b what 4 to 7 make; a unit each in between."""
    torch.manual_seed(seed)
    model = Two()
    with torch.no_grad():
        model.mid.bias.fill_(1.0)
        model.up.bias.fill_(1.0)
        model.up.weight.mul_(0.1)
        model.mid.weight.zero_()
        model.mid.weight[:2, :3] = 0.1 + torch.rand(2, 3)
        model.mid.weight[2:, 4:7] = 0.1 + torch.rand(2, 3)
        model.a.weight.copy_(torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
        model.b.weight.copy_(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    return model


@pytest.mark.parametrize("factor", [1.0, 1e6, 1e-6])
def test_each_task_keeps_its_own_and_the_vote_keeps_the_union(factor):
    """Oracle O18: disjoint halves of the neurons, and two that nobody needs."""
    model = planted()
    losses = {
        "a": lambda out, x: factor * (out["a"] - 1).square().mean(),
        "b": lambda out, x: (out["b"] - 1).square().mean(),
    }
    pruner = prune(Vote(0.25, granularity=Grouped(HIDDEN)), model, losses=losses)
    assert pruner.masks["up.weight"][:, 0].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6]
    pruner.finalize()
    for task, own in (("a", [0, 1, 2]), ("b", [4, 5, 6])):
        alone = prune(
            Vote(0.625, granularity=Grouped(HIDDEN)), planted(), losses={task: losses[task]}
        )
        assert alone.masks["up.weight"][:, 0].nonzero().flatten().tolist() == own
        wish = alone.task_masks[task]["mid.weight"][0].nonzero().flatten().tolist()
        assert wish == own


def test_what_each_task_alone_would_keep_is_told_in_weights():
    pruner = prune(Vote(0.625, granularity=Grouped(HIDDEN)), planted())
    wishes = {task: masks["up.weight"][:, 0] for task, masks in pruner.task_masks.items()}
    assert wishes["a"].nonzero().flatten().tolist() == [0, 1, 2]
    assert wishes["b"].nonzero().flatten().tolist() == [4, 5, 6]
    assert affinity.compare(pruner.task_masks).iou == 0.0
    row = pruner.report().components[0]
    assert row.want["a"] + row.want["b"] == pytest.approx(1.0)


def test_units_of_different_size_compete_by_saliency_per_weight():
    """One neuron of a hundred inputs has ten times the saliency of one of a single input."""
    model = nn.ModuleDict({"wide": nn.Linear(100, 2, bias=False), "thin": nn.Linear(1, 2)})
    with torch.no_grad():
        model["wide"].weight.fill_(1.0)
        model["thin"].weight.fill_(10.0)
    groups = [Group(name, 2, (Member(f"{name}.weight", 0, (0, 1)),)) for name in ("wide", "thin")]
    method = Vote(
        0.4, granularity=Grouped(groups), saliency=saliency.magnitude, allocation="global"
    )
    pruner = MultitaskPruner(model, {"t": lambda out, batch: out}, ["wide", "thin"], method=method)
    losses = {"t": model["wide"].weight.sum() + model["thin"].weight.sum()}
    pruner.observe_losses(losses)
    pruner.step()
    assert {group.name: group.kept for group in pruner.report().groups} == {"wide": 1, "thin": 2}


def test_a_pattern_keeps_n_of_every_m():
    torch.manual_seed(0)
    pruner = prune(Vote(granularity=NM(2, 4)))
    assert list(pruner.masks) == ["mid.weight", "a.weight", "b.weight"]
    for mask in pruner.masks.values():
        assert (mask.view(-1, 4).sum(1) == 2).all()
    assert pruner.sparsity == 0.5
    assert pruner.report().left_alone == {"up.weight": "its 6 inputs are not a multiple of 4"}
    for masks in pruner.task_masks.values():
        assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in masks.values())


def test_a_pattern_is_by_the_vote():
    """Of four inputs the one that some task ranks highest among all that it uses."""
    torch.manual_seed(0)
    model = Two()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    shares = []
    for task, loss in LOSSES.items():
        model.zero_grad()
        loss(model(x), x).backward()
        own = (model.mid.weight, getattr(model, task).weight)
        scores = [(weight * weight.grad).abs().flatten() for weight in own]
        every = torch.cat(scores)
        shares.append(torch.stack([(every < score).double().mean() for score in scores[0]]))
    worth = torch.stack(shares).amax(0).view(4, 2, 4)
    mask = prune(Vote(granularity=NM(1, 4)), model).masks["mid.weight"].view(4, 2, 4)
    assert torch.equal(mask.int().argmax(2), worth.argmax(2))


# --- Found by patterns, and by torch-pruning ------------------------------------------------------


def test_heads_and_neurons_share_a_budget():
    run = Run(build("transformer_encoder"), Vote(0.5, granularity=(Head(), Neuron())))
    run.train(2)
    report = run.pruner.report()
    kinds = [group.name.rpartition(".")[2] for group in report.groups]
    assert kinds == ["heads", "heads", "neurons", "neurons"]
    assert [group.units for group in report.groups] == [2, 2, 12, 12]
    assert set(report.left_alone.values()) == {"no unit lies in it"}
    masks = run.pruner.masks
    # The largest unit is a head: 4 rows of each third of 8 inputs, and 4 columns of 8 outputs.
    assert 0 <= zeros(masks) - round(0.5 * size(masks)) < 4 * 4 * 8
    for at in range(2):
        name = f"trunk.encoder.layers.{at}"
        heads = masks[f"{name}.self_attn.in_proj_weight"][:, 0].view(3, 2, 4)
        assert (heads == heads[:1, :, :1]).all()
        columns = masks[f"{name}.self_attn.out_proj.weight"][0].view(2, 4)
        assert torch.equal(columns, heads[0])
        up, down = masks[f"{name}.linear1.weight"], masks[f"{name}.linear2.weight"]
        assert torch.equal(up[:, 0], down[0])
    assert json.loads(json.dumps(report.to_dict()))["groups"][0]["units"] == 2


def test_what_was_looked_for_is_named():
    with pytest.raises(ValueError, match="Plain has no attention heads where the patterns look"):
        Run(build("plain"), Vote(0.5, granularity=Head()))


def test_channels_of_a_network_and_a_budget_of_multiply_adds():
    pytest.importorskip("torch_pruning")
    net = build("conv_bn")
    inputs = net.make_batch(0)["x"]
    method = Vote(speedup=1.6, granularity=Channel(inputs))
    assert method.inputs_to_measure is inputs
    other = dataclasses.replace(method, granularity=Channel(inputs + 1))
    assert other.inputs_to_measure is other.granularity.example_inputs
    run = Run(net, method)
    run.train(2)
    report = run.pruner.report()
    assert {group.units for group in report.groups} == {4}
    first, second = (run.pruner.masks[f"trunk.{i}.weight"] for i in (0, 3))
    assert torch.equal(first[:, 0, 0, 0], second.flatten(2).any(2).any(0))
    assert report.macs_sparsity is not None
    assert report.macs_sparsity >= 1 - 1 / 1.6


# --- Budgets of multiply-adds --------------------------------------------------------------------


class Convs(nn.Module):
    """The early layer has few weights and many multiply-adds."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(2, 8, 3, padding=1)
        self.late = nn.Conv2d(8, 8, 3, stride=4)
        self.a = nn.Linear(8, 1)
        self.b = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.late(self.early(x).relu()).relu().amax((2, 3))
        return {"a": self.a(features), "b": self.b(features)}


CONVS = (
    Group("early", 8, members("early", "late", size=8)),
    Group("late", 8, members("late", "a", "b", size=8)),
)
IMAGE = torch.randn(2, 2, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"speedup": 2.0}, {"speedup": 3}])
@pytest.mark.parametrize("allocation", ["floor", "global", "uniform"])
def test_multiply_adds_stay_within_one_unit_of_the_budget(budget, allocation):
    torch.manual_seed(1)
    model = Convs()
    costs = {"early": 12 * 12, "late": 3 * 3, "a": 1, "b": 1}  # pixels that each weight meets
    whole = sum(costs[name] * model.get_submodule(name).weight.numel() for name in costs)
    method = Vote(granularity=Grouped(CONVS), example_inputs=IMAGE, allocation=allocation, **budget)
    pruner = MultitaskPruner(model, LOSSES, ["early", "late"], method=method)
    report = pruner.prune([IMAGE], progress=False)
    stays = budget.get("macs", 1 / budget.get("speedup", 1))
    kept = sum(cost * int(pruner.masks[f"{name}.weight"].sum()) for name, cost in costs.items())
    largest = max(
        costs["early"] * 18 + costs["late"] * 72,  # a channel: its row, and what reads it
        costs["late"] * 72 + costs["a"] + costs["b"],
    )
    assert kept <= stays * whole < kept + largest
    assert report.macs_sparsity == pytest.approx(1 - float(kept / whole))
    assert "of the multiply-adds fall on pruned weights" in str(report)


def test_a_budget_of_multiply_adds_prunes_where_they_are():
    """The same share of weights would take more channels from the late layer."""

    def kept(**budget):
        torch.manual_seed(1)
        method = Vote(
            granularity=Grouped(CONVS), example_inputs=IMAGE, allocation="global", **budget
        )
        pruner = MultitaskPruner(Convs(), LOSSES, ["early", "late"], method=method)
        report = pruner.prune([IMAGE], progress=False)
        return report.macs_sparsity, {group.name: group.kept for group in report.groups}

    share, by_weights = kept(sparsity=0.5)
    less, by_macs = kept(macs=1 - share)
    assert less >= share - 1e-9
    assert by_macs["early"] <= by_weights["early"]


def test_multiply_adds_are_told_if_there_is_something_to_measure_them_on():
    x = torch.randn(4, 6)
    pruner = prune(Vote(0.5, granularity=Grouped(HIDDEN), example_inputs=x))
    assert pruner.report().macs_sparsity == 40 / 88
    pruner = prune(Vote(0.5, example_inputs=x))
    assert pruner.report().macs_sparsity == 0.5
    assert prune(Vote(0.5)).report().macs_sparsity is None


def test_what_stays_dense_counts_in_a_budget_of_multiply_adds():
    model = Two()
    hidden = Group("features", 4, members("mid", "a", "b", size=4))
    x = torch.randn(4, 6)
    with pytest.raises(
        ValueError,
        match=r"Layers that Grouped\(names=\('features',\)\) leaves alone take 54\.5% of the "
        r"multiply-adds, more than the 50\.0% that may stay",
    ):
        MultitaskPruner(
            model,
            LOSSES,
            ["up", "mid"],
            method=Vote(macs=0.5, granularity=Grouped(hidden), example_inputs=x),
        )
    pruner = prune(Vote(macs=0.75, granularity=Grouped(hidden), example_inputs=x), model)
    assert zeros(pruner.masks) >= 22
    assert pruner.report().macs_sparsity == zeros(pruner.masks) / 88


# --- On every net --------------------------------------------------------------------------------


class Rows:
    """Every first index of every weight is a unit: a granularity in a few lines."""

    def groups(self, model, layers):
        return [
            Group(x.name, x.shape[0], (Member(x.name, 0, tuple(range(x.shape[0]))),))
            for x in layers
        ]


class Crossed:
    """Rows and columns of the same weights."""

    def groups(self, model, layers):
        return [
            Group(
                f"{x.name} {dim}",
                x.shape[dim],
                (Member(x.name, dim, tuple(range(x.shape[dim]))),),
            )
            for x in layers
            for dim in range(len(x.shape))
        ]


class Halves:
    """Two units that lie in all layers, and what belongs to none."""

    def groups(self, model, layers):
        units = [
            Member(x.name, 0, tuple(NOBODY if i % 5 == 4 else i % 2 for i in range(x.shape[0])))
            for x in layers
        ]
        return [Group("halves", 2, tuple(units))]


def in_units(granularity, masks):
    """The masks that keep each unit of which anything is kept; the weights of the largest unit."""
    if hasattr(granularity, "pool"):
        kept = {
            n: granularity.spread(granularity.pool(m.float()) > 0, m.shape)
            for n, m in masks.items()
        }
        return kept, max(
            float(granularity.pool(torch.ones_like(m).float()).max()) for m in masks.values()
        )
    layers = [SimpleNamespace(name=name, shape=tuple(mask.shape)) for name, mask in masks.items()]
    kinds = granularity if isinstance(granularity, tuple) else (granularity,)
    groups = [group for kind in kinds for group in kind.groups(None, layers)]
    numbers = {name: mask.float() for name, mask in masks.items()}
    shapes = {name: mask.shape for name, mask in masks.items()}
    whole = unit_masks(groups, [unit_sums(group, numbers) > 0 for group in groups], shapes)
    alone = [
        zeros(unit_masks([group], [torch.arange(group.size) != unit], shapes))
        for group in groups
        for unit in range(group.size)
    ]
    return whole, max(alone)


GRANULARITIES: dict[str, Any] = {
    "block": Block(2, 3),
    "rows": Rows(),
    "crossed": Crossed(),
    "halves": Halves(),
    "both": (Rows(), Halves()),
}


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("net", each())
def test_masks_are_whole_units_and_the_budget_holds(net, name, device):
    method = Vote(0.5, granularity=GRANULARITIES[name], min_keep=0)
    run = Run(build(net, device), method)
    while not run.step():
        assert run.at < 4
    pruner = run.pruner
    masks = {layer: mask.cpu() for layer, mask in pruner.masks.items()}
    whole, largest = in_units(method.granularity, masks)
    assert same(whole, masks)
    wanted = round(0.5 * size(masks))
    assert wanted <= zeros(masks) < wanted + largest
    assert pruner.report().kept == size(masks) - zeros(masks)
    for task, wishes in pruner.task_masks.items():
        assert wishes, task
        assert zeros(wishes) >= round(0.5 * size(wishes))


@pytest.mark.parametrize("name", ["block", "rows", "crossed"])
@pytest.mark.parametrize("net", ["plain", "conv_bn", "attention", "transformer_encoder", "lstm"])
def test_no_group_is_emptied(net, name):
    """Under one ranking, with nothing but the guard between a group and its end."""
    method = Vote(0.6, granularity=GRANULARITIES[name], allocation="global")
    masks = Run(build(net), method).train(2).pruner.masks
    assert zeros(masks) >= round(0.6 * size(masks))
    assert all(bool(mask.any()) for mask in masks.values())


@pytest.mark.parametrize("net", ["plain", "conv_bn", "transformer_encoder", "lstm", "bfloat16"])
def test_a_pattern_on_nets(net, device):
    run = Run(build(net, device), Vote(granularity=NM(1, 2)))
    run.train(2)
    for mask in run.pruner.masks.values():
        assert (mask.movedim(1, -1).reshape(-1, 2).sum(1) == 1).all()
    assert run.pruner.sparsity == 0.5


METHODS: dict[str, Callable[[Any], Vote]] = {
    "one-shot": lambda g: Vote(0.6, granularity=g),
    "cubic": lambda g: Vote(0.6, granularity=g, schedule=Cubic(begin=1, end=5, every=2)),
    "linear, global": lambda g: Vote(
        0.6, granularity=g, schedule=Linear(begin=1, end=5, every=1), allocation="global"
    ),
    "erk, majority": lambda g: Vote(0.6, granularity=g, allocation="erk", vote=votes.majority),
    "mean, priority": lambda g: Vote(
        0.6, granularity=g, vote=votes.mean, priority={"a": 3.0}, allocation="uniform"
    ),
    "joint": lambda g: Vote(0.6, granularity=g, disentangled=False),
    "magnitude": lambda g: Vote(0.6, granularity=g, saliency=saliency.magnitude),
    "random": lambda g: Vote(0.6, granularity=g, saliency=saliency.random),
    "auto": lambda g: Vote(0.6, granularity=g, schedule=mtprune.OneShot(4), observations="auto"),
    "movement": lambda g: dataclasses.replace(recipes.movement(0.6, steps=8), granularity=g),
}


@pytest.mark.parametrize(
    ("name", "kind", "backend"), pairs(METHODS, ["rows", "block", "both"], ["prune", "inplace"])
)
def test_whatever_a_method_does_it_does_over_units(name, kind, backend):
    run = Run(build("plain"), METHODS[name](GRANULARITIES[kind]), backend)
    before: list[dict[str, Tensor]] = []
    for _ in range(70 if name == "auto" else 12):
        run.step()
        before.append(run.pruner.masks)
    masks = run.pruner.masks
    wanted = round(0.6 * size(masks))
    assert wanted <= zeros(masks) < wanted + 64
    if name in ("cubic", "linear, global"):
        for old, new in pairwise(before):
            assert all(bool((new[k] <= old[k]).all()) for k in new)
    if name == "movement":
        assert run.pruner.report().step is not None
    outputs = run.model(run.net.make_batch(99)["x"])["a"]
    run.pruner.finalize()
    assert torch.equal(outputs, run.model(run.net.make_batch(99)["x"])["a"])


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            Vote(granularity=NM(1, 4), schedule=Cubic(begin=1, end=5, every=1)), id="cubic"
        ),
        pytest.param(Vote(granularity=NM(1, 4), disentangled=False), id="joint"),
        pytest.param(Vote(granularity=NM(1, 4), saliency=saliency.magnitude), id="magnitude"),
        pytest.param(
            Vote(granularity=NM(1, 4), schedule=Cubic(0, 6, 2), straight_through=True), id="through"
        ),
    ],
)
def test_whatever_a_method_does_it_does_in_patterns(method, backend):
    run = Run(build("plain"), method, backend)
    before = []
    for _ in range(8):
        run.step()
        before.append(run.pruner.masks)
    kept = {name: mask.view(-1, 4).sum(1) for name, mask in run.pruner.masks.items()}
    assert len(kept) == 3
    assert all(bool((counts == 1).all()) for counts in kept.values())
    if not method.straight_through:
        for old, new in pairwise(before):
            assert all(bool((new[name] <= old[name]).all()) for name in new)


def test_folding_gives_the_same_masks():
    """Scores of units from the sweeps that are the backward too."""

    def masks(fold: bool):
        net = build("plain")
        pruner = MultitaskPruner(
            net.model, net.task_losses, "trunk", method=Vote(0.5, granularity=Rows())
        )
        batch = net.make_batch(0)
        pruner.observe(net.model(batch["x"]), batch, fold=fold)
        pruner.step()
        return pruner.masks

    assert same(masks(False), masks(True))


def test_both_back_ends_and_both_dtypes_of_scores_agree():
    def masks(backend="prune", **options):
        method = METHODS["cubic"](GRANULARITIES["both"])
        return Run(build("plain"), method, backend, **options).train(7).pruner.masks

    assert same(masks(), masks("inplace"))
    assert same(masks(), masks(score_dtype=torch.bfloat16))


def test_the_scale_of_a_loss_changes_nothing():
    def masks(factor: float):
        net = build("twelve_tasks")
        loss = net.task_losses["t3"]
        net.task_losses["t3"] = lambda outputs, batch: factor * loss(outputs, batch)
        run = Run(net, Vote(0.3, granularity=GRANULARITIES["both"]))
        return run.train(2).pruner.masks

    assert same(masks(1.0), masks(1e6))
    assert same(masks(1.0), masks(1e-6))


def test_per_task_keep_merges_the_tasks_own_units():
    torch.manual_seed(0)
    pruner = prune(Vote(PerTaskKeep(0.375), granularity=Grouped(HIDDEN)), planted())
    assert pruner.masks["up.weight"][:, 0].nonzero().flatten().tolist() == [0, 1, 2, 4, 5, 6]


def grouped(name, kind):
    return Run(build("plain"), METHODS[name](GRANULARITIES[kind]))


@pytest.mark.parametrize("kind", ["block", "both"])
@pytest.mark.parametrize("name", ["cubic", "movement"])
def test_training_resumes_to_the_same_masks(name, kind):
    straight = record(grouped, name, kind)
    second = load(grouped(name, kind), through_a_file(straight.at(4).checkpoint))
    assert second.pruner.report().groups == straight.at(4).report.groups
    assert_ends_like(second.train(6), straight.at(10))


def test_units_of_ones_own_have_the_same_name_in_every_process():
    method = Vote(0.5, granularity=(Rows(), Halves()))
    assert mtprune.methods.describe(method, defaults=False) == (
        "Vote(sparsity=0.5, granularity=(Rows, Halves))"
    )


def test_a_checkpoint_of_other_units_is_refused():
    first = Run(build("plain"), Vote(0.5, granularity=Rows())).train(2)
    second = Run(build("plain"), Vote(0.5, granularity=Block(2, 2)))
    with pytest.raises(ValueError, match="pruner with other method"):
        second.pruner.load_state_dict(first.pruner.state_dict())


def test_a_single_weight_as_a_block_is_an_element():
    """Oracle O16: the same masks, however they are allocated."""
    for options in ({}, {"allocation": "global"}, {"allocation": "erk"}, {"vote": votes.mean}):
        found = [
            Run(build("conv_bn"), Vote(0.7, granularity=g, **options)).train(2).pruner.masks
            for g in (Element(), Block(1, 1))
        ]
        assert same(*found)


def test_nothing_is_pruned_at_sparsity_0_and_all_but_one_unit_goes_at_the_end():
    pruner = prune(Vote(0.0, granularity=Grouped([HIDDEN, FEATURES])))
    assert zeros(pruner.masks) == 0
    pruner = prune(Vote(0.9, granularity=Grouped([HIDDEN, FEATURES])))
    assert [group.kept for group in pruner.report().groups] == [1, 1]
    with pytest.raises(
        ValueError,
        match=r"min_keep=1 in each of the 2 groups of Grouped\(.*\) keeps 10\.2%, more than the "
        r"5\.0% that may stay. Ask for less, or min_keep=0",
    ):
        prune(Vote(0.95, granularity=Grouped([HIDDEN, FEATURES])))
    pruner = prune(Vote(0.95, granularity=Grouped([HIDDEN]), min_keep=0))
    assert [group.kept for group in pruner.report().groups] == [0]


def test_a_frozen_layer_keeps_its_part_of_a_unit():
    model = Two()
    model.up.requires_grad_(False)
    pruner = prune(Vote(0.5, granularity=Grouped(HIDDEN)), model, shared=["mid"])
    assert list(pruner.masks) == ["mid.weight"]
    assert pruner.sparsity == 0.5
    assert pruner.report().left_alone["up.weight"] == "frozen"


def test_what_is_shared_may_hold_no_unit():
    """`shared_modules` names layers that the granularity does not cover."""
    pruner = prune(Vote(0.5, granularity=Grouped(FEATURES)), shared=["up", "mid"])
    assert "up.weight" not in pruner.masks
    assert pruner.report().left_alone == {"up.weight": "no unit lies in it"}
