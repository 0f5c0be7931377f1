"""The null of unrelated tasks: outputs beside other samples' targets, and nothing else changed."""

import random
from dataclasses import dataclass
from math import inf, isnan, nan
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mtprune import NM, Block, MultitaskPruner, Vote, saliency
from mtprune.affinity import Affinity, Contrast, compare, iou, permuted, suggest_split, watershed
from mtprune.affinity.likeness import Likeness
from mtprune.affinity.null import Draw, Null
from mtprune.affinity.pairing import deal, paired
from mtprune.facts import Subject
from mtprune.model.parts import Part
from mtprune.model.task_masks import PackedTaskMasks


class Net(nn.Module):
    """A trunk whose parts are named in another order than they run in, and heads."""

    def __init__(self, tasks=("seg", "depth"), width=12):
        super().__init__()
        self.a_last = nn.Linear(width, width)
        self.b_first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 2) for task in tasks})

    def forward(self, x):
        hidden = self.drop(self.norm(self.b_first(x)).relu())
        hidden = self.a_last(hidden).relu()
        return {task: head(hidden) for task, head in self.heads.items()}

    @property
    def trunk(self):
        return [self.a_last, self.b_first]


def loss_of(task):
    return lambda outputs, batch: (outputs[task] - batch[task]).square().mean()


def problem(tasks=("seg", "depth"), batches=2, size=8):
    """A net on random rows with random targets."""
    held = [
        {"x": torch.randn(size, 6), **{task: torch.randn(size, 2) for task in tasks}}
        for _ in range(batches)
    ]
    return Net(tasks), {task: loss_of(task) for task in tasks}, held


def forward(model, batch):
    return model(batch["x"])


def ask(model, losses, batches, **options):
    options = {"sparsity": 0.5, "draws": 2, "forward": forward, "progress": False, **options}
    return permuted(model, losses, batches, **options)


# --- Pairing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 9])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_tasks_are_dealt_outputs_of_other_samples_and_each_its_own(size, tasks):
    names = [f"t{i}" for i in range(tasks)]
    for seed in range(5):
        dealt = deal(size, names, torch.Generator().manual_seed(seed))
        assert all(sorted(order.tolist()) == list(range(size)) for order in dealt.values())
        orders = torch.stack(list(dealt.values()))
        if size > tasks:
            orders = torch.cat([torch.arange(size)[None], orders])  # nobody keeps its own
        for column in orders[:size].T:  # as many tasks as there are places: all different
            assert len(set(column.tolist())) == len(column)


def test_draws_are_different():
    generator = torch.Generator().manual_seed(0)
    dealt = [deal(8, ["seg", "depth"], generator)["seg"].tolist() for _ in range(20)]
    assert len({tuple(order) for order in dealt}) > 10


@dataclass
class Answer:
    logits: torch.Tensor
    name: str = "answer"


def test_outputs_move_whatever_they_are_in():
    order, rows = torch.tensor([2, 0, 1]), torch.tensor([[1.0], [2.0], [3.0]])
    moved = paired({"a": [rows, Answer(rows)], "scale": torch.ones(()), "two": rows[:2]}, order)
    assert moved["a"][0].flatten().tolist() == [3.0, 1.0, 2.0]
    assert moved["a"][1].logits.flatten().tolist() == [3.0, 1.0, 2.0]
    assert moved["a"][1].name == "answer"
    assert moved["scale"] == 1.0
    assert torch.equal(moved["two"], rows[:2])


def test_losses_see_the_batch_as_it_is_and_rows_of_outputs_elsewhere():
    model, losses, batches = problem(batches=1)
    seen = []

    def spied(task):
        def loss(outputs, batch):
            assert batch is batches[0]
            if torch.is_grad_enabled():
                seen.append((task, outputs[task].detach().clone()))
            return loss_of(task)(outputs, batch)

        return loss

    model.eval()
    ask(model, {task: spied(task) for task in losses}, batches, draws=3)
    plain = forward(model, batches[0])
    assert [task for task, _ in seen] == ["seg", "depth"] * 4
    assert all(torch.equal(outputs, plain[task]) for task, outputs in seen[:2])
    for task, outputs in seen[2:]:
        assert not (outputs == plain[task]).all(1).any()
        assert torch.equal(outputs.sort(0).values, plain[task].sort(0).values)


