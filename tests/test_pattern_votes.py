"""N of M by any vote: the best of every M inputs by exact worth, to the weight."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mtprune import NM, MultitaskPruner, Vote, votes
from tests.oracles import VOTES, percentiles

RULES = {
    "unanimous": votes.unanimous,
    "majority": votes.majority,
    "at_least(2)": votes.at_least(2),
    "intersection": votes.intersection,
    "mean": votes.mean,
}
SHAPES = {"lin": (5, 24), "conv": (4, 12, 3, 2), "own": (3, 12)}
USERS = {"lin": "abc", "conv": "ab", "own": "c"}


@dataclass(frozen=True)
class At:
    """Updates at the first steps, each with its share of the pruning."""

    shares: tuple[float, ...]

    def next_update(self, after):
        return next((step for step in range(1, len(self.shares) + 1) if step > after), None)

    def progress(self, step):
        return self.shares[step - 1]


def slope(weight, grad):
    return grad.abs()


def drawn(kind, generator):
    """The saliency of each weight for each task that uses it."""
    found = {}
    for name, shape in SHAPES.items():
        values = torch.randn(len(USERS[name]), *shape, generator=generator)
        if kind == "ties":
            values = values.mul(2).round()
        elif kind == "near":  # closer than a table tells apart
            values = 1 + values * 1e-5
        found[name] = dict(zip(USERS[name], values.abs(), strict=True))
    return found


def expected(scores, rule, keep, m, standing):
    """The ``keep`` best of those standing, of every m inputs; earlier ones first among equals."""
    names = list(scores)
    flat = [{task: values.flatten() for task, values in scores[name].items()} for name in names]
    masks = {}
    for name, shares in zip(names, percentiles(flat), strict=True):
        shape = SHAPES[name]
        mask = torch.zeros(shape, dtype=torch.bool)
        numbers = torch.arange(mask.numel()).view(shape).movedim(1, -1).reshape(-1, m)
        for row in numbers.tolist():
            able = [i for i in row if standing[name].view(-1)[i]]
            best = sorted(able, key=lambda i: (-VOTES[rule](shares[i]), i))[:keep]
            mask.view(-1)[best] = True
        masks[name] = mask
    return masks


@pytest.mark.parametrize("kind", ["smooth", "ties", "near"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 3), (5, 12)])
@pytest.mark.parametrize("rule", RULES)
def test_the_best_of_every_m_by_exact_worth(rule, n, m, kind):
    generator = torch.Generator().manual_seed(n * m)
    model = nn.ModuleDict(
        {"lin": nn.Linear(24, 5), "conv": nn.Conv2d(12, 4, (3, 2)), "own": nn.Linear(12, 3)}
    )
    shares = (0.0, 0.5, 1.0)
    method = Vote(granularity=NM(n, m), vote=RULES[rule], saliency=slope, schedule=At(shares))
    pruner = MultitaskPruner(model, ["a", "b", "c"], method=method)
    standing = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for share in shares:
        scores = drawn(kind, generator)
        losses = {
            task: sum(
                (model[name].weight * own[task]).sum()
                for name, own in scores.items()
                if task in own
            )
            for task in "abc"
        }
        pruner.observe_losses(losses)
        pruner.step()
        standing = expected(scores, rule, m - round((m - n) * share), m, standing)
        for name, mask in standing.items():
            assert torch.equal(pruner.masks[f"{name}.weight"], mask)
