r"""Selection: from per-task saliency to masks with an exact number of weights.

For a task k that uses :math:`N_k` weights, the percentile of a weight is the share of those that
are strictly less salient, :math:`F_k(w) = \#\{v : s_k(v) < s_k(w)\} / N_k`; ties share the lower
percentile. A vote turns the percentiles of a weight's voters into its worth, and a quota keeps an
exact number of weights, best worth first, earlier position first among equals.

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
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from mtprune import votes
from mtprune.votes import Vote

__all__ = ["Best", "Quota", "Ranking", "rank", "select"]

_CODES = 1 << 16  # a float's leading 16 bits, rounded away from zero: zero is alone in its code
_INFINITY = 0x7F800000  # its bits: edges are bits, because some CPUs flush subnormal numbers
_ZERO = _CODES // 2  # the cell of 0.0; that of -0.0 is the one before
_GRID = 1 << 14  # resolution of worth while looking for the cut
_CHUNK = 1 << 17  # weights looked at together: bounds all temporaries, and fits a core's cache

_NOT_A_VOTE = (
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


class Ranking:
    """One task's ordering of all the weights it uses, as a table instead of a sort.

    Args:
        pieces: The task's saliencies, one flat tensor per layer, float32 or bfloat16.
        priority: Divides the distance from the top, ``1 - (1 - percentile) / priority``, which
            gives the task that many times the share the others get.
    """

    def __init__(self, pieces: Sequence[Tensor], priority: float = 1.0) -> None:
        self._pieces = pieces
        self._priority = priority
        device = pieces[0].device
        self.total = sum(piece.numel() for piece in pieces)
        by_code = torch.zeros(_CODES, dtype=torch.int64, device=device)
        for chunk in self._chunks():
            found = torch.bincount(_codes(chunk))
            by_code[: found.numel()] += found
        # From here on by cell: the codes in the order of the values they stand for.
        self._cells, self._edges = _layout(device)
        self.counts = torch.empty_like(by_code).scatter_(0, self._cells, by_code)
        self._below = self.counts.cumsum(0) - self.counts
        self._below[_ZERO] = self._below[_ZERO - 1]  # 0.0 and -0.0 are one number
        spread = (self.counts - 1).clamp_(min=0)
        spread[_ZERO - 1 : _ZERO + 1] = 0
        if all(piece.dtype == torch.bfloat16 for piece in pieces):
            spread.zero_()  # a code is a number
        self._low = self.percentile(self._below)
        self._high = self.percentile(self._below + spread)

    def percentile(self, below: Tensor) -> Tensor:
        """The percentile of a weight with ``below`` strictly less salient ones, float64."""
        share = below.to(torch.float64) / max(self.total, 1)
        return share if self._priority == 1.0 else 1.0 - (1.0 - share) / self._priority

    def bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest percentile each of ``values`` can have, float64, same shape."""
        cells = self._cells[_codes(values)]
        return self._low[cells], self._high[cells]

    def range(self) -> tuple[float, float]:
        """Between what all its percentiles lie."""
        low, high = self.percentile(self.counts.new_tensor([0, self.total])).tolist()
        return low, high

    def tabulate(self, grid: "_Grid") -> None:
        """Prepare `on_grid`, `reach` and `edges`."""
        self._grid_low, self._grid_high = grid.cell(self._low), grid.cell(self._high)
        self._by_code = self._grid_low.to(torch.int16)[self._cells]

    def on_grid(self, values: Tensor, out: Tensor) -> None:
        """Write the grid cell of the lowest percentile of each of ``values``, int16."""
        torch.index_select(self._by_code, 0, _codes(values), out=out)

    def reach(self, cuts: Tensor) -> Tensor:
        """The highest grid cell of what is below each cut by its lowest percentile, int32."""
        last = torch.searchsorted(self._grid_low, cuts) - 1
        return torch.where(last < 0, -1, self._grid_high[last.clamp_(min=0)])

    def edges(self, surely_in: Tensor, surely_out: Tensor) -> tuple[list[int], list[int]]:
        """For each cut, from which value on percentiles reach it surely, and from which maybe.

        Of the values the bits.
        """
        surely = self._edges[torch.searchsorted(self._grid_low, surely_in)]
        maybe = self._edges[torch.searchsorted(self._grid_high, surely_out)]
        return surely.tolist(), maybe.tolist()

    def exact(self, values: Tensor) -> Tensor:
        """The percentiles of ``values``, each of them one of the task's own, float64."""
        if values.numel() == 0:
            return self._low.new_zeros(0)
        values = values.to(torch.float32)
        cells = self._cells[_codes(values)]
        touched = torch.zeros(_CODES, dtype=torch.bool, device=values.device)
        touched[cells] = True
        touched[_ZERO - 1 : _ZERO + 1] = False  # of zeros it is known how many lie below
        # Counted in the touched cells alone: how many saliencies lie below each value.
        near = _sorted(self._within(touched))
        counts = torch.where(touched, self.counts, 0)
        near_below = (counts.cumsum(0) - counts)[cells]
        rank = self._below[cells] + torch.where(
            touched[cells], torch.searchsorted(near, values) - near_below, 0
        )
        return self.percentile(rank)

    def cut(self, keep: int) -> tuple[int, int, int]:
        """The least of the ``keep`` highest, how many are equal to it, and how many of them count.

        Of the least the bits.

        Args:
            keep: At least 1.
        """
        cell = int((self.total - self._below >= min(keep, self.total)).sum()) - 1
        left = keep - int(self.counts[cell + 1 :].sum())
        if cell == _ZERO:
            return 0, int(self.counts[_ZERO - 1 : _ZERO + 1].sum()), left
        touched = torch.zeros(_CODES, dtype=torch.bool, device=self.counts.device)
        touched[cell] = True
        near = self._within(touched)
        value = _sorted(near)[near.numel() - left]
        equal, above = int((near == value).sum()), int((near > value).sum())
        return int(value.view(torch.int32)), equal, left - above

    def _within(self, touched: Tensor) -> Tensor:
        """The task's saliencies that fall into some cells, float32."""
        found = touched.nonzero().squeeze(1)
        if not found.numel():
            return self._low.new_zeros(0, dtype=torch.float32)
        first, last = int(found[0]), int(found[-1])
        low, high = int(self._edges[first]), int(self._edges[last + 1])
        # Few in between: two comparisons spare most of them the table.
        narrow = int(self.counts[first : last + 1].sum()) < self.total // 8
        by_code = touched[self._cells]
        near = []
        for chunk in self._chunks():
            if narrow:
                chunk = chunk[_where(_at_least(chunk, low) & ~_at_least(chunk, high))]
            if found.numel() < last + 1 - first or not narrow:
                chunk = chunk[_where(torch.index_select(by_code, 0, _codes(chunk)))]
            near.append(chunk.to(torch.float32))
        return torch.cat(near)

    def _chunks(self) -> Iterator[Tensor]:
        for piece in self._pieces:
            yield from torch.split(piece, _span(piece))


