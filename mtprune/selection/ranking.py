r"""Ranking: from a task's saliencies to percentiles, and from those to the worth of weights.

For a task k that uses :math:`N_k` weights, the percentile of a weight is the share of those that
are strictly less salient, :math:`F_k(w) = \#\{v : s_k(v) < s_k(w)\} / N_k`; ties share the lower
percentile. A vote turns the percentiles of a weight's voters into its worth.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from mtprune import votes
from mtprune.census import HERE, Census
from mtprune.selection.arrays import (
    ascending,
    chunk_size,
    count_true,
    number_of,
    positions,
    reaches,
)
from mtprune.votes import Vote

__all__ = ["GRID", "Best", "Grid", "Ranking", "rank", "worths"]

GRID = 1 << 14
"""Resolution of worth while looking for the cut."""

_CODES = 1 << 16  # a float's leading 16 bits, rounded away from zero: zero is alone in its code
_INFINITY = 0x7F800000  # its bits: edges are bits, because some CPUs flush subnormal numbers
_ZERO = _CODES // 2  # the cell of 0.0; that of -0.0 is the one before


@dataclass(frozen=True)
class Grid:
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
        return ((worth - self.bottom) / width * GRID).to(torch.int32).clamp_(0, GRID - 1)


class Ranking:
    """One task's ordering of all the weights it uses, as a table instead of a sort.

    Args:
        pieces: The task's saliencies, one flat tensor per layer, float32 or bfloat16.
        priority: Divides the distance from the top, ``1 - (1 - percentile) / priority``, which
            gives the task that many times the share the others get.
        census: Counts over the saliencies of all ranks, where each has a part.
    """

    def __init__(
        self, pieces: Sequence[Tensor], priority: float = 1.0, census: Census = HERE
    ) -> None:
        self._pieces = pieces
        self._priority = priority
        self.census = census
        device = pieces[0].device
        by_code = torch.zeros(_CODES, dtype=torch.int64, device=device)
        for chunk in self._chunks():
            histogram = torch.bincount(_codes(chunk))
            by_code[: histogram.numel()] += histogram
        by_code = census.sum(by_code)
        self.total: int = census.number(sum(piece.numel() for piece in pieces), by_code)
        # From here on by cell: codes in the order of their values.
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
        self._low_by_code, self._high_by_code = self._low[self._cells], self._high[self._cells]

    def percentile(self, below: Tensor) -> Tensor:
        """The percentile of a weight with ``below`` strictly less salient ones, float64."""
        share = below.to(torch.float64) / max(self.total, 1)
        return share if self._priority == 1.0 else 1.0 - (1.0 - share) / self._priority

    def bounds(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest percentile each of ``values`` can have, float64, same shape."""
        both = self._low.new_empty(2, values.numel())
        self.write_bounds(values.view(-1), both)
        low, high = both.view(2, *values.shape)
        return low, high

    def write_bounds(self, values: Tensor, out: Tensor) -> None:
        """Write the lowest and highest percentile each of ``values``, ``[n]``, can have.

        Args:
            values: Saliencies.
            out: float64 ``[2, n]``.
        """
        codes = _codes(values)
        torch.index_select(self._low_by_code, 0, codes, out=out[0])
        torch.index_select(self._high_by_code, 0, codes, out=out[1])

    def range(self) -> tuple[float, float]:
        """The lowest and the highest percentile there can be."""
        low, high = self.percentile(self.counts.new_tensor([0, self.total])).tolist()
        return low, high

    def tabulate(self, grid: Grid) -> None:
        """Prepare `on_grid`, `cells`, `reach` and `edges`."""
        self._grid_low, self._grid_high = grid.cell(self._low), grid.cell(self._high)
        self._by_code = self._grid_low.to(torch.int16)[self._cells]
        highest = self._grid_high.to(torch.int16)[self._cells]
        # Both in one number, so that one look finds them.
        self._both_by_code = torch.stack([self._by_code, highest], 1).view(torch.int32).squeeze(1)

    def on_grid(self, values: Tensor, out: Tensor) -> None:
        """Write the grid cell of the lowest percentile of each of ``values``, int16."""
        torch.index_select(self._by_code, 0, _codes(values), out=out)

    def cells(self, values: Tensor) -> Tensor:
        """The grid cells of the lowest and highest percentile of each of ``values``.

        Returns:
            int16 ``[n, 2]``.
        """
        both = torch.index_select(self._both_by_code, 0, _codes(values))
        return both.view(torch.int16).view(-1, 2)

    def reach(self, cuts: Tensor) -> Tensor:
        """For each cut, the highest cell of a percentile whose lower bound is below it, int32.

        -1 if no lower bound is below.
        """
        last = torch.searchsorted(self._grid_low, cuts) - 1
        return torch.where(last < 0, -1, self._grid_high[last.clamp_(min=0)])

    def edges(self, surely_in: Tensor, surely_out: Tensor) -> tuple[list[int], list[int]]:
        """For each cut the saliency, as bits, from which on a percentile is surely not below it.

        And the one from which on it may not be below.
        """
        surely = self._edges[torch.searchsorted(self._grid_low, surely_in)]
        maybe = self._edges[torch.searchsorted(self._grid_high, surely_out)]
        return surely.tolist(), maybe.tolist()

    def exact(self, values: Tensor) -> Tensor:
        """The percentiles of ``values``, each of them one of the task's own, float64."""
        if values.numel() == 0 and not self.census.is_scattered:
            return self._low.new_zeros(0)
        values = values.to(torch.float32)
        cells = self._cells[_codes(values)]
        inside = torch.zeros(_CODES, dtype=torch.bool, device=values.device)
        inside[cells] = True
        inside = self.census.sum(inside.to(torch.int32)).bool()
        inside[_ZERO - 1 : _ZERO + 1] = False  # of zeros it is known how many lie below
        # Counted inside these cells alone: how many saliencies lie below each value.
        neighbours = ascending(self._within(inside))
        counts = torch.where(inside, self.counts, 0)
        before = (counts.cumsum(0) - counts)[cells]
        below = self._below[cells] + torch.where(
            inside[cells], self.census.below(neighbours, values) - before, 0
        )
        return self.percentile(below)

    def cut(self, keep: int) -> tuple[int, int, int]:
        """The last saliency kept if the ``keep`` highest are, as bits.

        Also how many are equal to it, and how many of those are kept.

        Args:
            keep: At least 1.
        """
        cell = int((self.total - self._below >= min(keep, self.total)).sum()) - 1
        remaining = keep - int(self.counts[cell + 1 :].sum())
        if cell == _ZERO:
            return 0, int(self.counts[_ZERO - 1 : _ZERO + 1].sum()), remaining
        inside = torch.zeros(_CODES, dtype=torch.bool, device=self.counts.device)
        inside[cell] = True
        value, equal, left = self.census.kth(self._within(inside), remaining)
        return int(value.view(torch.int32)), equal, left

    def _within(self, inside: Tensor) -> Tensor:
        """The task's saliencies inside some cells, float32.

        Args:
            inside: Bool, a flag for each cell.
        """
        cells = inside.nonzero().squeeze(1)
        if not cells.numel():
            return self._low.new_zeros(0, dtype=torch.float32)
        first, last = int(cells[0]), int(cells[-1])
        low, high = int(self._edges[first]), int(self._edges[last + 1])
        # Few in between: two comparisons spare most of them the table.
        narrow = int(self.counts[first : last + 1].sum()) < self.total // 8
        by_code = inside[self._cells]
        saliencies = []
        for chunk in self._chunks():
            if narrow:
                chunk = chunk[positions(reaches(chunk, low) & ~reaches(chunk, high))]
            if cells.numel() < last + 1 - first or not narrow:
                chunk = chunk[positions(torch.index_select(by_code, 0, _codes(chunk)))]
            saliencies.append(chunk.to(torch.float32))
        return torch.cat(saliencies)

    def _chunks(self) -> Iterator[Tensor]:
        for piece in self._pieces:
            yield from torch.split(piece, chunk_size(piece))


