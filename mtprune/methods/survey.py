"""A survey: what votes would decide on is gathered once and shown, and nothing is pruned."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from mtprune.granularity import Granularity
from mtprune.holding import Masks
from mtprune.methods.base import Ballot, Method, Needs
from mtprune.methods.vote import Vote
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.schedule import OneShot, Schedule

__all__ = ["Survey"]


@dataclass(frozen=True)
class Survey(Method[Masks]):
    """Gather what some votes need, which is the same for all, and prune nothing.

    Attributes:
        votes: The votes; they differ in how much they prune, and where.
        show: Is given the ballot on which each of them would decide.
    """

    votes: tuple[Vote, ...]
    show: Callable[[Ballot], object] = field(repr=False)
    sparsity: float = 0.0
    schedule: Schedule = field(default_factory=OneShot)

    @property
    def granularity(self) -> Granularity:  # type: ignore[override]  # of the votes
        """What is kept or pruned as one."""
        return self.votes[0].granularity

    @override
    def needs(self, inventory: Inventory) -> Needs:
        return self.votes[0].needs(inventory)

    @override
    def fits(self, layer: Layer) -> str:
        return self.votes[0].fits(layer)

    @override
    def check(self, inventory: Inventory) -> None:
        for vote in self.votes:
            vote.check(inventory)

    @override
    def decide(self, ballot: Ballot, step: int) -> Masks:
        self.show(ballot)
        kept: Any = list(ballot.masks)
        return Masks(kept)
