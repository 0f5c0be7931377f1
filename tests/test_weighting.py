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
    Worst,
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


@pytest.mark.long
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


ONE = {"rate": 0.05, "least": 0.0, "reference": {"a": 2.0, "b": 1.0, "c": 8.0}}


def softmax(scores):
    return [len(scores) * math.exp(s) / sum(map(math.exp, scores)) for s in scores]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_worst_is_exponentiated_gradient_on_log_losses(temperature):
    rule = Worst(temperature=temperature, **ONE)
    losses = [[2.0 * math.e, 1.0, 8.0 / math.e]] * 40
    found = run(rule, losses)
    for step in (1, 2, 40):  # the lags are 1, 0 and -1
        stays = 1 - rule.rate * temperature
        score = rule.rate * sum(stays**i for i in range(step))
        assert found[step - 1] == pytest.approx(softmax([score, 0.0, -score]), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_worst_rests_where_weights_are_powers_of_relative_losses(temperature):
    rule = Worst(rate=0.5, temperature=temperature, least=0.25, reference=ONE["reference"])
    relative = [3.0, 1.0, 0.5]
    row = [factor * loss for factor, loss in zip(relative, ONE["reference"].values(), strict=True)]
    found = run(rule, [row] * 400)[-1]
    powers = [factor ** (1 / temperature) for factor in relative]
    expected = [0.25 + 0.75 * 3 * power / sum(powers) for power in powers]
    assert found == pytest.approx(expected, rel=1e-5)
    assert sum(found) == pytest.approx(3)


def test_worst_holds_losses_against_their_first_ones():
    losses = torch.tensor([[4.0, 1.0], [1.0, 1.0], [1.0, 1.0], [2.0, 0.25]])
    found = run(Worst(window=2, rate=0.1, temperature=0.0, least=0.0), losses.tolist(), ("a", "b"))
    assert found[:2] == [[1.0, 1.0]] * 2  # their geometric means are 2 and 1
    first = 0.1 * math.log(0.5) / 2
    assert found[2] == pytest.approx(softmax([first, -first]))
    second = first - 0.1 * math.log(0.25) / 2
    assert found[3] == pytest.approx(softmax([second, -second]))


def test_worst_does_not_see_the_scale_of_a_loss():
    losses = 1 + torch.rand(60, 3)
    plain = run(Worst(window=5), losses.tolist())
    scaled = run(Worst(window=5), (losses * torch.tensor([1.0, 1e3, 1e-3])).tolist())
    assert plain[-1] != [1.0] * 3
    for one, two in zip(plain, scaled, strict=True):
        assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
def test_worst_leaves_out_losses_without_a_logarithm(bad):
    losses = [[2.0, 2.0, 8.0]] * 20
    known = [[2.0, bad, 8.0] if i == 10 else row for i, row in enumerate(losses)]
    rule = Worst(**ONE)
    assert run(rule, known) == run(rule, losses)  # as if the task had lagged as before
    everything = [*losses, [bad] * 3]
    assert run(rule, everything)[-1] == run(rule, losses)[-1]


def test_worst_minds_how_a_task_lags_not_how_often_it_comes():
    both = Weigher(Worst(window=1), ["a", "b"])
    seldom = Weigher(Worst(window=1), ["a", "b"])
    for i in range(40):
        now = {"a": torch.tensor(1.0 if i == 0 else 0.5), "b": torch.tensor(1.0)}
        both.weigh(now)
        seldom.weigh(now if i % 4 in (0, 1) else {"a": now["a"]})
    assert seldom.weights == pytest.approx(both.weights)
    assert both.weights["b"] > 1 > both.weights["a"]


def test_a_task_that_comes_late_begins_in_the_middle():
    weigher = Weigher(Worst(reference={"a": 1.0, "b": 1.0, "c": 1.0}, least=0.0), ["a", "b", "c"])
    for _ in range(30):
        weigher.weigh({"a": torch.tensor(2.0), "b": torch.tensor(0.5)})
    assert weigher.weights["c"] == 1.0
    weigher.weigh({"c": torch.tensor(1.0)})
    assert weigher.weights["a"] > weigher.weights["c"] > weigher.weights["b"]


class Between(nn.Module):
    """A point that one task wants here, the other there."""

    def __init__(self):
        super().__init__()
        self.point = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.point.weight)

    def losses(self):
        x, y = self.point.weight[0]
        return {"a": (x - 1) ** 2 + y**2, "b": 0.05 * (x**2 + (y - 1) ** 2)}