class Best(Mapping[int, Tensor]):
    """The masks of a task's own highest saliencies, earlier ones first among equals.

    A mask is made when it is looked up.

    Args:
        pieces: ``{layer: saliencies}``, flat, in order of position.
        ranking: The ranking of these saliencies.
        keep: How many are kept.
    """

    def __init__(self, pieces: Mapping[int, Tensor], ranking: Ranking, keep: int) -> None:
        self._pieces = pieces
        self._value, equal, remaining = ranking.cut(keep) if keep > 0 else (_INFINITY, 0, 0)
        # Of those equal to the last one kept, how many each layer keeps; None for all of them.
        self._ties: dict[int, int] | None = None
        if remaining < equal:
            ties = [count_true(piece == number_of(self._value)) for piece in pieces.values()]
            taken = ranking.census.shares(ties, remaining)
            self._ties = dict(zip(pieces, taken, strict=True))

    @override
    def __getitem__(self, layer: int) -> Tensor:
        """A bool tensor ``[n]``, True = keep."""
        piece = self._pieces[layer]
        mask = reaches(piece, self._value)
        if self._ties is not None:
            mask[positions(piece == number_of(self._value))[self._ties[layer] :]] = False
        return mask

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self._pieces)

    @override
    def __len__(self) -> int:
        return len(self._pieces)


