r"""`LowRank`: directions of matrices instead of single weights, to an exact budget of parameters.

Put a gate on every direction of a weight, :math:`W = \sum_k z_k\, s_k\, u_k v_k^T`. What a task
loses with a direction is told by the derivative of its loss in the gate,

.. math:: \frac{\partial L}{\partial z_k} = (W v_k)^T G\, v_k , \quad
    G = \frac{\partial L}{\partial W},

which needs no gate in the model, only the gradient of the weight. Every task ranks the directions
it uses by it, for each parameter they cost, and a vote merges the ranks.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from mtprune import checks, votes
from mtprune.holding import Hold, Masking
from mtprune.holding.low_rank import LowRankHold, LowRanks
from mtprune.methods import gates
from mtprune.methods.base import Ballot, Method, Needs
from mtprune.model import factors
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer, is_another_linear
from mtprune.reading import Entry
from mtprune.saliency import movement
from mtprune.schedule import OneShot, Regrow, Rounds, Schedule, due
from mtprune.selection import rank, select_directions
from mtprune.statistics import PerWeight

__all__ = ["LowRank"]

_FACTORED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_START = 3.0  # log alpha of a gate at first: open with probability 0.995, 0.92 on average
_FARTHEST = 6.0  # log alpha stays this close to 0, so that no gate is beyond recovery
_TRAVEL = 20.0  # how far log alpha could go in a run, if a gate was at the top all the time
_STIFFNESS = 5.0  # the second multiplier at first: what a gap between due and saved counts at once
_MEMORY = 0.9  # how much of the worth of before counts


def _along(layer: Layer, score: Tensor) -> Tensor:
    """How much a loss depends on each direction of each matrix, whichever way."""
    return torch.cat([factors.along(matrix).abs() for matrix in layer.layout.each(score)])


@dataclass(frozen=True)
class _Matrices:
    """The matrices of a ballot, of which a stack of experts has several.

    Attributes:
        names: Their names.
        shapes: Their shapes.
        rates: How much a parameter of each costs of the budget: itself, or its multiply-adds.
        scores: For each matrix and voter, the saliency of its directions ``[m]``.
        counts: How many of them each layer has.
    """

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    rates: Sequence[Fraction | int]
    scores: Sequence[Mapping[str, Tensor]]
    counts: Sequence[int]

    @classmethod
    def of(cls, ballot: Ballot) -> "_Matrices":
        """The matrices of a ballot, layer by layer."""
        names, shapes, rates, scores = [], [], [], []
        costs: Sequence[Fraction | int] = ballot.costs or [1] * len(ballot.subjects)
        for subject, cost, voters in zip(ballot.subjects, costs, ballot.scores, strict=True):
            count, layout = subject.matrices, subject.layout
            names += layout.names(subject.name, subject.shape)
            shapes += [layout.shape(subject.shape)] * count
            rates += [cost] * count
            parts = {voter: score.chunk(count) for voter, score in voters.items()}
            scores += [{voter: part[i] for voter, part in parts.items()} for i in range(count)]
        return cls(names, shapes, rates, scores, ballot.matrices)

    @property
    def sizes(self) -> list[int]:
        """How many directions each has."""
        return [factors.full(shape) for shape in self.shapes]

    @property
    def costs(self) -> Tensor:
        """How much each direction costs of the budget, matrix by matrix, float64."""
        pairs = zip(self.shapes, self.rates, strict=True)
        units = [float(factors.price(shape) * rate) for shape, rate in pairs]
        sizes = torch.tensor(self.sizes)
        return torch.tensor(units, dtype=torch.float64).repeat_interleave(sizes)

    def by_layer(self, values: Sequence[Tensor]) -> list[Tensor]:
        """What there is of each matrix, layer by layer."""
        ends = list(accumulate(self.counts, initial=0))
        return [torch.cat(list(values[i:j])) for i, j in pairwise(ends)]

    def layers(self, matrices: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The same for layers of which there is something of all matrices."""
        ends = enumerate(pairwise(accumulate(self.counts, initial=0)))
        return {
            place: torch.cat([matrices[i] for i in range(*span)])
            for place, span in ends
            if span[0] in matrices
        }


