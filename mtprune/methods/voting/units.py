"""Units larger than a weight: they compete by saliency per cost, and fill a budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from mtprune.holding import Masks
from mtprune.methods.voting.election import Alone, Election, Scores, merged, own
from mtprune.model.layers import Layer
from mtprune.model.parts import Part
from mtprune.model.units import Units
from mtprune.selection import fitting_units, least_cost, rank, select_units, worths

__all__ = [
    "Electorate",
    "UnitBudget",
    "alone_among",
    "electorate_of",
    "keep_units",
    "keep_units_per_task",
    "of_weights",
    "pool_of",
]


@dataclass(frozen=True)
class UnitBudget:
    """How much of a model stays.

    Attributes:
        stays: The share that stays in the end.
        by_macs: Whether it is one of multiply-adds; otherwise of weights.
    """

    stays: Fraction
    by_macs: bool

    def priced(
        self, units: Units, costs: Sequence[Fraction], total_macs: Fraction
    ) -> tuple[Units, Fraction]:
        """Units in the currency of the budget, and the cost of the layers without units.

        Args:
            units: The units.
            costs: The multiply-adds of a weight of each layer, if they were measured.
            total_macs: The multiply-adds of all prunable layers.
        """
        if not self.by_macs:
            return units, Fraction(0)
        units = units.among(range(len(units.layers)), costs)
        return units, total_macs - units.weigh(units.everything())

    def room(self, cost: Fraction, progress: float) -> Fraction:
        """The part of a cost that may stay."""
        pruned = (1 - self.stays) * Fraction(progress) * cost
        return cost - (pruned if self.by_macs else round(pruned))

    def check(self, units: Units, fixed: Fraction, min_keep: int, what: str) -> None:
        """Refuse a budget that leaves no room for the units that have to stay.

        Args:
            units: The units, priced.
            fixed: The cost of the layers without units.
            min_keep: The least each group keeps.
            what: What errors call the granularity.

        Raises:
            ValueError: If it is too small.
        """
        every = fixed + units.weigh(units.everything())
        needed = fixed + least_cost(units, min_keep)
        if needed <= self.room(every, 1.0):
            return
        may = f"more than the {float(self.stays):.1%} that may"
        if fixed > self.room(every, 1.0):
            raise ValueError(
                f"Layers that {what} leaves alone take {float(fixed / every):.1%} of the "
                f"multiply-adds, {may} stay. Ask for less, or cover more layers."
            )
        if any(least > min_keep for least in units.least):
            raise ValueError(
                f"As many units of {what} as must stay are {float(needed / every):.1%}, "
                f"{may} stay. Ask for less, or for other units as well."
            )
        raise ValueError(
            f"min_keep={min_keep} in each of the {len(units.names)} groups of {what} keeps "
            f"{float(needed / every):.1%}, {may} stay. Ask for less"
            + (", or min_keep=0 to let groups go altogether." if min_keep else ".")
        )


def keep_units(election: Election, budget: UnitBudget, progress: float, what: str) -> Masks:
    """Keep the units of highest worth that a budget has room for.

    Args:
        election: The ballot and the rules.
        budget: How much stays.
        progress: The share of the pruning that is due.
        what: What errors call the granularity.
    """
    ballot = election.ballot
    assert ballot.units is not None
    units, fixed = budget.priced(ballot.units, ballot.costs, ballot.total_macs)
    budget.check(units, fixed, election.min_keep, what)
    electorate = electorate_of(ballot.scores, units)
    kept = select_units(
        worths(electorate.scores, election.vote, rank(electorate.scores, election.priority)),
        units,
        budget.room(fixed + units.weigh(units.everything()), progress) - fixed,
        election.allocation.units,
        eligible=units.standing(ballot.whole_masks()),
        min_keep=election.min_keep,
    )
    alone = alone_among(electorate, units, lambda cost: budget.room(cost, progress))
    return of_weights(kept, alone, units, ballot.parts)


def keep_units_per_task(election: Election, ratio: float) -> Masks:
    """Every task keeps units up to that share of its weights; the vote merges their masks."""
    ballot = election.ballot
    assert ballot.units is not None
    units = ballot.units
    electorate = electorate_of(ballot.scores, units)
    alone = alone_among(electorate, units, lambda cost: int(ratio * cost))
    eligible = units.standing(ballot.whole_masks())
    kept = merged(electorate.scores, eligible, alone, election.vote)
    for mask, least, able, voters in zip(
        kept, units.least, eligible, electorate.scores, strict=True
    ):
        worth = torch.stack(list(voters.values())).sum(0).double().where(able, -1.0)
        missing = least - int(mask.sum())
        if missing > 0:  # the tasks agree on too few
            mask[worth.where(~mask, -1.0).topk(missing).indices] = True
    return of_weights(kept, alone, units, ballot.parts)


def pool_of(units: Units) -> Callable[[Layer, Tensor], Tensor]:
    """From a layer and the saliency of its weights to that of the units in it."""
    places = {layer.name: place for place, layer in enumerate(units.layers)}
    return lambda layer, score: units.pool(places[layer.name], score)


@dataclass(frozen=True)
class Electorate:
    """Units and who has a say in them.

    Attributes:
        scores: For each group of units, its voters' saliencies per cost ``{voter: [units]}``.
        used: For each voter, the layers that it uses.
    """

    scores: Scores
    used: Mapping[str, Sequence[int]]


def electorate_of(scores: Scores, units: Units) -> Electorate:
    """The sums of units over the layers they lie in.

    Args:
        scores: For each layer ``{voter: [units in it]}``.
        units: The units.
    """
    voters = dict.fromkeys(voter for layer in scores for voter in layer)
    used = {
        voter: [place for place, layer in enumerate(scores) if voter in layer] for voter in voters
    }
    sums = {
        voter: units.gather({place: scores[place][voter] for place in places})
        for voter, places in used.items()
    }
    groups = range(len(units.names))
    summed = [{v: own[g] for v, own in sums.items() if g in own} for g in groups]
    return Electorate(_per_cost(summed, units.costs), used)


def _spread(kept: Sequence[Tensor], units: Units, parts: Sequence[Part]) -> list[Tensor]:
    """What is here of the masks of weights, flat, from those of units."""
    pairs = zip(parts, units.spread(kept), strict=True)
    return [part.of(mask).reshape(-1) for part, mask in pairs]


def of_weights(kept: Sequence[Tensor], alone: Alone, units: Units, parts: Sequence[Part]) -> Masks:
    """The masks of weights from those of units."""

    def ask(voter: str) -> Mapping[int, Tensor]:
        wishes = alone[voter]  # units without one are kept
        every = [wishes.get(group, mask) for group, mask in enumerate(units.everything())]
        return dict(enumerate(_spread(every, units, parts)))

    return Masks(
        _spread(kept, units, parts),
        Alone(alone, ask),
        units=dict(zip(units.names, kept, strict=True)) if units.spanning else {},
    )


def alone_among(
    electorate: Electorate, units: Units, keep: Callable[[Fraction], Fraction | int]
) -> Alone:
    """The units each voter alone would keep, given how much of how much."""

    def ask(voter: str) -> Mapping[int, Tensor]:
        return fitting_units(own(electorate.scores, voter), units, keep, electorate.used[voter])

    return Alone(electorate.used, ask)


def _per_cost(scores: Scores, costs: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Saliencies over costs, as they are if all units cost the same."""
    every = torch.cat(list(costs))
    if not every.numel() or bool((every == every[0]).all()):
        return [dict(voters) for voters in scores]
    return [
        {voter: values / cost.clamp_min(1e-30).float() for voter, values in voters.items()}
        for voters, cost in zip(scores, costs, strict=True)
    ]