def rank(
    scores: Sequence[Mapping[str, Tensor]],
    priority: Mapping[str, float] | None = None,
    census: Census = HERE,
) -> dict[str, Ranking]:
    """Each task's ranking of all the weights it uses; for the arguments see `select`."""
    tasks = dict.fromkeys(task for layer in scores for task in layer)
    share = _relative(priority or {}, tasks)
    return {
        task: Ranking([layer[task] for layer in scores if task in layer], share[task], census)
        for task in tasks
    }


def worths(
    scores: Sequence[Mapping[str, Tensor]], vote: Vote, rankings: Mapping[str, Ranking]
) -> list[Tensor]:
    """The exact worth of all units or weights, float64 ``[n]`` for each group or layer.

    Args:
        scores: For each group or layer, its voters' saliencies ``{task: [n]}``, flat.
        vote: Reduces percentiles ``[voters, n]`` to worth ``[n]``.
        rankings: What `rank` gives for ``scores``.

    Example:
        >>> from mtprune import votes
        >>> from mtprune.selection import rank
        >>> scores = [{"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([0.0, 1.0])}]
        >>> worths(scores, votes.mean, rank(scores))
        [tensor([0.2500, 0.2500], dtype=torch.float64)]
    """
    below = {
        task: iter(_below([voters[task] for voters in scores if task in voters]))
        for task in rankings
    }
    percentiles = (
        torch.stack([rankings[task].percentile(next(below[task])) for task in voters])
        for voters in scores
    )
    return [votes.tally(vote, rows) for rows in percentiles]


def _relative(priority: Mapping[str, float], tasks: Mapping[str, None]) -> dict[str, float]:
    """Priorities of all tasks; equal ones are dropped, so that they change nothing at all."""
    share = {task: float(priority.get(task, 1.0)) for task in tasks}
    return dict.fromkeys(tasks, 1.0) if len(set(share.values())) == 1 else share


def _below(pieces: Sequence[Tensor]) -> list[Tensor]:
    """For each value of each piece, how many of all are strictly less."""
    values = torch.cat([piece.to(torch.float32) for piece in pieces])
    if values.device.type == "cpu":  # several times as fast as torch
        order = torch.from_numpy(np.argsort(values.numpy()))
    else:
        order = values.argsort()
    rising = values[order]
    place = torch.arange(len(order), device=order.device)
    place[1:][rising[1:] == rising[:-1]] = 0
    counts = torch.empty_like(place).scatter_(0, order, place.cummax(0).values)
    return list(counts.split([piece.numel() for piece in pieces]))


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
