"""Groups: weights that compete only with the few beside them, such as every m inputs of an output.

As where all weights compete (`mtprune.selection.weights`), the tables of the tasks bound every
worth from both sides, and only weights whose bounds do not decide are ranked exactly. The result is
the one a full sort would give, to the weight.
"""

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from mtprune import votes
from mtprune.selection.arrays import chunk_size, count_true, positions
from mtprune.selection.ranking import Grid, Ranking
from mtprune.selection.weights import NOT_A_VOTE, exact_worths
from mtprune.votes import Vote

__all__ = ["Groups", "select_in_groups", "settled"]


class Groups(Protocol):
    """How the weights of a layer fall into groups, and how many stay of each."""

    def split(self, values: Tensor) -> Tensor:
        """Values of a layer's weights, flat, as ``[groups, members]``."""
        ...

    def join(self, values: Tensor) -> Tensor:
        """The inverse of `split`."""
        ...

    def best(self, worth: Tensor, which: Tensor | None = None) -> Tensor:
        """Those that stay, bool ``[groups, members]``, earlier ones first among equals.

        Args:
            worth: ``[groups, members]``.
            which: The numbers of these groups; None for all.
        """
        ...

    def settle(self, low: Tensor, high: Tensor) -> Tensor:
        """What bounds of the worth decide: 1 for weights that surely stay, -1 for those that go.

        As `settled` gives it.

        Args:
            low: A lower bound of the worth of each weight, ``[groups, members]``.
            high: An upper bound.

        Returns:
            int8 ``[groups, members]``, 0 where bounds do not decide.
        """
        ...


def select_in_groups(
    scores: Sequence[Mapping[str, Tensor]],
    vote: Vote,
    rankings: Mapping[str, Ranking],
    groups: Sequence[Groups],
    eligible: Sequence[Tensor],
) -> list[Tensor]:
    """Keep the weights of highest worth of each group.

    Args:
        scores: For each layer, its voters' saliencies ``{task: [n]}``, flat.
        vote: Reduces percentiles ``[voters, n]`` to worth ``[n]``.
        rankings: What `rank` gives for ``scores``.
        groups: How the weights of each layer fall into groups.
        eligible: For each layer, bool ``[n]``: the weights that may be kept.

    Returns:
        For each layer a bool tensor ``[n]``, True = keep.
    """
    alone = votes.order_statistic(vote) is not None
    if alone and rankings:
        ranges = [ranking.range() for ranking in rankings.values()]
        grid = Grid(min(low for low, _ in ranges), max(high for _, high in ranges))
        for ranking in rankings.values():
            ranking.tabulate(grid)
    standing = []
    for voters, of, may in zip(scores, groups, eligible, strict=True):
        if alone and len(voters) == 1:
            # The worth is the percentile of the one voter: it orders weights as its saliency does.
            score = next(iter(voters.values())).to(torch.float32).masked_fill(~may, -inf)
            standing.append(of.best(of.split(score)).to(torch.int8) * 2 - 1)
        else:
            low, high = _bounds(voters, vote, rankings)
            if count_true(may) < may.numel():
                low, high = (_lowest_where(~may, bound) for bound in (low, high))
            standing.append(of.settle(of.split(low), of.split(high)))
    undecided = [positions(of.join(state) == 0) for of, state in zip(groups, standing, strict=True)]
    exact = exact_worths(scores, vote, rankings, list(enumerate(undecided)))
    masks = []
    for of, may, state, index, worth in zip(
        groups, eligible, standing, undecided, exact, strict=True
    ):
        mask = state > 0
        if index.numel():
            known = torch.empty(may.numel(), dtype=torch.float64, device=may.device)
            known[index] = worth.where(may[index], -inf)
            contested = positions((state == 0).any(1))
            sure = state[contested]
            exactly = of.split(known)[contested].where(sure == 0, sure * inf)
            mask[contested] = of.best(exactly, contested)
        masks.append(of.join(mask) & may)
    return masks


def settled(low: Tensor, high: Tensor, best: Callable[[Tensor], Tensor]) -> Tensor:
    """What bounds of the worth decide, as `Groups.settle` gives it.

    A weight whose lower bound is above all but the k highest upper bounds of its group is among its
    k best; one whose upper bound is below the k highest lower bounds is not.

    Args:
        low: A lower bound of the worth of each weight, ``[groups, members]``.
        high: An upper bound.
        best: Those that stay of each group, `Groups.best`.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    last_in = low.masked_fill(~best(low), inf).amin(1, keepdim=True)
    first_out = high.masked_fill(best(high), -inf).amax(1, keepdim=True)
    return (low > first_out).to(torch.int8) - (high < last_in).to(torch.int8)


def _bounds(
    voters: Mapping[str, Tensor], vote: Vote, rankings: Mapping[str, Ranking]
) -> tuple[Tensor, Tensor]:
    """Numbers in the order of the lowest and the highest worth of each weight, ``[n]``.

    Of a type in which they are compared fast: int16 if the vote picks a percentile, else float32.
    """
    like = next(iter(voters.values()))
    order = votes.order_statistic(vote)
    size = chunk_size(like) if order is not None else max(1, chunk_size(like) // 4)
    chunks = []
    for start in range(0, like.numel(), size):
        pieces = {task: values[start : start + size] for task, values in voters.items()}
        if order is not None:
            # Such a vote picks one of the percentiles: it may as well pick among their cells.
            pairs = [rankings[task].cells(values) for task, values in pieces.items()]
            chunks.append(votes.pick(pairs, order(len(pairs))))
            continue
        count = len(next(iter(pieces.values())))
        rows = torch.empty(len(pieces), 2, count, dtype=torch.float64, device=like.device)
        for row, (task, values) in zip(rows, pieces.items(), strict=True):
            rankings[task].write_bounds(values, row)
        low, high = votes.tally(vote, rows.flatten(1)).reshape(2, -1)
        if bool((low > high).any()):
            raise ValueError(NOT_A_VOTE)
        chunks.append(torch.stack([low.to(torch.float32), high.to(torch.float32)], 1))
    low, high = torch.cat(chunks).unbind(1)
    return low, high


def _lowest_where(mask: Tensor, bound: Tensor) -> Tensor:
    """A bound below all others where a mask is True."""
    return bound.masked_fill(mask, -inf if bound.is_floating_point() else -1)
