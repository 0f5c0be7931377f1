r"""Weights: from the votes of the tasks to masks with an exact number of weights.

A quota keeps an exact number of weights, best worth first, earlier position first among equals.
Nothing here sorts or concatenates all weights. A task's percentiles come from a histogram over the
leading bits of its saliencies, which bounds every worth from both sides. Only weights whose bounds
straddle the cut are ranked exactly. Since a vote is non-decreasing in every percentile the result
is the one a full sort would give, to the weight.

A vote that picks one of its percentiles by rank needs even less: whether a weight is above a cut is
then a matter of how many of its saliencies are, and those are compared as they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import votes
from mtprune.census import HERE, Census
from mtprune.selection.arrays import chunk_size, count_true, highest, positions, reaches
from mtprune.selection.ranking import GRID, Grid, Ranking, rank
from mtprune.votes import Vote

__all__ = ["NOT_A_VOTE", "Quota", "exact_worths", "select"]

NOT_A_VOTE = (
    "The vote is not one: a weight lost worth when a task's percentile rose. A vote must be "
    "non-decreasing in every percentile."
)


@dataclass(frozen=True)
class Quota:
    """How many weights some layers keep together, and how many each is sure of.

    Attributes:
        layers: Positions of the layers that compete with each other.
        keep: The exact number of weights they keep.
        floors: For each of them, how many of its own best it keeps whatever the others are worth.
    """

    layers: tuple[int, ...]
    keep: int
    floors: tuple[int, ...]


def select(
    scores: Sequence[Mapping[str, Tensor]],
    vote: Vote,
    quotas: Sequence[Quota],
    *,
    eligible: Sequence[Tensor] | None = None,
    priority: Mapping[str, float] | None = None,
    rankings: Mapping[str, Ranking] | None = None,
    census: Census = HERE,
) -> list[Tensor]:
    """Keep, in every quota, the exact number of weights of highest worth.

    Args:
        scores: For each layer, in order of position, its voters' saliencies ``{task: [n]}``:
            flat, finite, float32 or bfloat16. Every task is ranked over all the layers it appears
            in.
        vote: Reduces percentiles ``[voters, n]`` to worth ``[n]``.
        quotas: Disjoint sets of layers with the number of weights each keeps.
        eligible: For each layer, a bool tensor ``[n]``: the weights that may be kept. The others
            count in percentiles but are not kept. All of them unless given.
        priority: Factor on a task's guaranteed share; 1 for those not named.
        rankings: What `rank` gives for ``scores`` and ``priority``, if it is known already.
        census: Counts over all ranks, where each has a part of every layer.

    Returns:
        For each layer a bool tensor ``[n]``, True = keep; all False where no quota names it.

    Example:
        >>> shared = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.tensor([1.0, 2, 3, 4])}
        >>> [mask] = select([shared], votes.unanimous, [Quota((0,), 2, (0,))])
        >>> mask
        tensor([ True, False, False,  True])
    """
    masks = [torch.zeros_like(next(iter(s.values())), dtype=torch.bool) for s in scores]
    if rankings is None:
        rankings = rank(scores, priority, census)
    selection = _Selection(scores, vote, rankings, eligible, census)
    order = votes.order_statistic(vote)
    if order is not None and rankings:
        # Such a vote picks one of the percentiles, so it may as well pick among their grid cells.
        ranges = [ranking.range() for ranking in rankings.values()]
        grid = Grid(min(low for low, _ in ranges), max(high for _, high in ranges))
        for ranking in rankings.values():
            ranking.tabulate(grid)
        contests: list[_Contest] = [_OrderStatistic(selection, quota, order) for quota in quotas]
    else:
        contests = [_AnyVote(selection, quota) for quota in quotas]
    for contest in contests:
        contest.open(masks)
    undecided = [part for contest in contests for part in contest.undecided]
    worths = exact_worths(scores, vote, rankings, undecided, census)
    for contest in contests:
        contest.close(masks, [next(worths) for _ in contest.undecided])
    return masks


@dataclass(frozen=True)
class _Selection:
    """The arguments of `select` that all its contests look at."""

    scores: Sequence[Mapping[str, Tensor]]
    vote: Vote
    rankings: Mapping[str, Ranking]
    eligible: Sequence[Tensor] | None
    census: Census

    def size(self, layer: int) -> int:
        """How many weights a layer has."""
        return next(iter(self.scores[layer].values())).numel()

    def chunks(self, layer: int) -> Iterator[tuple[slice, dict[str, Tensor], Tensor | None]]:
        """Positions, saliencies and eligibility of a layer's weights, chunk by chunk."""
        step = chunk_size(next(iter(self.scores[layer].values())))
        for start in range(0, self.size(layer), step):
            chunk = slice(start, start + step)
            saliencies = {task: values[chunk] for task, values in self.scores[layer].items()}
            yield chunk, saliencies, None if self.eligible is None else self.eligible[layer][chunk]


