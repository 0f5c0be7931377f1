r"""Selection: from per-task saliency to masks with an exact number of weights.

For a task k that uses :math:`N_k` weights, the percentile of a weight is the share of those that
are strictly less salient, :math:`F_k(w) = \#\{v : s_k(v) < s_k(w)\} / N_k`; ties share the lower
percentile. A vote turns the percentiles of a weight's voters into its worth, and a quota keeps an
exact number of weights, best worth first, earlier position first among equals.

Nothing here sorts or concatenates all weights. A task's percentiles come from a histogram over the
leading bits of its saliencies, which bounds every worth from both sides. Only weights whose bounds
straddle the cut are ranked exactly. Since a vote is non-decreasing in every percentile the result
is the one a full sort would give, to the weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mtprune import votes
from mtprune.votes import Vote

__all__ = ["Quota", "Ranking", "select"]

# Two cells for each value of a float's leading 16 bits: numbers whose other bits are all zero, and
# the rest. The first kind holds a single value, so zeros and bfloat16 numbers are exact at once.
_CELLS = 1 << 17
_GRID = 1 << 14  # resolution of worth while looking for the cut
_CHUNK = 1 << 20  # weights looked at together: bounds the memory of all temporaries

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
        pieces: The task's saliencies, one flat tensor per layer.
        priority: Divides the distance from the top, ``1 - (1 - percentile) / priority``, which
            gives the task that many times the share the others get.
    """

    def __init__(self, pieces: Sequence[Tensor], priority: float = 1.0) -> None:
        self._pieces = pieces
        self._priority = priority
        self.counts = torch.zeros(_CELLS, dtype=torch.int64, device=pieces[0].device)
        for chunk in self._chunks():
            self.counts += torch.bincount(_cell(chunk), minlength=_CELLS)
        self.total = sum(piece.numel() for piece in pieces)
        self._below = self.counts.cumsum(0) - self.counts
        spread = (self.counts - 1).clamp_(min=0)
        spread[0::2] = 0
        self._low = self.percentile(self._below)
        self._high = self.percentile(self._below + spread)

    def percentile(self, below: Tensor) -> Tensor:
        """The percentile of a weight with ``below`` strictly less salient ones, float64."""
        share = below.to(torch.float64) / max(self.total, 1)
        return share if self._priority == 1.0 else 1.0 - (1.0 - share) / self._priority

    def bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest percentile each of ``values`` can have, float64, same shape."""
        cells = _cell(_comparable(values))
        return self._low[cells], self._high[cells]

    def range(self) -> tuple[float, float]:
        """Between what all its percentiles lie."""
        low, high = self.percentile(self.counts.new_tensor([0, self.total])).tolist()
        return low, high

    def tabulate(self, grid: "_Grid") -> None:
        """Prepare `grid_bounds`."""
        self._grid_low, self._grid_high = grid.cell(self._low), grid.cell(self._high)

    def grid_bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The grid cells of `bounds`, int32, same shape."""
        cells = _cell(_comparable(values))
        return self._grid_low[cells], self._grid_high[cells]

    def exact(self, values: Tensor) -> Tensor:
        """The percentiles of ``values``, each of them one of the task's own, float64."""
        if values.numel() == 0:
            return self._low.new_zeros(0)
        unique, inverse = torch.unique(_comparable(values), return_inverse=True)
        cells = _cell(unique)
        touched = torch.zeros(_CELLS, dtype=torch.bool, device=unique.device)
        touched[cells] = True
        # Counted in the touched cells alone: how many saliencies lie below each unique value.
        between = torch.zeros(unique.numel() + 1, dtype=torch.int64, device=unique.device)
        for chunk in self._chunks():
            near = chunk[touched[_cell(chunk)]]
            place = torch.searchsorted(unique, near, right=True)
            between += torch.bincount(place, minlength=between.numel())
        near_counts = torch.where(touched, self.counts, 0)
        near_below = near_counts.cumsum(0) - near_counts
        rank = self._below[cells] + between.cumsum(0)[:-1] - near_below[cells]
        return self.percentile(rank)[inverse]

    def _chunks(self) -> Iterator[Tensor]:
        for piece in self._pieces:
            for chunk in torch.split(piece, _CHUNK):
                yield _comparable(chunk)


