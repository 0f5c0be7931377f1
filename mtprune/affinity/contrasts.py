"""Contrasts: a number of the tasks beside the same number of nulls, and the interval of the excess.

The interval is that of a new draw against others. If the tasks were as unrelated as those of a
null, their number would scatter as those of the nulls do, and so would the mean of the nulls it is
held against, if less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan, nan, sqrt
from statistics import fmean
from typing import TYPE_CHECKING

from mtprune import checks
from mtprune.paired import student

if TYPE_CHECKING:
    from mtprune.affinity.overlap import Affinity

__all__ = ["Contrast", "Contrasts", "contrast", "mean_within", "spread"]


@dataclass(frozen=True)
class Contrast:
    """A number, such as an overlap, beside those of nulls.

    Attributes:
        value: The number; NaN if there is none.
        null: That of each null.

    Example:
        >>> found = Contrast(0.75, null=(0.5, 0.25, 0.75, 0.5))
        >>> found.expected, found.excess, found.p
        (0.5, 0.25, 0.4)
        >>> low, high = found.interval
        >>> round(low, 2), round(high, 2), found.beyond
        (-0.48, 0.98, False)
    """

    value: float
    null: tuple[float, ...]

    @property
    def iou(self) -> float:
        """The number, where it is an overlap."""
        return self.value

    @property
    def expected(self) -> float:
        """The mean of the nulls that have a number."""
        return fmean(self._known) if self._known else nan

    @property
    def excess(self) -> float:
        """The number beyond that."""
        return self.value - self.expected

    @property
    def p(self) -> float:
        """How often a null has as much: (1 + those that do) / (1 + all nulls)."""
        if isnan(self.value):
            return nan
        return (1 + sum(value >= self.value for value in self.null)) / (1 + len(self.null))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the excess that is to be expected lies, with a confidence of 95 %."""
        return self.within()

    @property
    def beyond(self) -> bool:
        """Whether there is an excess beyond the interval: all of it is above 0."""
        return self.interval[0] > 0

    def within(self, confidence: float = 0.95, *, of: int = 1) -> tuple[float, float]:
        r"""The interval of the excess, :math:`\bar d \pm t_{D-1}\, s \sqrt{1 + 1/D}`.

        Args:
            confidence: How sure.
            of: Of so many intervals all at once (Bonferroni).

        Returns:
            Both ends; infinite with a single null, NaN without a number.
        """
        checks.inside("confidence", confidence, "(0, 1)")
        checks.whole("of", of, least=1)
        if isnan(self.excess):
            return nan, nan
        draws = len(self._known)
        if draws < 2:
            return -inf, inf
        reach = student(1 - (1 - confidence) / of, draws - 1) * sqrt(1 + 1 / draws)
        reach *= spread(self._known)
        return self.excess - reach, self.excess + reach

    @property
    def _known(self) -> list[float]:
        return [value for value in self.null if not isnan(value)]


@dataclass(frozen=True)
class Contrasts:
    """An affinity beside its nulls.

    Attributes:
        overall: Of all layers together.
        layers: ``{layer: contrast}``, in order of position.
    """

    overall: Contrast
    layers: Mapping[str, Contrast]


def contrast(affinity: "Affinity", nulls: Sequence["Affinity"]) -> Contrasts:
    """Put an affinity beside those of nulls of your own, such as tasks with shuffled labels.

    Args:
        affinity: What `compare` found.
        nulls: What it found under each null, on the same layers.

    Example:
        >>> import torch
        >>> from mtprune.affinity import compare
        >>> both, one = (torch.tensor([True, False]), torch.tensor([True, True]))
        >>> tasks = compare({"seg": {"trunk": both}, "depth": {"trunk": both}})
        >>> null = compare({"seg": {"trunk": both}, "depth": {"trunk": one}})
        >>> contrast(tasks, [null]).overall.excess
        0.5
    """
    if not nulls:
        raise ValueError("`nulls` must hold at least one affinity. Got none.")
    names = [layer.name for layer in affinity.layers]
    for null in nulls:
        if [layer.name for layer in null.layers] != names:
            raise ValueError(
                f"`nulls` must be of the layers {names}. Got {[x.name for x in null.layers]}."
            )
    return Contrasts(
        overall=Contrast(affinity.iou, tuple(null.iou for null in nulls)),
        layers={
            layer.name: Contrast(layer.iou, tuple(null.layers[i].iou for null in nulls))
            for i, layer in enumerate(affinity.layers)
        },
    )


def mean_within(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the mean of draws; infinite for a single one.

    Example:
        >>> low, high = mean_within([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    draws = len(values)
    if draws < 2:
        return -inf, inf
    reach = student(confidence, draws - 1) * spread(values) / sqrt(draws)
    return fmean(values) - reach, fmean(values) + reach


def spread(values: Sequence[float]) -> float:
    """The standard deviation of two draws or more."""
    middle = fmean(values)
    return sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
