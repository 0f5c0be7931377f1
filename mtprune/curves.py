"""Curves: what each sparsity costs each task, as `mtprune.sweep` measured it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from mtprune import checks, files
from mtprune.intervals import Change
from mtprune.text import columns

__all__ = ["Alone", "Point", "Sweep"]

_FEW = 5  # layers in the short table


@dataclass(frozen=True)
class Point:
    """What tasks lose where so much is pruned.

    Attributes:
        sparsity: The share of zeros that was asked for.
        pruned: The share that there is: larger units do not always fit.
        tasks: Each task's change, in percent; below 0 is worse.

    Example:
        >>> point = Point(0.9, 0.9, {"seg": Change(-2.0), "depth": Change(1.0)})
        >>> point.mean, point.worst_task
        (-0.5, 'seg')
    """

    sparsity: float
    pruned: float
    tasks: Mapping[str, Change]

    @property
    def mean(self) -> float:
        """The mean change over tasks."""
        return fmean(change.mean for change in self.tasks.values())

    @property
    def worst_task(self) -> str:
        """The task that loses most."""
        return min(self.tasks, key=lambda task: self.tasks[task].mean)

    @property
    def worst(self) -> Change:
        """The change of the task that loses most."""
        return self.tasks[self.worst_task]


@dataclass(frozen=True)
class Alone(Point):
    """What tasks lose where one layer or component is pruned, and nothing else.

    Attributes:
        name: The layer or component.
        weights: How many weights it has.
    """

    name: str
    weights: int


@dataclass(frozen=True)
class Sweep:
    """What each sparsity costs each task. It prints as a table, and is data.

    Attributes:
        tasks: The tasks.
        points: One for each sparsity, the lowest first.
        layers: What each layer costs alone, one for each layer and sparsity, in order of position.
        components: The same of components.
        batches: On how many batches each task was measured; with one there are no intervals.
        method: What decided, as far as it differs from the defaults.

    Example:
        >>> points = (Point(0.5, 0.5, {"seg": Change(-0.2)}), Point(0.9, 0.9, {"seg": Change(-3)}))
        >>> found = Sweep(("seg",), points)
        >>> found.within(loss=0.01), found.within(loss=0.05), found.within(loss=0.001)
        (0.5, 0.9, 0.0)
        >>> print(found)
        sparsity   mean    seg  worst
        0.5       -0.20  -0.20    seg
        0.9       -3.00  -3.00    seg
        Change in percent against the model as it is; below 0 is worse.
        No task loses more than 1 % up to 0.5, where the worst, seg, changes by -0.20.
    """

    tasks: tuple[str, ...]
    points: tuple[Point, ...]
    layers: tuple[Alone, ...] = ()
    components: tuple[Alone, ...] = ()
    batches: int = 1
    method: str = ""

    def at(self, sparsity: float) -> Point:
        """The point of a sparsity.

        Raises:
            ValueError: If that was not tried.
        """
        for point in self.points:
            if point.sparsity == sparsity:
                return point
        known = tuple(point.sparsity for point in self.points)
        raise ValueError(checks.message("sparsity", sparsity, f"must be one of {known}"))

    def within(self, loss: float, *, sure: bool = False) -> float:
        """The most sparsity that was tried at which no task loses more than that share.

        Args:
            loss: A share of what the model has now: 0.01 is one percent.
            sure: Count the worse end of every interval, not its middle.

        Returns:
            The sparsity; 0 if there is none. ``at(sparsity).worst_task`` is the task that loses
            most there.

        Raises:
            ValueError: If the share is negative, or `sure` is asked for where there are no
                intervals.
        """
        checks.inside("loss", loss, "[0, inf)", must="is a share of 1, at least 0")
        if sure and self.batches < 2:
            raise ValueError(
                "sure=True needs intervals, and this was measured on one batch: let `evaluate` "
                "return a list, with the result of each batch."
            )
        fine = [point.sparsity for point in self.points if self._loses(point, sure) <= 100 * loss]
        return max(fine, default=0.0)

    def _loses(self, point: Point, sure: bool) -> float:
        """What the task that loses most loses, in percent."""
        return -min(change.low if sure else change.mean for change in point.tasks.values())

    def table(self, layers: bool = False) -> str:
        """The sweep as text.

        Args:
            layers: Tell of all layers alone, not only of those that cost most.
        """
        head = ["sparsity", "mean", *self.tasks, "worst"]
        lines = columns([head, *(self._row(f"{p.sparsity:g}", p) for p in self.points)])
        lines.append(self._about())
        lines.append(self._limit(0.01))
        for what, rows in (("component", self.components), ("layer", self.layers)):
            few = rows if layers or what == "component" else self._costliest()
            if few:
                head = [f"{what} alone", "sparsity", "mean", *self.tasks, "worst"]
                body = [[row.name, *self._row(f"{row.sparsity:g}", row)] for row in few]
                lines += ["", *columns([head, *body])]
            if len(few) < len(rows):
                lines.append(f"The {len(few)} of {len(rows)} that cost most.")
        return "\n".join(lines)

    def __str__(self) -> str:
        """The table, with the layers that cost most alone."""
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """The sweep as dicts, lists, numbers and strings; None for what is not finite."""
        return {
            "tasks": list(self.tasks),
            "batches": self.batches,
            "method": self.method,
            "points": [_plain(point) for point in self.points],
            "layers": [_plain(row) for row in self.layers],
            "components": [_plain(row) for row in self.components],
        }

    def save(self, path: str | PathLike[str]) -> Path:
        """Write `to_dict` as JSON.

        Args:
            path: The file, which is replaced. Its name ends in ``.json``.

        Returns:
            The file.

        Raises:
            ValueError: If it does not.
        """
        target = Path(path)
        if target.suffix.lower() != ".json":
            raise ValueError(f"A sweep is saved as JSON: its name ends in .json. Got '{path}'.")
        files.write_text(target, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        return target

    def _row(self, name: str, point: Point) -> list[str]:
        tasks = [str(point.tasks[task]) for task in self.tasks]
        return [name, f"{point.mean:+.2f}", *tasks, point.worst_task]

    def _about(self) -> str:
        sure = f" ± its 95 % interval over {self.batches} batches" if self.batches > 1 else ""
        by = f" By {self.method}." if self.method else ""
        return f"Change in percent{sure} against the model as it is; below 0 is worse.{by}"

    def _limit(self, loss: float) -> str:
        most = self.within(loss)
        if not most:
            return f"Some task loses more than {100 * loss:g} % at every sparsity."
        point = self.at(most)
        return (
            f"No task loses more than {100 * loss:g} % up to {most:g}, where the worst, "
            f"{point.worst_task}, changes by {point.worst}."
        )

    def _costliest(self) -> Sequence[Alone]:
        """The layers by which the worst task loses most, in order of position."""
        first = sorted(self.layers, key=lambda row: row.worst.mean)[:_FEW]
        return [row for row in self.layers if row in first]


def _plain(point: Point) -> dict[str, Any]:
    named = {"name": point.name, "weights": point.weights} if isinstance(point, Alone) else {}
    return {
        **named,
        "sparsity": point.sparsity,
        "pruned": point.pruned,
        "mean": _finite(point.mean),
        "worst": point.worst_task,
        "tasks": {
            task: {
                "change": _finite(change.mean),
                "low": None if change.error is None else _finite(change.low),
                "high": None if change.error is None else _finite(change.high),
            }
            for task, change in point.tasks.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