def select(
    scores: Sequence[Mapping[str, Tensor]],
    vote: Vote,
    quotas: Sequence[Quota],
    *,
    eligible: Sequence[Tensor] | None = None,
    priority: Mapping[str, float] | None = None,
) -> list[Tensor]:
    """Keep, in every quota, the exact number of weights of highest worth.

    Args:
        scores: For each layer, in order of position, its voters' saliencies ``{task: [n]}``:
            flat, finite, float32. Every task is ranked over all the layers it appears in.
        vote: Reduces percentiles ``[voters, n]`` to worth ``[n]``.
        quotas: Disjoint sets of layers with the number of weights each keeps.
        eligible: For each layer, a bool tensor ``[n]``: the weights that may be kept. The others
            count in percentiles but are not kept. All of them unless given.
        priority: Factor on a task's guaranteed share; 1 for those not named.

    Returns:
        For each layer a bool tensor ``[n]``, True = keep; all False where no quota names it.

    Example:
        >>> shared = {"a": torch.tensor([4.0, 3, 2, 1]), "b": torch.tensor([1.0, 2, 3, 4])}
        >>> [mask] = select([shared], votes.unanimous, [Quota((0,), 2, (0,))])
        >>> mask
        tensor([ True, False, False,  True])
    """
    masks = [torch.zeros_like(next(iter(s.values())), dtype=torch.bool) for s in scores]
    tasks = dict.fromkeys(task for layer in scores for task in layer)
    share = _relative(priority or {}, tasks)
    rankings = {
        task: Ranking([layer[task] for layer in scores if task in layer], share[task])
        for task in tasks
    }
    shared = None
    if _is_order_statistic(vote) and rankings:
        # Such a vote picks one of the percentiles, so it may as well pick among their grid cells.
        ranges = [ranking.range() for ranking in rankings.values()]
        shared = _Grid(min(low for low, _ in ranges), max(high for _, high in ranges))
        for ranking in rankings.values():
            ranking.tabulate(shared)
    for quota in quotas:
        _Contest(scores, vote, quota, eligible, rankings, shared).decide(masks)
    return masks


def _is_order_statistic(vote: Vote) -> bool:
    """Whether a vote is known to return one of the percentiles it is given, by rank alone."""
    if isinstance(vote, partial):
        return vote.func is votes.mth_smallest
    return vote in (votes.unanimous, votes.majority, votes.intersection)


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


