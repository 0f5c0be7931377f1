"""Budgets in time: what is worth least per millisecond goes, layer by layer where that pays."""

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import numpy as np
from torch import Tensor

from mtprune.allocation import Budget
from mtprune.holding import Masks
from mtprune.latency import Latency, Pace, Timetable, Timing
from mtprune.methods.voting.election import Election
from mtprune.methods.voting.units import alone_among, electorate_of, of_weights
from mtprune.methods.voting.weights import alone_of, unless_all
from mtprune.model.inventory import Inventory
from mtprune.model.units import Units
from mtprune.selection import (
    Quota,
    knapsack,
    least_cost,
    least_units,
    rank,
    select,
    select_units,
    worths,
)

__all__ = ["check_in_time", "keep_in_time"]

TRIALS = 6
"""So often a choice is measured, each time corrected by what was found."""

NEAR = 0.02
"""A measured time is what was asked for if it is off by no more than this share of it."""

OFF = 0.1
"""By more than this a user is told."""

_SHARES = 64  # at which a layer's damage is looked at
_STEPS = 24  # of a bisection
_FEWER = 0.8  # weights, where there is no time for what an allocation makes sure of


class Choice(Protocol):
    """Masks for a time."""

    def within(self, ms: float, progress: float) -> Masks:
        """The masks of least damage that take so long, when a share of the pruning is due.

        Args:
            ms: Milliseconds in the end.
            progress: The share that is due.
        """
        ...


def check_in_time(inventory: Inventory, latency: Latency, min_keep: int, what: str) -> None:
    """Refuse a budget that no masks keep to, by the timetable.

    Args:
        inventory: The layers, with their times.
        latency: The budget.
        min_keep: The least a layer, or a group of units, keeps.
        what: What errors call the granularity.

    Raises:
        ValueError: If it is too small, or the timetable is of something else.
    """
    assert inventory.pace is not None
    times, units = inventory.pace.times, inventory.units
    fitting = "weights" if units is None else "units"
    if times.of != fitting:
        raise ValueError(
            f"The timetable is of {times.of}, and {what} prunes {fitting}. Measure one with "
            "mtprune.latency.timetable(model, example_inputs, granularity)."
        )
    names = [layer.name for layer in inventory.layers]
    if not any(name in times.layers for name in names):
        raise ValueError(
            f"The timetable knows none of the layers that are pruned: {names[:3]} ..., but "
            f"{list(times.layers)[:3]} ... Was it measured on another model?"
        )
    if units is None:
        sizes = [layer.parameter.numel() for layer in inventory.layers]
        pairs = zip(names, sizes, strict=True)
        shares = {name: max(times.least(name), min(min_keep, n) / n) for name, n in pairs}
    else:
        masks = units.spread(least_units(units, min_keep))
        shares = _shares(names, masks)
    least = times.ms(shares)
    if least > latency.share * times.dense_ms:
        raise ValueError(
            f"`latency` asks for {latency.share:.1%} of the dense model's time, and by the "
            f"timetable it takes {least / times.dense_ms:.1%} with the least of {what} that can "
            "stay. Ask for more, or cover more layers."
        )


def keep_in_time(election: Election, latency: Latency, progress: float) -> Masks:
    """Keep what is worth most within a time.

    Where choices can be tried, the first and the last one are: a model is compressed with its
    masks and measured, and what the timetable is asked for is corrected by what was found.

    Args:
        election: The ballot and the rules.
        latency: The budget.
        progress: The share of the pruning that is due.
    """
    ballot = election.ballot
    assert ballot.pace is not None
    times = ballot.pace.times
    choice: Choice = _Weights(election, times) if ballot.units is None else _Units(election, times)
    asked = latency.share * times.dense_ms
    known = ballot.memory.get("latency")
    best = _Trial(known["correction"] if known else 1.0)
    if ballot.pace.tried is not None and (progress == 1 or not known):
        best = _nearest(choice, ballot.pace, ballot.names, asked, best)
    if progress < 1 or best.masks is None:
        best = replace(best, masks=choice.within(asked * best.correction, progress), ms=None)
    assert best.masks is not None
    if best.ms is not None and best.ms > (1 + OFF) * asked:
        warnings.warn(
            f"`latency` asks for {asked:.3g} ms of {times.dense_ms:.3g} ms, and the compressed "
            f"model took {best.ms:.3g} ms with the masks that came nearest. Was the machine busy? "
            "Else ask for more, or cover more layers.",
            stacklevel=2,
        )
    predicted = times.ms(_shares(ballot.names, best.masks.masks))
    timing = Timing(times.dense_ms, asked, predicted, best.ms, best.correction)
    return replace(best.masks, memory={"latency": asdict(timing)})


