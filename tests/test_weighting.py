"""Weights of the tasks: the published ones against a restatement, and what a user may pass."""

import math

import pytest
import torch
from torch import nn

from mtprune import Cubic, MultitaskPruner, SoftThreshold, Vote
from mtprune.reading import Entry
from mtprune.weighting import (
    Noise,
    PruningSensitivity,
    Weigher,
    noise_weights,
    parse_weighting,
    uniform,
)
from tests import checkpoints


def run(weighting, losses, tasks=("a", "b", "c")):
    """The weights after each step of a run of losses."""
    weigher = Weigher(parse_weighting(weighting), tasks)
    seen = []
    for row in losses:
        weigher.weigh(dict(zip(tasks, map(torch.tensor, row), strict=True)))
        seen.append([weigher.weights[task] for task in tasks])
    return seen


def published(losses, begin, window):
    """The weights of the published trainer, restated: plain floats, one step after the other."""
    ratios = [[] for _ in losses[0]]
    result = []
    for i, row in enumerate(losses):
        weights = [1.0] * len(row)
        if i > begin:
            for t, loss in enumerate(row):
                ratios[t].append(abs(losses[i - 1][t] - loss) / loss)
            if len(ratios[0]) > window:
                for seen in ratios:
                    del seen[0]
                means = [sum(seen) / window for seen in ratios]
                weights = [len(row) * mean / sum(means) for mean in means]
        result.append(weights)
    return result


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_noise_is_the_published_formula_for_any_number_of_tasks(tasks):
    losses = (1 + torch.rand(12, tasks, dtype=torch.float64)).float().double().tolist()
    found = run(Noise(begin=2, window=4), losses, [f"t{k}" for k in range(tasks)])
    expected = published(torch.tensor(losses, dtype=torch.float32).tolist(), 2, 4)
    assert found == expected
    assert [weights == [1.0] * tasks for weights in found[:7]] == [True] * 7
    assert all(sum(weights) == pytest.approx(tasks) for weights in found)


def test_noise_begins_after_a_full_window():
    losses = [[1.0 + 0.1 * (i % 2), 1.0 + 0.2 * (i % 2)] for i in range(20)]
    found = run(Noise(begin=5, window=3), losses, ("a", "b"))
    changed = [i for i, weights in enumerate(found) if weights != [1.0, 1.0]]
    assert changed[0] == 5 + 3 + 1


def test_noise_does_not_see_the_scale_of_a_loss():
    losses = 1 + torch.rand(30, 3)
    plain = run(Noise(begin=0, window=5), losses.tolist())
    scaled = run(Noise(begin=0, window=5), (losses * torch.tensor([1.0, 64.0, 1 / 64])).tolist())
    assert scaled == plain


@pytest.mark.slow
def test_noise_is_the_coefficient_of_variation_of_stationary_losses():
    torch.manual_seed(0)
    spread = torch.tensor([0.02, 0.05, 0.10])
    losses = 1 + spread * torch.randn(20_000, 3)
    weights = run(Noise(begin=0, window=19_000), losses.tolist())[-1]
    expected = (3 * spread / spread.sum()).tolist()
    assert weights == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_noise_survives_losses_that_cannot_be_divided_by(bad):
    losses = (1 + torch.rand(20, 3)).tolist()
    losses[6][1] = bad
    weights = run(Noise(begin=0, window=4), losses)[-1]
    assert sum(weights) == pytest.approx(3.0)
    assert all(0.0 < weight < 3.0 for weight in weights)


def test_losses_that_stand_still_weigh_the_same():
    assert run(Noise(begin=0, window=2), [[1.0, 2.0, 3.0]] * 9)[-1] == [1.0, 1.0, 1.0]


