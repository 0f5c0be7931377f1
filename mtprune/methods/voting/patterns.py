"""Patterns: of every m consecutive inputs the same number is kept, those of highest worth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtprune import votes
from mtprune.granularity import NM
from mtprune.holding import Masks
from mtprune.methods.voting.election import Election
from mtprune.methods.voting.grouped import keep_in_groups

__all__ = ["keep_pattern"]


def keep_pattern(election: Election, pattern: NM, progress: float) -> Masks:
    """Keep n of m inputs, or more as long as not all pruning is due.

    Args:
        election: The ballot and the rules.
        pattern: The pattern in the end.
        progress: The share of its sparsity that is due.
    """
    keep = pattern.m - round((pattern.m - pattern.n) * progress)
    subjects = election.ballot.subjects
    return keep_in_groups(
        election, [_Inputs(x.shape, x.layout.inputs, pattern, keep) for x in subjects]
    )


@dataclass(frozen=True)
class _Inputs:
    """Every m consecutive inputs of an output, at each place of the kernel, and in each matrix.

    Attributes:
        shape: Of the weight.
        inputs: Along which of its dimensions inputs lie.
        pattern: The pattern.
        keep: How many of m are kept.
    """

    shape: tuple[int, ...]
    inputs: int
    pattern: NM
    keep: int

    def split(self, values: Tensor) -> Tensor:
        """See `Groups`."""
        return values.view(self.shape).movedim(self.inputs, -1).reshape(-1, self.pattern.m)

    def join(self, values: Tensor) -> Tensor:
        """See `Groups`."""
        others = [n for dim, n in enumerate(self.shape) if dim != self.inputs]
        moved = values.view(*others, self.shape[self.inputs])
        return moved.movedim(-1, self.inputs).reshape(-1)

    def best(self, worth: Tensor, which: Tensor | None = None) -> Tensor:
        """See `Groups`."""
        return self.pattern.best(worth, self.keep)

    def settle(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Groups`: `settled`, by the m columns of all groups, which are few and long."""
        if self.keep == self.pattern.m:
            return torch.ones_like(low, dtype=torch.int8)
        lows, highs = torch.stack(low.unbind(1)), torch.stack(high.unbind(1))
        last_in = votes.pick(lows.unbind(), self.pattern.m - self.keep + 1)
        first_out = votes.pick(highs.unbind(), self.pattern.m - self.keep)
        state = (lows > first_out).view(torch.int8) - (highs < last_in).view(torch.int8)
        return torch.stack(state.unbind(), 1)
