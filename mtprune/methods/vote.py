"""`Vote`: every task ranks the weights it uses, a vote merges the ranks, a budget cuts exactly."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import saliency as saliencies
from mtprune import votes
from mtprune.allocation import NAMES, Allocation, Erk, Floor, layer_counts, quotas
from mtprune.granularity import Element, Granularity
from mtprune.methods.base import Ballot, Decision
from mtprune.saliency import Saliency
from mtprune.schedule import OneShot, Regrow, Schedule
from mtprune.selection import Best, Quota, Ranking, rank, select

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
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"`ratio` must be in (0, 1]. Got {self.ratio!r}.")


@dataclass(frozen=True)
class Vote:
    """Prune by a vote of the tasks, to an exact sparsity.

    Attributes:
        sparsity: Share of zeros among the pruned layers' weights, in [0, 1), or `PerTaskKeep`.
        saliency: A function of weight and gradient (`mtprune.saliency`).
        vote: Reduces percentiles over tasks to a worth (`mtprune.votes`).
        schedule: When masks change (`mtprune.schedule`).
        granularity: What is pruned as one (`mtprune.granularity`).
        allocation: How the budget is spread over layers (`mtprune.allocation`).
        priority: Factor on a task's guaranteed share; tasks not named count 1.
        observations: How many observations of every task an update needs, or ``"auto"``: at least
            4, until the masks no longer change.
        disentangled: Score every loss on its own. False scores their sum in one sweep: the joint
            baseline.
        min_keep: The least a layer keeps as long as the budget has as much for each.
        straight_through: Let pruned weights come back until the last update. Scores add up over all
            steps until then and are never forgotten; masks hide weights, which keep their value and
            go on being scored with the gradient they would have.

    Example:
        >>> Vote(sparsity=0.9, vote=votes.majority).sparsity
        0.9
    """

    sparsity: float | PerTaskKeep
    saliency: Saliency = saliencies.taylor
    vote: votes.Vote = votes.unanimous
    schedule: Schedule = field(default_factory=OneShot)
    granularity: Granularity = field(default_factory=Element)
    allocation: Allocation = "floor"
    priority: Mapping[str, float] = field(default_factory=dict)
    observations: int | Literal["auto"] = 1
    disentangled: bool = True
    min_keep: int = 1
    straight_through: bool = False

    softens: ClassVar[bool] = False
    watch: ClassVar[None] = None
    needs_costs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.sparsity, PerTaskKeep):
            check_sparsity("sparsity", self.sparsity)
        for name in ("saliency", "vote"):
            if not callable(getattr(self, name)):
                raise TypeError(f"`{name}` must be a function. Got {getattr(self, name)!r}.")
        vote: object = self.vote
        if vote is votes.at_least:
            raise TypeError("`vote` must be at_least(m), with a number of tasks, not at_least.")
        saliencies.uses_gradient(self.saliency)
        if isinstance(self.schedule, type) or not hasattr(self.schedule, "next_update"):
            raise TypeError(
                f"`schedule` must be a schedule such as OneShot() or Cubic(...). "
                f"Got {self.schedule!r}."
            )
        if isinstance(self.granularity, type) or not hasattr(self.granularity, "pool"):
            raise TypeError(
                f"`granularity` must be a granularity such as Element(). Got {self.granularity!r}."
            )
        _check_allocation(self.allocation)
        if not isinstance(self.priority, Mapping):
            raise TypeError(f"`priority` must be a mapping task -> factor. Got {self.priority!r}.")
        for task, factor in self.priority.items():
            if isinstance(factor, bool) or not isinstance(factor, (int, float)):
                raise TypeError(f"`priority` of task '{task}' must be a number. Got {factor!r}.")
            if not 0.0 < factor < float("inf"):
                raise ValueError(f"`priority` of task '{task}' must be positive. Got {factor!r}.")
        if self.priority and (isinstance(self.sparsity, PerTaskKeep) or not self.disentangled):
            raise ValueError(
                "`priority` shifts the tasks' percentiles against each other: there are none with "
                "PerTaskKeep, and only one voter with disentangled=False."
            )
        auto = self.observations == "auto"
        if not auto and (not _is_whole(self.observations) or int(self.observations) < 1):
            raise ValueError(
                f"`observations` must be at least 1, or 'auto'. Got {self.observations!r}."
            )
        if not _is_whole(self.min_keep) or self.min_keep < 0:
            raise ValueError(f"`min_keep` must be a whole number. Got {self.min_keep!r}.")
        if self.regrows and (self.allocation == "global" or isinstance(self.sparsity, PerTaskKeep)):
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

    @property
    def regrows(self) -> bool:
        """Whether a pruned weight can come back."""
        return isinstance(self.schedule, Regrow)

    def decide(self, ballot: Ballot, step: int) -> Decision:
        """The masks of the update of ``step``."""
        if not self.straight_through:
            return self._decide(ballot, step)
        everything = [torch.ones_like(mask) for mask in ballot.masks]
        decision = self._decide(replace(ballot, masks=everything), step)
        return replace(decision, provisional=self.schedule.next_update(step) is not None)

    def _decide(self, ballot: Ballot, step: int) -> Decision:
        """The same, where what is masked stays masked."""
        if isinstance(self.sparsity, PerTaskKeep):
            ratio, progress = self.sparsity.ratio, self.schedule.progress(step)
            return self._per_task(ballot, ratio if progress == 1 else 1 - (1 - ratio) * progress)
        zeros = round(self.sparsity * self.schedule.progress(step) * ballot.total)
        keep = ballot.total - zeros
        rankings = rank(ballot.scores, self.priority)
        if isinstance(self.schedule, Regrow):
            masks = self._exchange(ballot, rankings, keep, self.schedule, step)
        else:
            masks = self._shrink(ballot, rankings, keep, self.schedule.progress(step))
        share = 1 - self.sparsity * self.schedule.progress(step)
        return Decision(masks, _Alone(ballot, rankings, lambda n: round(share * n)))

    def _shrink(
        self, ballot: Ballot, rankings: Mapping[str, Ranking], keep: int, progress: float
    ) -> list[Tensor]:
        allocation = self.allocation
        if isinstance(allocation, Mapping):
            allocation = {name: s * progress for name, s in allocation.items()}
        upper = [int(mask.sum()) for mask in ballot.masks]
        plan = quotas(
            allocation, ballot.shapes, ballot.components, keep, upper, min_keep=self.min_keep
        )
        return select(
            ballot.scores, self.vote, plan, eligible=_unless_all(ballot.masks), rankings=rankings
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
        of = self.allocation
        upper = [prod(shape) for shape in ballot.shapes]
        if isinstance(of, Mapping):
            plan = quotas(of, ballot.shapes, ballot.components, keep, upper, self.min_keep)
            counts = [0] * len(upper)
            for quota in plan:
                inside = [ballot.shapes[i] for i in quota.layers]
                most = [upper[i] for i in quota.layers]
                spread = layer_counts("uniform", inside, quota.keep, most, self.min_keep)
                for layer, count in zip(quota.layers, spread, strict=True):
                    counts[layer] = count
            return counts
        if of == "floor":
            of = Floor()
        of = of.of if isinstance(of, Floor) else of
        return layer_counts(of, ballot.shapes, keep, upper, self.min_keep)

    def _per_task(self, ballot: Ballot, ratio: float) -> Decision:
        alone = _Alone(ballot, rank(ballot.scores), lambda n: int(ratio * n))
        masks = []
        for layer, voters in enumerate(ballot.scores):
            wishes = torch.stack([alone[task][layer] for task in voters])
            masks.append((self.vote(wishes.to(torch.float64)) >= 0.5) & ballot.masks[layer])
        return Decision(masks, alone)


class _Alone(Mapping[str, Mapping[int, Tensor]]):
    """What each voter would keep if it were the only one, found out when somebody asks."""

    def __init__(
        self, ballot: Ballot, rankings: Mapping[str, Ranking], keep: Callable[[int], int]
    ) -> None:
        self._scores = ballot.scores
        self._rankings = rankings
        self._keep = keep
        self._known: dict[str, Best] = {}

    @override
    def __getitem__(self, task: str) -> Best:
        if task not in self._known:
            pieces = {i: layer[task] for i, layer in enumerate(self._scores) if task in layer}
            ranking = self._rankings[task]
            self._known[task] = Best(pieces, ranking, self._keep(ranking.total))
        return self._known[task]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._rankings)

    @override
    def __len__(self) -> int:
        return len(self._rankings)


def check_sparsity(name: str, value: object) -> None:
    """Refuse what is not a share of zeros in [0, 1).

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number in [0, 1). Got {value!r}.")
    if not 0.0 <= value < 1.0:
        hint = f" Did you mean {value / 100:g}?" if 1.0 < value < 100.0 else ""
        raise ValueError(f"`{name}` must be in [0, 1). Got {value!r}.{hint}")


def _check_allocation(allocation: object) -> None:
    if isinstance(allocation, Mapping):
        for component, sparsity in allocation.items():
            check_sparsity(f"allocation[{component!r}]", sparsity)
    elif isinstance(allocation, str):
        if allocation not in NAMES:
            raise ValueError(f"`allocation` must be one of {NAMES}. Got {allocation!r}.")
    elif not isinstance(allocation, (Erk, Floor)):
        raise TypeError(
            f"`allocation` must be one of {NAMES}, Erk(...), Floor(...) or a mapping "
            f"component -> sparsity. Got {allocation!r}."
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