# --- No trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_is_changed(fails):
    model, losses, batches = problem()
    model.eval()
    model.norm.train()
    model.a_last.weight.grad = torch.ones_like(model.a_last.weight)
    if fails:
        losses["depth"] = lambda outputs, batch: (outputs["depth"] - nan).mean()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    same = {name: id(x) for name, x in model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    modes = [module.training for module in model.modules()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    if fails:
        with pytest.raises(RuntimeError, match=r"Loss of task 'depth' is not finite"):
            ask(model, losses, batches)
    else:
        ask(model, losses, batches)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert {name: id(x) for name, x in model.named_parameters()} == same
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn[1:]
    assert torch.equal(model.a_last.weight.grad, torch.ones_like(model.a_last.weight))
    assert model.b_first.weight.grad is None
    MultitaskPruner(model, list(losses))  # nobody owns it


def test_the_same_seed_draws_the_same():
    model, losses, batches = problem()
    one, again, other = (ask(model, losses, batches, seed=seed) for seed in (3, 3, 4))
    found = [compare(null.task_masks, null).null for null in (one, again, other)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Vote(0.5, observations=2), id="taylor"),
        pytest.param(Vote(0.5, saliency=saliency.fisher, observations=2), id="fisher"),
        pytest.param(Vote(0.5, voters=(saliency.magnitude,), observations=2), id="voters"),
    ],
)
def test_beside_their_own_targets_tasks_keep_what_the_pruner_says(method):
    model, losses, batches = problem()
    null = ask(model, losses, iter(batches * 3), shared_modules=model.trunk, method=method)
    pruner = MultitaskPruner(model, losses, model.trunk, method=method)
    pruner.prune(batches, forward=forward, progress=False)
    masks = pruner.task_masks
    assert {t: set(own) for t, own in null.task_masks.items()} == {t: set(masks[t]) for t in masks}
    for task, own in null.task_masks.items():
        assert all(torch.equal(mask, masks[task][name]) for name, mask in own.items())
    assert compare(masks, null) == compare(null.task_masks, null)


def test_layers_are_in_order_of_execution_with_their_multiply_adds():
    model, losses, batches = problem()
    null = ask(model, losses, batches)
    assert [layer.name for layer in null.layers] == [
        "b_first.weight",
        "a_last.weight",
        "heads.seg.weight",
        "heads.depth.weight",
    ]
    assert [layer.cost for layer in null.layers] == [1, 1, 1, 1]
    found = compare(null.task_masks, null)
    assert [layer.name for layer in found.layers] == ["b_first.weight", "a_last.weight"]


def test_a_convolution_reads_each_weight_at_every_place():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            return self.trunk(x).mean((2, 3))

    losses = {
        "one": lambda out, batch: (out[:, 0] - batch[:, 0, 0, 0]).square().mean(),
        "two": lambda out, batch: (out[:, 1] - batch[:, 1, 0, 0]).square().mean(),
    }
    batch = torch.randn(4, 3, 6, 5)
    null = permuted(Conv(), losses, [batch], sparsity=0.5, draws=1, progress=False)
    assert [layer.cost for layer in null.layers] == [30]


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda out: SimpleNamespace(out=out),
            r"Outputs have no batch dimension .* Got SimpleNamespace\. Let `forward` return",
            id="no container",
        ),
        pytest.param(
            lambda out: out["seg"].sum(), r"no batch dimension .*a tensor of shape \(\)", id="a sum"
        ),
        pytest.param(
            lambda out: {"seg": out["seg"], "depth": out["depth"][:4]},
            r"Outputs hold tensors of 4, 8 rows, so they do not tell which dimension",
            id="two sizes",
        ),
    ],
)
def test_outputs_without_samples_first_are_refused(change, message):
    model, losses, batches = problem()
    with pytest.raises(ValueError, match=message):
        ask(model, dict.fromkeys(losses, lambda outputs, batch: None), batches,
            forward=lambda model, batch: change(forward(model, batch)))  # fmt: skip


def test_a_batch_of_one_sample_is_refused():
    model, losses, batches = problem()
    batches.append({name: rows[:1] for name, rows in batches[0].items()})
    model.eval()
    with pytest.raises(ValueError, match=r"Batch 2 has one sample: there is no other to pair"):
        ask(model, losses, batches)


@pytest.mark.parametrize("batches", [1, 2])
def test_a_loss_that_takes_targets_from_outputs_has_no_null(batches):
    model, losses, batches = problem(batches=batches)
    losses["depth"] = lambda outputs, batch: outputs["depth"].square().mean()
    with pytest.raises(ValueError, match=r"loss of task 'depth' is the same whichever targets"):
        ask(model, losses, batches)