_Decision = tuple[slice, Tensor, Tensor, Tensor | None]
"""Positions, and of the weights there: which are surely kept, which may be, which are eligible."""


class _Contest(ABC):
    """The layers of one quota, competing for its weights.

    Attributes:
        undecided: For each layer, its number and the positions of the weights about which bounds
            alone do not decide.
    """

    def __init__(self, selection: _Selection, quota: Quota) -> None:
        self._selection = selection
        self._quota = quota
        self._sure_counts: list[int] = []
        self.undecided: list[tuple[int, Tensor]] = []

    def open(self, masks: list[Tensor]) -> None:
        """Set in ``masks`` the weights that are surely kept, and find those that are undecided."""
        for layer, chunks in zip(self._quota.layers, self._decisions(), strict=True):
            undecided = [torch.zeros(0, dtype=torch.int64, device=masks[layer].device)]
            for chunk, sure, possible, eligible in chunks:
                if eligible is not None:
                    sure, possible = sure & eligible, possible & eligible
                masks[layer][chunk] = sure
                undecided.append(positions(possible & ~sure) + chunk.start)
            self.undecided.append((layer, torch.cat(undecided)))
        self._sure_counts = self._kept(masks)

    def close(self, masks: list[Tensor], worths: Sequence[Tensor]) -> None:
        """Set ``masks`` of the quota's layers to exactly ``keep`` True in all.

        Args:
            masks: What `open` has left.
            worths: The exact worth of the undecided weights of each layer.
        """
        remaining = self._quota.keep - sum(self._sure_counts)
        rest: list[tuple[int, Tensor, Tensor]] = []
        for (layer, index), worth, sure, floor in zip(
            self.undecided, worths, self._sure_counts, self._quota.floors, strict=True
        ):
            need = max(0, floor - sure)
            if need:
                [best] = highest([worth], need, self._selection.census)
                masks[layer][index[best]] = True
                remaining -= need
                index, worth = index[~best], worth[~best]
            rest.append((layer, index, worth))
        chosen = highest([worth for _, _, worth in rest], remaining, self._selection.census)
        for (layer, index, _), best in zip(rest, chosen, strict=True):
            masks[layer][index[best]] = True
        if sum(self._kept(masks)) != self._quota.keep:
            raise ValueError(NOT_A_VOTE)

    def _kept(self, masks: Sequence[Tensor]) -> list[int]:
        """How many weights each layer keeps."""
        own = [masks[layer] for layer in self._quota.layers]
        counts = [count_true(mask) for mask in own]
        if not self._selection.census.is_scattered:
            return counts
        return self._selection.census.count(own)

    @abstractmethod
    def _decisions(self) -> Iterator[Iterator[_Decision]]:
        """For each layer, chunk by chunk, which weights are surely kept and which may be."""


