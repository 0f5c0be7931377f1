"""`Vote`: every task ranks the weights it uses, a vote merges the ranks, a budget cuts exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from math import prod
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
    ByComponent,
    Floor,
    Global,
    Uniform,
    parse_allocation,
)
from mtprune.facts import Subject
from mtprune.granularity import (
    NM,
    Element,
    Granularity,
    check_granularity,
    example_inputs_of,
)
from mtprune.holding import Hold, MaskHold, Masking, Masks, Phased
from mtprune.holding.refitted import RefitHold, Refitted
from mtprune.holding.regrow import RegrowHold
from mtprune.holding.straight_through import StraightThrough
from mtprune.latency import Latency, Timing
from mtprune.methods.base import Ballot, Method, Needs, describe
from mtprune.methods.voting.amount import WAYS, PerTaskKeep, check_amount
from mtprune.methods.voting.election import Election
from mtprune.methods.voting.exchange import draw, exchange, lasting_counts
from mtprune.methods.voting.latency import check_in_time, keep_in_time
from mtprune.methods.voting.outputs import keep_outputs
from mtprune.methods.voting.patterns import keep_pattern
from mtprune.methods.voting.units import (
    UnitBudget,
    keep_units,
    keep_units_per_task,
    pool_of,
)
from mtprune.methods.voting.weights import keep_best, keep_per_task
from mtprune.model.covering import is_single
from mtprune.model.inputs import why_no_inputs
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.reading import Entry
from mtprune.refitting import Refit
from mtprune.saliency import Saliency
from mtprune.schedule import OneShot, Regrow, Rounds, Schedule, due
from mtprune.selection import Quota, rank, worths
from mtprune.statistics import JOINT, PerWeight

__all__ = ["PerTaskKeep", "Vote"]


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
        example_inputs: What the model is called with to measure multiply-adds, or times: a tensor,
            a tuple of arguments, or a dict of keyword arguments.
        refit: Let the weights that stay make up for those that go, layer by layer
            (`mtprune.Refit`); None leaves them as they are.
        voters: Saliencies that look at no data, such as `mtprune.saliency.magnitude`: each is one
            more voter on every weight, private ones too, asked at the update. They are called by
            their names, in `priority` and in the report.
        latency: In place of `sparsity`, the time of the compressed model as a share of the dense
            model's on this machine, in (0, 1]; `mtprune.latency.Latency` with a timetable measures
            nothing. Each layer keeps what pays: the least worth goes that gives the time.

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
    refit: Refit | None = field(default=None, metadata={"later": True})
    voters: tuple[Saliency, ...] = field(default=(), metadata={"later": True})
    latency: float | Latency | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        """Validate."""
        check_granularity(self.granularity)
        check_amount(self._ways, self.granularity, self.inputs_to_measure)
        checks.function("saliency", self.saliency)
        votes.check(self.vote)
        saliencies.asks(self.saliency)
        self._check_voters()
        must = "must be a schedule such as OneShot() or Cubic(...)"
        checks.object_with("schedule", self.schedule, "next_update", must=must)
        layerwise = self._allocation.layerwise
        checks.mapping("priority", self.priority, "task -> factor")
        for task, factor in self.priority.items():
            of = f" of task '{task}'"
            checks.number("priority", factor, of=of)
            checks.inside("priority", factor, "(0, inf)", of=of, must="must be positive")
        alone = not self.disentangled and not self.voters
        if self.priority and (isinstance(self.target, PerTaskKeep) or alone):
            raise ValueError(
                "`priority` shifts the voters' percentiles against each other: there are none with "
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
        if self.straight_through and isinstance(self.schedule, Rounds):
            raise ValueError(
                "straight_through=True adds up scores over training steps, and Rounds are made "
                "before training. Choose one: Cubic(...) goes with straight_through=True."
            )
        if self.straight_through and auto:
            raise ValueError(
                "straight_through=True observes every step, so there is no number of observations "
                "to find: leave out observations='auto'."
            )
        if self.refit is not None:
            self._check_refit(self.refit)
        if self.latency is not None:
            self._check_latency()
        if not isinstance(self.granularity, Element):
            self._check_granular()

    def _check_refit(self, refit: object) -> None:
        """Refuse what weights cannot be fitted for."""
        if not isinstance(refit, Refit):
            raise TypeError(checks.message("refit", refit, "must be mtprune.Refit(...) or None"))
        if self.straight_through or self.regrows:
            how = "straight_through=True" if self.straight_through else "Regrow"
            raise ValueError(
                f"`refit` makes up for weights that are gone for good; with {how} they may come "
                "back. Leave `refit` out."
            )

    def _check_voters(self) -> None:
        """Refuse voters that look at data, or that cannot be told apart."""
        given: object = self.voters
        if not isinstance(given, tuple):
            must = "must be a tuple of saliencies, such as (saliency.magnitude,)"
            raise TypeError(checks.message("voters", given, must))
        for voter in self.voters:
            checks.function("voters", voter)
            data = sorted(saliencies.asks(voter) & {"grad", "inputs", "task"})
            if data:
                raise ValueError(
                    f"`voters` look at no data: they vote beside the tasks. '{_name(voter)}' asks "
                    f"for {', '.join(data)}. Pass it as `saliency`, or give `grad` a default of "
                    "None and leave it out."
                )
        names = [_name(voter) for voter in self.voters]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Two of `voters` are called '{name}'. Give each its own name.")
        if self.voters and isinstance(self.schedule, Regrow):
            raise ValueError(
                "`voters` look at weights, and those that Regrow may grow are all zero. Leave "
                "`voters` out."
            )

    def _check_latency(self) -> None:
        """Refuse what says otherwise how much each layer keeps, or decides again and again."""
        if self.regrows or self.observations == "auto":
            how = "Regrow" if self.regrows else "observations='auto'"
            raise ValueError(
                f"`latency` decides anew how much each layer keeps, and {how} goes by that. Give a "
                "number for `sparsity`, or leave it out."
            )
        if is_single(self.granularity) and not isinstance(self._allocation, (Floor, Global)):
            raise ValueError(
                "`latency` says how much each layer keeps, so `allocation` can only make sure of "
                f"some: Floor(...) or 'global'. Got {self.allocation!r}."
            )

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
        if self._allocation.by_output:
            raise ValueError(
                f"{self._allocation!r} counts the single weights of each output. Leave it out with "
                f"{what}, or take one of {NAMES}."
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
        pool = None if units is None else pool_of(units)
        # There are few units, and each is a sum of many weights.
        dtype = None if units is None else torch.float32
        asked_for = saliencies.asks(self.saliency)
        asked = {"saliency": self.saliency, **{_ballot(v): v for v in self.voters}}
        return Needs(
            statistics={
                **{name: PerWeight(of, pool, dtype=dtype) for name, of in asked.items()},
                **(self.refit.statistics if self.refit else {}),
            },
            apart=self.disentangled,
            observations=self.observations,
            by_graph="inputs" in asked_for and "grad" not in asked_for,
            over_the_run=self.straight_through,
            macs=self.inputs_to_measure is not None and self.latency is None,
            example_inputs=self.inputs_to_measure,
            latency=self._latency,
        )

    @override
    def fits(self, layer: Layer) -> str:
        return why_no_inputs(layer) if "inputs" in saliencies.asks(self.saliency) else ""

    @override
    def needs_whole(self, inventory: Inventory) -> str:
        grouped = [x.name for x in inventory.layers if getattr(x.places[0][0], "groups", 1) > 1]
        if self.refit is not None and grouped:
            return f"`refit` fits the groups of '{grouped[0]}' as a whole"
        if isinstance(self.granularity, NM):
            return f"{describe(self.granularity)} compares the weights of a whole layer"
        if self.latency is not None:
            return "`latency` measures whole layers"
        for score in (self.saliency, *self.voters):
            reason = saliencies.why_whole(score)
            if reason:
                return f"'{_name(score)}' {reason}"
        return ""

    @override
    def check(self, inventory: Inventory) -> None:
        voters = [_name(voter) for voter in self.voters]
        for name in voters:
            if name in inventory.tasks or name == JOINT:
                raise ValueError(f"Voter '{name}' has the name of a task. Call one something else.")
        known = [*(inventory.tasks if self.disentangled else ()), *voters]
        inventory.check_names("priority", self.priority, known)
        inventory.check_names("allocation", self.allocation, inventory.components)
        if self._latency is not None:
            what = "single weights" if inventory.units is None else describe(self.granularity)
            check_in_time(inventory, self._latency, self.min_keep, what)
            return
        if inventory.units is None or isinstance(self.target, PerTaskKeep):
            return
        budget = self._budget
        units, fixed = budget.priced(inventory.units, inventory.prices, inventory.total_macs)
        budget.check(units, fixed, self.min_keep, describe(self.granularity))

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
        return MaskHold(masks) if self.refit is None else RefitHold(masks)

    @property
    def inputs_to_measure(self) -> Any:
        """What the model is called with to measure it; None if nothing is measured."""
        if self.example_inputs is None and set(self._ways) - {"sparsity"}:
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
    def _budget(self) -> UnitBudget:
        """How much stays in the end, of weights or of multiply-adds."""
        if self.macs is not None:
            return UnitBudget(Fraction(str(self.macs)), by_macs=True)
        if self.speedup is not None:
            return UnitBudget(1 / Fraction(str(self.speedup)), by_macs=True)
        return UnitBudget(1 - Fraction(str(self.target)), by_macs=False)

    @property
    def _latency(self) -> Latency | None:
        """The budget in time."""
        return None if self.latency is None else Latency.of(self.latency)

    @property
    def _ways(self) -> dict[str, Any]:
        """What says how much is pruned."""
        return {name: value for name in WAYS if (value := getattr(self, name)) is not None}

    @property
    def _final(self) -> float:
        """The share that is pruned in the end, of whatever the budget counts."""
        if self._latency is not None:
            return 1.0 - self._latency.share
        if isinstance(self.target, PerTaskKeep):
            return 1.0 - self.target.ratio
        return 1.0 - float(self._budget.stays)

    @property
    @override
    def wants_training(self) -> bool:
        # `snip` is `taylor` at initialisation, on purpose; the others do without a gradient there.
        return self.saliency in (
            saliencies.taylor,
            saliencies.taylor_magnitude,
            saliencies.fisher,
        )

    @override
    def recall(self, memory: Entry, layers: Sequence[Layer]) -> Mapping[str, Any]:
        told = dict(super().recall(memory, layers))
        if "latency" in told:
            told["latency"] = asdict(Timing.read(memory["latency"]))
        return told

    @property
    @override
    def regrows(self) -> bool:
        return isinstance(self.schedule, Regrow)

    @override
    def promised(self, subjects: Sequence[Subject], step: int) -> Sequence[Quota]:
        target = self.target
        if not isinstance(self.granularity, Element) or not isinstance(target, (int, float)):
            return ()
        if self.regrows:
            counts = lasting_counts(subjects, self._allocation, target, self.min_keep)
            return [Quota((place,), count, (count,)) for place, count in enumerate(counts)]
        total = sum(prod(subject.shape) for subject in subjects)
        keep = total - round(target * due(self.schedule, step, self._final) * total)
        return [Quota(tuple(range(len(subjects))), keep, (0,) * len(subjects))]

    @override
    def decide(self, ballot: Ballot, step: int) -> Masks:
        if self.refit is not None:
            rows, weights = ballot.shared(self.refit.name), ballot.weights
            return Refitted.of(self._decide(ballot, step), self.refit, rows, weights)
        if not self.straight_through:
            return self._decide(ballot, step)
        everything = [torch.ones_like(mask) for mask in ballot.masks]
        decision = self._decide(replace(ballot, masks=everything), step)
        return replace(decision, final=self.schedule.next_update(step) is None)

    def _decide(self, ballot: Ballot, step: int) -> Masks:
        """The masks of the update of ``step``; masked weights stay masked."""
        decision = self._elect(self._with_voters(ballot), step)
        return replace(decision, voters=tuple(map(_name, self.voters)))

    def _with_voters(self, ballot: Ballot) -> Ballot:
        """The ballot with the voters that are no tasks beside the tasks."""
        if not self.voters:
            return ballot
        columns = {_name(v): ballot.statistics[_ballot(v)] for v in self.voters}
        scores = [
            {**layer, **{name: next(iter(of[place].values())) for name, of in columns.items()}}
            for place, layer in enumerate(ballot.scores)
        ]
        return replace(ballot, statistics={**ballot.statistics, "saliency": scores})

    @override
    def worths(self, ballot: Ballot) -> Sequence[Tensor]:
        if ballot.units is not None or isinstance(self.target, PerTaskKeep):
            return ()
        scores = self._with_voters(ballot).scores
        if not all(scores):
            return ()  # masks are drawn at random
        return list(worths(scores, self.vote, rank(scores, self.priority)))

    def _elect(self, ballot: Ballot, step: int) -> Masks:
        progress, target = due(self.schedule, step, self._final), self.target
        election = Election(ballot, self.vote, self.priority, self._allocation, self.min_keep)
        if self._latency is not None:
            return keep_in_time(election, self._latency, progress)
        if isinstance(target, PerTaskKeep):
            ratio = target.at(progress)
            per_task = keep_per_task if ballot.units is None else keep_units_per_task
            return per_task(election, ratio)
        if ballot.units is not None:
            return keep_units(election, self._budget, progress, describe(self.granularity))
        if isinstance(self.granularity, NM):
            return keep_pattern(election, self.granularity, progress)
        assert target is not None
        if self._allocation.by_output:
            return keep_outputs(election, target, progress)
        if not isinstance(self.schedule, Regrow):
            return keep_best(election, target, progress)
        if step == 0:
            return draw(election, target)
        return exchange(election, target, self.schedule, step)


def _name(voter: Saliency) -> str:
    """What a voter that is no task is called."""
    return str(getattr(voter, "__name__", None) or describe(voter))


def _ballot(voter: Saliency) -> str:
    """The name of the statistic that holds its votes."""
    return f"voter {_name(voter)}"
