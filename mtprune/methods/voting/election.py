"""Elections: a ballot and the rules of a vote, which all four algorithms share."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import votes
from mtprune.allocation import Allocation
from mtprune.methods.base import Ballot
from mtprune.selection import Ranking, rank

__all__ = ["Alone", "Election", "Scores", "merged", "own"]

Scores = Sequence[Mapping[str, Tensor]]
"""For each layer, or group of units, its voters' saliencies ``{voter: [n]}``."""


@dataclass(frozen=True)
class Election:
    """A ballot and the rules of a vote.

    Attributes:
        ballot: The ballot.
        vote: Reduces percentiles over tasks to a worth.
        priority: Factor on a task's guaranteed share; tasks not named count 1.
        allocation: How the budget is spread.
        min_keep: The least a layer, or a group of units, keeps.
    """

    ballot: Ballot
    vote: votes.Vote
    priority: Mapping[str, float]
    allocation: Allocation
    min_keep: int

    @cached_property
    def rankings(self) -> dict[str, Ranking]:
        """Every voter's ranking of all the weights it uses."""
        return rank(self.ballot.scores, self.priority, self.ballot.census)


class Alone(Mapping[str, Mapping[int, Tensor]]):
    """The masks of each voter if it were the only one, made when they are asked for."""

    def __init__(self, voters: Collection[str], ask: Callable[[str], Mapping[int, Tensor]]) -> None:
        self._voters = voters
        self._ask = ask
        self._known: dict[str, Mapping[int, Tensor]] = {}

    @override
    def __getitem__(self, task: str) -> Mapping[int, Tensor]:
        if task not in self._voters:
            raise KeyError(task)
        if task not in self._known:
            self._known[task] = self._ask(task)
        return self._known[task]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._voters)

    @override
    def __len__(self) -> int:
        return len(self._voters)


def own(scores: Scores, voter: str) -> dict[int, Tensor]:
    """The scores of one voter, by layer or group."""
    return {place: voters[voter] for place, voters in enumerate(scores) if voter in voters}


def merged(
    scores: Scores,
    eligible: Sequence[Tensor],
    alone: Mapping[str, Mapping[int, Tensor]],
    vote: votes.Vote,
) -> list[Tensor]:
    """The published rule of DiSparse: the vote over the tasks' own masks.

    Args:
        scores: Who votes in each layer, or group.
        eligible: The weights, or units, that may be kept.
        alone: The masks of each voter.
        vote: The vote.
    """
    masks = []
    for place, voters in enumerate(scores):
        wishes = torch.stack([alone[voter][place] for voter in voters])
        masks.append((vote(wishes.to(torch.float64)) >= 0.5) & eligible[place])
    return masks
