"""Intervals: how sure a relative change is that was measured on a few batches."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import fmean, stdev

from mtprune.metrics import delta_t
from mtprune.paired import student

__all__ = ["Change", "changes"]

Results = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Change:
    """A relative change, in percent; below 0 is worse.

    Attributes:
        mean: The change. It is ``-inf`` where what was measured is no longer finite.
        error: Half the width of its 95 % interval; None if there is one measurement only.

    Example:
        >>> change = Change(-1.0, 0.25)
        >>> change.low, change.high, f"{change}"
        (-1.25, -0.75, '-1.00 ± 0.25')
    """

    mean: float
    error: float | None = None

    @property
    def low(self) -> float:
        """The worse end of the interval; the change itself if there is no interval."""
        return self.mean - (self.error or 0.0)

    @property
    def high(self) -> float:
        """The better end of the interval; the change itself if there is no interval."""
        return self.mean + (self.error or 0.0)

    def __str__(self) -> str:
        """The change and half the width of its interval."""
        return f"{self.mean:+.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


def changes(
    found: Sequence[Results], base: Sequence[Results], lower: Mapping[str, Collection[str]]
) -> dict[str, Change]:
    r"""The relative change of each task's mean over batches, with its 95 % interval.

    Batches are paired: both models have seen each. With the means :math:`\bar m` and
    :math:`\bar b`, the change is :math:`100\,(\bar m - \bar b) / |\bar b|`, and its error that of
    a ratio of means: the standard error of :math:`m_i - (\bar m / \bar b)\, b_i`, over
    :math:`|\bar b|`, times Student's quantile. A task with several metrics has the mean of their
    changes, batch by batch.

    Args:
        found: ``{task: {metric: value}}`` of each batch.
        base: The same of the model to compare with.
        lower: ``{task: {metric, ...}}``: errors and losses. All others are scores.

    Raises:
        ValueError: If a mean of `base` is 0.

    Example:
        >>> base = [{"seg": {"loss": 1.0}}, {"seg": {"loss": 3.0}}]
        >>> print(changes([{"seg": {"loss": 1.2}}, {"seg": {"loss": 3.2}}], base,
        ...               {"seg": {"loss"}})["seg"])
        -10.00 ± 63.53
    """
    means, bases = _means(found), _means(base)
    whole = {task: values for task, values in means.items() if all(map(isfinite, values.values()))}
    known = {task: found for task, found in bases.items() if task in whole}
    directed = {task: names for task, names in lower.items() if task in whole}
    told = delta_t(whole, known, directed).tasks if whole else {}
    return {
        task: Change(told[task], _error(task, found, base, lower.get(task, ())))
        if task in told
        else Change(-inf)
        for task in means
    }


def _means(batches: Sequence[Results]) -> dict[str, dict[str, float]]:
    """Of each metric, the mean over batches."""
    return {
        task: {metric: fmean(b[task][metric] for b in batches) for metric in metrics}
        for task, metrics in batches[0].items()
    }


def _error(
    task: str, found: Sequence[Results], base: Sequence[Results], lower: Collection[str]
) -> float | None:
    """Half the width of the interval of a task's change, in percent."""
    number = len(found)
    if number < 2:
        return None
    metrics = list(found[0][task])
    away = [0.0] * number
    for metric in metrics:
        values = [batch[task][metric] for batch in found]
        before = [batch[task][metric] for batch in base]
        mean = fmean(before)
        ratio = fmean(values) / mean
        share = (-1 if metric in lower else 1) / abs(mean) / len(metrics)
        for i, (value, was) in enumerate(zip(values, before, strict=True)):
            away[i] += share * (value - ratio * was)
    return 100 * student(0.95, number - 1) * stdev(away) / sqrt(number)
