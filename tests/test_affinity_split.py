"""Where a trunk may branch: planted problems, and what a split costs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mtprune.affinity import permuted, suggest_split
from mtprune.affinity.likeness import Likeness
from mtprune.affinity.null import Draw, Null
from mtprune.bits import pack_bits
from mtprune.facts import Subject
from mtprune.model.parts import Part
from mtprune.model.task_masks import PackedTaskMasks

# --- Planted -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A trunk of three layers, and a head for each task."""

    def __init__(self, tasks, width=48):
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Linear(16, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width, 4) for task in tasks})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


def teacher(x):
    """A function drawn at random."""
    hidden = torch.relu(x @ torch.randn(16, 24) / 4)
    y = hidden @ torch.randn(24, 4)
    return (y - y.mean(0)) / y.std(0)


def error(task):
    return lambda outputs, batch: (outputs[task] - batch[1][task]).square().mean()


def trained(targets_of, seed, steps=300):
    """A net that has learnt targets that are functions of random inputs, asked for its null."""
    torch.manual_seed(seed)
    x = torch.randn(2048, 16)
    targets = targets_of(x)
    targets = {task: y + 0.3 * torch.randn_like(y) for task, y in targets.items()}
    net = Net(targets)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = {task: error(task) for task in targets}
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        batch = x[rows], {task: y[rows] for task, y in targets.items()}
        outputs = net(batch[0])
        optimizer.zero_grad()
        sum(loss(outputs, batch) for loss in losses.values()).backward()
        optimizer.step()
    batches = [
        (x[i : i + 32], {task: y[i : i + 32] for task, y in targets.items()})
        for i in range(0, 256, 32)
    ]
    options = {"sparsity": 0.8, "draws": 4, "progress": False}
    return permuted(
        net, losses, batches, net.trunk, forward=lambda net, batch: net(batch[0]), **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_copies_of_one_task_share_everything(seed):
    found = suggest_split(trained(lambda x: dict.fromkeys(("a", "b"), teacher(x)), seed))
    assert found.best is None
    assert all(split.agreement > 0.3 for split in found.ranked)
    assert str(found).endswith("Share everything: no split surely gains.")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_unrelated_tasks_in_one_trunk_part_at_its_first_layer(seed):
    found = suggest_split(trained(lambda x: {"a": teacher(x), "b": teacher(x)}, seed))
    assert (found.best.at, found.best.before) == ("trunk.0.weight", 0)
    assert -0.1 < found.best.interval[0] < found.best.interval[1] < 0.15
    assert str(found).endswith("Split at trunk.0.weight into a | b.")


@pytest.mark.slow
def test_the_one_of_three_that_is_unrelated_goes():
    def targets(x):
        y = teacher(x)
        return {"a": y, "stranger": teacher(x), "b": y}

    found = suggest_split(trained(targets, seed=0))
    assert found.best.groups == (("a", "b"), ("stranger",))
    assert found.best.at == "trunk.0.weight"


# --- What it costs -------------------------------------------------------------------------------


def draw_of(tasks, layers, agreeing):
    """A draw with masks by hand: for each layer, of each task that uses it."""
    places = [
        SimpleNamespace(name=name, shape=(n,), part=Part((n,)))
        for name, rows in layers.items()
        for n in [len(next(iter(rows.values())))]
    ]
    masks = [
        {task: torch.tensor(row, dtype=torch.bool) for task, row in rows.items()}
        for rows in layers.values()
    ]
    bits = [{task: pack_bits(mask) for task, mask in row.items()} for row in masks]
    alike = {}
    for place, row in zip(places, masks, strict=True):
        for i, one in enumerate(tasks):
            for other in tasks[i + 1 :]:
                if one in row and other in row:
                    size = place.shape[0]
                    union = int((row[one] | row[other]).sum())
                    same = agreeing.get((one, other), 0) * union
                    likeness = Likeness(0.0, size, 0.5, (1.0, 1.0), same, union)
                    alike.setdefault((one, other), {})[place.name] = likeness
    return Draw(PackedTaskMasks.of(tasks, places, bits), alike)


def null_of(layers, agreeing=None, cost=2, tasks=("a", "b")):
    """A null in all of whose draws some pairs agree wherever one of them keeps anything."""
    subjects = tuple(
        Subject(name, "shared", (len(next(iter(rows.values()))),), tuple(rows), cost)
        for name, rows in layers.items()
    )
    draw = draw_of(tasks, layers, agreeing or {})
    return Null(tasks, subjects, draw, (draw,) * 3)


ONE, TWO = [1, 1, 0, 0], [0, 0, 1, 1]


def test_a_split_copies_all_that_comes_after():
    null = null_of({"l0": {"a": ONE, "b": ONE}, "l1": {"a": [1, 0], "b": [0, 1]}, "h": {"a": [1]}})
    found = suggest_split(null)
    assert found.layers == ("l0", "l1")
    assert {(s.at, s.before, s.parameters, s.macs) for s in found.ranked} == {
        ("l0", 0, 6, 12.0),
        ("l1", 1, 2, 4.0),
    }
    assert found.ranked[0].groups == (("a",), ("b",))


def test_multiply_adds_that_were_not_seen_are_unknown():
    found = suggest_split(null_of({"l0": {"a": ONE, "b": ONE}}, cost=None))
    assert found.ranked[0].macs is None
    assert "unknown" in str(found)


@pytest.mark.parametrize(
    ("other", "keeps"),
    [
        pytest.param(ONE, 0.5, id="the same weights"),
        pytest.param(TWO, 1.0, id="others"),
        pytest.param([0, 1, 1, 0], 0.75, id="half of them"),
    ],
)
def test_for_as_many_weights_tasks_keep_less_of_what_both_want(other, keeps):
    (split,) = suggest_split(null_of({"l0": {"a": ONE, "b": other}})).ranked
    assert split.keeps == {"a": keeps, "b": keeps}


def test_what_stays_shared_is_kept():
    null = null_of({"l0": {"a": ONE, "b": ONE}, "l1": {"a": ONE, "b": ONE}})
    keeps = {split.at: split.keeps["a"] for split in suggest_split(null).ranked}
    assert keeps == {"l0": 0.5, "l1": 0.75}


def test_the_gain_counts_what_is_told_apart_beside_what_sharing_is_worth():
    layers = {"l0": {"a": ONE, "b": ONE}, "l1": {"a": ONE, "b": TWO}}
    found = suggest_split(null_of(layers), worth=0.2)
    gains = {split.at: split.gain for split in found.ranked}
    assert gains == {"l0": pytest.approx((0.2, 0.2)), "l1": pytest.approx((0.2 * 4 / 6,) * 2)}
    assert found.best.at == "l0"
    agreed = suggest_split(null_of(layers, {("a", "b"): 1}), worth=0.2)
    assert agreed.best is None
    assert agreed.ranked[0].gain[0] == pytest.approx(-0.8 * 4 / 6)


@pytest.mark.parametrize(("count", "ways"), [(2, 1), (3, 4), (4, 14), (5, 51), (6, 7)])
def test_ways_to_group_tasks(count, ways):
    tasks = tuple(f"t{i}" for i in range(count))
    found = suggest_split(null_of({"l0": dict.fromkeys(tasks, ONE)}, tasks=tasks))
    groups = {split.groups for split in found.ranked}
    assert len(groups) == len(found.ranked) == ways
    assert all(sorted(sum(way, ())) == list(tasks) for way in groups)


def test_related_tasks_stay_together():
    tasks = ("a", "b", "c", "d")
    pairs = {("a", "c"): 1, ("b", "d"): 1}
    null = null_of({"l0": dict.fromkeys(tasks, ONE)}, pairs, tasks=tasks)
    assert suggest_split(null).best.groups == (("a", "c"), ("b", "d"))


def test_layers_of_some_tasks_are_copied_for_those():
    layers = {"l0": {"a": ONE, "b": ONE, "c": ONE}, "l1": {"a": ONE, "b": ONE}}
    found = suggest_split(null_of(layers, tasks=("a", "b", "c")))
    costs = {(s.at, s.groups): s.parameters for s in found.ranked}
    assert costs["l0", (("a", "b"), ("c",))] == 4
    assert costs["l0", (("a",), ("b",), ("c",))] == 8 + 4
    assert ("l1", (("a", "b"), ("c",))) not in costs
    assert costs["l1", (("a",), ("b", "c"))] == 4


def test_nothing_kept_agrees_in_nothing():
    found = suggest_split(null_of({"l0": {"a": [0, 0], "b": [0, 0]}}))
    assert found.best is None
    assert found.ranked[0].agreement == 0.0
    assert found.ranked[0].interval == (0.0, 0.0)


def test_one_draw_is_no_ground_to_split():
    null = null_of({"l0": {"a": ONE, "b": TWO}})
    assert suggest_split(null).best is not None
    found = suggest_split(replace(null, draws=null.draws[:1]))
    assert found.best is None
    assert found.ranked[0].gain[0] > 0


def test_what_cannot_be_split_is_refused():
    null = null_of({"l0": {"a": ONE}, "l1": {"b": ONE}})
    with pytest.raises(ValueError, match=r"No two of the tasks \['a', 'b'\] share a layer"):
        suggest_split(null)
    with pytest.raises(ValueError, match=r"`worth` must be in \(0, 1\)\. Got 10"):
        suggest_split(null_of({"l0": {"a": ONE, "b": ONE}}), worth=10)
