"""Groups: weights that compete only with the few beside them, such as every m inputs of an output.

As where all weights compete (`mtprune.selection.weights`), the tables of the tasks bound every
worth from both sides, and only weights whose bounds do not decide are ranked exactly. The result is
the one a full sort would give, to the weight.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Protocol

import torch
from torch import Tensor

from mtprune import votes
from mtprune.selection.arrays import chunk_size, positions
from mtprune.selection.ranking import Grid, Ranking
from mtprune.selection.weights import NOT_A_VOTE, exact_worths
from mtprune.votes import Vote

__all__ = ["Groups", "select_in_groups"]


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
            best = of.best(of.split(score))
            standing.append(torch.where(best, inf, -inf))
        else:
            low, high = (x.masked_fill_(~may, -inf) for x in _bounds(voters, vote, rankings))
            standing.append(_settled(of.split(low), of.split(high), of))
    undecided = [
        positions(of.join(state).isnan()) for of, state in zip(groups, standing, strict=True)
    ]
    exact = exact_worths(scores, vote, rankings, list(enumerate(undecided)))
    masks = []
    for of, may, state, index, worth in zip(
        groups, eligible, standing, undecided, exact, strict=True
    ):
        mask = state == inf
        if index.numel():
            flat = of.join(state).to(torch.float64)
            flat[index] = worth.where(may[index], -inf)
            contested = state.isnan().any(1).nonzero().squeeze(1)
            mask[contested] = of.best(of.split(flat)[contested], contested)
        masks.append(of.join(mask) & may)
    return masks


def _bounds(
    voters: Mapping[str, Tensor], vote: Vote, rankings: Mapping[str, Ranking]
) -> tuple[Tensor, Tensor]:
    """Numbers in the order of the lowest and the highest worth of each weight, float32 ``[n]``."""
    like = next(iter(voters.values()))
    size, order = chunk_size(like), votes.order_statistic(vote)
    lows, highs = [], []
    for start in range(0, like.numel(), size):
        pieces = {task: values[start : start + size] for task, values in voters.items()}
        if order is not None:
            # Such a vote picks one of the percentiles: it may as well pick among their cells.
            pairs = [rankings[task].cells(values) for task, values in pieces.items()]
            low, high = (votes.pick(rows, order(len(rows))) for rows in zip(*pairs, strict=True))
        else:
            pairs = [rankings[task].bounds(values) for task, values in pieces.items()]
            low, high = (votes.tally(vote, torch.stack(rows)) for rows in zip(*pairs, strict=True))
        if bool((low > high).any()):
            raise ValueError(NOT_A_VOTE)
        lows.append(low.to(torch.float32))
        highs.append(high.to(torch.float32))
    return torch.cat(lows), torch.cat(highs)


def _settled(low: Tensor, high: Tensor, of: Groups) -> Tensor:
    """Infinite for weights that surely stay, or go, and NaN for others, float32 ``[groups, n]``.

    A weight whose lower bound is above all but the k highest upper bounds of its group is among its
    k best; one whose upper bound is below the k highest lower bounds is not.

    Args:
        low: A lower bound of the worth of each weight, ``[groups, n]``.
        high: An upper bound.
        of: How many stay of each group.
    """
    last_in = low.masked_fill(~of.best(low), inf).amin(1, keepdim=True)
    first_out = high.masked_fill(of.best(high), -inf).amax(1, keepdim=True)
    state = torch.full_like(low, torch.nan)
    state[low > first_out] = inf
    state[high < last_in] = -inf
    return state
