"""Single weights: the exact number of highest worth is kept, wherever the allocation has it."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from mtprune.allocation import Budget
from mtprune.holding import Masks
from mtprune.methods.voting.election import Alone, Election, merged, own
from mtprune.selection import Best, Ranking, rank, select

__all__ = ["alone_of", "keep_best", "keep_per_task", "unless_all"]


def keep_best(election: Election, sparsity: float, progress: float) -> Masks:
    """Prune ``round(sparsity * progress * N)`` of N weights.

    Args:
        election: The ballot and the rules.
        sparsity: Share of zeros in the end.
        progress: The share of it that is due.
    """
    ballot = election.ballot
    keep = ballot.total - round(sparsity * progress * ballot.total)
    budget = Budget(
        ballot.shapes,
        ballot.components,
        keep,
        ballot.kept,
        election.min_keep,
        ballot.matrices,
    )
    masks = select(
        ballot.scores,
        election.vote,
        election.allocation.at(progress).quotas(budget),
        eligible=unless_all(ballot.masks),
        rankings=election.rankings,
        census=ballot.census,
    )
    return Masks(masks, alone_of(election, election.rankings, sparsity * progress))


def keep_per_task(election: Election, ratio: float) -> Masks:
    """Every task keeps the top ``int(ratio * N_k)`` weights, and the vote merges their masks."""
    ballot = election.ballot
    alone = _alone(election, rank(ballot.scores, census=ballot.census), lambda n: int(ratio * n))
    return Masks(merged(ballot.scores, ballot.masks, alone, election.vote), alone)


def alone_of(election: Election, rankings: Mapping[str, Ranking], sparsity: float) -> Alone:
    """The weights each voter alone would keep at a sparsity."""
    share = 1 - sparsity
    return _alone(election, rankings, lambda n: round(share * n))


def _alone(
    election: Election, rankings: Mapping[str, Ranking], keep: Callable[[int], int]
) -> Alone:
    """The weights each voter alone would keep, given how many of how many."""

    def ask(voter: str) -> Mapping[int, Tensor]:
        ranking = rankings[voter]
        return Best(own(election.ballot.scores, voter), ranking, keep(ranking.total))

    return Alone(rankings, ask)


def unless_all(masks: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """Masks, or None if they are all True."""
    return None if all(bool(mask.all()) for mask in masks) else masks
