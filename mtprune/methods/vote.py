"""`Vote`: every task ranks the weights it uses, a vote merges the ranks, a budget cuts exactly."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import inf, isclose, prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from mtprune import checks, votes
from mtprune import saliency as saliencies
from mtprune.allocation import (
    NAMES,
    Allocation,
    AllocationLike,
    Budget,
    ByComponent,
    Floor,
    Uniform,
    parse_allocation,
)
from mtprune.granularity import (
    NM,
    Element,
    Granularity,
    check_granularity,
    example_inputs_of,
)
from mtprune.holding import (
    Hold,
    MaskHold,
    Masking,
    Masks,
    Phased,
    RegrowHold,
    StraightThrough,
)
from mtprune.methods.base import Ballot, Method, Needs, describe
from mtprune.model.inputs import why_no_inputs
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.model.units import Units, is_single
from mtprune.saliency import Saliency
from mtprune.schedule import OneShot, Regrow, Schedule
from mtprune.selection import (
    Best,
    Quota,
    Ranking,
    fitting_units,
    least_cost,
    rank,
    select,
    select_units,
    worths,
)
from mtprune.statistics import PerWeight

__all__ = ["PerTaskKeep", "Vote"]


@dataclass(frozen=True)
class PerTaskKeep:
    """The published rule of DiSparse, in place of a sparsity: for comparison.

    Every task keeps the top ``int(ratio * N_k)`` of the weights it uses, then the vote merges the
    tasks' masks. The sparsity that results depends on the data; allocation does not apply.

    Attributes:
        ratio: Share of its weights each task keeps, in (0, 1].
    """

    ratio: float

    def __post_init__(self) -> None:
        """Validate."""
        checks.inside("ratio", self.ratio, "(0, 1]")


@dataclass(frozen=True)
class Vote(Method[Masks]):
    """Prune by a vote of the tasks, to an exact sparsity.

    Attributes:
        sparsity: Share of zeros among the weights that `granularity` covers, in [0, 1), or
            `PerTaskKeep`. Larger units are kept while they fit into what is left by it.
        saliency: A function of weight and gradient (`mtprune.saliency`).
        vote: Reduces percentiles over tasks to a worth (`mtprune.votes`).
        schedule: When masks change (`mtprune.schedule`).
        granularity: What is pruned as one (`mtprune.granularity`); several that span layers, in a
            tuple, share the budget. Units compete by their saliency per weight.
        allocation: How the budget is spread over layers, or groups of units (`mtprune.allocation`).
        priority: Factor on a task's guaranteed share; tasks not named count 1.
        observations: How many observations of every task an update needs, or ``"auto"``: at least
            4, until the masks no longer change.
        disentangled: Score every loss on its own. False scores their sum in one sweep: the joint
            baseline.
        min_keep: The least a layer keeps as long as the budget has as much for each. Of larger
            units every group keeps as many, and a budget without room for that is refused.
        straight_through: Let pruned weights come back until the last update. Scores add up over all
            steps until then and are never forgotten; masks hide weights, which keep their value and
            go on being scored with the gradient they would have.
        macs: In place of `sparsity`, the share of multiply-adds that stays, in (0, 1], of all that
            the weights of prunable layers take part in. Units then compete by their saliency per
            multiply-add.
        speedup: The same as ``macs=1 / speedup``.
        example_inputs: What the model is called with to measure multiply-adds: a tensor, a tuple of
            arguments, or a dict of keyword arguments.

    Example:
        >>> Vote(sparsity=0.9, vote=votes.majority).sparsity
        0.9
    """

    sparsity: float | PerTaskKeep | None = None
    saliency: Saliency = saliencies.taylor
    vote: votes.Vote = votes.unanimous
    schedule: Schedule = field(default_factory=OneShot)
    granularity: Granularity = field(default_factory=Element)
    allocation: AllocationLike = "floor"
    priority: Mapping[str, float] = field(default_factory=dict)
    observations: int | Literal["auto"] = 1
    disentangled: bool = True
    min_keep: int = 1
    straight_through: bool = False
    macs: float | None = None
    speedup: float | None = None
    example_inputs: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate."""
        check_granularity(self.granularity)
        self._check_amount()
        checks.function("saliency", self.saliency)
        votes.check(self.vote)
        saliencies.asks(self.saliency)
        must = "must be a schedule such as OneShot() or Cubic(...)"
        checks.object_with("schedule", self.schedule, "next_update", must=must)
        layerwise = self._allocation.layerwise
        checks.mapping("priority", self.priority, "task -> factor")
        for task, factor in self.priority.items():
            of = f" of task '{task}'"
            checks.number("priority", factor, of=of)
            checks.inside("priority", factor, "(0, inf)", of=of, must="must be positive")
        if self.priority and (isinstance(self.target, PerTaskKeep) or not self.disentangled):
            raise ValueError(
                "`priority` shifts the tasks' percentiles against each other: there are none with "
                "PerTaskKeep, and only one voter with disentangled=False."
            )
        auto = self.observations == "auto"
        if not auto:
            must = "must be at least 1, or 'auto'"
            checks.whole("observations", self.observations, least=1, must=must)
        checks.whole("min_keep", self.min_keep, least=0, must="must be a whole number")
        if self.regrows and (layerwise is None or isinstance(self.target, PerTaskKeep)):
            raise ValueError(
                "Regrow keeps the number of weights of every layer, so it needs an allocation that "
                "says how many: allocation='erk' or 'uniform', with a number for `sparsity`."
            )
        if self.straight_through and self.regrows:
            raise ValueError(
                "straight_through=True lets weights come back by their scores, Regrow by drop and "
                "grow. Choose one: with Regrow, leave `straight_through` out."
            )
        if self.straight_through and auto:
            raise ValueError(
                "straight_through=True observes every step, so there is no number of observations "
                "to find: leave out observations='auto'."
            )
        if not isinstance(self.granularity, Element):
            self._check_granular()

    def _check_amount(self) -> None:
        """Refuse anything but one way to say how much is pruned."""
        given = [
            name for name in ("sparsity", "macs", "speedup") if getattr(self, name) is not None
        ]
        if isinstance(self.granularity, NM):
            fixed = self.granularity.sparsity
            number = self.sparsity if isinstance(self.sparsity, (int, float)) else -1.0
            if given and (given != ["sparsity"] or not isclose(number, fixed)):
                told = ", ".join(f"{name}={getattr(self, name)!r}" for name in given)
                raise ValueError(
                    f"{self.granularity!r} fixes the sparsity: it is {fixed:g}. Leave {told} out."
                )
            return
        if len(given) > 1:
            raise ValueError(
                "One of `sparsity`, `macs` and `speedup` says how much is pruned. Got "
                f"{' and '.join(given)}."
            )
        if self.macs is None and self.speedup is None:
            if not isinstance(self.sparsity, PerTaskKeep):
                checks.sparsity("sparsity", self.sparsity)
            return
        checks.number(given[0], getattr(self, given[0]))
        if self.macs is not None:
            checks.share("macs", self.macs, "(0, 1]", must="is what stays, in (0, 1]")
        if self.speedup is not None:
            checks.inside("speedup", self.speedup, "[1, inf)", must="must be at least 1")
        if is_single(self.granularity):
            raise ValueError(
                f"`{given[0]}` needs units that can be left out of a product: Channel(...), "
                "Neuron(), Head() or Block(...). Of single weights, SoftThreshold(..., "
                "budget_unit='macs') counts multiply-adds."
            )
        if self.inputs_to_measure is None:
            raise ValueError(f"`{given[0]}` needs `example_inputs`: what the model is called with.")

    def _check_granular(self) -> None:
        """Refuse what is only for single weights."""
        what = describe(self.granularity)
        if self.regrows:
            raise ValueError(
                f"Regrow exchanges single weights; {what} prunes what it prunes as one. Use "
                "OneShot(), Linear(...) or Cubic(...)."
            )
        if isinstance(self._allocation, ByComponent):
            raise ValueError(
                f"An allocation by component counts single weights, and a unit of {what} may lie "
                f"in two components. Use one of {NAMES}."
            )
        if isinstance(self.granularity, NM) and (
            isinstance(self.target, PerTaskKeep) or self._allocation not in (Floor(), Uniform())
        ):
            raise ValueError(
                f"{what} keeps the same share of every layer: leave `allocation` out, and "
                "PerTaskKeep."
            )

    @override
    def needs(self, inventory: Inventory) -> Needs:
        units = inventory.units
        score = PerWeight(self.saliency)
        if units is not None:  # there are few of them, and each is a sum of many weights
            score = PerWeight(self.saliency, _pool_of(units), dtype=torch.float32)
        return Needs(
            statistics={"saliency": score},
            apart=self.disentangled,
            observations=self.observations,
            over_the_run=self.straight_through,
            macs=self.inputs_to_measure is not None,
            example_inputs=self.inputs_to_measure,
        )

    @override
    def fits(self, layer: Layer) -> str:
        return why_no_inputs(layer) if "inputs" in saliencies.asks(self.saliency) else ""

    @override
    def check(self, inventory: Inventory) -> None:
        inventory.check_names("priority", self.priority, inventory.tasks)
        inventory.check_names("allocation", self.allocation, inventory.components)
        if inventory.units is not None:
            self._check_room(inventory.units, inventory.prices, inventory.total_macs)

    @override
    def hold(self, masks: Masking, optimizer: Optimizer | None) -> Hold[Masks]:
        if self.straight_through:
            return Phased(StraightThrough(masks), MaskHold(masks))
        if self.regrows:
            if optimizer is None:
                raise ValueError(
                    "Regrowth resets the optimizer's state of weights that come back. "
                    "Pass optimizer=... to the pruner."
                )
            return RegrowHold(masks, optimizer)
        return MaskHold(masks)

    @property
    def inputs_to_measure(self) -> Any:
        """What the model is called with to measure multiply-adds; None if nothing is measured."""
        if self.example_inputs is None and self._by_macs:
            return example_inputs_of(self.granularity)
        return self.example_inputs

    @property
    def _allocation(self) -> Allocation:
        """How the budget is spread."""
        return parse_allocation(self.allocation)

    @property
    def target(self) -> float | PerTaskKeep | None:
        """The sparsity in the end: what was given, or what the pattern fixes."""
        return self.granularity.sparsity if isinstance(self.granularity, NM) else self.sparsity

    @property
    def _stays(self) -> Fraction:
        """The share that stays in the end, of weights or of multiply-adds."""
        if self.macs is not None:
            return Fraction(str(self.macs))
        if self.speedup is not None:
            return 1 / Fraction(str(self.speedup))
        return 1 - Fraction(str(self.target))

    @property
    def _by_macs(self) -> bool:
        return self.macs is not None or self.speedup is not None

    def _check_room(self, units: Units, costs: Sequence[Fraction], total_macs: Fraction) -> None:
        """Refuse a budget that leaves no room for the units that have to stay."""
        if isinstance(self.target, PerTaskKeep):
            return
        units, fixed = self._priced(units, costs, total_macs)
        every = fixed + units.weigh(units.everything())
        needed = fixed + least_cost(units, self.min_keep)
        if needed <= self._room(every, 1.0):
            return
        what, may = describe(self.granularity), f"more than the {float(self._stays):.1%} that may"
        if fixed > self._room(every, 1.0):
            raise ValueError(
                f"Layers that {what} leaves alone take {float(fixed / every):.1%} of the "
                f"multiply-adds, {may} stay. Ask for less, or cover more layers."
            )
        raise ValueError(
            f"min_keep={self.min_keep} in each of the {len(units.names)} groups of {what} keeps "
            f"{float(needed / every):.1%}, {may} stay. Ask for less"
            + (", or min_keep=0 to let groups go altogether." if self.min_keep else ".")
        )

    def _priced(
        self, units: Units, costs: Sequence[Fraction], total_macs: Fraction
    ) -> tuple[Units, Fraction]:
        """Units in the currency of the budget, and the cost of the layers without units."""
        if not self._by_macs:
            return units, Fraction(0)
        units = units.among(range(len(units.layers)), costs)
        return units, total_macs - units.weigh(units.everything())

    def _room(self, cost: Fraction, progress: float) -> Fraction:
        """What may stay of so much."""
        gone = (1 - self._stays) * Fraction(progress) * cost
        return cost - (gone if self._by_macs else round(gone))

    @property
    @override
    def regrows(self) -> bool:
        return isinstance(self.schedule, Regrow)

    @override
    def decide(self, ballot: Ballot, step: int) -> Masks:
        if not self.straight_through:
            return self._decide(ballot, step)
        everything = [torch.ones_like(mask) for mask in ballot.masks]
        decision = self._decide(replace(ballot, masks=everything), step)
        return replace(decision, final=self.schedule.next_update(step) is None)

    def _decide(self, ballot: Ballot, step: int) -> Masks:
        """The masks of the update of ``step``; masked weights stay masked."""
        if ballot.units is not None:
            return self._of_units(ballot, ballot.units, self.schedule.progress(step))
        if isinstance(self.granularity, NM):
            return self._patterned(ballot, self.granularity, self.schedule.progress(step))
        if isinstance(self.target, PerTaskKeep):
            ratio = self._ratio(self.target, self.schedule.progress(step))
            alone = _alone(ballot.scores, rank(ballot.scores), lambda n: int(ratio * n))
            return Masks(self._per_task(ballot.scores, ballot.masks, alone), alone)
        assert self.target is not None
        zeros = round(self.target * self.schedule.progress(step) * ballot.total)
        keep = ballot.total - zeros
        rankings = rank(ballot.scores, self.priority)
        if isinstance(self.schedule, Regrow):
            masks = self._exchange(ballot, rankings, keep, self.schedule, step)
        else:
            masks = self._shrink(ballot, rankings, keep, self.schedule.progress(step))
        share = 1 - self.target * self.schedule.progress(step)
        return Masks(masks, _alone(ballot.scores, rankings, lambda n: round(share * n)))

    def _of_units(self, ballot: Ballot, units: Units, progress: float) -> Masks:
        """Units larger than a weight compete by saliency per cost."""
        units, fixed = self._priced(units, ballot.costs, ballot.total_macs)
        electorate = _electorate(ballot.scores, units)
        scores, eligible = electorate.scores, units.standing(ballot.masks)
        if isinstance(self.target, PerTaskKeep):
            ratio = self._ratio(self.target, progress)
            alone = _alone_of_units(electorate, units, lambda n: int(ratio * n))
            kept = self._per_task(scores, eligible, alone)
        else:
            self._check_room(units, ballot.costs, ballot.total_macs)
            kept = select_units(
                worths(scores, self.vote, rank(scores, self.priority)),
                units,
                self._room(fixed + units.weigh(units.everything()), progress) - fixed,
                self._allocation.units,
                eligible=eligible,
                min_keep=self.min_keep,
            )
            alone = _alone_of_units(electorate, units, lambda cost: self._room(cost, progress))
        return Masks(
            [mask.reshape(-1) for mask in units.spread(kept)],
            _Alone(alone, lambda voter: _spread(alone[voter], units)),
            units=dict(zip(units.names, kept, strict=True)) if units.spanning else {},
        )

    def _patterned(self, ballot: Ballot, pattern: NM, progress: float) -> Masks:
        """Of every m inputs equally many are kept."""
        keep = pattern.m - round((pattern.m - pattern.n) * progress)

        def best(worth: Tensor, layer: int) -> Tensor:
            return pattern.best(worth.view(ballot.shapes[layer]), keep).view(-1)

        rankings = rank(ballot.scores, self.priority)
        masks = [
            best(worth.masked_fill(~mask, -inf), layer) & mask
            for layer, (worth, mask) in enumerate(
                zip(worths(ballot.scores, self.vote, rankings), ballot.masks, strict=True)
            )
        ]

        def alone(task: str) -> Mapping[int, Tensor]:
            own = enumerate(ballot.scores)
            return {layer: best(scores[task], layer) for layer, scores in own if task in scores}

        return Masks(masks, _Alone(rankings, alone))

    def _ratio(self, keep: PerTaskKeep, progress: float) -> float:
        return keep.ratio if progress == 1 else 1 - (1 - keep.ratio) * progress

    def _shrink(
        self, ballot: Ballot, rankings: Mapping[str, Ranking], keep: int, progress: float
    ) -> list[Tensor]:
        upper = [int(mask.sum()) for mask in ballot.masks]
        budget = Budget(ballot.shapes, ballot.components, keep, upper, self.min_keep)
        return select(
            ballot.scores,
            self.vote,
            self._allocation.at(progress).quotas(budget),
            eligible=_unless_all(ballot.masks),
            rankings=rankings,
        )

    def _exchange(
        self,
        ballot: Ballot,
        rankings: Mapping[str, Ranking],
        keep: int,
        schedule: Regrow,
        step: int,
    ) -> list[Tensor]:
        """Random masks at first; then drop by magnitude and grow by vote, layer by layer."""
        if step == 0:
            counts = self._layer_counts(ballot, keep)
            draws = [
                saliencies.random(w, generator=ballot.generator).float() for w in ballot.weights
            ]
            return _best_of_each(draws, counts)
        counts = [int(mask.sum()) for mask in ballot.masks]
        fraction = schedule.fraction_at(step)
        drop = [
            min(round(fraction * n), mask.numel() - n)
            for n, mask in zip(counts, ballot.masks, strict=True)
        ]
        survivors = _best_of_each(
            [w.abs().float() for w in ballot.weights],
            [n - d for n, d in zip(counts, drop, strict=True)],
            eligible=ballot.masks,
        )
        grown = select(
            ballot.scores,
            self.vote,
            [Quota((layer,), n, (n,)) for layer, n in enumerate(drop)],
            eligible=[~mask for mask in survivors],
            rankings=rankings,
        )
        return [old | new for old, new in zip(survivors, grown, strict=True)]

    def _layer_counts(self, ballot: Ballot, keep: int) -> list[int]:
        """How many weights each layer keeps for the whole of sparse training."""
        layerwise = self._allocation.layerwise
        assert layerwise is not None
        upper = [prod(shape) for shape in ballot.shapes]
        return layerwise.counts(
            Budget(ballot.shapes, ballot.components, keep, upper, self.min_keep)
        )

    def _per_task(
        self,
        scores: Sequence[Mapping[str, Tensor]],
        eligible: Sequence[Tensor],
        alone: Mapping[str, Mapping[int, Tensor]],
    ) -> list[Tensor]:
        """The vote over the tasks' own masks."""
        masks = []
        for place, voters in enumerate(scores):
            wishes = torch.stack([alone[task][place] for task in voters])
            masks.append((self.vote(wishes.to(torch.float64)) >= 0.5) & eligible[place])
        return masks


