"""Results: ``{task: {metric: value}}``, as a function of the user's returns them."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from mtprune import checks, metrics
from mtprune.metrics import delta_t

__all__ = ["Results", "directions", "not_finite", "read", "read_dense"]

Results = dict[str, dict[str, float]]
"""``{task: {metric: value}}``."""

_NAMELESS = "value"
"""The metric of a task for which there is a number and no name."""


def read(found: Any, tasks: Sequence[str] | None, by: str = "evaluate") -> Results:
    """What a function returned, with a name for each metric.

    Args:
        found: ``{task: value}`` or ``{task: {metric: value}}``.
        tasks: The tasks; None for those that there are.
        by: The function, as the user knows it.

    Raises:
        TypeError: If it is no such mapping, or what it holds are no numbers.
        ValueError: If it is of other tasks.
    """
    must = "must return a mapping task -> value or task -> {metric: value}"
    if not isinstance(found, Mapping) or (tasks is None and not found):
        raise TypeError(checks.message(by, found, must))
    if tasks is not None and set(found) != set(tasks):
        raise ValueError(
            f"`{by}` must return a result for each task {list(tasks)}, and no others. "
            f"Got {list(found)}."
        )
    results: Results = {}
    for task in found if tasks is None else tasks:
        value = found[task]
        values = value if isinstance(value, Mapping) else {_NAMELESS: value}
        try:
            results[task] = {metric: float(value) for metric, value in values.items()}
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(checks.message(by, value, must, f" for '{task}'")) from None
    return results


def read_dense(
    found: Any, tasks: Sequence[str] | None, which: str, by: str = "evaluate"
) -> Results:
    """The same of a model that is not pruned, whose results must be finite.

    Args:
        found: What the function returned.
        tasks: The tasks; None for those that there are.
        which: How the model came about.
        by: The function.
    """
    results = read(found, tasks, by)
    if problem := not_finite(results, by):
        raise ValueError(f"{problem}, of the model {which}. Nothing can be compared with that.")
    return results


def not_finite(results: Results, by: str = "evaluate") -> str:
    """Which result is NaN or infinite, in words; empty if none is."""
    for task, found in results.items():
        for metric, value in found.items():
            if not isfinite(value):
                return f"`{by}` returned {value} for {_metric(task, metric)}"
    return ""


def _metric(task: str, metric: str) -> str:
    return f"task '{task}'" if metric == _NAMELESS else f"'{metric}' of task '{task}'"


def directions(
    results: Results, lower: bool | Mapping[str, Iterable[str]] | None
) -> Mapping[str, set[str]]:
    """Which metrics are errors, as `delta_t` wants to be told."""
    if isinstance(lower, bool):
        return {task: set(found) if lower else set() for task, found in results.items()}
    if lower is not None:
        checks.mapping("lower_is_better", lower, "task -> metrics, True or False")
        told = {task: set(names) for task, names in lower.items()}
        ones = {task: dict.fromkeys(found, 1.0) for task, found in results.items()}
        delta_t(ones, ones, told)  # which refuses names that are not there
        return told
    known = metrics.LOWER_IS_BETTER | metrics.HIGHER_IS_BETTER
    for task, found in results.items():
        for name in found:
            if name not in known:
                raise ValueError(
                    f"Is {_metric(task, name)} better when it is lower? Say it by "
                    "`lower_is_better`: True for losses and errors, False for scores, or "
                    "{task: {metric, ...}}, those that are errors."
                )
    return metrics.lower_is_better(results)
