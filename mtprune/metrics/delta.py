"""Metrics: how a pruned model does on every task, against the dense one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from mtprune import checks

__all__ = ["DeltaT", "delta_t"]


@dataclass(frozen=True)
class DeltaT:
    """Relative change against a baseline, in percent; positive is better.

    Attributes:
        overall: The mean over tasks.
        tasks: Each task's own.
    """

    overall: float
    tasks: Mapping[str, float]


def delta_t(
    results: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, Mapping[str, float]],
    lower_is_better: Mapping[str, Collection[str]] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> DeltaT:
    r"""Relative change of every metric, with its direction, gathered by task.

    .. math:: \Delta_k = 100 \cdot \operatorname{mean}_j\, (-1)^{l_j} (M_j - B_j) / |B_j|

    with l = 1 where lower is better (Vandenhende et al., "Multi-task learning for dense prediction
    tasks: a survey", TPAMI 2021).

    Args:
        results: ``{task: {metric: value}}``.
        baseline: The same tasks and metrics of the model to compare with.
        lower_is_better: ``{task: {metric, ...}}``: errors and losses. All others are scores.
        reduction: Over a task's metrics: ``"mean"``, or ``"sum"``, which some tables use.

    Raises:
        ValueError: If tasks or metrics differ, a name is unknown, or a baseline value is zero.

    Example:
        >>> delta_t({"seg": {"miou": 0.25}}, {"seg": {"miou": 0.5}}).tasks
        {'seg': -50.0}
    """
    checks.either("reduction", reduction, ("mean", "sum"))
    if not results or set(results) != set(baseline):
        raise ValueError(
            f"`results` and `baseline` must hold the same tasks. "
            f"Got {sorted(results)} and {sorted(baseline)}."
        )
    lower = lower_is_better or {}
    unknown = {
        f"{task}: {metric}"
        for task, metrics in lower.items()
        for metric in metrics
        if metric not in results.get(task, {})
    }
    if unknown:
        raise ValueError(
            f"`lower_is_better` names what `results` does not hold: {sorted(unknown)}."
        )
    tasks = {}
    for task, metrics in results.items():
        base = baseline[task]
        if not metrics or set(metrics) != set(base):
            raise ValueError(
                f"Task '{task}' must have the same metrics in both. "
                f"Got {sorted(metrics)} and {sorted(base)}."
            )
        changes = []
        for metric, value in metrics.items():
            if base[metric] == 0:
                raise ValueError(
                    f"'{metric}' of task '{task}' is 0 in the baseline: no change is relative to 0."
                )
            change = 100 * (value - base[metric]) / abs(base[metric])
            changes.append(-change if metric in lower.get(task, ()) else change)
        tasks[task] = sum(changes) / (len(changes) if reduction == "mean" else 1)
    return DeltaT(sum(tasks.values()) / len(tasks), tasks)