@dataclass(frozen=True)
class _Trial:
    """Masks that were tried.

    Attributes:
        correction: By what the asked time was multiplied.
        masks: The masks for that; None before the first.
        ms: The milliseconds of the compressed model.
    """

    correction: float
    masks: Masks | None = None
    ms: float | None = None


def _nearest(
    choice: Choice, pace: Pace, names: Sequence[str], asked: float, start: _Trial
) -> _Trial:
    """The trial whose time is nearest to what was asked for.

    Args:
        choice: Masks for a time.
        pace: The timetable, and the clock.
        names: The layers.
        asked: The milliseconds that were asked for.
        start: The correction to begin with.
    """
    assert pace.tried is not None
    trials, correction = [start], start.correction
    seen: set[float] = set()
    sides: dict[bool, tuple[float, float]] = {}  # the last that was too fast, and too slow
    for _ in range(TRIALS):
        masks = choice.within(asked * correction, 1.0)
        predicted = pace.times.ms(_shares(names, masks.masks))
        if predicted in seen:  # no other masks are left
            break
        seen.add(predicted)
        took = pace.tried(dict(zip(names, masks.masks, strict=True))) * pace.times.dense_ms
        trials.append(_Trial(correction, masks, took))
        if abs(took - asked) <= NEAR * asked:
            break
        sides[took > asked] = correction, took
        if len(sides) == 2:  # the time may jump, where layers join for instance
            (low, fast), (high, slow) = sides[False], sides[True]
            correction = low + (high - low) * min(0.8, max(0.2, (asked - fast) / (slow - fast)))
        else:
            correction *= min(2.0, max(0.5, asked / took))
    return min(trials, key=lambda t: math.inf if t.ms is None else abs(t.ms - asked))


def _shares(names: Sequence[str], masks: Sequence[Tensor]) -> dict[str, float]:
    """The share of each layer that stays."""
    pairs = zip(names, masks, strict=True)
    return {name: int(mask.count_nonzero()) / mask.numel() for name, mask in pairs}


@dataclass(frozen=True)
class _Option:
    """What a layer can keep.

    Attributes:
        counts: Numbers of its weights, rising.
        ms: The milliseconds of each.
        damage: The worth of all weights that each leaves out.
    """

    counts: Sequence[int]
    ms: Sequence[float]
    damage: Sequence[float]

    def above(self, floor: int) -> "_Option":
        """The same without fewer weights than a floor, or its most if that is less."""
        first = min(bisect_left(self.counts, floor), len(self.counts) - 1)
        return _Option(self.counts[first:], self.ms[first:], self.damage[first:])


