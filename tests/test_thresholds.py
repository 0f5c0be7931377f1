"""The soft threshold, against literals, closed forms and finite differences; and the waterline."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import grad as derivative
from torch.func import vmap

from mtprune.holding.thresholds import nearest_threshold, shrinkage, soft_threshold
from mtprune.methods.controller import pi_step
from mtprune.selection import waterline


class Leaky:
    """A leak that is what it is told."""

    def __init__(self, now: float) -> None:
        self.now = now
        self.tensors = (torch.tensor(now), torch.tensor(False))


def tau(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def literal(weight: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return weight.sign() * (weight.abs() - threshold).relu()


# The operator.


def test_weights_move_towards_zero_and_stop_there():
    weight = torch.tensor([-3.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 2.0])
    expected = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    assert torch.equal(soft_threshold(weight, tau(1.0)), expected)


def test_a_convolution_with_a_logit_of_minus_3_loses_11_of_54_weights():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1)
    left = soft_threshold(conv.weight, torch.sigmoid(tau(-3.0)))
    assert int((left == 0).sum()) == 11
    assert torch.equal(left, literal(conv.weight, torch.sigmoid(tau(-3.0))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_published_formula_to_the_bit(dtype, device):
    weight = torch.randn(999, device=device).to(dtype)
    threshold = tau(0.3, dtype).to(device)
    result = soft_threshold(weight, threshold)
    assert result.dtype == dtype
    assert torch.equal(result, literal(weight, threshold))


def test_gradients_are_the_published_ones():
    weight = torch.randn(999, requires_grad=True)
    threshold = tau(0.4).requires_grad_()
    given = torch.randn(999)
    soft_threshold(weight, threshold).backward(given)
    above = weight.detach().abs() > 0.4
    assert torch.equal(weight.grad, given * above)
    slope = -(given * weight.detach().sign() * above).sum()
    torch.testing.assert_close(threshold.grad, slope)


def test_a_logit_gets_the_chain_rule():
    weight, logit, given = torch.randn(99), tau(-1.0).requires_grad_(), torch.randn(99)
    soft_threshold(weight, torch.sigmoid(logit)).backward(given)
    s = torch.sigmoid(logit.detach())
    above = weight.abs() > s
    torch.testing.assert_close(logit.grad, -s * (1 - s) * (given * weight.sign() * above).sum())


def test_one_threshold_for_many_layers_gets_the_sum_of_their_gradients():
    weights, threshold = [torch.randn(n) for n in (5, 50, 500)], tau(0.5).requires_grad_()
    parts = []
    for weight in weights:
        [part] = torch.autograd.grad(soft_threshold(weight, threshold).square().sum(), threshold)
        parts.append(part)
    loss = sum(soft_threshold(weight, threshold).square().sum() for weight in weights)
    [whole] = torch.autograd.grad(loss, threshold)
    torch.testing.assert_close(whole, sum(parts))


def test_slack_gets_the_derivative_in_the_log_threshold():
    weight, threshold = torch.randn(99), tau(0.3).requires_grad_()
    slack = torch.zeros((), requires_grad=True)
    soft_threshold(weight, threshold, None, slack).sin().sum().backward()
    torch.testing.assert_close(slack.grad, 0.3 * threshold.grad)


def test_at_the_edge_slack_gets_the_size_of_the_gradients():
    weight, slack = torch.tensor([-1.05, 0.9, 1.0, 1.09, 1.2]), torch.zeros((), requires_grad=True)
    given = torch.tensor([-2.0, 4.0, 8.0, 16.0, 32.0])
    soft_threshold(weight, tau(1.0), None, slack, 0.1).backward(given)
    assert slack.grad == 18.0


def test_gradients_agree_with_finite_differences():
    weight = torch.randn(200, dtype=torch.float64)
    weight = weight[(weight.abs() - 0.5).abs() > 1e-3].requires_grad_()
    threshold = tau(0.5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(soft_threshold, (weight, threshold))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_leak_lets_gradient_pass_below(share):
    weight = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    soft_threshold(weight, tau(1.0), Leaky(share)).backward(torch.tensor([1.0, 2.0, 4.0]))
    assert weight.grad.tolist() == [1.0, 2.0 * share, 4.0]


def test_a_threshold_of_zero_is_the_dense_weight():
    weight, threshold = torch.randn(99, requires_grad=True), tau(0.0).requires_grad_()
    slack = torch.zeros((), requires_grad=True)
    result = soft_threshold(weight, threshold, None, slack)
    result.square().sum().backward()
    assert torch.equal(result, weight)
    assert torch.equal(weight.grad, 2 * weight.detach())
    assert slack.grad == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_above_all_weights_nothing_is_left_and_only_a_leak_leads_back(share):
    weight, threshold = torch.randn(99, requires_grad=True), tau(10.0).requires_grad_()
    soft_threshold(weight, threshold, Leaky(share)).sum().backward()
    assert torch.equal(weight.grad, torch.full((99,), share))
    assert threshold.grad == 0


def test_laws():
    weight, other = torch.randn(2, 999, dtype=torch.float64)
    levels = [tau(x, torch.float64) for x in (0.0, 0.1, 0.5, 1.0, 3.0)]
    for low, high in pairwise(levels):
        one, two = soft_threshold(weight, low), soft_threshold(weight, high)
        assert int((one == 0).sum()) <= int((two == 0).sum())
        assert int((two == 0).sum()) == int((weight.abs() <= high).sum())
        assert bool((two.abs() <= one.abs()).all())
        assert bool((two * weight >= 0).all())
        assert torch.equal(soft_threshold(-weight, high), -two)
        torch.testing.assert_close(soft_threshold(3 * weight, 3 * high), 3 * two)
        torch.testing.assert_close(
            soft_threshold(one, high), soft_threshold(weight, low + high), rtol=0, atol=1e-14
        )
        moved = (soft_threshold(other, high) - two).abs()
        assert bool((moved <= (other - weight).abs() + 1e-15).all())


def test_it_is_the_proximal_map_of_the_absolute_value():
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    for weight in (-2.2, -0.3, 0.0, 0.71, 3.0):
        best = grid[(0.5 * (grid - weight).square() + 0.7 * grid.abs()).argmin()]
        result = soft_threshold(torch.tensor([weight], dtype=torch.float64), tau(0.7, grid.dtype))
        assert abs(float(best) - float(result)) < 1e-4


def test_it_goes_through_function_transforms():
    weights = torch.randn(4, 6)
    batched = vmap(lambda w: soft_threshold(w, tau(0.5)))(weights)
    assert torch.equal(batched, literal(weights, tau(0.5)))
    slope = derivative(lambda w: soft_threshold(w, tau(0.5)).square().sum())(weights[0])
    torch.testing.assert_close(slope, 2 * literal(weights[0], tau(0.5)))


def test_shrinkage_sums_to_the_derivative_in_the_threshold():
    weight, threshold = torch.randn(99), tau(0.3).requires_grad_()
    result = soft_threshold(weight, threshold)
    result.retain_grad()
    result.cos().sum().backward()
    torch.testing.assert_close(shrinkage(result.detach(), result.grad).sum(), threshold.grad)


# The waterline.


def reference(heights, budget, costs, groups=(), least=()):
    """A stable sort, and one weight after the other, in exact arithmetic."""
    flat = [
        (float(h), layer, i) for layer, hs in enumerate(heights) for i, h in enumerate(hs.tolist())
    ]
    safe = set()
    above = {key[1:] for key in flat}
    while True:
        above, spent = {key[1:] for key in flat}, Fraction(0)
        line = None
        for height, layer, i in sorted(flat):
            if (layer, i) in safe:
                continue
            if spent + costs[layer] > budget:
                if line is None:
                    line = height
                if height != line:
                    break
                continue
            if line is not None and height != line:
                break
            above.discard((layer, i))
            spent += costs[layer]
        starved = [
            (group, count)
            for group, count in zip(groups, least, strict=True)
            if sum(layer in group for layer, _ in above) < count
        ]
        if not starved:
            break
        for group, count in starved:
            members = sorted(group)
            inner = [
                ([members.index(i) for i in other], few)
                for other, few in zip(groups, least, strict=True)
                if set(other) < set(group)
            ]
            own = [heights[i] for i in members]
            lost = sum(h.numel() for h in own) - count
            kept = reference(own, lost, [1] * len(own), *map(list, zip(*inner, strict=True)))
            safe |= {(members[p], int(i)) for p, mask in enumerate(kept) for i in mask.nonzero()}
    return [
        torch.tensor([(layer, i) in above for i in range(h.numel())], dtype=torch.bool)
        for layer, h in enumerate(heights)
    ]


HEIGHTS = {
    "normal": lambda n: torch.randn(n).abs(),
    "ties": lambda n: torch.randint(0, 4, (n,)).float(),
    "zeros": lambda n: torch.randn(n).clamp(min=0.0),
    "wide": lambda n: torch.randn(n).abs() * 10.0 ** torch.randint(-38, 30, (n,)),
    "bfloat16": lambda n: torch.randn(n).abs().bfloat16().float(),
    "one": lambda n: torch.ones(n),
}


@pytest.mark.parametrize("kind", HEIGHTS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.99, 1.0])
def test_the_waterline_is_that_of_a_sort(kind, share, device):
    heights = [HEIGHTS[kind](n).to(device) for n in (7, 1, 300, 64)]
    budget = round(share * 372)
    found = waterline(heights, budget, [1] * 4)
    assert sum(int((~mask).sum()) for mask in found) == budget
    expected = reference(heights, budget, [1] * 4)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", HEIGHTS)
@pytest.mark.parametrize("share", [0.3, 0.9, 0.97])
def test_groups_keep_their_least(kind, share):
    heights = [HEIGHTS[kind](n) * s for n, s in ((40, 1.0), (30, 0.1), (20, 0.01), (1, 0.0))]
    groups, least = [(0,), (1, 2), (0,), (1,), (2,), (3,)], [4, 8, 1, 1, 1, 1]
    budget = min(round(share * 91), 91 - 13)
    found = waterline(heights, budget, [1] * 4, groups, least)
    assert sum(int((~mask).sum()) for mask in found) == budget
    for group, count in zip(groups, least, strict=True):
        assert sum(int(found[i].sum()) for i in group) >= count
    assert all(map(torch.equal, found, reference(heights, budget, [1] * 4, groups, least)))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_weights_of_different_cost_fill_the_budget_as_far_as_they_fit(share):
    heights = [torch.randn(n).abs() for n in (40, 30, 20)]
    costs = [Fraction(9), Fraction(1, 3), Fraction(4)]
    budget = Fraction(share) * (360 + 10 + 80)
    found = waterline(heights, budget, costs)
    spent = sum(c * int((~mask).sum()) for c, mask in zip(costs, found, strict=True))
    assert budget - 9 < spent <= budget
    assert all(map(torch.equal, found, reference(heights, budget, costs)))


def test_what_costs_nothing_goes_under_with_the_rest():
    heights = [torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2.0, 4.0, 6.0])]
    found = waterline(heights, 1, [1, 0])
    assert [mask.tolist() for mask in found] == [[False, True, True], [False, True, True]]


def test_more_than_there_is_cannot_go_under():
    heights = [torch.ones(3), torch.ones(3)]
    with pytest.raises(ValueError, match="Only 3 of 5 can go under"):
        waterline(heights, 5, [1, 1], [(0,), (1,)], [1, 2])


# Between, and the controller.


def test_a_threshold_parts_what_is_above_from_what_is_not():
    for _ in range(50):
        size = torch.randn(40).abs()
        above = size > size.sort().values[int(torch.randint(0, 39, ()))]
        for wanted in (0.0, 0.5, 9.0):
            found = nearest_threshold(size, above, wanted)
            assert torch.equal(size > found, above)


def test_where_equals_are_parted_all_of_them_stay_above_the_threshold():
    size = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert nearest_threshold(size, torch.tensor([False, False, True, True]), 2.0) == 1.0


def test_a_layer_that_is_all_above_or_all_below():
    size = torch.tensor([1.0, 2.0])
    assert nearest_threshold(size, torch.tensor([True, True]), 0.0) == 0.0
    assert nearest_threshold(size, torch.tensor([True, True]), 1.5) == 0.0
    assert nearest_threshold(size, torch.tensor([False, False]), 5.0) == 5.0


def test_the_controller_settles_where_it_should():
    weights = torch.randn(100_000, dtype=torch.float64).abs()
    trim, smooth = 0.7, None
    guess = math.log(float(torch.special.ndtri(torch.tensor(0.95, dtype=torch.float64))))
    for _ in range(100):
        got = float((weights <= math.exp(guess + trim)).double().mean())
        trim, smooth = pi_step(trim, smooth, 0.9, got)
    assert abs(got - 0.9) < 1e-3
