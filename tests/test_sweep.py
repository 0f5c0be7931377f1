"""One scoring pass, many sparsities: masks are a pruner's, and curves are what they cost."""

import copy
import json
import random
import re
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import mtprune
from mtprune import (
    NM,
    Block,
    Cubic,
    Head,
    LowRank,
    MultitaskPruner,
    Neuron,
    Refit,
    Rounds,
    Sweep,
    Vote,
    saliency,
    sweep,
)
from mtprune.curves import Alone, Point
from mtprune.intervals import Change, changes
from tests import nets

TASKS = ("a", "b")


class Net(nn.Module):
    """A trunk that two tasks share, with all that a forward could change."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(12, 3) for task in TASKS})

    def forward(self, x):
        hidden = self.trunk(x).relu()
        return {task: head(hidden) for task, head in self.heads.items()}


def setting(**options):
    """All arguments."""
    torch.manual_seed(0)
    model = Net()
    data = [{"x": torch.randn(16, 6), "y": torch.randn(16, 1)} for _ in range(6)]

    def loss(task):
        return lambda out, batch: (out[task] - batch["y"]).square().mean()

    return {
        "model": model,
        "task_losses": {task: loss(task) for task in TASKS},
        "batches": data[:3],
        "shared_modules": [model.trunk],
        "sparsities": [0.5, 0.8],
        "evaluate": data[3:],
        "forward": lambda model, batch: model(batch["x"]),
        "progress": False,
    } | options


def seen(**options):
    """The states of all models that are evaluated: dense, each sparsity, each alone."""
    states = []

    def evaluate(model):
        assert not any(module._forward_pre_hooks for module in model.modules())
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return dict.fromkeys(TASKS, 1.0)

    found = sweep(**setting(evaluate=evaluate, lower_is_better=True, **options))
    return found, states


# Masks.


@pytest.mark.parametrize(
    "method",
    [
        Vote(0.1),
        Vote(0.1, observations=3, allocation="erk", saliency=saliency.fisher),
        Vote(0.1, voters=(saliency.magnitude,), saliency=saliency.taylor_magnitude),
        Vote(0.1, disentangled=False, allocation="global", vote=mtprune.votes.mean),
        Vote(0.1, granularity=Block(2, 2)),
        Vote(0.1, saliency=saliency.random),
        Vote(0.1, observations=2, refit=Refit(samples=20)),
    ],
    ids=["plain", "erk", "voters", "joint", "blocks", "random", "refit"],
)
def test_each_sparsity_is_that_of_a_fresh_pruner_to_the_bit(method):
    found, states = seen(method=method, sensitivity=())
    assert [point.sparsity for point in found.points] == [0.5, 0.8]
    assert len(states) == 3
    for point, state in zip(found.points, states[1:], strict=True):
        fresh = setting()
        model, losses, shared = (fresh[n] for n in ("model", "task_losses", "shared_modules"))
        own = replace(method, sparsity=point.sparsity)
        pruner = MultitaskPruner(model, losses, shared, method=own)
        pruner.prune(fresh["batches"], forward=fresh["forward"], progress=False)
        pruner.finalize()
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name
        assert point.pruned == pruner.sparsity


@pytest.mark.parametrize("name", nets.each())
def test_awkward_nets_are_pruned_as_by_a_pruner(name):
    net, states = nets.build(name), []
    batches = [net.make_batch(seed) for seed in range(2)]
    before = copy.deepcopy(net.model.state_dict())

    def evaluate(model):
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        return dict.fromkeys(net.task_losses, 1.0)

    with nets.expected(net):
        sweep(
            net.model,
            net.task_losses,
            batches,
            net.shared_modules,
            sparsities=[0.6],
            evaluate=evaluate,
            method=Vote(0.5, observations=2),
            sensitivity=(),
            lower_is_better=True,
            forward=lambda model, batch: model(batch["x"]),
            progress=False,
            include=net.include,
        )
    for n, value in net.model.state_dict().items():
        assert torch.equal(value, before[n]), n
    method = Vote(0.6, observations=2)
    pruner = MultitaskPruner(
        net.model, net.task_losses, net.shared_modules, method=method, include=net.include
    )
    with nets.expected(net):
        pruner.prune(batches, forward=lambda model, batch: model(batch["x"]), progress=False)
    pruner.finalize()
    for n, value in net.model.state_dict().items():
        assert torch.equal(states[1][n], value), n


def test_refit_is_the_vote_s_refit():
    one, states = seen(refit=Refit(samples=20))
    two, others = seen(method=Vote(0.9, refit=Refit(samples=20)))
    three, zeros = seen()
    assert one.points == two.points
    weight = "trunk.0.weight"
    for fitted, same, plain in zip(states[1:3], others[1:3], zeros[1:3], strict=True):
        assert torch.equal(fitted[weight], same[weight])
        assert torch.equal(fitted[weight] == 0, plain[weight] == 0)
        assert not torch.equal(fitted[weight], plain[weight])
    assert (three.method, two.method) == ("", "Vote(refit=Refit(samples=20))")


def test_each_layer_and_component_is_pruned_alone_to_the_same_sparsity():
    found, states = seen(sensitivity=[0.5])
    dense, layers = states[0], [f"{n}.weight" for n in ("trunk.0", "trunk.4", "heads.a", "heads.b")]
    components = {"shared": layers[:2], "a": [layers[2]], "b": [layers[3]]}
    expected = [*components.items(), *((name, [name]) for name in layers)]
    assert [row.name for row in found.components] == list(components)
    assert [row.name for row in found.layers] == layers
    told = [*found.components, *found.layers]
    for row, (name, own), state in zip(told, expected, states[3:], strict=True):
        assert (row.name, row.sparsity) == (name, 0.5)
        assert row.weights == sum(dense[layer].numel() for layer in own)
        assert row.pruned == 0.5
        for layer in layers:
            assert int((state[layer] == 0).sum()) == (layer in own) * dense[layer].numel() // 2
            if layer not in own:
                assert torch.equal(state[layer], dense[layer])


def test_the_middle_sparsity_is_that_of_layers_alone():
    assert {row.sparsity for row in sweep(**setting(sparsities=[0.9, 0.1, 0.6])).layers} == {0.6}
    assert sweep(**setting(sensitivity=())).layers == ()
    two = sweep(**setting(sensitivity=[0.3, 0.6]))
    assert [row.sparsity for row in two.layers] == [0.3] * 4 + [0.6] * 4


def test_whole_heads_are_swept_too():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    losses = {
        "a": lambda out, x: (out[..., :8] - 1).square().mean(),
        "b": lambda out, x: out[..., 8:].abs().mean(),
    }
    data = [torch.randn(4, 5, 16) for _ in range(2)]
    method = Vote(granularity=(Neuron(), Head()), sparsity=0.5)
    found = sweep(
        block, losses, data, sparsities=[0.5], evaluate=data, method=method, progress=False
    )
    assert found.points[0].pruned == pytest.approx(0.5, abs=0.05)
    assert found.layers[0].name == "self_attn.in_proj_weight"
    assert all(row.pruned > 0.2 for row in found.layers)


# Nothing is left behind.


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_model_and_random_state_are_as_before(mode):
    options = setting(refit=Refit(samples=20))
    model = options["model"].train(mode)
    model.trunk[0].bias.requires_grad_(False)
    model.trunk[4].weight.grad = torch.ones(12, 16)
    calls = []
    model.heads["a"].register_forward_hook(lambda *_: calls.append(1))
    before, hooks = copy.deepcopy(model), dict(model.heads["a"]._forward_hooks)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    sweep(**options)
    assert calls  # of the copies
    for (name, now), then in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(now, then), name
    for now, then in zip(model.modules(), before.modules(), strict=True):
        assert (type(now), now.training) == (type(then), then.training)
        assert now._parameters.keys() == then._parameters.keys()
        assert now._buffers.keys() == then._buffers.keys()
        assert not now._forward_pre_hooks
        assert not now._state_dict_hooks
        assert not now._load_state_dict_pre_hooks
    assert model.heads["a"]._forward_hooks == hooks
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.requires_grad == then.requires_grad
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        "trunk.4.weight"
    ]
    assert torch.equal(model.trunk[4].weight.grad, torch.ones(12, 16))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    MultitaskPruner(model, options["task_losses"], [model.trunk]).finalize()  # it is free


def test_batches_are_taken_once_and_each_copy_meets_the_same_random_state():
    options = setting(sensitivity=())
    draws = []

    def evaluate(model):
        draws.append(float(torch.rand(1)))
        return dict.fromkeys(TASKS, 1.0)

    options |= {"batches": iter(options["batches"]), "evaluate": evaluate}
    sweep(**options, lower_is_better=True)
    assert len(draws) == 3
    assert len(set(draws)) == 1


def test_what_is_named_by_the_model_s_modules_is_found_in_the_copies():
    options = setting()
    found = sweep(**options, exclude=[options["model"].heads["b"]])
    assert [row.name for row in found.components] == ["shared", "a"]


# What it costs.


class Row(nn.Module):
    """Both tasks want every weight, the second ten times as much."""

    def __init__(self, *weights):
        super().__init__()
        self.row = nn.Linear(len(weights), 1, bias=False)
        with torch.no_grad():
            self.row.weight.copy_(torch.tensor([weights]))

    def forward(self, x):
        return self.row(x)[:, 0]


def rows(**options):
    model = Row(1.0, 2.0, 3.0, 4.0)
    losses = {
        "a": lambda out, x: (out - 100).square().sum(),
        "b": lambda out, x: 10 * (out - 100).square().sum(),
    }

    def evaluate(model):
        kept = float(model.row.weight.detach().square().sum())
        return {"a": {"score": kept}, "b": {"score": 30 + 10 * kept}}

    return {
        "model": model,
        "task_losses": losses,
        "batches": [torch.eye(4)],
        "sparsities": [0.25, 0.5, 0.75],
        "evaluate": evaluate,
        "lower_is_better": False,
        "progress": False,
    } | options


def test_changes_are_those_of_the_weights_that_go():
    found = sweep(**rows())
    assert [[point.tasks[task].mean for task in TASKS] for point in found.points] == [
        pytest.approx([-100 * lost / 30, -1000 * lost / 330]) for lost in (1, 5, 14)
    ]
    assert [point.worst_task for point in found.points] == ["a", "a", "a"]
    assert [found.within(loss) for loss in (0.0, 0.03, 0.04, 0.2, 1.0)] == [0, 0, 0.25, 0.5, 0.75]
    [layer] = found.layers
    assert layer.tasks == found.at(0.5).tasks


TABLE = """\
sparsity    mean       a       b  worst
0.25       -3.18   -3.33   -3.03      a
0.5       -15.91  -16.67  -15.15      a
0.75      -44.55  -46.67  -42.42      a
Change in percent against the model as it is; below 0 is worse.
Some task loses more than 1 % at every sparsity.