class Best(Mapping[int, Tensor]):
    """A task's own highest saliencies, earlier ones first among equals: masks, made when asked for.

    Args:
        pieces: Layer -> its saliencies, flat, in order of position.
        ranking: Of the same.
        keep: How many are kept.
    """

    def __init__(self, pieces: Mapping[int, Tensor], ranking: Ranking, keep: int) -> None:
        self._pieces = pieces
        self._value, equal, left = ranking.cut(keep) if keep > 0 else (_INFINITY, 0, 0)
        # Of those equal to the last one kept, how many each layer keeps; None for all of them.
        self._ties: dict[int, int] | None = None
        if left < equal:
            self._ties = {}
            for layer, piece in pieces.items():
                here = _count(piece == _number(self._value)) if left else 0
                self._ties[layer] = min(here, left)
                left -= self._ties[layer]

    @override
    def __getitem__(self, layer: int) -> Tensor:
        """A bool tensor ``[n]``, True = keep."""
        piece = self._pieces[layer]
        mask = _at_least(piece, self._value)
        if self._ties is not None:
            mask[_where(piece == _number(self._value))[self._ties[layer] :]] = False
        return mask

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self._pieces)

    @override
    def __len__(self) -> int:
        return len(self._pieces)


def rank(
    scores: Sequence[Mapping[str, Tensor]], priority: Mapping[str, float] | None = None
) -> dict[str, Ranking]:
    """Every task's ranking of all it uses.

    Args:
        scores: See `select`.
        priority: See `select`.
    """
    tasks = dict.fromkeys(task for layer in scores for task in layer)
    share = _relative(priority or {}, tasks)
    return {
        task: Ranking([layer[task] for layer in scores if task in layer], share[task])
        for task in tasks
    }