@pytest.mark.slow
def test_training_for_the_worst_task_makes_both_as_bad():
    """From (0, 0) the tasks want (1, 0) and (0, 1); b is in units that make it count little."""

    def trained(weighting):
        model, weigher = Between(), Weigher(parse_weighting(weighting), ["a", "b"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(800):
            optimizer.zero_grad()
            weigher.weigh(model.losses()).backward()
            optimizer.step()
        return model.point.weight[0].detach(), weigher.weights

    plain, _ = trained("uniform")
    assert plain.tolist() == pytest.approx([1 / 1.05, 0.05 / 1.05], abs=1e-4)
    point, weights = trained(Worst(rate=0.05, temperature=0.0, least=0.0, window=1))
    assert point.tolist() == pytest.approx([0.5, 0.5], abs=1e-2)
    assert weights["b"] / weights["a"] == pytest.approx(20, rel=0.05)


@pytest.mark.slow
def test_a_task_that_lags_while_it_is_pruned_is_worth_more_and_catches_up():
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    targets = {t: x @ torch.randn(12, 12) for t in "ab"}
    scale = {"a": 1.0, "b": 0.02}

    def worst(weighting):
        torch.manual_seed(1)
        model = nn.ModuleDict({"trunk": nn.Linear(12, 12, bias=False)})
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        schedule = Cubic(begin=0, end=60, every=5)
        method = SoftThreshold(0.5, weighting=weighting, schedule=schedule)
        pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=method, optimizer=optimizer)
        for step in range(150):
            optimizer.zero_grad()
            y = model["trunk"](x)
            losses = {t: scale[t] * (y - targets[t]).square().mean() for t in "ab"}
            if step == 0:
                first = {t: float(loss.detach()) for t, loss in losses.items()}
            pruner.weigh(pruner.observe_losses(losses)).backward()
            optimizer.step()
            pruner.step()
        assert pruner.sparsity == 0.5
        relative = {t: float(loss.detach()) / first[t] for t, loss in losses.items()}
        return max(relative, key=relative.get), max(relative.values()), pruner.report().weights

    task, before, _ = worst("uniform")
    assert task == "b"
    _, after, weights = worst(Worst(rate=0.1, temperature=0.1, window=1))
    assert weights["b"] > 1 > weights["a"]
    assert after < 0.7 * before


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


@pytest.mark.parametrize("stop", [3, 15])
@pytest.mark.parametrize("rule", [Noise(begin=0, window=5), Worst(window=5)])
def test_weights_travel_in_the_checkpoint(rule, stop):
    losses = (1 + torch.rand(30, 2)).tolist()
    straight = Weigher(rule, ["a", "b"])
    for row in losses[:stop]:
        straight.weigh(dict(zip("ab", map(torch.tensor, row), strict=True)))
    resumed = Weigher(rule, ["a", "b"])
    resumed.load(resumed.read(Entry(straight.state_dict(), "This checkpoint", "")))
    for row in losses[stop:]:
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
        (lambda: Worst(rate=0.0), r"`rate` must be in \(0, 1\]"),
        (lambda: Worst(temperature=-1.0), r"`temperature` must be in \[0, inf\)"),
        (lambda: Worst(rate=0.5, temperature=3.0), "`rate` times `temperature` must be at most 1"),
        (lambda: Worst(least=1.0), r"`least` must be in \[0, 1\)"),
        (lambda: Worst(window=0), "`window` must be a whole number, at least 1"),
        (lambda: Worst(reference={"a": 0.0}), "`reference` of task 'a' must be positive"),
        (
            lambda: Weigher(Worst(reference={"x": 1.0}), ["a", "b"]),
            r"`reference` names \['x'\]\. Known here: \['a', 'b'\]",
        ),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_reference_is_a_mapping_of_numbers():
    with pytest.raises(TypeError, match=r"`reference` must be a mapping task -> loss\. Got 1\.0"):
        Worst(reference=1.0)
    with pytest.raises(TypeError, match=r"`reference` of task 'a' must be a number\. Got 'x'"):
        Worst(reference={"a": "x"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"x": 1.0}}, r"'scores' must have keys among .*'a', 'b'.*, not .*'x'"),
        ({"lags": {"a": "far"}}, r"'lags\.a' must be a finite number|'lags\.a' must be a number"),
        ({"starts": {"a": [None]}}, r"'starts\.a\.0' must be a"),
        ({"starts": 1.0}, "'starts' must be a mapping"),
    ],
)
def test_memory_that_is_no_memory_is_refused(change, message):
    weigher = Weigher(Worst(window=1), ["a", "b"])
    for _ in range(3):
        weigher.weigh({"a": torch.tensor(2.0), "b": torch.tensor(3.0)})
    state = weigher.state_dict()
    with pytest.raises(ValueError, match=message):
        weigher.read(Entry({**state, **change}, "This checkpoint", ""))
    assert weigher.state_dict() == state


class Product(nn.Module):
    """Makes one loss of all, by a factor that is learned."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, losses):
        return self.factor * losses.prod()


def test_a_module_makes_the_total_and_a_task_counts_as_much_as_its_loss_moves_it():
    module = Product()
    weigher = Weigher(parse_weighting(module), ["a", "b"])
    losses = {task: torch.tensor(x, requires_grad=True) for task, x in {"a": 3.0, "b": 5.0}.items()}
    total = weigher.weigh(losses)
    assert total == 30.0
    total.backward()
    assert weigher.weights == {"a": 10.0, "b": 6.0}
    assert losses["a"].grad == 10.0
    assert module.factor.grad == 15.0
    other = Weigher(parse_weighting(module), ["a", "b"])
    other.load(other.read(Entry(weigher.state_dict(), "This checkpoint", "")))
    assert other.weights == weigher.weights


def test_a_module_that_makes_no_loss_is_refused():
    weigher = Weigher(parse_weighting(nn.Identity()), ["a", "b"])
    losses = {task: torch.tensor(1.0, requires_grad=True) for task in "ab"}
    with pytest.raises(ValueError, match=r"Identity\(\) must make one loss of losses \[2\]. Got"):
        weigher.weigh(losses)