class _Alone(Mapping[str, Mapping[int, Tensor]]):
    """The masks of each voter if it were the only one, made when they are asked for."""

    def __init__(self, voters: Collection[str], ask: Callable[[str], Mapping[int, Tensor]]) -> None:
        self._voters = voters
        self._ask = ask
        self._known: dict[str, Mapping[int, Tensor]] = {}

    @override
    def __getitem__(self, task: str) -> Mapping[int, Tensor]:
        if task not in self._voters:
            raise KeyError(task)
        if task not in self._known:
            self._known[task] = self._ask(task)
        return self._known[task]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._voters)

    @override
    def __len__(self) -> int:
        return len(self._voters)


def _pool_of(units: Units) -> Callable[[Layer, Tensor], Tensor]:
    """From a layer and the saliency of its weights to that of the units in it."""
    places = {layer.name: place for place, layer in enumerate(units.layers)}
    return lambda layer, score: units.pool(places[layer.name], score)


@dataclass(frozen=True)
class _Electorate:
    """Units and who has a say in them.

    Attributes:
        scores: For each group of units, its voters' saliencies per cost ``{voter: [units]}``.
        used: For each voter, the layers that it uses.
    """

    scores: Sequence[Mapping[str, Tensor]]
    used: Mapping[str, Sequence[int]]