@dataclass(frozen=True)
class LowRank(Method[LowRanks]):
    """Prune the rank of linear layers and convolutions by a vote of the tasks, to a budget.

    A layer of rank r counts as ``min(r (in + out), in * out)`` parameters, those of the two layers
    it can become; above break-even it stays whole. The matrix of a convolution has in a row all
    that an output reads, so that ``in`` is its inputs times its kernel: of rank r it can become a
    convolution with that kernel to r channels, and one with a kernel of size 1. ``nn.Linear``,
    transformers' Conv1D, ``nn.Conv1d`` to ``nn.Conv3d`` without groups and stacks of experts are
    pruned (`mtprune.compress` makes two layers of all but ``nn.Conv1d`` and ``nn.Conv3d``). In a
    stack the matrix of each expert has a rank of its own, as if it were a layer. Weights of any
    other kind are left dense, and the report names them. The masks stay all True: a matrix of low
    rank has no zeros.

    Attributes:
        sparsity: Share of parameters saved, in [0, 1). The budget is met up to less than what one
            direction costs.
        gates: ``"saliency"`` ranks directions by the derivative of the losses in their gates when
            an update is made; ``"learned"`` trains the gates from update to update, with the
            weights, and removes nothing before the last one. A direction that has faded and comes
            back is as exact as the type of the weights lets it be: train them in float32.
        vote: Reduces percentiles over tasks to a worth (`mtprune.votes`).
        schedule: When ranks, or gates, change (`mtprune.schedule`).
        floor: The share of a uniform budget that every matrix is sure of, filled by its own best
            directions; 0 for one ranking of all, 1 for the same share everywhere.
        min_rank: The least rank of a matrix, as long as the budget has as much for each.
        observations: How many observations of every task an update needs.
        disentangled: Score every loss on its own. False scores their sum.
        rate: How far learned gates move in an update; so that all updates together could take them
            from one end to the other and half the way back, unless given.
        budget_unit: What ``sparsity`` is a share of: ``"params"``, or ``"macs"``, multiply-adds on
            ``example_inputs``. Every parameter of a convolution, and of both that it can become,
            is multiplied once for each position of its output.
        example_inputs: What the model is called with to measure multiply-adds: a tensor, a tuple of
            arguments, or a dict of keyword arguments.

    Example:
        >>> LowRank(0.5, vote=votes.mean).gates
        'saliency'
    """

    sparsity: float
    gates: Literal["saliency", "learned"] = "saliency"
    vote: votes.Vote = votes.unanimous
    schedule: Schedule = field(default_factory=OneShot)
    floor: float = 0.5
    min_rank: int = 1
    observations: int = 1
    disentangled: bool = True
    rate: float | None = None
    budget_unit: Literal["params", "macs"] = field(default="params", metadata={"later": True})
    example_inputs: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate."""
        checks.sparsity("sparsity", self.sparsity)
        checks.either("gates", self.gates, ("saliency", "learned"))
        votes.check(self.vote)
        must = "must be a schedule such as OneShot() or Cubic(...)"
        checks.object_with("schedule", self.schedule, "next_update", must=must)
        if isinstance(self.schedule, Regrow):
            raise ValueError(
                "Regrow is sparse training at constant sparsity. Ranks need a schedule that ends: "
                "OneShot(...), Linear(...) or Cubic(...)."
            )
        if self.gates == "learned" and isinstance(self.schedule, (OneShot, Rounds)):
            raise ValueError(
                "gates='learned' needs time to learn: schedule=Cubic(begin=..., end=..., every=...)"
                ", or recipes.flop(sparsity, steps). OneShot and Rounds go with gates='saliency'."
            )
        checks.whole("min_rank", self.min_rank, least=0)
        checks.whole("observations", self.observations, least=1)
        checks.inside("floor", self.floor, "[0, 1]", must="is a share, in [0, 1]")
        if self.rate is not None:
            checks.inside("rate", self.rate, "(0, inf]", must="must be positive")
        checks.either("budget_unit", self.budget_unit, ("params", "macs"))
        if self.budget_unit == "macs" and self.example_inputs is None:
            raise ValueError(
                "budget_unit='macs' needs `example_inputs`: what the model is called with."
            )

    @override
    def needs(self, inventory: Inventory) -> Needs:
        # The sum of `movement` over a direction is minus the derivative in its gate.
        return Needs(
            statistics={"saliency": PerWeight(movement, _along)},
            apart=self.disentangled,
            observations=self.observations,
            macs=self.budget_unit == "macs",
            example_inputs=self.example_inputs,
        )

    @override
    def fits(self, layer: Layer) -> str:
        modules = {module for module, _ in layer.places}
        known = layer.layout.stacked or all(
            type(module) in _FACTORED or is_another_linear(module) for module in modules
        )
        if not known:
            return "only nn.Linear, nn.Conv1d to nn.Conv3d and experts can become two layers"
        if len(modules) > 1:
            return "its weight is tied to another"
        # Each group is a matrix of its own, and those of a depthwise convolution have one row.
        return "a convolution with groups is no single matrix" if _groups(modules) > 1 else ""

    @override
    def recall(self, memory: Entry, layers: Sequence[Layer]) -> Mapping[str, Any]:
        """See `Method`."""
        full = {
            name: factors.full(layer.layout.shape(layer.shape))
            for layer in layers
            for name in layer.layout.names(layer.name, layer.shape)
        }
        if not memory.mapping():
            return {}
        if self.gates == "saliency":
            ranks = memory.fields(["ranks"])["ranks"].mapping(full)
            return {"ranks": {name: part.whole(most=full[name]) for name, part in ranks.items()}}
        parts = memory.fields(["log_alpha", "worth", "multipliers", "count", "pace"])
        log_alpha = parts["log_alpha"].fields(full)
        return {
            "log_alpha": {
                name: part.tensor((full[name],), torch.float64).clone()
                for name, part in log_alpha.items()
            },
            "worth": parts["worth"].tensor((sum(full.values()),)).clone(),
            "multipliers": [part.number() for part in parts["multipliers"].items(2)],
            "count": parts["count"].whole(),
            "pace": parts["pace"].number(least=0.0),
        }

    @override
    def hold(self, masks: Masking, optimizer: Optimizer | None) -> Hold[LowRanks]:
        return LowRankHold()

    @override
    def decide(self, ballot: Ballot, step: int) -> LowRanks:
        """The ranks of the update of ``step``, or the gates until the next one."""
        if self.gates == "learned":
            return self._learn(ballot, step)
        matrices = _Matrices.of(ballot)
        known = ballot.memory.get("ranks", {})
        alive = [known.get(n, m) for n, m in zip(matrices.names, matrices.sizes, strict=True)]
        share = self.sparsity * due(self.schedule, step, self.sparsity)
        percentiles = _percentiles(matrices)
        kept = self._select(matrices, self._vote(percentiles), share, alive)
        alone: dict[str, dict[int, Tensor]] = {}
        for voter in dict.fromkeys(voter for matrix in percentiles for voter in matrix):
            own = [i for i, matrix in enumerate(percentiles) if voter in matrix]
            worths = [percentiles[i][voter] for i in own]
            wish = self._select(matrices, worths, share, [alive[i] for i in own], own)
            alone[voter] = matrices.layers(dict(zip(own, wish, strict=True)))
        now = {n: int(mask.sum()) for n, mask in zip(matrices.names, kept, strict=True)}
        return LowRanks(
            ballot.masks,
            memory={"ranks": now},
            directions=matrices.by_layer(kept),
            directions_alone=alone,
        )

    def _vote(self, percentiles: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        return [self.vote(torch.stack(list(voters.values()))) for voters in percentiles]

    def _select(
        self,
        matrices: _Matrices,
        worths: Sequence[Tensor],
        share: float,
        alive: Sequence[int],
        which: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """What a budget pays for that saves this share of some matrices, or of all."""
        every = list(zip(matrices.shapes, matrices.rates, strict=True))
        some = every if which is None else [every[i] for i in which]
        shapes, rates = [shape for shape, _ in some], [rate for _, rate in some]
        total = sum(rate * math.prod(shape) for shape, rate in some)
        budget, least = total - round(share * total), self._least(shapes, share)
        return select_directions(worths, shapes, budget, rates=rates, least=least, alive=alive)

    def _least(self, shapes: Sequence[tuple[int, ...]], share: float) -> list[int]:
        """How many of its own best directions each matrix is sure of."""
        uniform = [(1 - share) * math.prod(shape) / factors.price(shape) for shape in shapes]
        return [max(self.min_rank, math.floor(self.floor * rank)) for rank in uniform]

    def _learn(self, ballot: Ballot, step: int) -> LowRanks:
        r"""One step of the gates, and in the end what is kept.

        Gates are at their mean, in units of what it was at first. The step goes down the augmented
        Lagrangian

        .. math:: -\frac1C \sum_k c_k w_k p_k + \lambda_1 (s - t) + \lambda_2 (s - t)^2, \quad
            s = 1 - \frac1C \sum_k c_k p_k ,

        where a direction costs :math:`c_k` of the budget, C in all, is open with probability
        :math:`p_k`, and is worth :math:`w_k` for its price: the vote on how fast the losses change
        with its gate. Early that is what the noise of the gradient tells of the curvature, and once
        a direction that matters has faded, how much it is missed. Of s, the share saved, t is due.
        It is a step of mirror descent,

        .. math:: \operatorname{logit} p_k \leftarrow \operatorname{logit} p_k
            + \eta\, (w_k + \lambda_1 + 2 \lambda_2 (s - t)),

        so that a gate that is almost shut moves as fast as any other. The multipliers go up their
        gradients; :math:`-\lambda_1` ends as the price of one unit of the budget.
        """
        matrices = _Matrices.of(ballot)
        names, sizes = matrices.names, matrices.sizes
        settled = self.schedule.next_update(step) is None
        memory: Mapping[str, Any] = ballot.memory
        if settled and not memory:
            raise RuntimeError(
                "gates='learned' has had no update to learn from. Call observe() and step() in a "
                "loop, or take gates='saliency'."
            )
        pace = memory["pace"] if memory else self._pace()
        count = memory["count"] + 1 if memory else 1
        fresh = [torch.full((size,), _START, dtype=torch.float64) for size in sizes]
        before = [memory["log_alpha"][name] for name in names] if memory else fresh
        worth = torch.cat(self._vote(_percentiles(matrices, [_let(x) for x in before])))
        smooth = (1 - _MEMORY) * (worth - worth.mean())
        smooth += _MEMORY * memory["worth"] if memory else 0.0
        log_alpha = torch.cat(before)
        gap = self._saved(matrices, log_alpha) - self.schedule.progress(step) * self._due(matrices)
        first, second = memory["multipliers"] if memory else (0.0, _STIFFNESS)
        log_alpha += pace * (smooth / (1 - _MEMORY**count) + first + 2.0 * second * gap)
        moved = [x.clone() for x in log_alpha.clamp(-_FARTHEST, _FARTHEST).split(sizes)]
        for x, sure in zip(moved, self._least(matrices.shapes, self.sparsity), strict=True):
            best = x.argsort(descending=True, stable=True)[:sure]
            x[best] = x[best].clamp(min=_START)  # what a matrix is sure of does not fade
        if settled:
            kept = self._select(matrices, moved, self.sparsity, sizes)
            return LowRanks(ballot.masks, directions=matrices.by_layer(kept))
        return LowRanks(
            ballot.masks,
            memory={
                "log_alpha": dict(zip(names, moved, strict=True)),
                "worth": smooth,
                "multipliers": [first + pace * gap, second + pace * gap**2],
                "count": count,
                "pace": pace,
            },
            directions=matrices.by_layer([torch.ones(m, dtype=torch.bool) for m in sizes]),
            gates=matrices.by_layer([_let(x) for x in moved]),
        )

    def _saved(self, matrices: _Matrices, log_alpha: Tensor) -> float:
        """The share of what the directions cost that shut gates are expected to save."""
        costs = matrices.costs
        return 1.0 - float((costs * gates.open_probability(log_alpha)).sum() / costs.sum())

    def _due(self, matrices: _Matrices) -> float:
        """The same share in the end: factors of full rank are larger than the matrix."""
        sizes = map(math.prod, matrices.shapes)
        total = sum(rate * size for rate, size in zip(matrices.rates, sizes, strict=True))
        budget = (1 - self.sparsity) * float(total)
        return 1.0 - min(1.0, budget / float(matrices.costs.sum()))

    def _pace(self) -> float:
        """How far a gate's parameter moves in an update."""
        if self.rate is not None:
            return self.rate
        updates, at = 0, self.schedule.next_update(-1)
        while at is not None:
            updates, at = updates + 1, self.schedule.next_update(at)
        return min(1.0, _TRAVEL / updates)


def _let(log_alpha: Tensor) -> Tensor:
    """How much of a direction its gate lets through: all of it at first."""
    return gates.mean(log_alpha) / gates.mean(torch.tensor(_START, dtype=torch.float64))


def _percentiles(
    matrices: _Matrices, through: Sequence[Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """For each matrix and voter the percentile of its directions, by their price, float64 ``[m]``.

    Args:
        matrices: The matrices and their scores.
        through: What the gates let through when they were scored; all unless given.
    """
    scores = []
    each = zip(matrices.shapes, matrices.rates, matrices.scores, strict=True)
    for place, (shape, rate, voters) in enumerate(each):
        unit = float(factors.price(shape) * rate)
        scale = unit if through is None else unit * through[place]
        scores.append({voter: (s.cpu() / scale).float() for voter, s in voters.items()})
    rankings = rank(scores)
    return [{voter: rankings[voter].exact(s) for voter, s in layer.items()} for layer in scores]


def _groups(modules: Iterable[nn.Module]) -> int:
    """In how many groups some layers convolve, at most."""
    return max(getattr(module, "groups", 1) for module in modules)