class _Contest:
    """The layers of one quota, competing for its weights."""

    def __init__(
        self,
        scores: Sequence[Mapping[str, Tensor]],
        vote: Vote,
        quota: Quota,
        eligible: Sequence[Tensor] | None,
        rankings: Mapping[str, Ranking],
        shared: _Grid | None,
    ) -> None:
        self._scores = scores
        self._vote = vote
        self._quota = quota
        self._eligible = eligible
        self._rankings = rankings
        self._by_rank = shared is not None
        self._grid = shared or _Grid(*self._range())

    def decide(self, masks: list[Tensor]) -> None:
        """Set ``masks`` of the quota's layers to exactly ``keep`` True in all."""
        surely_in, surely_out = self._cuts()
        sure, contested, worth = [], [], []
        for place, layer in enumerate(self._quota.layers):
            taken, index, values = self._split(layer, int(surely_in[place]), int(surely_out[place]))
            masks[layer] |= taken
            sure.append(int(taken.sum()))
            contested.append(index)
            worth.append(values)
        exact = self._exact(contested, worth)
        left = self._quota.keep - sum(sure)
        rest: list[tuple[int, Tensor, Tensor]] = []
        for place, layer in enumerate(self._quota.layers):
            index, value = contested[place], exact[place]
            need = max(0, self._quota.floors[place] - sure[place])
            if need:
                order = torch.sort(value, descending=True, stable=True).indices
                masks[layer][index[order[:need]]] = True
                left -= need
                others = order[need:].sort().values
                index, value = index[others], value[others]
            rest.append((layer, index, value))
        if left > 0:
            value = torch.cat([value for _, _, value in rest])
            winners = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
            winners[torch.sort(value, descending=True, stable=True).indices[:left]] = True
            for (layer, index, _), won in zip(
                rest, torch.split(winners, [index.numel() for _, index, _ in rest]), strict=True
            ):
                masks[layer][index[won]] = True
        kept = sum(int(masks[layer].sum()) for layer in self._quota.layers)
        if kept != self._quota.keep:
            raise ValueError(_NOT_A_VOTE)

    def _range(self) -> tuple[float, float]:
        """The lowest and the highest worth there can be."""
        ends: list[tuple[float, float]] = []
        for voters in {tuple(self._scores[layer]) for layer in self._quota.layers}:
            column = [self._rankings[task] for task in voters]
            rows = [r.percentile(r.counts.new_tensor([0, r.total])) for r in column]
            worth = self._vote(torch.stack(rows))
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

    def _chunks(self, layer: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Start, low and high grid cells of the worth, and eligibility, chunk by chunk."""
        size = next(iter(self._scores[layer].values())).numel()
        for start in range(0, size, _CHUNK):
            pairs = [
                self._bounds(task, values[start : start + _CHUNK])
                for task, values in self._scores[layer].items()
            ]
            low, high = (self._vote(torch.stack(rows)) for rows in zip(*pairs, strict=True))
            if not self._by_rank:
                low, high = self._grid.cell(low), self._grid.cell(high)
            may = None if self._eligible is None else self._eligible[layer][start : start + _CHUNK]
            yield start, low, high, may

    def _bounds(self, task: str, values: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of a task's percentiles, or their grid cells if the vote can do with those."""
        ranking = self._rankings[task]
        return ranking.grid_bounds(values) if self._by_rank else ranking.bounds(values)

    def _least(self, layer: int, index: Tensor) -> Tensor:
        """The least worth some of a layer's weights can have, float64."""
        if not index.numel():
            return index.new_zeros(0, dtype=torch.float64)
        rows = [self._rankings[t].bounds(v[index])[0] for t, v in self._scores[layer].items()]
        return self._vote(torch.stack(rows))

    def _cuts(self) -> tuple[Tensor, Tensor]:
        """For each layer, the cell from which worth is surely enough, and below which it is not.

        With the cut at a cell, a layer keeps the larger of its floor and the number of its weights
        above the cut. Counting lower bounds gives too few, counting upper bounds too many, and the
        true cut lies between the two.
        """
        low, high = [], []
        for layer in self._quota.layers:
            device = next(iter(self._scores[layer].values())).device
            counts = torch.zeros(2, _GRID + 1, dtype=torch.int64, device=device)
            for _, low_cell, high_cell, may in self._chunks(layer):
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

    def _split(self, layer: int, surely_in: int, surely_out: int) -> tuple[Tensor, Tensor, Tensor]:
        """A layer's surely kept weights, the contested ones' positions and their low worth."""
        taken, contested = [], []
        for start, low_cell, high_cell, may in self._chunks(layer):
            kept = low_cell >= surely_in
            open_ = ~kept & (high_cell >= surely_out)
            if may is not None:
                kept, open_ = kept & may, open_ & may
            taken.append(kept)
            contested.append(open_.nonzero().squeeze(1) + start)
        index = torch.cat(contested)
        return torch.cat(taken), index, self._least(layer, index)

    def _exact(self, contested: Sequence[Tensor], at_least: Sequence[Tensor]) -> list[Tensor]:
        """The exact worth of the contested weights of every layer."""
        wanted: dict[str, list[Tensor]] = {task: [] for task in self._rankings}
        sieve: list[dict[str, Tensor]] = []
        for layer, index, least in zip(self._quota.layers, contested, at_least, strict=True):
            sieve.append({})
            for task, values in self._scores[layer].items():
                # Under `unanimous` a task whose highest percentile is below another's lowest has
                # no say in this weight, and need not be ranked among the thousands around it.
                matters = torch.ones_like(index, dtype=torch.bool)
                if self._vote is votes.unanimous:
                    matters = self._rankings[task].bounds(values[index])[1] >= least
                sieve[-1][task] = matters
                wanted[task].append(values[index[matters]])
        exact = {
            task: iter(torch.split(self._rankings[task].exact(torch.cat(v)), [len(x) for x in v]))
            for task, v in wanted.items()
            if v
        }
        result = []
        for layer, index, least, asked in zip(
            self._quota.layers, contested, at_least, sieve, strict=True
        ):
            rows = []
            for task, values in self._scores[layer].items():
                row = self._rankings[task].bounds(values[index])[0]
                row[asked[task]] = next(exact[task])
                rows.append(row)
            worth = self._vote(torch.stack(rows)) if index.numel() else least
            if not bool((worth >= least - 1e-9).all()):  # allows for a vote's own rounding
                raise ValueError(_NOT_A_VOTE)
            result.append(worth)
        return result


def _comparable(values: Tensor) -> Tensor:
    """The values with -0.0 turned into 0.0, which is the same number but has other bits."""
    return values + 0.0


def _cell(values: Tensor) -> Tensor:
    """Histogram cell of each float32, int64: in the order of the values."""
    bits = values.view(torch.int32)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats sort backwards by their bits
    return (((key >> 16) + 32768) * 2 + ((key & 0xFFFF) != 0)).to(torch.int64)