def _electorate(scores: Sequence[Mapping[str, Tensor]], units: Units) -> _Electorate:
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
    return _Electorate(_per_cost(summed, units.costs), used)


def _spread(wishes: Mapping[int, Tensor], units: Units) -> dict[int, Tensor]:
    """The masks of weights from those of units, flat; units without one are kept."""
    masks = units.spread([wishes.get(g, mask) for g, mask in enumerate(units.everything())])
    return {place: mask.reshape(-1) for place, mask in enumerate(masks)}


def _alone(
    scores: Sequence[Mapping[str, Tensor]],
    rankings: Mapping[str, Ranking],
    keep: Callable[[int], int],
) -> _Alone:
    """The weights each voter would keep, given how many of how many."""

    def ask(task: str) -> Mapping[int, Tensor]:
        ranking = rankings[task]
        return Best(_own(scores, task), ranking, keep(ranking.total))

    return _Alone(rankings, ask)


def _alone_of_units(
    electorate: _Electorate, units: Units, keep: Callable[[Fraction], Fraction | int]
) -> _Alone:
    """The units each voter would keep, given how much of how much."""

    def ask(task: str) -> Mapping[int, Tensor]:
        return fitting_units(_own(electorate.scores, task), units, keep, electorate.used[task])

    return _Alone(electorate.used, ask)


