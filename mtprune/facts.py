"""Facts: the numbers of an update, kept for the report when scores and masks are gone."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

from torch import Tensor

from mtprune.census import Census
from mtprune.model import factors
from mtprune.model.layers import Layer
from mtprune.model.layout import PLAIN, Layout
from mtprune.reading import Entry

__all__ = [
    "Count",
    "Facts",
    "GroupRow",
    "Moment",
    "Subject",
    "count",
    "count_rank",
    "everywhere",
    "mean",
    "share",
    "total",
]

_MOMENTS = 512


@dataclass(frozen=True)
class Subject:
    """A layer that an update decides about.

    Attributes:
        name: The layer.
        component: Its component.
        shape: Its shape.
        tasks: The tasks that use it.
        cost: Multiply-adds of each of its weights, if that was measured.
        layout: Where its matrices lie in it.
    """

    name: str
    component: str
    shape: tuple[int, ...]
    tasks: tuple[str, ...]
    cost: Fraction | None = None
    layout: Layout = PLAIN

    @property
    def matrices(self) -> int:
        """How many matrices it holds."""
        return self.layout.count(self.shape)


@dataclass(frozen=True)
class Count:
    """The numbers of one layer after an update.

    Attributes:
        name: The layer.
        component: Its component.
        parameters: How many weights it has.
        kept: How many of them are kept.
        wanted: For each task that uses it, how many of the kept ones that task alone would keep.
        unanimous: How many of the kept ones each of these tasks alone would keep.
        tasks: The tasks that use it.
        single: How many of the kept ones exactly one of them alone would keep, if that is known.
        nobody: How many of the kept ones none of them alone would keep, if that is known.
        threshold: Its threshold, if it has one.
        cost: Multiply-adds of each of its weights, if that was measured.
        rank: How many singular directions it keeps, if ranks are pruned.
        full_rank: How many it had.
    """

    name: str
    component: str
    parameters: int
    kept: int
    wanted: Mapping[str, int]
    unanimous: int
    tasks: tuple[str, ...] = ()
    single: int | None = None
    nobody: int | None = None
    threshold: float | None = None
    cost: float | None = None
    rank: int | None = None
    full_rank: int | None = None


@dataclass(frozen=True)
class Moment:
    """The state of pruning after one update.

    Attributes:
        step: The step of the update.
        sparsity: Share pruned.
        components: For each component its ``"sparsity"``, its ``"share"`` of all kept weights, and
            its ``"threshold"``, if it has one: the mean over its weights.
        weights: The factor on each task's loss.
    """

    step: int
    sparsity: float
    components: Mapping[str, Mapping[str, float]]
    weights: Mapping[str, float]


@dataclass(frozen=True)
class GroupRow:
    """The numbers of a group of units after an update.

    Attributes:
        name: The group.
        units: How many there are.
        kept: How many of them are kept.
    """

    name: str
    units: int
    kept: int

    @classmethod
    def of(cls, name: str, mask: Tensor) -> "GroupRow":
        """The numbers of a group from the mask of its units."""
        return cls(name, mask.numel(), int(mask.count_nonzero()))


@dataclass(frozen=True)
class Facts:
    """All that is remembered of an update.

    Attributes:
        counts: One for each pruned layer.
        observations: Observations of each task behind it.
        stable: See `mtprune.report.Report`.
        discarded: See `mtprune.report.Report`.
        history: See `mtprune.report.Report`.
        groups: See `mtprune.report.Report`.
    """

    counts: tuple[Count, ...] = ()
    observations: Mapping[str, int] = field(default_factory=dict)
    stable: bool | None = None
    discarded: Mapping[str, int] = field(default_factory=dict)
    history: tuple[Moment, ...] = ()
    groups: tuple[GroupRow, ...] = ()

    @classmethod
    def before(cls, layers: Iterable[Layer]) -> "Facts":
        """The facts before the first update: everything is kept."""
        sizes = {layer.name: layer.parameter.numel() for layer in layers}
        return cls(tuple(Count(name, "", n, n, {}, n) for name, n in sizes.items()))

    @property
    def kept(self) -> dict[str, int]:
        """How many weights each layer keeps, by name."""
        return {row.name: row.kept for row in self.counts}

    def remembering(self, step: int, weights: Mapping[str, float]) -> "Facts":
        """The same with one more moment in the history: the state of these counts.

        Args:
            step: The step of the update.
            weights: The factor on each task's loss.
        """
        longer = (*self.history, moment(self.counts, step, weights))
        short = longer if len(longer) <= _MOMENTS else longer[len(longer) % 2 - 1 :: 2]
        return replace(self, history=short)

    def left(self, kept: Mapping[str, int]) -> "Facts":
        """The same with other numbers of weights kept, where no single task has a say in which.

        Args:
            kept: How many each layer keeps.
        """
        counts = (
            c if c.kept == kept.get(c.name, c.kept) else _kept(c, kept[c.name]) for c in self.counts
        )
        return replace(self, counts=tuple(counts))

    def state_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return {
            **asdict(self),
            "counts": [asdict(c) for c in self.counts],
            "history": [asdict(m) for m in self.history],
            "groups": [asdict(g) for g in self.groups],
        }

    @classmethod
    def read(cls, entry: Entry, sizes: Mapping[str, int], tasks: Collection[str]) -> "Facts":
        """The inverse of `state_dict`.

        Args:
            entry: What it returned.
            sizes: How many weights each layer has.
            tasks: The tasks.

        Raises:
            ValueError: If it is not that.
        """
        parts = entry.fields([f.name for f in fields(cls)])
        return cls(
            counts=tuple(_count(part, sizes, tasks) for part in parts["counts"].items()),
            observations=_whole(parts["observations"], tasks),
            stable=parts["stable"].optional(Entry.flag),
            discarded=_whole(parts["discarded"], tasks),
            history=tuple(_moment(part, tasks) for part in parts["history"].items()),
            groups=tuple(_group(part) for part in parts["groups"].items()),
        )


def _kept(count: Count, number: int) -> Count:
    return replace(count, kept=number, unanimous=number, single=None, nobody=None)


def _whole(entry: Entry, keys: Collection[str]) -> dict[str, int]:
    """A whole number for each of some keys."""
    return {key: part.whole() for key, part in entry.mapping(keys).items()}


def _count(entry: Entry, sizes: Mapping[str, int], tasks: Collection[str]) -> Count:
    parts = entry.fields([f.name for f in fields(Count)])
    name = parts["name"].text(sizes)
    kept = parts["kept"].whole(most=sizes[name])
    return Count(
        name=name,
        component=parts["component"].text(),
        parameters=parts["parameters"].whole(sizes[name], sizes[name]),
        kept=kept,
        # Voters need not be tasks.
        wanted={voter: part.whole(most=kept) for voter, part in parts["wanted"].mapping().items()},
        unanimous=parts["unanimous"].whole(most=kept),
        tasks=tuple(part.text(tasks) for part in parts["tasks"].items()),
        single=parts["single"].optional(lambda part: part.whole(most=kept)),
        nobody=parts["nobody"].optional(lambda part: part.whole(most=kept)),
        threshold=parts["threshold"].optional(Entry.number),
        cost=parts["cost"].optional(lambda part: part.number(least=0.0)),
        rank=parts["rank"].optional(Entry.whole),
        full_rank=parts["full_rank"].optional(Entry.whole),
    )


def _moment(entry: Entry, tasks: Collection[str]) -> Moment:
    parts = entry.fields([f.name for f in fields(Moment)])
    return Moment(
        step=parts["step"].whole(),
        sparsity=parts["sparsity"].number(0.0, 1.0),
        components={
            name: {key: value.number() for key, value in numbers.mapping().items()}
            for name, numbers in parts["components"].mapping().items()
        },
        weights={task: part.number() for task, part in parts["weights"].mapping(tasks).items()},
    )


def _group(entry: Entry) -> GroupRow:
    parts = entry.fields([f.name for f in fields(GroupRow)])
    units = parts["units"].whole()
    return GroupRow(parts["name"].text(), units, parts["kept"].whole(most=units))


def count(
    subject: Subject,
    mask: Tensor,
    alone: Mapping[str, Tensor],
    *,
    threshold: float | None = None,
) -> Count:
    """Count one layer.

    Args:
        subject: The layer.
        mask: The weights that are kept, flat bool.
        alone: For each task that has a say, those that task alone would keep, flat bool.
        threshold: Its threshold, if it has one.
    """
    every, once = mask, mask.new_zeros(mask.shape)
    twice = once
    for wish in alone.values():
        every = every & wish
        twice = twice | (once & wish)
        once = once | wish
    nobody = int((mask & ~once).count_nonzero()) if alone else None
    single = int((mask & once & ~twice).count_nonzero()) if alone else None
    return Count(
        name=subject.name,
        component=subject.component,
        parameters=mask.numel(),
        kept=int(mask.count_nonzero()),
        wanted={task: int((mask & wish).count_nonzero()) for task, wish in alone.items()},
        unanimous=int(every.count_nonzero()),
        tasks=subject.tasks,
        single=single,
        nobody=nobody,
        threshold=threshold,
        cost=None if subject.cost is None else float(subject.cost),
    )


def everywhere(counts: Sequence[Count], census: Census) -> list[Count]:
    """The counts of all ranks together, from those of the parts of layers that are here."""
    if not census.is_scattered:
        return list(counts)
    numbers = [number for row in counts for number in _numbers(row)]
    totals = iter([total for _, total in census.places(numbers)])
    found = []
    for row in counts:
        parameters, kept, unanimous, single, nobody = (next(totals) for _ in range(5))
        found.append(
            replace(
                row,
                parameters=parameters,
                kept=kept,
                unanimous=unanimous,
                single=None if row.single is None else single,
                nobody=None if row.nobody is None else nobody,
                wanted={voter: next(totals) for voter in row.wanted},
            )
        )
    return found


def _numbers(row: Count) -> list[int]:
    single, nobody = row.single or 0, row.nobody or 0
    return [row.parameters, row.kept, row.unanimous, single, nobody, *row.wanted.values()]


def count_rank(subject: Subject, kept: Tensor, alone: Mapping[str, Tensor]) -> Count:
    """Count one layer whose rank is pruned.

    Its weights count as kept as far as its factors have parameters, each of which takes part in as
    many multiply-adds as a weight did. Where these were not measured, they are those of one row of
    input of a linear layer, and not known of a convolution, which has as many rows as positions.

    Args:
        subject: The layer.
        kept: The singular directions of the weight that are kept, bool ``[m]``, matrix by matrix.
        alone: For each task that has a say, those that task alone would keep, bool ``[m]``.
    """
    if subject.cost is None and len(subject.shape) == 2:
        subject = replace(subject, cost=Fraction(1))
    directions = count(subject, kept, alone)
    shape = subject.layout.shape(subject.shape)
    ranks = kept.view(subject.matrices, -1).sum(1).tolist()
    size = sum(factors.parameters(shape, rank) for rank in ranks)

    def part(number: int) -> int:
        return round(size * number / max(1, directions.kept))

    return replace(
        directions,
        parameters=math.prod(subject.shape),
        kept=size,
        wanted={task: part(number) for task, number in directions.wanted.items()},
        unanimous=part(directions.unanimous),
        single=None if directions.single is None else part(directions.single),
        nobody=None if directions.nobody is None else part(directions.nobody),
        rank=directions.kept,
        full_rank=directions.parameters,
    )


def moment(counts: Sequence[Count], step: int, weights: Mapping[str, float]) -> Moment:
    """The state of pruning that the counts of an update show."""
    kept = sum(c.kept for c in counts)
    components: dict[str, Mapping[str, float]] = {}
    for name in dict.fromkeys(c.component for c in counts):
        own = [c for c in counts if c.component == name]
        parameters, left = sum(c.parameters for c in own), sum(c.kept for c in own)
        numbers = {"sparsity": share(parameters - left, parameters), "share": share(left, kept)}
        tau = mean([(c.threshold, c.parameters) for c in own])
        components[name] = numbers if tau is None else {**numbers, "threshold": tau}
    parameters = sum(c.parameters for c in counts)
    return Moment(step, share(parameters - kept, parameters), components, dict(weights))


def share(part: int, whole: int) -> float:
    """A part of a whole, 0 of nothing."""
    return part / whole if whole else 0.0


def total(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    """The sum of value times number; None if some value is not known."""
    known = [value * number for value, number in pairs if value is not None]
    return sum(known) if len(known) == len(pairs) else None


def mean(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    """The mean of values that stand for a number each; None if some value is not known."""
    summed = total(pairs)
    return None if summed is None else summed / max(1, sum(number for _, number in pairs))
