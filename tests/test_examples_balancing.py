"""The balances of the examples, by their closed forms."""

from math import log

import pytest
import torch
from common import balancing
from torch import nn


def test_gradients_that_agree_are_summed():
    gradients = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    torch.testing.assert_close(balancing.project(gradients), gradients.sum(0))


def test_of_two_that_conflict_each_loses_what_opposes_the_other():
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    # (1, 0) + 1/2 (-1, 1) = (.5, .5), and (-1, 1) + (1, 0) = (0, 1).
    torch.testing.assert_close(balancing.project(gradients), torch.tensor([0.5, 1.5]))


def test_a_task_is_projected_alike_whatever_the_size_of_what_opposes_it():
    own, other = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    for size in (0.5, 1.0, 8.0):
        total = balancing.project(torch.stack([own, size * other]))
        torch.testing.assert_close(total, torch.tensor([0.5, 0.5 + size]))


def test_gradients_that_cancel_leave_nothing():
    assert balancing.project(torch.tensor([[1.0, -2.0], [-1.0, 2.0]])).tolist() == [0.0, 0.0]


def net_and_losses():
    net = nn.Linear(3, 2)
    outputs = net(torch.randn(8, 3))
    return net, {"a": outputs[:, 0].square().mean(), "b": (outputs.sum(1) - 5).square().mean()}


def test_pcgrad_puts_projected_gradients_into_the_net():
    net, losses = net_and_losses()
    weights = list(net.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
        for loss in losses.values()
    ]
    balancing.PCGrad(weights, seed=3).backward(losses)
    expected = balancing.project(torch.stack(rows), torch.Generator().manual_seed(3))
    found = torch.cat([weight.grad.flatten() for weight in weights])
    torch.testing.assert_close(found, expected)


def test_pcgrad_takes_what_a_task_does_not_reach_for_zero():
    shared, own = nn.Linear(2, 1), nn.Linear(1, 1)
    nn.init.ones_(own.weight)  # so that the two agree
    hidden = shared(torch.ones(1, 2))
    weights = [*shared.parameters(), *own.parameters()]
    balancing.PCGrad(weights).backward({"a": hidden.sum(), "b": own(hidden).sum()})
    torch.testing.assert_close(own.bias.grad, torch.ones(1))


def test_famo_weighs_by_the_inverse_of_the_losses():
    losses = torch.tensor([1.0, 4.0], requires_grad=True)
    balancing.famo_total(torch.zeros(2), losses).backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0.8, 0.2]))


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0], [2.0, -1.0, 0.5]])
def test_famo_makes_a_convex_combination(logits):
    losses = torch.tensor([0.1, 3.0, 20.0], requires_grad=True)
    balancing.famo_total(torch.tensor(logits), losses).backward()
    assert (losses.grad > 0).all()
    assert losses.grad.sum().item() == pytest.approx(1)


def test_famo_counts_less_what_fell_fast():
    before, after = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])
    gradient = balancing.famo_gradient(torch.zeros(2), before, after)
    torch.testing.assert_close(gradient, torch.tensor([0.25 * log(2), -0.25 * log(2)]))


def test_famo_descends_the_mean_fall():
    logits = torch.randn(4, dtype=torch.float64, requires_grad=True)
    before, after = torch.rand(2, 4, dtype=torch.float64) + 0.5
    (logits.softmax(0) * (before.log() - after.log())).sum().backward()
    found = balancing.famo_gradient(logits.detach(), before, after)
    torch.testing.assert_close(found, logits.grad)


def test_famo_moves_towards_the_task_that_does_not_fall():
    balance = balancing.Famo(2)
    weight = torch.ones(1, requires_grad=True)
    for _ in range(3):
        balance.backward({"falls": 2 * weight.sum(), "stays": 0 * weight.sum() + 1})
        balance.after(lambda: {"falls": torch.tensor(1.0), "stays": torch.tensor(1.0)})
    falls, stays = balance.logits.softmax(0).tolist()
    assert falls < 0.5 < stays


def test_uncertainties_are_best_at_the_logarithms_of_the_losses():
    losses = torch.tensor([0.2, 1.0, 30.0])
    best = losses.log().requires_grad_()
    total = balancing.uncertainty_total(best, losses)
    assert total.item() == pytest.approx(3 + losses.log().sum().item())
    total.backward()
    torch.testing.assert_close(best.grad, torch.zeros(3))
    for aside in (-0.1, 0.1):
        assert balancing.uncertainty_total(best.detach() + aside, losses) > total


def test_uncertainties_are_learned_and_weigh_the_net():
    balance = balancing.Uncertainty(2, rate=0.1)
    for _ in range(200):
        weight = torch.ones(1, requires_grad=True)
        balance.backward({"a": 3 * weight.sum(), "b": 0.5 * weight.sum()})
    found = balance.logs.detach()
    torch.testing.assert_close(found, torch.tensor([3.0, 0.5]).log(), atol=0.02, rtol=0)
    assert weight.grad.item() == pytest.approx(2, abs=0.05)  # L / L for each task


def test_equal_sums():
    net, losses = net_and_losses()
    expected = torch.autograd.grad(sum(losses.values()), list(net.parameters()), retain_graph=True)
    balancing.Equal().backward(losses)
    for weight, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)