class _OrderStatistic(_Contest):
    """Under a vote that picks the m-th smallest percentile.

    Such a worth reaches a cut if enough of the weight's percentiles do, and a percentile does if
    its saliency reaches a certain value.
    """

    def __init__(self, selection: _Selection, quota: Quota, order: Callable[[int], int]) -> None:
        super().__init__(selection, quota)
        self._order = order

    @override
    def _decisions(self) -> Iterator[Iterator[_Decision]]:
        rankings = self._selection.rankings
        surely_in, surely_out = self._cuts()
        edges = {task: r.edges(surely_in, surely_out) for task, r in rankings.items()}
        for place, layer in enumerate(self._quota.layers):
            sure = {task: values[place] for task, (values, _) in edges.items()}
            possible = {task: values[place] for task, (_, values) in edges.items()}
            yield (
                (chunk, self._enough(saliencies, sure), self._enough(saliencies, possible), e)
                for chunk, saliencies, e in self._selection.chunks(layer)
            )

    def _enough(self, saliencies: Mapping[str, Tensor], edges: Mapping[str, int]) -> Tensor:
        """For each weight, whether the m-th smallest of its saliencies reaches its task's edge."""
        first, *others = (reaches(values, edges[task]) for task, values in saliencies.items())
        voters = len(saliencies)
        needed = voters + 1 - self._order(voters)
        if needed in (1, voters):
            join = torch.bitwise_or if needed == 1 else torch.bitwise_and
            for other in others:
                first = join(first, other, out=first)
            return first
        total = first.view(torch.int8)
        for other in others:
            total = total + other.view(torch.int8)
        return total >= needed

    def _cuts(self) -> tuple[Tensor, Tensor]:
        r"""For each layer, the cell from which worth is surely enough, and below which it is not.

        With the cut at a cell c, each layer keeps its weights whose worth is at least c, and no
        fewer than its floor. Let low(c) be how many that are in all if worth is counted by its
        lower bound, and high(c) by its upper bound. Both fall as c rises, and for the cell
        :math:`c^*` of the last weight kept

        .. math:: low(c^* + 1) \le keep \le high(c^*) .

        So worth is not enough below the highest c with :math:`low(c) \ge keep`. Here high is not
        counted. But let :math:`c_0` be the lowest cell with :math:`low(c_0) \le keep`, and
        :math:`c_1 \ge c_0` lie above the upper bound of every percentile whose lower bound is
        below :math:`c_0`. Then :math:`high(c_1) \le low(c_0) \le keep`, and worth is enough from
        :math:`c_1` on. A layer's floor has cuts of its own, found in the same way among its own
        weights; the lower cut of the two counts.
        """
        quota = self._quota
        total = None
        own = []
        for layer, floor in zip(quota.layers, quota.floors, strict=True):
            low = self._low(layer)
            own.append(torch.stack([(low > floor).sum(), (low >= floor).sum() - 1]))
            low = low.clamp_(min=floor)
            total = low if total is None else total.add_(low)
        assert total is not None
        common = torch.stack([(total > quota.keep).sum(), (total >= quota.keep).sum() - 1])
        cuts = torch.minimum(torch.stack(own), common).to(torch.int32)
        first, surely_out = cuts[:, 0].contiguous(), cuts[:, 1].contiguous()
        reach = torch.stack([r.reach(first) for r in self._selection.rankings.values()]).amax(0) + 1
        return torch.maximum(first, reach.to(torch.int32)), surely_out

    def _low(self, layer: int) -> Tensor:
        """For each cell, how many weights of a layer have a lower bound of worth at least there."""
        voters = self._selection.scores[layer]
        like = next(iter(voters.values()))
        counts = torch.zeros(GRID + 1, dtype=torch.int64, device=like.device)
        space = torch.empty(
            len(voters), min(like.numel(), chunk_size(like)), dtype=torch.int16, device=like.device
        )
        for _, saliencies, eligible in self._selection.chunks(layer):
            rows = [space[i, : values.numel()] for i, values in enumerate(saliencies.values())]
            for row, (task, values) in zip(rows, saliencies.items(), strict=True):
                self._selection.rankings[task].on_grid(values, row)
            worth = votes.pick(rows, self._order(len(rows)))
            if eligible is not None:
                worth = worth[positions(eligible)]
            histogram = torch.bincount(worth)
            counts[: histogram.numel()] += histogram
        return self._selection.census.sum(counts).flip(0).cumsum(0).flip(0)


