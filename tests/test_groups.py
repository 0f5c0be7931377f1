"""Weights that compete only inside of small groups: as by exact worth, to the weight."""

from dataclasses import dataclass

import pytest
import torch

from mtprune import votes
from mtprune.selection import rank, select_in_groups, settled, worths


@dataclass(frozen=True)
class Rows:
    """Rows of ``width`` weights, the first ``more`` of which keep one more than the others."""

    width: int
    keep: int
    more: int = 0

    def split(self, values):
        return values.view(-1, self.width)

    def join(self, values):
        return values.reshape(-1)

    def best(self, worth, which=None):
        which = torch.arange(len(worth)) if which is None else which
        order = worth.argsort(dim=1, descending=True, stable=True)
        place = torch.arange(self.width).expand_as(order)
        keep = self.keep + (which < self.more)[:, None].long()
        return torch.empty_like(worth, dtype=torch.bool).scatter_(1, order, place < keep)

    def settle(self, low, high):
        return settled(low, high, self.best)


def drawn(kind, size, generator):
    """Saliencies: smooth, with many ties, signed, of a few values of every size."""
    values = torch.randn(size, generator=generator)
    match kind:
        case "ties":
            return values.mul(2).round()
        case "zeros":
            return values.clamp(min=0)
        case "near":  # closer than a table tells apart
            return 1 + values * 1e-5
        case "far":
            return values * 10.0 ** torch.randint(-30, 30, (size,), generator=generator)
    return values


@pytest.mark.parametrize("kind", ["smooth", "ties", "zeros", "near", "far"])
@pytest.mark.parametrize(
    "vote", [votes.unanimous, votes.majority, votes.intersection, votes.at_least(2), votes.mean]
)
def test_the_same_as_by_exact_worth(vote, kind):
    g = torch.Generator().manual_seed(len(kind))
    tasks = [["a", "b", "c"], ["a", "b", "c"], ["b"], ["a", "c"]]
    scores = [{task: drawn(kind, 240, g) for task in users} for users in tasks]
    groups = [Rows(4, 2), Rows(60, 17, more=3), Rows(6, 1), Rows(12, 5, more=7)]
    everything = [torch.ones(240, dtype=torch.bool) for _ in scores]
    some = [torch.rand(240, generator=g) > 0.4 for _ in scores]
    rankings = rank(scores, {"a": 2.0})
    exact = worths(scores, vote, rankings)
    for eligible in (everything, some):
        masks = select_in_groups(scores, vote, rankings, groups, eligible)
        for mask, worth, of, may in zip(masks, exact, groups, eligible, strict=True):
            wanted = of.best(of.split(worth.masked_fill(~may, -torch.inf)))
            assert torch.equal(mask, wanted.view(-1) & may)


def test_what_is_no_vote_is_refused():
    near = 1 + torch.arange(8.0) * 1e-5
    scores = [{"a": near, "b": near.flip(0)}]
    everything = [torch.ones(8, dtype=torch.bool)]
    with pytest.raises(ValueError, match="The vote is not one: a weight lost worth"):
        select_in_groups(scores, lambda p: -p.sum(0), rank(scores), [Rows(4, 2)], everything)