def test_errors_of_one_sign_are_no_sign_of_that():
    model, losses, batches = problem()
    losses["depth"] = lambda outputs, batch: (outputs["depth"] - batch["depth"] - 100).abs().mean()
    null = ask(model, losses, batches)
    assert len(null.draws) == 2


def test_batches_may_have_different_sizes():
    model, losses, batches = problem()
    batches.append({name: rows[:5] for name, rows in batches[0].items()})
    assert len(ask(model, losses, batches).draws) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"draws": 0}, ValueError, r"`draws` must be a whole number, at least 1\. Got 0"),
        ({"sparsity": 90}, ValueError, r"`sparsity` must be in \[0, 1\)\. Got 90"),
        ({"method": "vote"}, TypeError, r"`method` must be a Vote, .* or None\. Got 'vote'"),
        (
            {"method": Vote(0.5, disentangled=False)},
            ValueError,
            r"`method` scores tasks alike: with disentangled=False",
        ),
        (
            {"method": Vote(0.5, saliency=saliency.magnitude)},
            ValueError,
            r"Affinity needs a score of each task",
        ),
        ({"shared_modules": "trunk"}, ValueError, r"`shared_modules`.*'trunk'"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    model, losses, batches = problem()
    with pytest.raises(error, match=message):
        ask(model, losses, batches, **options)


def test_outputs_without_a_graph_are_refused_as_everywhere():
    model, losses, batches = problem()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Loss of task 'seg' carries no gradient"):
        ask(model, losses, batches)


@pytest.mark.parametrize("granularity", [NM(2, 4), Block(2, 2)], ids=repr)
def test_larger_units_have_a_null(granularity):
    model, losses, batches = problem()
    method = Vote(0.5, granularity=granularity, observations=2)
    null = ask(model, losses, batches, method=method, shared_modules=model.trunk)
    pruner = MultitaskPruner(model, losses, model.trunk, method=method)
    pruner.prune(batches, forward=forward, progress=False)
    found = compare(pruner.task_masks, null)
    assert found == compare(null.task_masks, null)
    assert len(suggest_split(null).ranked) == len(found.layers)


def test_no_batch_one_task_and_a_pruned_model_are_refused():
    model, losses, batches = problem()
    with pytest.raises(ValueError, match=r"`batches` gave no batch\. Pass at least one"):
        ask(model, losses, [])
    with pytest.raises(ValueError, match=r"at least two tasks\. Got \['seg'\]"):
        ask(model, {"seg": losses["seg"]}, batches)
    pruner = MultitaskPruner(model, losses, method=Vote(0.5))
    with pytest.raises(ValueError, match=r"already has a live pruner"):
        ask(model, losses, batches)
    pruner.finalize()


# --- Against the null ----------------------------------------------------------------------------


def null_of(own, draws, tasks=("x", "y")):
    """A null with such masks: for each task a row for each layer."""
    count = len(own[0])
    names = [f"l{i}" for i in range(count)]
    shapes = [(len(own[0][i]),) for i in range(count)]

    def draw(masks):
        packed = [
            {task: torch.tensor(rows[i], dtype=torch.bool) for task, rows in zip(tasks, masks)}  # noqa: B905
            for i in range(count)
        ]
        layers = [
            SimpleNamespace(name=n, shape=s, part=Part(s))
            for n, s in zip(names, shapes, strict=True)
        ]
        from mtprune.bits import pack_bits

        bits = [{task: pack_bits(mask) for task, mask in row.items()} for row in packed]
        alike = Likeness(0.5 * shapes[0][0], shapes[0][0], 0.5, (1.0, 1.0), 0, 0)
        pairs = {(a, b): dict.fromkeys(names, alike) for a in tasks for b in tasks if a < b}
        return Draw(PackedTaskMasks.of(tasks, layers, bits), pairs)

    layers = [Subject(n, "shared", s, tasks) for n, s in zip(names, shapes, strict=True)]
    return Null(tasks, tuple(layers), draw(own), tuple(map(draw, draws)))


def test_the_excess_is_what_exceeds_the_mean_of_the_draws():
    alike, apart, half = ([[1, 1]], [[1, 1]]), ([[1, 0]], [[0, 1]]), ([[1, 1]], [[1, 0]])
    null = null_of(alike, [apart, half, half])
    found = compare(null.task_masks, null)
    (layer,) = found.layers
    assert (layer.iou, layer.null, layer.chance) == (1.0, (0.0, 0.5, 0.5), 1.0)
    assert layer.expected == found.expected == pytest.approx(1 / 3)
    assert layer.excess == found.excess == pytest.approx(2 / 3)
    reach = 4.302653 * (1 / 12) ** 0.5 * (4 / 3) ** 0.5  # t of two degrees, spread, one more draw
    assert layer.interval == pytest.approx((2 / 3 - reach, 2 / 3 + reach))
    assert (layer.rank.value, layer.cosine.value) == (0.5, 0.5)
    told = str(found).splitlines()
    assert told[0].split()[:6] == ["layer", "overlap", "by", "chance", "unrelated", "excess"]
    assert told[1].split()[:5] == ["l0", "1.000", "1.000", "0.333", "+0.667"]


def test_a_layer_of_which_nothing_is_kept_is_flagged_and_counts_nowhere():
    empty = [0, 0]
    null = null_of(([[1, 0], empty], [[1, 0], empty]), [([[1, 0], empty], [[0, 1], empty])] * 2)
    found = compare(null.task_masks, null)
    assert found.empty == ["l1"]
    assert found.layers[1].empty
    assert all(isnan(x) for x in (found.layers[1].iou, found.layers[1].excess))
    assert all(isnan(x) for x in found.layers[1].interval)
    assert (found.iou, found.null) == (1.0, (0.0, 0.0))
    assert str(found).splitlines()[2].split() == ["l1", "empty"]
    assert watershed(found) is None


def test_every_two_of_many_tasks_are_compared():
    tasks = ("seg", "depth", "edge", "normal")
    model, losses, batches = problem(tasks)
    null = ask(model, losses, batches)
    found = compare(null.task_masks, null)
    assert len(found.null) == 2
    assert found.rank is None
    assert len(found.pairs) == 6
    for pair, two in found.pairs.items():
        assert two == compare({task: null.task_masks[task] for task in pair}, null)
        assert two.rank is not None
        assert two.cosine is not None
        assert found.iou <= two.iou
        assert [x.iou for x in two.layers] == [
            iou([null.task_masks[task][x.name] for task in pair]) for x in two.layers
        ]


def test_without_a_null_the_excess_is_over_chance():
    masks = {t: {"l": torch.tensor([True, False, True, False])} for t in "xy"}
    found = compare(masks)
    assert found.excess == found.iou - found.chance
    assert (found.null, found.interval, found.layers[0].interval) == ((), None, None)
    assert str(found).splitlines()[0].split() == ["layer", "overlap", "by", "chance"]


def test_masks_that_do_not_go_with_the_null_are_refused():
    null = null_of(([[1, 1, 0, 0]], [[1, 0, 1, 0]]), [([[1, 1, 0, 0]], [[1, 0, 1, 0]])])
    masks = null.task_masks
    with pytest.raises(ValueError, match=r"is of the tasks \['x', 'y'\]\. Got masks of \['z'\]"):
        compare({"x": masks["x"], "z": masks["y"]}, null)
    with pytest.raises(ValueError, match=r"no mask of shape \(4,\) for 'l9' of task 'x'"):
        compare({t: {"l9": mask["l0"]} for t, mask in masks.items()}, null)
    dense = {t: {"l0": torch.ones(4, dtype=torch.bool)} for t in masks}
    with pytest.raises(ValueError, match=r"Task 'x' keeps 4 of 4 weights, and 2 in `null`\. Make"):
        compare(dense, null)


# --- Where the excess drops ----------------------------------------------------------------------


def affinity_of(curve, draws):
    """An affinity with these overlaps, layer by layer, and those of its null."""
    from mtprune.affinity import LayerAffinity

    layers = [
        LayerAffinity(f"l{i}", value, 0.0, {}, null=tuple(draw[i] for draw in draws))
        for i, value in enumerate(curve)
    ]
    return Affinity(tuple(layers), nan, nan)


def test_the_excess_drops_where_tasks_part():
    draws = [[0.5 + e, 0.5 - e, 0.2 + e, 0.2] for e in (-0.01, 0.0, 0.01, 0.02)]
    found = watershed(affinity_of([0.9, 0.9, 0.25, 0.2], draws))
    assert (found.before, found.drop) == (1, pytest.approx(0.4 - 0.05, abs=0.02))


@pytest.mark.parametrize(
    ("curve", "spread"),
    [
        pytest.param([0.5, 0.5, 0.2, 0.2], 0.01, id="the curve falls as the null does"),
        pytest.param([0.5, 0.5, 0.05, 0.05], 0.01, id="no excess before the drop"),
        pytest.param([0.6, 0.6, 0.2, 0.2], 0.2, id="within the scatter"),
    ],
)
def test_there_is_no_watershed_without_an_excess(curve, spread):
    draws = [[0.5 + e, 0.5 + e, 0.2 + f, 0.2] for e in (-spread, spread) for f in (-spread, spread)]
    assert watershed(affinity_of(curve, draws)) is None


def test_an_affinity_brings_its_own_null():
    with pytest.raises(ValueError, match=r"has a watershed against its null: compare\(task_masks"):
        watershed(affinity_of([0.5, 0.4], []))
    with pytest.raises(ValueError, match=r"`null` goes with a curve of numbers"):
        watershed(affinity_of([0.5, 0.4], [[0.5, 0.4]]), null=[0.1, 0.2])


# --- Intervals -----------------------------------------------------------------------------------


def test_one_draw_says_nothing_and_equal_draws_everything():
    assert Contrast(0.7, (0.5,)).interval == (-inf, inf)
    assert Contrast(0.75, (0.5, 0.5)).interval == (0.25, 0.25)
    assert Contrast(0.75, (0.5, 0.5)).beyond
    assert not Contrast(0.5, (0.5, 0.5)).beyond
    assert all(isnan(end) for end in Contrast(nan, (0.5, 0.5)).interval)
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\)\. Got 95"):
        Contrast(0.7, (0.5, 0.4)).within(95)


