"""Outputs: each output of a layer keeps the same share of its weights, those of highest worth."""

from collections.abc import Mapping
from math import inf

import torch
from torch import Tensor

from mtprune.allocation import Budget
from mtprune.holding import Masks
from mtprune.methods.voting.election import Alone, Election
from mtprune.selection import worths

__all__ = ["keep_outputs"]


def keep_outputs(election: Election, sparsity: float, progress: float) -> Masks:
    """Prune ``round(sparsity * progress * N)`` of N weights, as many in each output of a layer.

    Args:
        election: The ballot and the rules.
        sparsity: Share of zeros in the end.
        progress: The share of it that is due.
    """
    ballot = election.ballot
    keep = ballot.total - round(sparsity * progress * ballot.total)
    upper = [int(mask.sum()) for mask in ballot.masks]
    budget = Budget(ballot.shapes, ballot.components, keep, upper, election.min_keep)
    counts = [quota.keep for quota in election.allocation.at(progress).quotas(budget)]

    def best(worth: Tensor, layer: int) -> Tensor:
        return _best(worth.view(ballot.shapes[layer][0], -1), counts[layer]).view(-1)

    masks = [
        best(worth.masked_fill(~mask, -inf), layer) & mask
        for layer, (worth, mask) in enumerate(
            zip(
                worths(ballot.scores, election.vote, election.rankings),
                ballot.masks,
                strict=True,
            )
        )
    ]

    def alone(voter: str) -> Mapping[int, Tensor]:
        layers = enumerate(ballot.scores)
        return {layer: best(scores[voter], layer) for layer, scores in layers if voter in scores}

    return Masks(masks, Alone(election.rankings, alone))


def _best(worth: Tensor, count: int) -> Tensor:
    """The highest of each row, earlier ones first among equals, ``count`` in all.

    Args:
        worth: ``[outputs, n]``.
        count: How many are kept. The first rows keep one more if it is no multiple of the rows.
    """
    outputs = len(worth)
    each = torch.full((outputs, 1), count // outputs, device=worth.device)
    each[: count % outputs] += 1
    order = worth.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(worth.shape[1], device=worth.device).expand_as(order)
    return torch.empty_like(worth, dtype=torch.bool).scatter_(1, order, place < each)
