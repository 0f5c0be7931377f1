"""Patterns: of every m consecutive inputs the same number is kept, those of highest worth."""

from collections.abc import Mapping
from math import inf

from torch import Tensor

from mtprune.granularity import NM
from mtprune.holding import Masks
from mtprune.methods.voting.election import Alone, Election
from mtprune.selection import worths

__all__ = ["keep_pattern"]


def keep_pattern(election: Election, pattern: NM, progress: float) -> Masks:
    """Keep n of m inputs, or more as long as not all pruning is due.

    Args:
        election: The ballot and the rules.
        pattern: The pattern in the end.
        progress: The share of its sparsity that is due.
    """
    ballot, rankings = election.ballot, election.rankings
    keep = pattern.m - round((pattern.m - pattern.n) * progress)

    def best(worth: Tensor, layer: int) -> Tensor:
        return pattern.best(worth.view(ballot.shapes[layer]), keep).view(-1)

    masks = [
        best(worth.masked_fill(~mask, -inf), layer) & mask
        for layer, (worth, mask) in enumerate(
            zip(worths(ballot.scores, election.vote, rankings), ballot.masks, strict=True)
        )
    ]

    def alone(voter: str) -> Mapping[int, Tensor]:
        layers = enumerate(ballot.scores)
        return {layer: best(scores[voter], layer) for layer, scores in layers if voter in scores}

    return Masks(masks, Alone(rankings, alone))
