r"""Paired differences: what the same seeds say of two methods.

The same seeds begin with the same weights and batches, so the difference of two methods is taken
seed by seed, and only its own spread counts. The interval of the mean of n differences is
:math:`\pm\, t\, s / \sqrt n` with their standard deviation s and the quantile t of Student's
distribution with n - 1 degrees of freedom. Where c intervals shall hold together, each is one of
:math:`1 - 0.05 / c` (Bonferroni).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mtprune import checks

__all__ = ["Difference", "interval", "spread", "student"]

_ROUNDING = 1e-9  # differences that are smaller, in points, are none
_MISSED = 0.05  # how often an interval, or any of those that shall hold together, may be wrong


def student(share: float, freedom: int) -> float:
    """The t with that share of Student's distribution between -t and t.

    For whole degrees of freedom the share is a finite sum in the angle whose tangent is
    ``t / sqrt(freedom)`` (Abramowitz & Stegun, 26.7.3 and 26.7.4); the angle is found by bisection.

    Args:
        share: In [0, 1).
        freedom: Degrees of freedom, at least 1.

    Example:
        >>> round(student(0.95, 2), 4), round(student(0.95, 1_000), 4)
        (4.3027, 1.9623)
    """
    checks.inside("share", share, "[0, 1)")
    checks.whole("freedom", freedom, least=1)
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """The share between -t and t."""
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for j in range((freedom - odd) // 2):
        total += term
        term *= square * (2 * j + 1 + odd) / (2 * j + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def interval(values: Sequence[float], comparisons: int = 1) -> float:
    """Half the width of the 95 % confidence interval of the mean; NaN of fewer than two values.

    Args:
        values: What it is the mean of.
        comparisons: How many intervals shall hold at once.

    Example:
        >>> round(interval([1.0, 2.0, 3.0]), 2), round(interval([1.0, 2.0, 3.0], comparisons=2), 2)
        (2.48, 3.58)
    """
    if len(values) < 2:
        return math.nan
    quantile = student(1 - _MISSED / comparisons, len(values) - 1)
    return quantile * _deviation(values) / math.sqrt(len(values))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, as text.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        '2.00 ± 1.00'
    """
    mean = f"{fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} \N{PLUS-MINUS SIGN} {_deviation(values):.2f}"


@dataclass(frozen=True)
class Difference:
    """Differences to a method, seed by seed.

    It prints as mean, half the interval of this difference alone, in brackets that of all which are
    compared, and a star where the second leaves out 0. Inside of it there is no difference to
    speak of, whichever mean is higher.

    Attributes:
        values: A difference for each seed that both have.
        comparisons: How many differences are looked at together.

    Example:
        >>> print(Difference((1.0, 2.0, 3.0), comparisons=2))
        +2.00 ± 2.48 (3.58)
        >>> print(Difference((2.0, 2.1, 1.9), comparisons=2))
        +2.00 ± 0.25 (0.36) *
    """

    values: tuple[float, ...]
    comparisons: int = 1

    @property
    def mean(self) -> float:
        """Their mean; NaN if there are none."""
        return fmean(self.values) if self.values else math.nan

    @property
    def alone(self) -> float:
        """Half the width of its own interval."""
        return interval(self.values)

    @property
    def among(self) -> float:
        """Half the width of the interval that holds together with the others."""
        return interval(self.values, self.comparisons)

    @property
    def differs(self) -> bool:
        """Whether that interval leaves out 0."""
        return abs(self.mean) > self.among + _ROUNDING

    def __str__(self) -> str:
        """See the class; empty without values."""
        if len(self.values) < 2:
            return f"{self.mean:+.2f}" if self.values else ""
        text = f"{self.mean:+.2f} \N{PLUS-MINUS SIGN} {self.alone:.2f} ({self.among:.2f})"
        return text + " *" * self.differs


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation; NaN where a value is not finite."""
    return stdev(values) if all(map(math.isfinite, values)) else math.nan
