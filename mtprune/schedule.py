"""Schedules: when masks change, and how far along we are.

A schedule is a frozen value that answers two questions. ``next_update(after)`` is the first step
later than ``after`` at which masks change, or ``None`` after the last. ``progress(step)`` is the
share of the final sparsity that is due at an update. Steps are optimizer steps, counted from 0.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

from mtprune import checks

__all__ = ["Cubic", "Hold", "Linear", "OneShot", "Regrow", "Rounds", "Schedule", "due"]


class Schedule(Protocol):
    """The two questions of the pruner to a schedule."""

    def next_update(self, after: int) -> int | None:
        """The first update later than step ``after`` (-1: the very first), or None."""
        ...

    def progress(self, step: int) -> float:
        """The share of the final sparsity due at the update of ``step``, in [0, 1]."""
        ...


@dataclass(frozen=True)
class OneShot:
    """All at once, at one step.

    Attributes:
        at: The step of the only update; 0 is before training has changed anything.

    Example:
        >>> OneShot().next_update(-1), OneShot().next_update(0)
        (0, None)
    """

    at: int = 0

    def __post_init__(self) -> None:
        """Validate."""
        checks.whole("at", self.at, least=0)

    def next_update(self, after: int) -> int | None:
        """See `Schedule`."""
        return self.at if after < self.at else None

    def progress(self, step: int) -> float:
        """See `Schedule`."""
        return 1.0


@dataclass(frozen=True)
class Linear:
    """Sparsity grows in equal parts from ``begin`` to ``end``; masks only shrink.

    Attributes:
        begin: Step of the first update, at which nothing is pruned yet.
        end: Step of the last update, which is always made.
        every: Steps between updates.

    Example:
        >>> schedule = Linear(begin=10, end=30, every=10)
        >>> [schedule.progress(step) for step in (10, 20, 30)]
        [0.0, 0.5, 1.0]
    """

    begin: int
    end: int
    every: int

    def __post_init__(self) -> None:
        """Validate."""
        _interval(self.begin, self.end, self.every)

    def next_update(self, after: int) -> int | None:
        """See `Schedule`."""
        if after < self.begin:
            return self.begin
        step = self.begin + ((after - self.begin) // self.every + 1) * self.every
        return min(step, self.end) if after < self.end else None

    def progress(self, step: int) -> float:
        """See `Schedule`."""
        return _fraction(step, self.begin, self.end)


@dataclass(frozen=True)
class Cubic(Linear):
    """The steps of `Linear`, but fast at first: ``1 - (1 - t)^3`` of the way at time t in [0, 1].

    Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
    compression", 2017. Masks only shrink.

    Example:
        >>> Cubic(begin=0, end=100, every=10).progress(50)
        0.875
    """

    def progress(self, step: int) -> float:
        """See `Schedule`."""
        return 1.0 - (1.0 - super().progress(step)) ** 3


@dataclass(frozen=True)
class Rounds:
    r"""Several rounds inside one ``pruner.prune(batches)``, each scored anew on fresh batches.

    Every round prunes the same share of what is left: after round r of n the sparsity is
    :math:`s_r = 1 - (1 - s)^{r / n}`. What is decided late, when most weights are gone, is decided
    by the scores of a network without them. Masks only shrink. Steps count rounds, from 0.

    Attributes:
        n: How many rounds.

    Example:
        >>> [round(due(Rounds(2), step, sparsity=0.96), 3) for step in (0, 1)]
        [0.833, 1.0]
    """

    n: int

    def __post_init__(self) -> None:
        """Validate."""
        checks.whole("n", self.n, least=1)

    def next_update(self, after: int) -> int | None:
        """See `Schedule`."""
        return after + 1 if after + 1 < self.n else None

    def progress(self, step: int) -> float:
        """The share of the rounds; `due` makes of it a share of the sparsity."""
        return (step + 1) / self.n


def due(schedule: Schedule, step: int, sparsity: float) -> float:
    """The share of the final sparsity that is due at the update of ``step``, in [0, 1].

    Args:
        schedule: The schedule.
        step: The step of the update.
        sparsity: The final sparsity, which `Rounds` depend on.
    """
    progress = schedule.progress(step)
    if isinstance(schedule, Rounds) and 0.0 < progress < 1.0 and sparsity > 0.0:
        return float(1.0 - (1.0 - sparsity) ** progress) / sparsity
    return progress


@dataclass(frozen=True)
class Hold:
    """A schedule, and after its last update more updates at the full sparsity.

    The additional updates change nothing if masks only shrink. With ``Vote(straight_through=True)``
    weights go on changing places.

    Attributes:
        schedule: The schedule of the sparsity.
        until: Step of the last update, not before the last of ``schedule``.
        every: Steps between the additional updates.

    Example:
        >>> schedule = Hold(Cubic(begin=0, end=100, every=50), until=130, every=20)
        >>> [schedule.next_update(step) for step in (-1, 0, 50, 100, 120, 130)]
        [0, 50, 100, 120, 130, None]
    """

    schedule: Schedule
    until: int
    every: int

    def __post_init__(self) -> None:
        """Validate."""
        must = "must be OneShot(), Linear(...) or Cubic(...)"
        checks.object_with("schedule", self.schedule, "next_update", must=must)
        if isinstance(self.schedule, (Regrow, Rounds)):
            raise TypeError(checks.message("schedule", self.schedule, must))
        checks.whole("until", self.until, least=0)
        checks.whole("every", self.every, least=1)
        if self.schedule.next_update(self.until) is not None:
            raise ValueError(
                f"`until` must not come before the last update of `schedule`. Got {self.until}, "
                f"with {self.schedule!r}."
            )

    def next_update(self, after: int) -> int | None:
        """See `Schedule`."""
        update = self.schedule.next_update(after)
        if update is not None:
            return update
        return min(after + self.every, self.until) if after < self.until else None

    def progress(self, step: int) -> float:
        """See `Schedule`."""
        return self.schedule.progress(step)


@dataclass(frozen=True)
class Regrow:
    """Sparse training at constant sparsity: drop and grow, ever fewer weights.

    The first update (step 0) draws random masks; those at ``every``, ``2 * every``, ... below
    ``end`` exchange ``fraction_at(step)`` of the kept weights of every layer.

    Attributes:
        every: Steps between updates.
        end: Step from which masks stay as they are.
        fraction: Share of a layer's kept weights exchanged at first; falls to 0 at ``end`` by a
            cosine.
        within: What a task ranks the gradients within, by which it asks for growth: each
            ``"layer"``, or the whole ``"model"``, where a task whose gradients are largest in its
            head has less of a say in the trunk.

    Example:
        >>> Regrow(every=10, end=100, fraction=0.5).fraction_at(50)
        0.25
    """

    every: int
    end: int
    fraction: float = 0.3
    within: Literal["model", "layer"] = field(default="model", metadata={"later": True})

    def __post_init__(self) -> None:
        """Validate."""
        checks.whole("every", self.every, least=1)
        checks.whole("end", self.end, least=1)
        checks.inside("fraction", self.fraction, "(0, 1]")
        checks.one_of("within", self.within, ("model", "layer"))

    def next_update(self, after: int) -> int | None:
        """See `Schedule`."""
        if after < 0:
            return 0
        step = (after // self.every + 1) * self.every
        return step if step < self.end else None

    def progress(self, step: int) -> float:
        """See `Schedule`."""
        return 1.0

    def fraction_at(self, step: int) -> float:
        """Share of every layer's kept weights to exchange at the update of ``step``."""
        return self.fraction / 2 * (1 + math.cos(math.pi * min(step / self.end, 1.0)))


def _interval(begin: int, end: int, every: int) -> None:
    checks.whole("begin", begin, least=0)
    checks.whole("end", end, least=0)
    checks.whole("every", every, least=1)
    if end < begin:
        raise ValueError(
            f"The schedule ends before it begins: `begin` is {begin}, `end` is {end}. "
            "Both are optimizer steps counted from 0."
        )


def _fraction(step: int, begin: int, end: int) -> float:
    return 1.0 if step >= end else max(0.0, (step - begin) / (end - begin))