class _Weights:
    """Single weights: a density for each layer, and its best weights.

    Args:
        election: The ballot and the rules.
        times: The timetable.
    """

    def __init__(self, election: Election, times: Timetable) -> None:
        self._election = election
        self._times = times

    def within(self, ms: float, progress: float) -> Masks:
        """See `Choice`."""
        election, ballot = self._election, self._election.ballot
        final = self._sure(ms)
        counts = [
            min(kept, mask.numel() - round((mask.numel() - count) * progress))
            for count, kept, mask in zip(final, ballot.kept, ballot.masks, strict=True)
        ]
        masks = select(
            ballot.scores,
            election.vote,
            [Quota((place,), count, (count,)) for place, count in enumerate(counts)],
            eligible=unless_all(ballot.masks),
            rankings=election.rankings,
        )
        sparsity = 1 - sum(counts) / ballot.total
        return Masks(masks, alone_of(election, election.rankings, sparsity))

    def _sure(self, ms: float) -> list[int]:
        """How many weights each layer keeps, so many of them sure by the allocation.

        An allocation goes by how many there are in all, which only the choice tells: that without
        it, or fewer if there is no time for as many.
        """
        counts = self._chosen(self._options, ms)
        ballot, total = self._election.ballot, sum(counts)
        while total > 0:
            budget = Budget(
                ballot.shapes,
                ballot.components,
                total,
                ballot.kept,
                self._election.min_keep,
                ballot.matrices,
            )
            (quota,) = self._election.allocation.quotas(budget)
            pairs = zip(self._options, quota.floors, strict=True)
            options = [option.above(floor) for option, floor in pairs]
            if sum(min(option.ms) for option in options) + self._others <= ms:
                return self._chosen(options, ms)
            total = int(_FEWER * total)
        return counts

    def _chosen(self, options: Sequence["_Option"], ms: float) -> list[int]:
        """The numbers of least damage that fit; the fastest if none do."""
        room = max(ms - self._others, sum(min(option.ms) for option in options))
        costs, damages = [option.ms for option in options], [option.damage for option in options]
        pairs = zip(options, knapsack(costs, damages, room), strict=True)
        return [option.counts[number] for option, number in pairs]

    @cached_property
    def _others(self) -> float:
        """The milliseconds of all that is not decided on: it stays dense."""
        here = sum(self._times.layer_ms(name, [1.0])[0] for name in self._election.ballot.names)
        return self._times.dense_ms - here

    @cached_property
    def _options(self) -> list[_Option]:
        """What each layer can keep."""
        election, ballot = self._election, self._election.ballot
        worth = worths(ballot.scores, election.vote, election.rankings)
        return [
            self._option(name, values.flatten()[mask.to(values.device)], mask.numel())
            for name, values, mask in zip(ballot.names, worth, ballot.masks, strict=True)
        ]

    def _option(self, name: str, worth: Tensor, size: int) -> _Option:
        """What a layer can keep.

        Args:
            name: The layer.
            worth: The worth of the weights that may stay.
            size: How many it has.
        """
        kept, least = worth.numel(), min(self._election.min_keep, worth.numel())
        low = self._times.least(name)
        shares = np.geomspace(low, 1.0, _SHARES) if low < 1 else np.ones(1)
        shares = np.append(shares, [share for share, _ in self._times.layers.get(name, ())])
        counts = np.unique(np.clip(np.ceil(shares * size - 1e-9).astype(np.int64), least, kept))
        # The least of all is worth something too: it does not go where that saves nothing.
        worth = worth.double() + 1.0 / self._election.ballot.total
        lost = np.append(0.0, np.cumsum(worth.sort().values.cpu().numpy()))
        ms = self._times.layer_ms(name, list(counts / size))
        return _Option(counts.tolist(), ms, lost[kept - counts].tolist())


class _Units:
    """Units that span layers: the best by saliency per millisecond, as many as there is time for.

    Args:
        election: The ballot and the rules.
        times: The timetable.
    """

    def __init__(self, election: Election, times: Timetable) -> None:
        ballot = election.ballot
        assert ballot.units is not None
        self._election = election
        self._times = times
        self._units = _priced(ballot.units, times)
        self._electorate = electorate_of(ballot.scores, self._units)
        scores = self._electorate.scores
        self._worth = worths(scores, election.vote, rank(scores, election.priority))
        self._eligible = self._units.standing(ballot.whole_masks())

    def within(self, ms: float, progress: float) -> Masks:
        """See `Choice`."""
        room = self._times.dense_ms - (self._times.dense_ms - ms) * progress
        everything = self._units.weigh(self._units.everything())
        least = least_cost(self._units, self._election.min_keep)
        # Prices are those of an average unit; what the timetable says of all that stay decides.
        fits, fails = Fraction(0), Fraction(1)
        kept = self._kept(everything)
        if self._takes(kept) > room:
            for _ in range(_STEPS):
                middle = (fits + fails) / 2
                found = self._kept(least + middle * (everything - least))
                if self._takes(found) <= room:
                    fits, kept = middle, found
                else:
                    fails = middle
            if fits == 0:
                kept = self._kept(least)
        share = self._units.weigh(kept) / everything
        alone = alone_among(self._electorate, self._units, lambda cost: share * cost)
        return of_weights(kept, alone, self._units, self._election.ballot.parts)

    def _kept(self, budget: Fraction) -> list[Tensor]:
        """The units that fit into a budget of average prices."""
        election = self._election
        return select_units(
            self._worth,
            self._units,
            budget,
            election.allocation.units,
            eligible=self._eligible,
            min_keep=election.min_keep,
        )

    def _takes(self, kept: Sequence[Tensor]) -> float:
        """The milliseconds of a model with these units."""
        return self._times.ms(_shares(self._election.ballot.names, self._units.spread(kept)))


def _priced(units: Units, times: Timetable) -> Units:
    """Units at the average price of the weights of each layer, in milliseconds."""
    prices = []
    for layer in units.layers:
        low = times.least(layer.name)
        first, last = times.layer_ms(layer.name, [low, 1.0])
        size = layer.parameter.numel()
        prices.append((last - first) / ((1 - low) * size) if low < 1 else 0.0)
    # None is free, so that saliency per cost is a number.
    floor = 1e-6 * max(prices) or 1.0
    exact = [Fraction(max(price, floor)) for price in prices]
    return units.among(range(len(units.layers)), exact)