class _AnyVote(_Contest):
    """Under any vote, by bounds of each weight's worth."""

    def __init__(self, selection: _Selection, quota: Quota) -> None:
        super().__init__(selection, quota)
        self._grid = Grid(*self._range())

    @override
    def _decisions(self) -> Iterator[Iterator[_Decision]]:
        for layer, sure, possible in zip(self._quota.layers, *self._cuts(), strict=True):
            yield (
                (chunk, low >= sure, high >= possible, eligible)
                for chunk, low, high, eligible in self._bounds(layer)
            )

    def _range(self) -> tuple[float, float]:
        """The lowest and the highest worth there can be."""
        selection = self._selection
        ranges: list[tuple[float, float]] = []
        for voters in {tuple(selection.scores[layer]) for layer in self._quota.layers}:
            rankings = [selection.rankings[task] for task in voters]
            rows = [r.percentile(r.counts.new_tensor([0, r.total])) for r in rankings]
            low, high = votes.tally(selection.vote, torch.stack(rows)).tolist()
            if high < low:
                raise ValueError(NOT_A_VOTE)
            ranges.append((low, high))
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def _bounds(self, layer: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Positions, lowest and highest cell of the worth, and eligibility, chunk by chunk."""
        for chunk, saliencies, eligible in self._selection.chunks(layer):
            pairs = [self._selection.rankings[task].bounds(v) for task, v in saliencies.items()]
            low, high = (
                self._grid.cell(self._selection.vote(torch.stack(rows)))
                for rows in zip(*pairs, strict=True)
            )
            yield chunk, low, high, eligible

    def _cuts(self) -> tuple[Tensor, Tensor]:
        r"""For each layer, the cell from which worth is surely enough, and below which it is not.

        As in `_OrderStatistic`, :math:`low(c^* + 1) \le keep \le high(c^*)` for the cell
        :math:`c^*` of the last weight kept. Here both are counted: worth is enough from the lowest
        c with :math:`high(c) \le keep` on, and not below the highest c with
        :math:`low(c) \ge keep`.
        """
        lows, highs = [], []
        for layer in self._quota.layers:
            device = next(iter(self._selection.scores[layer].values())).device
            counts, wrong = torch.zeros(2, GRID + 1, dtype=torch.int64, device=device), 0
            for _, lowest, topmost, eligible in self._bounds(layer):
                wrong += count_true(lowest > topmost)
                for row, cells in enumerate((lowest, topmost)):
                    cells = cells if eligible is None else cells[eligible]
                    counts[row] += torch.bincount(cells, minlength=GRID + 1)
            if self._selection.census.number(wrong, counts):
                raise ValueError(NOT_A_VOTE)
            counts = self._selection.census.sum(counts)
            from_top = counts.flip(1).cumsum(1).flip(1)
            lows.append(from_top[0])
            highs.append(from_top[1])
        low, high = torch.stack(lows), torch.stack(highs)
        keep = self._quota.keep
        floors = low.new_tensor(self._quota.floors).unsqueeze(1)
        common_out = (torch.maximum(low, floors).sum(0) >= keep).sum() - 1
        common_in = (torch.maximum(high, floors).sum(0) > keep).sum()
        floor_out = (low >= floors).sum(1) - 1
        floor_in = (high > floors).sum(1)
        return torch.minimum(common_in, floor_in), torch.minimum(common_out, floor_out)


def exact_worths(
    scores: Sequence[Mapping[str, Tensor]],
    vote: Vote,
    rankings: Mapping[str, Ranking],
    undecided: Sequence[tuple[int, Tensor]],
    census: Census = HERE,
) -> Iterator[Tensor]:
    """The exact worth of some weights of some layers, float64.

    Args:
        scores: See `select`.
        vote: The vote.
        rankings: What `rank` gives for ``scores``.
        undecided: Layers, each with the positions of weights.
        census: Counts over all ranks, where each has a part of every layer.
    """
    queries: dict[str, list[Tensor]] = {task: [] for task in rankings}
    rows_of, bounds_of, inexact_of = [], [], []
    for layer, index in undecided:
        pairs = [rankings[t].bounds(v[index]) for t, v in scores[layer].items()]
        low, high = (torch.stack(rows) for rows in zip(*pairs, strict=True))
        bound = vote(low) if index.numel() else low[0]
        # A percentile with equal bounds is exact already.
        inexact = high > low
        if vote is votes.unanimous:
            # A task whose highest percentile is below another's lowest has no say in this weight,
            # and need not be ranked among the thousands around it.
            inexact &= high >= bound
        for (task, values), mask in zip(scores[layer].items(), inexact, strict=True):
            queries[task].append(values[index[mask]])
        rows_of.append(low)
        bounds_of.append(bound)
        inexact_of.append(inexact)
    answers = {
        task: iter(torch.split(rankings[task].exact(torch.cat(v)), [len(x) for x in v]))
        for task, v in queries.items()
        if v
    }
    for (layer, _), rows, bound, inexact in zip(
        undecided, rows_of, bounds_of, inexact_of, strict=True
    ):
        for task, row, mask in zip(scores[layer], rows, inexact, strict=True):
            row[mask] = next(answers[task])
        worth = vote(rows) if bound.numel() else bound
        wrong = count_true(~(worth >= bound - 1e-9))  # allows for a vote's own rounding
        if census.number(wrong, worth):
            raise ValueError(NOT_A_VOTE)
        yield worth