def select(
    scores: Sequence[Mapping[str, Tensor]],
    vote: Vote,
    quotas: Sequence[Quota],
    *,
    eligible: Sequence[Tensor] | None = None,
    priority: Mapping[str, float] | None = None,
    rankings: Mapping[str, Ranking] | None = None,
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
        rankings = rank(scores, priority)
    ballot = _Ballot(scores, vote, rankings, eligible)
    needed = _rank_picked(vote)
    if needed is not None and rankings:
        # Such a vote picks one of the percentiles, so it may as well pick among their grid cells.
        ranges = [ranking.range() for ranking in rankings.values()]
        grid = _Grid(min(low for low, _ in ranges), max(high for _, high in ranges))
        for ranking in rankings.values():
            ranking.tabulate(grid)
        contests: list[_Contest] = [_Picked(ballot, quota, needed) for quota in quotas]
    else:
        contests = [_Reduced(ballot, quota) for quota in quotas]
    for contest in contests:
        contest.open(masks)
    worths = _exact(ballot, [part for contest in contests for part in contest.contested])
    for contest in contests:
        contest.close(masks, [next(worths) for _ in contest.contested])
    return masks


def _rank_picked(vote: Vote) -> Callable[[int], int] | None:
    """For a vote known to pick the m-th smallest percentile: m for a number of voters."""
    if isinstance(vote, partial) and vote.func is votes.mth_smallest:
        most = vote.keywords["m"]
        return lambda voters: min(most, voters)
    if vote is votes.unanimous:
        return lambda voters: voters
    if vote is votes.majority:
        return lambda voters: voters // 2 + 1
    return (lambda voters: 1) if vote is votes.intersection else None


@dataclass(frozen=True)
class _Grid:
    """Worth rounded down to cells: coarse, but in the same order.

    Attributes:
        bottom: The lowest worth there can be.
        top: The highest.
    """

    bottom: float
    top: float

    def cell(self, worth: Tensor) -> Tensor:
        """The cell of each worth, int32."""
        width = max(self.top - self.bottom, 1e-300)
        return ((worth - self.bottom) / width * _GRID).to(torch.int32).clamp_(0, _GRID - 1)


def _relative(priority: Mapping[str, float], tasks: Mapping[str, None]) -> dict[str, float]:
    """Priorities of all tasks; equal ones are dropped, so that they change nothing at all."""
    share = {task: float(priority.get(task, 1.0)) for task in tasks}
    return dict.fromkeys(tasks, 1.0) if len(set(share.values())) == 1 else share


@dataclass(frozen=True)
class _Ballot:
    """What all contests of a selection look at; see `select`."""

    scores: Sequence[Mapping[str, Tensor]]
    vote: Vote
    rankings: Mapping[str, Ranking]
    eligible: Sequence[Tensor] | None

    def size(self, layer: int) -> int:
        """How many weights a layer has."""
        return next(iter(self.scores[layer].values())).numel()

    def chunks(self, layer: int) -> Iterator[tuple[slice, dict[str, Tensor], Tensor | None]]:
        """Place, saliencies and eligibility, chunk by chunk."""
        step = _span(next(iter(self.scores[layer].values())))
        for start in range(0, self.size(layer), step):
            here = slice(start, start + step)
            part = {task: values[here] for task, values in self.scores[layer].items()}
            yield here, part, None if self.eligible is None else self.eligible[layer][here]


class _Contest(ABC):
    """The layers of one quota, competing for its weights.

    Attributes:
        contested: For each layer, its number and the positions of those weights about which bounds
            alone do not decide.
    """

    def __init__(self, ballot: _Ballot, quota: Quota) -> None:
        self._ballot = ballot
        self._quota = quota
        self._sure: list[int] = []
        self.contested: list[tuple[int, Tensor]] = []

    @abstractmethod
    def open(self, masks: list[Tensor]) -> None:
        """Set in ``masks`` what is surely kept, and find what is contested."""

    def close(self, masks: list[Tensor], worths: Sequence[Tensor]) -> None:
        """Set ``masks`` of the quota's layers to exactly ``keep`` True in all."""
        left = self._quota.keep - sum(self._sure)
        rest: list[tuple[int, Tensor, Tensor]] = []
        for (layer, index), worth, sure, floor in zip(
            self.contested, worths, self._sure, self._quota.floors, strict=True
        ):
            need = max(0, floor - sure)
            if need:
                won = _highest(worth, need)
                masks[layer][index[won]] = True
                left -= need
                index, worth = index[~won], worth[~won]
            rest.append((layer, index, worth))
        won = _highest(torch.cat([worth for _, _, worth in rest]), left)
        for (layer, index, _), here in zip(
            rest, torch.split(won, [index.numel() for _, index, _ in rest]), strict=True
        ):
            masks[layer][index[here]] = True
        kept = sum(_count(masks[layer]) for layer in self._quota.layers)
        if kept != self._quota.keep:
            raise ValueError(_NOT_A_VOTE)


class _Picked(_Contest):
    """Under a vote that picks the m-th smallest percentile.

    Such a worth reaches a cut if enough of the weight's percentiles do, and a percentile does if
    its saliency reaches a certain value.
    """

    def __init__(self, ballot: _Ballot, quota: Quota, picked: Callable[[int], int]) -> None:
        super().__init__(ballot, quota)
        self._picked = picked

    @override
    def open(self, masks: list[Tensor]) -> None:
        ballot, quota = self._ballot, self._quota
        surely_in, surely_out = self._cuts()
        edges = {
            task: ranking.edges(surely_in, surely_out) for task, ranking in ballot.rankings.items()
        }
        for place, layer in enumerate(quota.layers):
            open_ = []
            for here, part, may in ballot.chunks(layer):
                kept = self._enough({t: _at_least(v, edges[t][0][place]) for t, v in part.items()})
                able = self._enough({t: _at_least(v, edges[t][1][place]) for t, v in part.items()})
                if may is not None:
                    kept, able = kept & may, able & may
                masks[layer][here] = kept
                open_.append(_where(able & ~kept) + here.start)
            self._sure.append(_count(masks[layer]))
            self.contested.append((layer, torch.cat(open_)))

    def _enough(self, reached: Mapping[str, Tensor]) -> Tensor:
        """Whether the m-th smallest is among those that are True, for each weight."""
        first, *others = reached.values()
        needed = len(reached) + 1 - self._picked(len(reached))
        if needed in (1, len(reached)):
            join = torch.bitwise_or if needed == 1 else torch.bitwise_and
            for other in others:
                first = join(first, other, out=first)
            return first
        total = first.view(torch.int8)
        for other in others:
            total = total + other.view(torch.int8)
        return total >= needed

    def _cuts(self) -> tuple[Tensor, Tensor]:
        """For each layer, the cell from which worth is surely enough, and below which it is not.

        With the cut at a cell, a layer keeps the larger of its floor and the number of its weights
        above the cut. Worth is counted by its lower bound, which gives too few, so the true cut is
        not below the one where that is enough. Nor is it above the one where that is not too many,
        raised by as far as upper bounds reach over it.
        """
        quota = self._quota
        total = None
        own = []
        for layer, floor in zip(quota.layers, quota.floors, strict=True):
            at_least = self._at_least(layer)
            own.append(torch.stack([(at_least > floor).sum(), (at_least >= floor).sum() - 1]))
            at_least = at_least.clamp_(min=floor)
            total = at_least if total is None else total.add_(at_least)
        assert total is not None
        common = torch.stack([(total > quota.keep).sum(), (total >= quota.keep).sum() - 1])
        cuts = torch.minimum(torch.stack(own), common).to(torch.int32)
        low, surely_out = cuts[:, 0].contiguous(), cuts[:, 1].contiguous()
        reach = torch.stack([r.reach(low) for r in self._ballot.rankings.values()]).amax(0) + 1
        return torch.maximum(low, reach.to(torch.int32)), surely_out

    def _at_least(self, layer: int) -> Tensor:
        """How many of a layer's weights have a lower bound of worth of at least each cell."""
        voters = self._ballot.scores[layer]
        some = next(iter(voters.values()))
        counts = torch.zeros(_GRID + 1, dtype=torch.int64, device=some.device)
        space = torch.empty(
            len(voters), min(some.numel(), _span(some)), dtype=torch.int16, device=some.device
        )
        for _, part, may in self._ballot.chunks(layer):
            rows = [space[i, : values.numel()] for i, values in enumerate(part.values())]
            for row, (task, values) in zip(rows, part.items(), strict=True):
                self._ballot.rankings[task].on_grid(values, row)
            worth = votes.pick(rows, self._picked(len(rows)))
            found = torch.bincount(worth if may is None else worth[_where(may)])
            counts[: found.numel()] += found
        return counts.flip(0).cumsum(0).flip(0)


class _Reduced(_Contest):
    """Under any vote, by bounds of each weight's worth."""

    def __init__(self, ballot: _Ballot, quota: Quota) -> None:
        super().__init__(ballot, quota)
        self._grid = _Grid(*self._range())

    @override
    def open(self, masks: list[Tensor]) -> None:
        surely_in, surely_out = self._cuts()
        for place, layer in enumerate(self._quota.layers):
            open_ = []
            for here, low, high, may in self._bounds(layer):
                kept = low >= surely_in[place]
                able = high >= surely_out[place]
                if may is not None:
                    kept, able = kept & may, able & may
                masks[layer][here] = kept
                open_.append(_where(able & ~kept) + here.start)
            self._sure.append(_count(masks[layer]))
            self.contested.append((layer, torch.cat(open_)))

    def _range(self) -> tuple[float, float]:
        """The lowest and the highest worth there can be."""
        ballot = self._ballot
        ends: list[tuple[float, float]] = []
        for voters in {tuple(ballot.scores[layer]) for layer in self._quota.layers}:
            column = [ballot.rankings[task] for task in voters]
            rows = [r.percentile(r.counts.new_tensor([0, r.total])) for r in column]
            worth = ballot.vote(torch.stack(rows))
            if not isinstance(worth, Tensor) or worth.shape != (2,):
                got = tuple(worth.shape) if isinstance(worth, Tensor) else type(worth).__name__
                raise ValueError(
                    "A vote must turn percentiles [voters, weights] into worth [weights]. Got "
                    f"{got} for percentiles of shape ({len(rows)}, 2)."
                )
            lowest, highest = worth.tolist()
            if highest < lowest:
                raise ValueError(_NOT_A_VOTE)
            ends.append((lowest, highest))
        return min(low for low, _ in ends), max(high for _, high in ends)

    def _bounds(self, layer: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Place, low and high grid cells of the worth, and eligibility, chunk by chunk."""
        for here, part, may in self._ballot.chunks(layer):
            pairs = [self._ballot.rankings[task].bounds(values) for task, values in part.items()]
            low, high = (
                self._grid.cell(self._ballot.vote(torch.stack(rows)))
                for rows in zip(*pairs, strict=True)
            )
            yield here, low, high, may

    def _cuts(self) -> tuple[Tensor, Tensor]:
        """See `_Picked._cuts`; here upper bounds are counted as well."""
        low, high = [], []
        for layer in self._quota.layers:
            device = next(iter(self._ballot.scores[layer].values())).device
            counts = torch.zeros(2, _GRID + 1, dtype=torch.int64, device=device)
            for _, low_cell, high_cell, may in self._bounds(layer):
                if bool((low_cell > high_cell).any()):
                    raise ValueError(_NOT_A_VOTE)
                for row, cells in enumerate((low_cell, high_cell)):
                    cells = cells if may is None else cells[may]
                    counts[row] += torch.bincount(cells, minlength=_GRID + 1)
            from_top = counts.flip(1).cumsum(1).flip(1)
            low.append(from_top[0])
            high.append(from_top[1])
        at_least, at_most = torch.stack(low), torch.stack(high)
        keep = self._quota.keep
        floors = at_least.new_tensor(self._quota.floors).unsqueeze(1)
        global_out = (torch.maximum(at_least, floors).sum(0) >= keep).sum() - 1
        global_in = (torch.maximum(at_most, floors).sum(0) > keep).sum()
        floor_out = (at_least >= floors).sum(1) - 1
        floor_in = (at_most > floors).sum(1)
        return torch.minimum(global_in, floor_in), torch.minimum(global_out, floor_out)


def _exact(ballot: _Ballot, contested: Sequence[tuple[int, Tensor]]) -> Iterator[Tensor]:
    """The exact worth of the contested weights of every layer."""
    wanted: dict[str, list[Tensor]] = {task: [] for task in ballot.rankings}
    lows, leasts, sieve = [], [], []
    for layer, index in contested:
        bounds = [ballot.rankings[t].bounds(v[index]) for t, v in ballot.scores[layer].items()]
        low, high = (torch.stack(rows) for rows in zip(*bounds, strict=True))
        least = ballot.vote(low) if index.numel() else low[0]
        # Of a weight whose bounds are one the percentile is known.
        matters = high > low
        if ballot.vote is votes.unanimous:
            # A task whose highest percentile is below another's lowest has no say in this weight,
            # and need not be ranked among the thousands around it.
            matters &= high >= least
        for (task, values), asked in zip(ballot.scores[layer].items(), matters, strict=True):
            wanted[task].append(values[index[asked]])
        lows.append(low)
        leasts.append(least)
        sieve.append(matters)
    exact = {
        task: iter(torch.split(ballot.rankings[task].exact(torch.cat(v)), [len(x) for x in v]))
        for task, v in wanted.items()
        if v
    }
    for (layer, _), rows, least, matters in zip(contested, lows, leasts, sieve, strict=True):
        for task, row, asked in zip(ballot.scores[layer], rows, matters, strict=True):
            row[asked] = next(exact[task])
        worth = ballot.vote(rows) if least.numel() else least
        if not bool((worth >= least - 1e-9).all()):  # allows for a vote's own rounding
            raise ValueError(_NOT_A_VOTE)
        yield worth


def _codes(values: Tensor) -> Tensor:
    """The code of each value, int32 in [0, 65536)."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    return (values.view(torch.int32) + 0xFFFF).bitwise_right_shift_(16).bitwise_and_(0xFFFF)


@cache
def _layout(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each code its cell; for each cell, and one more, the bits of the least value in it."""
    size = torch.arange(_ZERO)  # of the codes of one sign
    cells = torch.cat([_ZERO + size, _ZERO - 1 - size])
    negative = (size << 16).clamp(max=_INFINITY).flip(0) - (1 << 31)
    positive = (((size - 1) << 16) + 1).clamp(min=0, max=_INFINITY)
    edges = torch.cat([negative, positive, torch.tensor([_INFINITY])]).to(torch.int32)
    return cells.to(device), edges.to(device)


def _span(like: Tensor) -> int:
    """How many weights to look at together."""
    return _CHUNK if like.device.type == "cpu" else 64 * _CHUNK


def _uses_numpy(values: Tensor) -> bool:
    """On a CPU NumPy is several times as fast as torch in what follows, and gives the same."""
    return values.device.type == "cpu"


def _at_least(values: Tensor, edge: int) -> Tensor:
    """Whether each value is at least the one with these bits, bool."""
    if values.dtype == torch.bfloat16:
        values = values.to(torch.float32)
    if not _uses_numpy(values):
        return values >= _number(edge)
    if edge > 0:  # larger numbers have larger bits
        return torch.from_numpy(values.view(torch.int32).numpy() >= np.int32(edge))
    return torch.from_numpy(values.numpy() >= np.int32(edge).view(np.float32))


def _number(bits: int) -> float:
    """The number with these bits."""
    return float(np.int32(bits).view(np.float32))


def _where(mask: Tensor) -> Tensor:
    """The positions that are True, int64."""
    if not _uses_numpy(mask):
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def _count(mask: Tensor) -> int:
    """How many are True."""
    if not _uses_numpy(mask):
        return int(mask.sum())
    return int(np.count_nonzero(mask.numpy()))


def _sorted(values: Tensor) -> Tensor:
    """Values in ascending order, float32."""
    if not _uses_numpy(values):
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))


def _highest(values: Tensor, count: int) -> Tensor:
    """The ``count`` highest, earlier ones first among equals, as a bool tensor."""
    if count <= 0 or count >= values.numel():
        return torch.full_like(values, count > 0, dtype=torch.bool)
    least = torch.kthvalue(values, values.numel() - count + 1).values
    won = values > least
    won[_where(values == least)[: count - _count(won)]] = True
    return won