LAWS = {
    "normal": lambda rng, size: rng.normal(0.6, 0.02, size),
    "overlaps, skewed": lambda rng, size: rng.beta(12, 3, size),
    "counts": lambda rng, size: rng.binomial(200, 0.4, size) / 200,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("draws", [3, 8, 16])
def test_intervals_hold_the_true_excess_nineteen_times_in_twenty(law, draws):
    rng = np.random.default_rng(draws)
    times, excess = 1500, 0.07
    numbers = LAWS[law](rng, (times, draws + 1))
    held = [
        low <= excess <= high
        for value, *null in numbers.tolist()
        for low, high in [Contrast(value + excess, tuple(null)).interval]
    ]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_intervals_of_many_layers_hold_all_at_once():
    rng = np.random.default_rng(0)
    times, layers, draws = 200, 20, 8
    numbers = rng.normal(0.5, 0.05, (times, layers, draws + 1))
    held = [
        all(
            low <= 0 <= high
            for value, *null in curve
            for low, high in [Contrast(value, tuple(null)).within(of=layers)]
        )
        for curve in numbers.tolist()
    ]
    assert np.mean(held) >= 0.93


def test_intervals_hold_for_masks_that_lean_on_the_same_net():
    """Scores are a part that all tasks share, the net's, and one of their own that may be shared.

    Unrelated tasks overlap far more than independent masks: the net's part makes them.
    """
    rng = np.random.default_rng(1)
    times, weights, draws, keep = 200, 1000, 8, 100

    def overlap(net, one, other):
        kept = [set(np.argpartition(net + own, -keep)[-keep:]) for own in (one, other)]
        return len(kept[0] & kept[1]) / len(kept[0] | kept[1])

    found, by_chance = [], keep / weights / (2 - keep / weights)
    for _ in range(times):
        net = rng.normal(size=weights)
        own = rng.normal(size=(2 * draws + 2, weights))
        overlaps = [overlap(net, own[2 * i], own[2 * i + 1]) for i in range(draws + 1)]
        found.append(Contrast(overlaps[0], tuple(overlaps[1:])))
    assert np.mean([x.expected for x in found]) > 3 * by_chance
    assert np.mean([x.interval[0] <= 0 <= x.interval[1] for x in found]) > 0.92
    assert np.mean([x.beyond for x in found]) < 0.05


def test_random_labels_leave_no_excess():
    _, losses, batches = problem(batches=2, size=32)
    null = ask(Net(width=64), losses, batches, draws=16, sparsity=0.8)
    found = compare(null.task_masks, null)
    assert found.iou > 1.3 * found.chance
    assert abs(found.excess) < 0.05
    assert found.interval[0] < 0 < found.interval[1]
