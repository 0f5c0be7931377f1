"""Grouped: weights that compete only inside of small groups."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from mtprune.holding import Masks
from mtprune.methods.voting.election import Alone, Election
from mtprune.selection import Groups, select_in_groups

__all__ = ["keep_in_groups"]


def keep_in_groups(election: Election, groups: Sequence[Groups]) -> Masks:
    """Keep the weights of highest worth of each group.

    Args:
        election: The ballot and the rules.
        groups: How the weights of each layer fall into groups, and how many stay of each.
    """
    ballot, rankings = election.ballot, election.rankings
    masks = select_in_groups(ballot.scores, election.vote, rankings, groups, ballot.masks)

    def best(scores: Tensor, of: Groups) -> Tensor:
        return of.join(of.best(of.split(scores)))

    def alone(voter: str) -> Mapping[int, Tensor]:
        layers = enumerate(zip(ballot.scores, groups, strict=True))
        return {i: best(scores[voter], of) for i, (scores, of) in layers if voter in scores}

    return Masks(masks, Alone(rankings, alone))
