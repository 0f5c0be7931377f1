"""Outputs: each output of a layer keeps the same share of its weights, those of highest worth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtprune.allocation import Budget
from mtprune.holding import Masks
from mtprune.methods.voting.election import Election
from mtprune.methods.voting.grouped import keep_in_groups
from mtprune.model.layout import Layout
from mtprune.selection import settled

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

    pairs = zip(ballot.subjects, counts, strict=True)
    return keep_in_groups(election, [_Outputs(x.shape, x.layout, count) for x, count in pairs])


@dataclass(frozen=True)
class _Outputs:
    """The weights of each output of a layer, or of each matrix of a stack.

    Attributes:
        shape: Of the weight.
        layout: Where its outputs lie.
        count: How many weights are kept in all. The first outputs keep one more if it is no
            multiple of the outputs.
    """

    shape: tuple[int, ...]
    layout: Layout
    count: int

    def split(self, values: Tensor) -> Tensor:
        """See `Groups`."""
        return self.layout.matrices(values.view(self.shape)).reshape(self._outputs, -1)

    def join(self, values: Tensor) -> Tensor:
        """See `Groups`."""
        shape = self.layout.matrices(torch.empty(self.shape, device="meta")).shape
        return self.layout.weight(values.view(shape)).reshape(-1)

    @property
    def _outputs(self) -> int:
        """How many outputs there are."""
        return self.layout.count(self.shape) * self.shape[self.layout.outputs]

    def best(self, worth: Tensor, which: Tensor | None = None) -> Tensor:
        """See `Groups`."""
        outputs = self._outputs
        each, more = divmod(self.count, outputs)
        keep = torch.full((outputs, 1), each, device=worth.device)
        keep[:more] += 1
        keep = keep if which is None else keep[which]
        order = worth.argsort(dim=1, descending=True, stable=True)
        place = torch.arange(worth.shape[1], device=worth.device).expand_as(order)
        return torch.empty_like(worth, dtype=torch.bool).scatter_(1, order, place < keep)

    def settle(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Groups`."""
        return settled(low, high, self.best)
