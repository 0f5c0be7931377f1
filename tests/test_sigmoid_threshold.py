"""The published dynamics of AdapMTL, and what they lead to."""

import math

import pytest
import torch
from torch import nn

from mtprune import MultitaskPruner, SigmoidThreshold, SoftThreshold, recipes
from mtprune.holding import Phased, make_masking
from tests.checkpoints import memory


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 20)
        self.a, self.b = nn.Linear(20, 1), nn.Linear(20, 1)

    def forward(self, x):
        hidden = self.trunk(x).relu()
        return {"a": self.a(hidden), "b": self.b(hidden)}


def start(method, optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), seed=0):
    torch.manual_seed(seed)
    model = Net()
    built = optimizer(model.parameters())
    pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=method, optimizer=built)
    return model, built, pruner


def step(model, optimizer, pruner, scale=1.0):
    optimizer.zero_grad()
    x = torch.randn(16, 6)
    out = model(x)
    losses = {t: scale * (out[t] - x[:, k : k + 1]).square().mean() for k, t in enumerate("ab")}
    pruner.observe_losses(losses)
    pruner.weigh(losses).backward()
    optimizer.step()
    pruner.step()


def softened(weight, tau):
    return weight.sign() * (weight.abs() - tau).relu()


def logits(pruner):
    return memory(pruner)["s"]


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [1e-2, 1e-4])
def test_under_adam_thresholds_follow_the_learning_rate_alone(weight_decay):
    method = SigmoidThreshold(0.9, end=400, init=-15.0, lr=1e-3, weight_decay=weight_decay)
    model, optimizer, pruner = start(method)
    for _ in range(301):
        step(model, optimizer, pruner)
    for s in logits(pruner).values():
        assert s == pytest.approx(-15.0 + 300 * 1e-3, abs=0.01 * 0.3 * 10)


def test_under_sgd_they_follow_the_weight_decay_alone():
    method = SigmoidThreshold(0.9, end=99, init=-1000.0, lr=0.5, weight_decay=1e-2, rule="sgd")
    model, optimizer, pruner = start(method)
    for _ in range(51):
        step(model, optimizer, pruner)
    for s in logits(pruner).values():
        assert s == pytest.approx(-1000.0 * (1 - 0.5 * 1e-2) ** 50, rel=1e-9)


def test_the_thresholds_are_what_autograd_and_adam_make_of_them():
    """In lock-step with logits that are Parameters of a plain torch optimizer."""
    settings = {"lr": 0.02, "weight_decay": 1e-3}
    method = SigmoidThreshold(0.99, end=50, init=-3.0, weighting="uniform", **settings)
    model, optimizer, pruner = start(method, lambda p: torch.optim.SGD(p, lr=0.0))
    # The reference starts where ours does: after the step that finds out who uses what.
    torch.manual_seed(0)
    twin = Net()
    names = {"trunk": "shared", "a": "a", "b": "b"}
    s = {c: nn.Parameter(torch.tensor(-3.0)) for c in names.values()}
    adam = torch.optim.Adam(s.values(), betas=(0.5, 0.999), **settings)
    for i in range(30):
        torch.manual_seed(100 + i)
        step(model, optimizer, pruner)
        if i == 0:
            continue
        torch.manual_seed(100 + i)
        x = torch.randn(16, 6)
        soft = {
            n: softened(getattr(twin, n).weight.detach(), torch.sigmoid(s[c]))
            for n, c in names.items()
        }
        hidden = nn.functional.linear(x, soft["trunk"], twin.trunk.bias).relu()
        loss = sum(
            (nn.functional.linear(hidden, soft[t], getattr(twin, t).bias) - x[:, k : k + 1])
            .square()
            .mean()
            for k, t in enumerate("ab")
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
        for name, found in logits(pruner).items():
            assert found == pytest.approx(s[name].item(), rel=1e-4)


def test_it_rests_while_the_target_is_reached_and_is_not_exact():
    method = SigmoidThreshold(0.25, end=60, init=-2.0, lr=0.1)
    model, optimizer, pruner = start(method)
    seen = []
    for _ in range(62):
        step(model, optimizer, pruner)
        seen.append(logits(pruner)["shared"])
    history = pruner.report().history
    reached = next(i for i, m in enumerate(history) if m.sparsity >= 0.25)
    assert len(set(seen[reached : reached + 2])) == 1
    assert history[-1].sparsity != pytest.approx(0.25, abs=1e-3)
    zeros = sum(int((~mask).sum()) for mask in pruner.masks.values())
    for _ in range(20):  # fixed at the end, unlike the original
        step(model, optimizer, pruner)
    assert zeros == sum(int((~mask).sum()) for mask in pruner.masks.values())


@pytest.mark.slow
def test_a_start_far_below_zero_is_dense_for_good_where_ours_is_on_target():
    model, optimizer, pruner = start(recipes.adapmtl_published(0.9, 50, init=-1000.0))
    for _ in range(52):
        step(model, optimizer, pruner)
    assert pruner.sparsity == 0.0
    assert method_threshold(-1000.0) == 0.0
    model, optimizer, pruner = start(recipes.adapmtl(0.9, 50))
    for _ in range(52):
        step(model, optimizer, pruner)
    assert pruner.sparsity == round(0.9 * 160) / 160


def method_threshold(s):
    return SigmoidThreshold(0.9, end=1).threshold(s)


def test_the_threshold_is_the_sigmoid():
    for s in (-30.0, -3.0, 0.0, 2.0):
        assert method_threshold(s) == pytest.approx(1 / (1 + math.exp(-s)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 90}, "Did you mean 0.9"),
        ({"end": -1}, "`end` must be a whole number"),
        ({"rule": "rmsprop"}, "`rule` must be 'adam' or 'sgd'"),
        ({"lr": -1.0}, "`lr` must be at least 0"),
        ({"weight_decay": math.inf}, "`weight_decay` must be at least 0"),
        ({"weighting": "loud"}, "`weighting` must be one of"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SigmoidThreshold(**({"sparsity": 0.9, "end": 10} | options))


def test_both_are_methods_of_the_same_kind():
    kinds = {
        type(method.hold(make_masking("prune", nn.Linear(2, 2)), None))
        for method in (SigmoidThreshold(0.9, end=10), SoftThreshold(0.9))
    }
    assert kinds == {Phased}
