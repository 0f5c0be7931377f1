"""Gates: closed forms against draws, against integrals, and against numbers worked out by hand."""

import math

import pytest
import torch
from scipy.integrate import quad

from mtprune.methods import gates

POINTS = pytest.mark.parametrize("x", [-6.0, -2.0, -0.5, 0.0, 0.0005, 0.3, 1.0, 2.197, 6.0])


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def draws(x, count=400_000):
    """The definition: a logistic, stretched and clipped."""
    u = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (torch.sigmoid(torch.logit(u) + x) * 1.2 - 0.1).clamp(0.0, 1.0)


def test_probabilities_are_eleven_twelfths_at_zero():
    assert gates.open_probability(double(0.0)).item() == pytest.approx(11 / 12, abs=1e-15)


@POINTS
def test_probabilities_are_those_of_draws(x):
    z = draws(x)
    assert (z > 0).double().mean().item() == pytest.approx(
        gates.open_probability(double(x)).item(), abs=2e-3
    )
    assert (z == 1).double().mean().item() == pytest.approx(
        1 - gates.open_probability(double(-x)).item(), abs=2e-3
    )


@POINTS
def test_the_mean_is_that_of_draws(x):
    assert draws(x).mean().item() == pytest.approx(gates.mean(double(x)).item(), abs=2e-3)


@POINTS
def test_the_mean_is_the_integral_of_the_tail(x):
    def tail(t):
        s = (t - gates.GAMMA) / (gates.ZETA - gates.GAMMA)
        return 1 / (1 + math.exp(math.log(s / (1 - s)) - x))

    expected, _ = quad(tail, 0, 1, epsabs=1e-12)
    assert gates.mean(double(x)).item() == pytest.approx(expected, abs=1e-8)


def test_known_means():
    x = torch.tensor([-1.0, 0.0, 1.0, 2.197, 4.0])
    expected = torch.tensor([0.3152, 0.5, 0.6848, 0.8534, 0.9681])
    assert torch.allclose(gates.mean(x), expected, atol=1e-4)


def test_the_mean_is_symmetric_rising_and_ends_at_zero_and_one():
    x = torch.linspace(-30, 30, 2_001, dtype=torch.float64)
    found = gates.mean(x)
    assert torch.allclose(found + found.flip(0), torch.ones_like(x), atol=1e-9)
    assert bool((found.diff() > 0).all())
    assert found[0].item() == pytest.approx(0.0, abs=1e-11)


def test_the_mean_is_close_to_the_magic_number_of_the_original_code():
    x = torch.linspace(-10, 10, 2_001, dtype=torch.float64)
    assert (torch.sigmoid(0.8 * x) - gates.mean(x)).abs().max().item() == pytest.approx(
        0.0073, abs=1e-4
    )


@POINTS
def test_the_slope_of_the_expected_norm_is_that_of_a_coin(x):
    x = double(x).requires_grad_()
    p = gates.open_probability(x)
    p.backward()
    assert torch.allclose(x.grad, p.detach() * (1 - p.detach()))


def test_types_are_kept():
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, dtype=dtype)
        assert gates.mean(x).dtype == gates.open_probability(x).dtype == dtype
