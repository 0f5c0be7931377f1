"""Intervals of paired differences are Student's."""

import math

import pytest
from scipy.stats import t as student_t

from mtprune.paired import Difference, interval, spread, student


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 29, 100, 1_001])
def test_quantiles_are_those_of_scipy(freedom):
    for share in (0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 1 - 0.05 / 40, 1 - 0.05 / 1_000):
        expected = student_t.ppf((1 + share) / 2, freedom)
        assert student(share, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_interval():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    # One of fifty: the quantile at 0.9995.
    assert interval([1.0, 2.0, 3.0], 50) == pytest.approx(31.59905 / 3**0.5, rel=1e-5)
    values = [0.5, -1.25, 3.0, 2.5, 0.0]
    low, high = student_t.interval(0.95, 4, 0.95, 1.0)
    width = (high - low) / 2 * math.sqrt(sum((v - 0.95) ** 2 for v in values) / 4 / 5)
    assert interval(values) == pytest.approx(width)
    assert math.isnan(interval([1.0]))
    assert math.isnan(interval([1.0, math.nan]))
    assert interval([2.0, 2.0]) == 0.0


def test_difference_in_words():
    assert str(Difference((1.0, 2.0, 3.0), 2)) == "+2.00 ± 2.48 (3.58)"
    assert str(Difference((2.0, 2.1, 1.9), 2)).endswith(" *")
    assert str(Difference((-2.0,))) == "-2.00"
    assert str(Difference(())) == ""
    assert str(Difference((1.0, math.nan))) == "+nan ± nan (nan)"
    assert not Difference((2.0, 2.0, 2.3), comparisons=10_000).differs
    assert Difference((2.0, 2.0, 2.3)).differs
    assert not Difference((0.0, 0.0)).differs
    assert not Difference((1e-14, 1e-14)).differs  # rounding


def test_spread():
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert spread([1.0]) == "1.00"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1.0, 3), r"`share` must be in \[0, 1\)"), ((0.5, 0), "`freedom` must be a whole number")],
)
def test_no_quantile(arguments, message):
    with pytest.raises(ValueError, match=message):
        student(*arguments)