def test_a_task_that_sits_out_keeps_its_weight():
    weigher = Weigher(Noise(begin=0, window=2), ["a", "b"])
    for i in range(8):
        weigher.weigh({t: torch.tensor(1.0 + i % (k + 2)) for k, t in enumerate("ab")})
    before = weigher.weights
    total = weigher.weigh({"b": torch.tensor(2.0)})
    assert set(weigher.weights) == {"a", "b"}
    assert float(total) == pytest.approx(2.0 * weigher.weights["b"])
    assert before.keys() == weigher.weights.keys()


def test_noise_weights_need_more_than_a_window():
    assert noise_weights({"a": [1.0], "b": [1.0]}, 1) == {}
    assert noise_weights({}, 1) == {}
    assert noise_weights({"a": [0.0, 1.0], "b": [0.0, 3.0]}, 1) == {"a": 0.5, "b": 1.5}


def test_sensitivity_averages_over_updates_and_guards_every_task():
    rule = PruningSensitivity(decay=0.5, least=0.2)
    averages = rule.average({}, {"a": 4.0, "b": -1.0})
    assert averages == {"a": 4.0, "b": 0.0}
    averages = rule.average(averages, {"a": 2.0, "b": 1.0})
    assert averages == {"a": 3.0, "b": 0.5}
    weights = rule.weights({"a": 3.0, "b": 1.0}, ["a", "b"])
    assert weights == pytest.approx({"a": 0.2 + 0.8 * 1.5, "b": 0.2 + 0.8 * 0.5})
    assert rule.weights({"a": 0.0, "b": 0.0}, ["a", "b"]) == {}
    assert rule.weights({"a": 1.0}, ["a", "b"]) == pytest.approx({"a": 1.8, "b": 0.2})


