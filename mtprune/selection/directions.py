"""Directions: a budget of parameters spent on the singular triples of matrices.

`mtprune.model.factors` says how many parameters a matrix of a given rank takes.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from mtprune.model import factors

__all__ = ["select_directions"]

Shape = tuple[int, ...]


def select_directions(
    worths: Sequence[Tensor],
    shapes: Sequence[Shape],
    budget: Fraction | int,
    *,
    rates: Sequence[Fraction | int] | None = None,
    least: Sequence[int] | None = None,
    alive: Sequence[int] | None = None,
) -> list[Tensor]:
    """Keep the directions of highest worth that a budget of parameters pays for.

    From the highest worth down, each is kept if it fits in what is left of the budget. When a
    matrix reaches break-even it is kept whole, and its other directions cost nothing. So what is
    left at the end is less than a direction costs. Among equals earlier layers, and in them larger
    singular values, come first.

    Args:
        worths: For each layer ``[m]``, the worth of its directions: comparable between layers, per
            parameter, or by their cost.
        shapes: The layers' shapes.
        budget: How many parameters all layers may have together, or what they may cost.
        rates: What a parameter of each layer costs; 1 unless given.
        least: How many of its own best directions each layer is sure of, if that is within the
            budget.
        alive: How many of its first directions each layer still has; all of them unless given.

    Returns:
        For each layer a bool tensor ``[m]``, True = keep.

    Example:
        >>> worths = [torch.tensor([0.9, 0.1, 0.2, 0.3]), torch.tensor([0.8, 0.7, 0.6, 0.5])]
        >>> select_directions(worths, [(4, 6), (4, 4)], 26)
        [tensor([ True, False, False, False]), tensor([True, True, True, True])]
    """
    kept = [torch.zeros(len(worth), dtype=torch.bool) for worth in worths]
    ranks = [0] * len(kept)
    counts = [len(worth) for worth in worths] if alive is None else alive
    remaining = budget
    rate = [1] * len(kept) if rates is None else rates

    def cost(layer: int, rank: int) -> Fraction | int:
        return rate[layer] * factors.parameters(shapes[layer], rank)

    def price(layer: int) -> Fraction | int:
        return cost(layer, ranks[layer] + 1) - cost(layer, ranks[layer])

    def take(layer: int, direction: int) -> None:
        nonlocal remaining
        remaining -= price(layer)
        kept[layer][direction] = True
        ranks[layer] += 1

    orders = [
        worth[:count].cpu().to(torch.float64).argsort(descending=True, stable=True).tolist()
        for worth, count in zip(worths, counts, strict=True)
    ]
    sure = [min(n, len(order)) for n, order in zip(least or [0] * len(kept), orders, strict=True)]
    if sum(cost(layer, count) for layer, count in enumerate(sure)) <= budget:
        for layer, (order, count) in enumerate(zip(orders, sure, strict=True)):
            for direction in order[:count]:
                take(layer, direction)
    values = torch.cat([worth[:n].cpu().double() for worth, n in zip(worths, counts, strict=True)])
    places = [(layer, direction) for layer, n in enumerate(counts) for direction in range(n)]
    for index in values.argsort(descending=True, stable=True).tolist():
        layer, direction = places[index]
        if not kept[layer][direction] and price(layer) <= remaining:
            take(layer, direction)
    for mask, rank, shape, count in zip(kept, ranks, shapes, counts, strict=True):
        if factors.parameters(shape, rank) == prod(shape):
            mask[:count] = True  # at break-even the directions passed over cost nothing
    return kept