component alone  sparsity   mean      a      b  worst
shared               0.25  -3.18  -3.33  -3.03      a

layer alone  sparsity   mean      a      b  worst
row.weight       0.25  -3.18  -3.33  -3.03      a"""


def test_the_table():
    assert str(sweep(**rows(sensitivity=[0.25]))) == TABLE
    by = sweep(**rows(sensitivity=(), method=Vote(0.9, allocation="erk", min_keep=2)))
    assert by.method == "Vote(allocation='erk', min_keep=2)"
    assert "below 0 is worse. By Vote(allocation='erk', min_keep=2)." in str(by)


def test_losses_on_batches_are_what_their_functions_say():
    options = setting(sensitivity=())
    model, losses, batches = options["model"], options["task_losses"], options["evaluate"]

    def evaluate(model):
        with torch.no_grad():
            outs = [model.eval()(batch["x"]) for batch in batches]
        return [
            {task: {"loss": loss(out, batch)} for task, loss in losses.items()}
            for out, batch in zip(outs, batches, strict=True)
        ]

    by_hand = sweep(**options | {"evaluate": evaluate})
    found = sweep(**options)
    assert model.training
    assert found == by_hand
    assert found.batches == 3
    assert all(change.error > 0 for p in found.points for change in p.tasks.values())


def test_data_and_json_say_the_same(tmp_path):
    found = sweep(**setting())
    path = found.save(tmp_path / "sweep.json")
    told = json.loads(path.read_text())
    assert told == found.to_dict()
    assert [p["sparsity"] for p in told["points"]] == [0.5, 0.8]
    for p, point in zip(told["points"], found.points, strict=True):
        assert p["worst"] == point.worst_task
        for task, change in point.tasks.items():
            assert p["tasks"][task] == {
                "change": change.mean,
                "low": change.low,
                "high": change.high,
            }
    assert [row["name"] for row in told["layers"]] == [row.name for row in found.layers]


def test_what_is_no_longer_finite_is_worse_than_anything(tmp_path):
    options = rows(sensitivity=())
    judge = options["evaluate"]

    def evaluate(model):
        found = judge(model)
        return found if model.row.weight.count_nonzero() > 2 else found | {"b": {"score": -inf}}

    found = sweep(**options | {"evaluate": evaluate})
    assert [p.tasks["b"].mean for p in found.points][1:] == [-inf, -inf]
    assert found.within(loss=1e9) == 0.25
    told = json.loads(found.save(tmp_path / "s.json").read_text())
    assert told["points"][1]["tasks"]["b"]["change"] is None
    assert told["points"][1]["worst"] == "b"


# Intervals.


def test_of_a_dense_model_that_is_always_the_same_it_is_the_interval_of_a_mean():
    found = [{"a": {"x": v}} for v in (1.0, 2.0, 4.0, 7.0)]
    base = [{"a": {"x": 2.0}}] * 4
    change = changes(found, base, {})["a"]
    low, high = stats.t.interval(0.95, 3, 3.5, stats.sem([1, 2, 4, 7]))
    assert change.mean == pytest.approx(75.0)
    assert (change.low, change.high) == pytest.approx((50 * low - 100, 50 * high - 100))


def test_what_all_batches_have_in_common_widens_nothing():
    base = [{"a": {"x": v}} for v in (1.0, 5.0, 2.0)]
    found = [{"a": {"x": 0.9 * v}} for v in (1.0, 5.0, 2.0)]
    change = changes(found, base, {"a": {"x"}})["a"]
    assert change.mean == pytest.approx(10.0)
    assert change.error == pytest.approx(0.0, abs=1e-9)


def test_metrics_of_a_task_count_with_their_direction():
    base = [{"a": {"score": 1.0, "loss": 1.0}}] * 2
    found = [{"a": {"score": 1.0 + d, "loss": 1.0 + d}} for d in (0.1, 0.3)]
    change = changes(found, base, {"a": {"loss"}})["a"]
    assert change.mean == pytest.approx(0.0, abs=1e-9)
    assert change.error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("batches", [4, 12])
def test_intervals_cover_the_truth_as_often_as_they_say(batches):
    """Losses of 1 to 2 that differ from batch to batch, 8 % more of which are lost on average."""
    draw = random.Random(0)
    inside = 0
    for _ in range(4000):
        base = [draw.uniform(1, 2) for _ in range(batches)]
        found = [v * draw.gauss(1.08, 0.1) for v in base]
        told = changes(
            [{"a": {"loss": v}} for v in found],
            [{"a": {"loss": v}} for v in base],
            {"a": {"loss"}},
        )["a"]
        inside += told.low <= -8.0 <= told.high
    assert inside / 4000 == pytest.approx(0.95, abs=0.015)


def test_sure_counts_the_worse_end():
    points = [
        Point(s, s, {"a": Change(mean, error), "b": Change(0.0, 0.0)})
        for s, mean, error in ((0.5, -0.1, 0.2), (0.7, -0.5, 0.6), (0.9, -3.0, 0.1))
    ]
    found = Sweep(TASKS, tuple(points), batches=4)
    assert found.within(0.01) == 0.7
    assert found.within(0.01, sure=True) == 0.5
    assert found.within(0.001, sure=True) == 0.0
    assert "No task loses more than 1 % up to 0.7, where the worst, a, changes by -0.50" in str(
        found
    )


def test_the_short_table_has_the_layers_that_cost_most():
    layers = tuple(Alone(0.5, 0.5, {"a": Change(-i % 8)}, f"layer{i}", 10) for i in range(8))
    found = Sweep(("a",), (Point(0.5, 0.5, {"a": Change(-5.0)}),), layers)
    assert "The 5 of 8 that cost most." in str(found)
    assert re.findall(r"layer\d", found.table(layers=True)) == [f"layer{i}" for i in range(8)]
    assert re.findall(r"layer\d", str(found)) == ["layer0", "layer4", "layer5", "layer6", "layer7"]


# What is refused.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"sparsities": []},
            ValueError,
            r"`sparsities` must be a list .* and not empty\. Got \[\]",
        ),
        ({"sparsities": [0.5, 0.5]}, ValueError, "`sparsities` must be .*, each once"),
        ({"sparsities": [50]}, ValueError, r"`sparsities` must be in \[0, 1\)\. Got 50\. Did you"),
        ({"sparsities": 0.5}, TypeError, "`sparsities` must be a list of numbers"),
        ({"sensitivity": ["x"]}, TypeError, r"`sensitivity` must be a number in \[0, 1\)"),
        ({"model": 3}, TypeError, "`model` must be a torch.nn.Module. Got 3"),
        ({"method": LowRank(0.5)}, TypeError, "`method` must be a mtprune.Vote"),
        (
            {"method": Vote(0.5, schedule=Rounds(3))},
            ValueError,
            r"scores once.*Leave `schedule` .* out\. Got Vote\(sparsity=0.5, schedule=Rounds",
        ),
        ({"method": Vote(0.5, schedule=Cubic(0, 9, 3))}, ValueError, "scores once"),
        ({"method": Vote(0.5, straight_through=True)}, ValueError, "scores once"),
        ({"method": Vote(0.5, observations="auto")}, ValueError, "Say how many: Vote"),
        ({"method": Vote(granularity=NM(2, 4))}, ValueError, "fixes the sparsity"),
        ({"refit": 3}, TypeError, "`refit` must be mtprune.Refit"),
        ({"evaluate": 3}, TypeError, "`evaluate` must be a function of the model, or a list"),
        ({"evaluate": {"a": 1}}, TypeError, "`evaluate` must be a function of the model"),
        ({"evaluate": iter([])}, TypeError, "`evaluate` is an iterator, which the first"),
        ({"evaluate": []}, ValueError, "`evaluate` returned no result"),
        ({"evaluate": lambda m: 3}, TypeError, "`evaluate` must return a mapping .* or a list"),
        ({"evaluate": lambda m: {"a": 1.0}}, ValueError, "a result for each task"),
        ({"evaluate": lambda m: {"a": 1.0, "b": 1.0}}, ValueError, "better when it is lower"),
        (
            {"evaluate": lambda m: {"a": inf, "b": 1.0}},
            ValueError,
            "returned inf for task 'a', of the model as it was given",
        ),
        ({"optimizer": 3}, TypeError, r"`optimizer` is not an argument of sweep\(\)"),
        ({"sparsity": 0.5}, TypeError, "`sparsity` is not an argument .*: see `sparsities`"),
        ({"task_losses": ["a", "b"]}, TypeError, "`task_losses` has names only"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        sweep(**setting(**options))


def test_a_model_of_a_live_pruner_is_refused():
    options = setting()
    pruner = MultitaskPruner(options["model"], options["task_losses"], [options["model"].trunk])
    with pytest.raises(ValueError, match="already has a live pruner"):
        sweep(**options)
    pruner.finalize()


def changing(*answers):
    answers = iter(answers)
    return lambda model: next(answers)


def test_results_that_cannot_be_compared_are_refused():
    fine = {"a": {"loss": 1.0}, "b": {"loss": 1.0}}
    other = {"a": {"loss": 1.0}, "b": {"miou": 1.0}}
    options = setting(sensitivity=(), sparsities=[0.5])
    with pytest.raises(ValueError, match="2 results for a pruned model, and 1 for the model as"):
        sweep(**options | {"evaluate": changing(fine, [fine, fine])})
    with pytest.raises(ValueError, match=r"returned \['miou'\] for task 'b' once, and \['loss'\]"):
        sweep(**options | {"evaluate": changing(fine, other)})
    zero = {"a": {"loss": 0.0}, "b": {"loss": 1.0}}
    with pytest.raises(ValueError, match="is 0 in the baseline"):
        sweep(**options | {"evaluate": changing(zero, fine)})


def test_questions_that_have_no_answer_are_refused(tmp_path):
    found = sweep(**rows())
    with pytest.raises(ValueError, match=r"`sparsity` must be one of \(0.25, 0.5, 0.75\). Got 0.9"):
        found.at(0.9)
    with pytest.raises(ValueError, match=r"`loss` is a share of 1, at least 0. Got -1"):
        found.within(-1)
    with pytest.raises(ValueError, match="sure=True needs intervals"):
        found.within(0.01, sure=True)
    with pytest.raises(ValueError, match=r"its name ends in \.json\. Got"):
        found.save(tmp_path / "sweep.txt")
    assert list(tmp_path.iterdir()) == []