class Toy(nn.Module):
    """One layer for both tasks, one that only the second uses."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 5, bias=False)
        self.b = nn.Linear(5, 1, bias=False)


def pruner_of(model, weighting, optimizer, **fields):
    return MultitaskPruner(
        model,
        ["a", "b"],
        "trunk",
        method=SoftThreshold(0.5, weighting=weighting, **fields),
        optimizer=optimizer,
    )


def test_sensitivity_is_the_derivative_in_the_common_log_threshold():
    torch.manual_seed(0)
    model = Toy().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = pruner_of(model, PruningSensitivity(decay=0.0, least=0.0), optimizer)
    x = torch.randn(9, 6, dtype=torch.float64)

    def losses():
        hidden = model.trunk(x)
        return {"a": (hidden - 2).square().mean(), "b": (model.b(hidden) - 1).square().mean()}

    def step():
        optimizer.zero_grad()
        found = pruner.observe_losses(losses())
        pruner.weigh(found).backward()
        optimizer.step()
        pruner.step()

    for _ in range(21):  # updates at 0, 10, 20; those of 20 are about the thresholds of 10
        step()
    slopes = checkpoints.memory(pruner)["slopes"]
    pruner.finalize()
    torch.manual_seed(0)
    model = Toy().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = pruner_of(model, PruningSensitivity(), optimizer)
    for _ in range(11):
        step()
    change = 1e-6
    taus = checkpoints.thresholds(pruner)
    found = []
    for step_ in (0.0, change):  # upwards: a weight may lie on its threshold, where there is a kink
        higher = torch.exp(torch.tensor(step_).double())
        checkpoints.set_thresholds(pruner, lambda name, _, by=higher: taus[name] * by)
        found.append({task: loss.detach().log() for task, loss in losses().items()})
    for task, slope in slopes.items():
        assert slope == pytest.approx(float(found[1][task] - found[0][task]) / change, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per", ["component", "layer"])
def test_sensitivity_counts_what_debias_gives_back(seed, per):
    torch.manual_seed(seed)
    model = Toy()
    plain = {name: weight.detach().double() for name, weight in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weighting = PruningSensitivity(decay=0.0, least=0.0)
    schedule = Cubic(begin=0, end=20, every=10)
    pruner = pruner_of(model, weighting, optimizer, debias=True, per=per, schedule=schedule)
    x = torch.randn(9, 6)
    for _ in range(20):  # updates at 0, 10, 20; slopes of 20 are about the thresholds of 10
        optimizer.zero_grad()
        hidden = model.trunk(x)
        parts = {"a": (hidden - 2).square().mean(), "b": (model.b(hidden) - 1).square().mean()}
        found = pruner.observe_losses(parts)
        pruner.weigh(found).backward()
        optimizer.step()
        before = checkpoints.thresholds(pruner) if pruner.sparsity else {}
        pruner.step()

    def losses(log_step):
        """What the losses are where thresholds are that much higher, and gains follow."""
        seen = {}
        for name, weight in plain.items():
            tau = float(before[name]) * math.exp(log_step)
            left = weight.sign() * (weight.abs() - tau).clamp(min=0.0)
            seen[name] = left * weight[left != 0].norm() / left.norm()
        hidden = x.double() @ seen["trunk.weight"].T
        second = hidden @ seen["b.weight"].T
        return {"a": (hidden - 2).square().mean().log(), "b": (second - 1).square().mean().log()}

    change = 1e-6  # upwards: a weight may lie on its threshold, where there is a kink
    low, high = losses(1e-9), losses(1e-9 + change)
    for task, slope in checkpoints.memory(pruner)["slopes"].items():
        assert slope == pytest.approx(float(high[task] - low[task]) / change, rel=1e-3, abs=1e-5)


def test_a_function_of_the_losses_weighs_them():
    weigher = Weigher(lambda losses: {"a": 2.0, "b": 1 / losses["b"]}, ["a", "b"])
    a, b = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    total = weigher.weigh({"a": a, "b": b})
    total.backward()
    assert total.item() == 7.0
    assert (float(a.grad), float(b.grad)) == (2.0, 0.25)  # weights have no gradient
    assert weigher.weights == {"a": 2.0, "b": 0.25}


@pytest.mark.parametrize("given", [None, {"c": 1.0}, [1.0, 2.0]])
def test_a_function_that_returns_no_weights_is_told(given):
    weigher = Weigher(lambda losses: given, ["a", "b"])
    with pytest.raises(ValueError, match=r"must return \{task: weight\} for tasks out of \['a'"):
        weigher.weigh({"a": torch.tensor(1.0)})


def test_uniform_is_the_plain_sum():
    losses = {"a": torch.tensor(3.0), "b": torch.tensor(4.0)}
    assert float(Weigher(uniform, ["a", "b"]).weigh(losses)) == 7.0
    model = Toy()
    pruner = MultitaskPruner(model, ["a", "b"], method=Vote(0.5))
    loss = model.trunk.weight.sum()
    assert torch.equal(pruner.weigh({"a": loss, "b": 2 * loss}), 3 * loss)
    assert pruner.report().weights == {}


def test_weights_travel_in_the_checkpoint():
    losses = (1 + torch.rand(30, 2)).tolist()
    straight = Weigher(Noise(begin=0, window=5), ["a", "b"])
    for row in losses[:15]:
        straight.weigh(dict(zip("ab", map(torch.tensor, row), strict=True)))
    resumed = Weigher(Noise(begin=0, window=5), ["a", "b"])
    resumed.load(resumed.read(Entry(straight.state_dict(), "This checkpoint", "")))
    for row in losses[15:]:
        for weigher in (straight, resumed):
            weigher.weigh(dict(zip("ab", map(torch.tensor, row), strict=True)))
    assert straight.weights == resumed.weights != {"a": 1.0, "b": 1.0}
    assert straight.state_dict() == resumed.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noise(begin=-1), "`begin` must be a whole number"),
        (lambda: Noise(window=0), "`window` must be a whole number, at least 1"),
        (lambda: PruningSensitivity(decay=1.0), r"`decay` must be in \[0, 1\)"),
        (lambda: PruningSensitivity(least=-0.1), r"`least` must be in \[0, 1\)"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