def _own(scores: Sequence[Mapping[str, Tensor]], task: str) -> dict[int, Tensor]:
    """The scores of one voter."""
    return {i: layer[task] for i, layer in enumerate(scores) if task in layer}


def _per_cost(
    scores: Sequence[Mapping[str, Tensor]], costs: Sequence[Tensor]
) -> list[dict[str, Tensor]]:
    """Saliencies over costs, as they are if all units cost the same."""
    every = torch.cat(list(costs))
    if not every.numel() or bool((every == every[0]).all()):
        return [dict(voters) for voters in scores]
    return [
        {voter: values / cost.clamp_min(1e-30).float() for voter, values in voters.items()}
        for voters, cost in zip(scores, costs, strict=True)
    ]


def _unless_all(masks: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """Masks, or None if they are all True."""
    return None if all(bool(mask.all()) for mask in masks) else masks


def _best_of_each(
    scores: Sequence[Tensor], counts: Sequence[int], eligible: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The ``counts`` highest scores of every layer on its own, flat bool masks."""
    masks = []
    for i, (values, count) in enumerate(zip(scores, counts, strict=True)):
        able = values if eligible is None else values[eligible[i]]
        best = Best({0: able}, Ranking([able]), count)[0]
        if eligible is not None:
            best = torch.zeros_like(eligible[i]).masked_scatter_(eligible[i], best)
        masks.append(best)
    return masks
