"""Sparse training: layers keep their counts, and exchange weights at every update."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from mtprune import saliency
from mtprune.allocation import Allocation, Budget
from mtprune.census import Census
from mtprune.facts import Subject
from mtprune.holding import Masks
from mtprune.methods.voting.election import Election
from mtprune.methods.voting.weights import alone_of
from mtprune.schedule import Regrow
from mtprune.selection import Best, Quota, Ranking, rank, select

__all__ = ["draw", "exchange", "lasting_counts"]


def lasting_counts(
    subjects: Sequence[Subject], allocation: Allocation, sparsity: float, min_keep: int
) -> list[int]:
    """How many weights each layer keeps, from the first update to the last."""
    layerwise = allocation.layerwise
    assert layerwise is not None  # checked when the method was built
    shapes, components = [s.shape for s in subjects], [s.component for s in subjects]
    sizes = [prod(shape) for shape in shapes]
    keep = sum(sizes) - round(sparsity * sum(sizes))
    matrices = [s.matrices for s in subjects]
    return layerwise.counts(Budget(shapes, components, keep, sizes, min_keep, matrices))


def draw(election: Election, sparsity: float) -> Masks:
    """Random masks with the allocation's count in every layer."""
    ballot = election.ballot
    counts = lasting_counts(ballot.subjects, election.allocation, sparsity, election.min_keep)
    # Each layer is drawn as a whole: what a rank has a part of is the same for all.
    draws = [
        part.of(saliency.random(mask.new_empty(shape), generator=ballot.generator)).reshape(-1)
        for part, mask, shape in zip(ballot.parts, ballot.masks, ballot.shapes, strict=True)
    ]
    masks = _best_of_each(draws, counts, ballot.census)
    return Masks(masks, alone_of(election, election.rankings, sparsity))


def exchange(election: Election, sparsity: float, schedule: Regrow, step: int) -> Masks:
    """Drop the smallest kept weights of every layer, and grow as many by vote.

    Args:
        election: The ballot and the rules.
        sparsity: Share of zeros.
        schedule: How many weights are exchanged, and what tasks rank them within.
        step: The step of the update.
    """
    fraction = schedule.fraction_at(step)
    ballot = election.ballot
    counts = ballot.kept
    drop = [
        min(round(fraction * n), prod(shape) - n)
        for n, shape in zip(counts, ballot.shapes, strict=True)
    ]
    survivors = _best_of_each(
        [w.abs().float() for w in ballot.weights],
        [n - d for n, d in zip(counts, drop, strict=True)],
        ballot.census,
        eligible=ballot.masks,
    )
    able = [~mask for mask in survivors]
    grown = (_grown_in_layers if schedule.within == "layer" else _grown)(election, able, drop)
    masks = [old | new for old, new in zip(survivors, grown, strict=True)]
    return Masks(masks, alone_of(election, election.rankings, sparsity))


def _grown(election: Election, able: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """What grows in every layer, by percentiles in all that a task uses."""
    return select(
        election.ballot.scores,
        election.vote,
        [Quota((layer,), n, (n,)) for layer, n in enumerate(counts)],
        eligible=able,
        rankings=election.rankings,
        census=election.ballot.census,
    )


def _grown_in_layers(
    election: Election, able: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """What grows in every layer, by percentiles among what may grow there."""
    masks = []
    for scores, free, count in zip(election.ballot.scores, able, counts, strict=True):
        grown = torch.zeros_like(free)
        if count:
            own = {voter: values[free] for voter, values in scores.items()}
            quota = Quota((0,), count, (0,))
            census = election.ballot.census
            rankings = rank([own], election.priority, census)
            [best] = select([own], election.vote, [quota], rankings=rankings, census=census)
            grown.masked_scatter_(free, best)
        masks.append(grown)
    return masks


def _best_of_each(
    scores: Sequence[Tensor],
    counts: Sequence[int],
    census: Census,
    eligible: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The ``counts`` highest scores of every layer on its own, flat bool masks."""
    masks = []
    for i, (values, count) in enumerate(zip(scores, counts, strict=True)):
        able = values if eligible is None else values[eligible[i]]
        best = Best({0: able}, Ranking([able], census=census), count)[0]
        if eligible is not None:
            best = torch.zeros_like(eligible[i]).masked_scatter_(eligible[i], best)
        masks.append(best)
    return masks
