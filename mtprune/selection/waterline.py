"""Waterline: the level below which weights of an exact number, or of an exact cost, lie.

The weights of a layer have heights, their size in units of the layer's threshold. The weights below
the line are pruned.
"""

import math
from collections.abc import Collection, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from mtprune.census import HERE, Census

__all__ = ["waterline"]

_BINS = 1 << 15  # the leading 16 bits of a float32 that is not negative
_CHUNK = 1 << 20  # weights looked at together: bounds the memory of all temporaries


def waterline(
    heights: Sequence[Tensor],
    budget: Fraction | int,
    costs: Sequence[Fraction | int],
    groups: Sequence[Collection[int]] = (),
    least: Sequence[int] = (),
    census: Census = HERE,
) -> list[Tensor]:
    """Put the lowest weights below the line, exactly as many as the budget says.

    Two histograms over the bits of the heights instead of a sort: the first finds the leading 16
    bits of the line, the second the other 16. Of weights on the line, earlier positions go below
    first.

    Args:
        heights: The heights of each layer's weights: flat, not negative, float32.
        budget: The cost of all weights below the line, at most.
        costs: The cost of a weight of each layer; if all are 1 the budget is a count.
        groups: Sets of layers that must not go below whole; disjoint, or one inside the other.
        least: For each group, how many of its highest weights stay above.
        census: Counts over all ranks, where each has a part of every layer.

    Returns:
        For each layer a bool tensor ``[n]``, True above the line.

    Raises:
        ValueError: If the groups do not leave enough to fill the budget.

    Example:
        >>> waterline([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0])], 2, [1, 1])
        [tensor([ True, False]), tensor([False,  True])]
    """
    safe: list[Tensor | None] = [None] * len(heights)
    while True:
        above = _line(heights, budget, costs, safe, census)
        stay = census.count(above) if groups else []
        too_few = [
            (group, count)
            for group, count in zip(groups, least, strict=True)
            if sum(stay[i] for i in group) < count
        ]
        if not too_few:
            return above
        for group, count in too_few:
            members = sorted(group)
            inner = [
                ([members.index(i) for i in other], number)
                for other, number in zip(groups, least, strict=True)
                if set(other) < set(group)
            ]
            own = [heights[i] for i in members]
            rest = census.number(sum(height.numel() for height in own), own[0]) - count
            ones = [1] * len(own)
            within, numbers = [g for g, _ in inner], [n for _, n in inner]
            highest = waterline(own, rest, ones, within, numbers, census)
            for i, mask in zip(members, highest, strict=True):
                before = safe[i]
                safe[i] = mask if before is None else before | mask


def _line(
    heights: Sequence[Tensor],
    budget: Fraction | int,
    costs: Sequence[Fraction | int],
    safe: Sequence[Tensor | None],
    census: Census,
) -> list[Tensor]:
    """`waterline` where some weights stay above whatever their height.

    Args:
        heights: See `waterline`.
        budget: See `waterline`.
        costs: See `waterline`.
        safe: For each layer the weights that stay above; None for none of them.
        census: See `waterline`.
    """
    free = [
        h.numel() - (0 if s is None else int(s.sum())) for h, s in zip(heights, safe, strict=True)
    ]
    counts = [total for _, total in census.places(free)]
    available = sum((c * n for c, n in zip(costs, counts, strict=True)), Fraction(0))
    if budget > available:
        raise ValueError(f"Only {float(available):g} of {float(budget):g} can go under.")
    if budget == available:
        return [
            torch.zeros_like(h, dtype=torch.bool) if s is None else s.clone()
            for h, s in zip(heights, safe, strict=True)
        ]
    leading = [_histogram(h, s, None) for h, s in zip(heights, safe, strict=True)]
    high, cost_below = _partial_bin(leading, budget, costs, census)
    trailing = [_histogram(h, s, high) for h, s in zip(heights, safe, strict=True)]
    low, cost_inside = _partial_bin(trailing, budget - cost_below, costs, census)
    remaining = budget - cost_below - cost_inside
    line = (high << 16) | low
    under, ties = [], []
    for height, mask in zip(heights, safe, strict=True):
        bits = _bits(height)
        below, on = bits < line, bits == line
        if mask is not None:
            below, on = below & ~mask, on & ~mask
        under.append(below)
        ties.append(on.nonzero().squeeze(1))
    places = census.places([own.numel() for own in ties])
    for below, own, cost, (ahead, total) in zip(under, ties, costs, places, strict=True):
        # Weights that cost nothing all go below; others go as long as they fit.
        count = total if cost == 0 else min(total, math.floor(remaining / cost))
        below[own[: max(count - ahead, 0)]] = True
        remaining -= count * cost
    return [~below for below in under]


def _partial_bin(
    counts: Sequence[Tensor],
    budget: Fraction | int,
    costs: Sequence[Fraction | int],
    census: Census,
) -> tuple[int, Fraction]:
    """The first bin that does not go below whole, and the cost of all bins before it."""
    common = math.lcm(*(Fraction(cost).denominator for cost in costs))
    total = torch.zeros_like(counts[0])
    for count, cost in zip(counts, costs, strict=True):
        total += count * int(cost * common)
    sums = census.sum(total).cumsum(0)
    first = int((sums <= math.floor(budget * common)).sum())
    # Bins of no cost at the very end go below whole, too.
    first = min(first, len(sums) - 1)
    return first, Fraction(int(sums[first - 1]) if first else 0, common)


def _histogram(height: Tensor, safe: Tensor | None, leading: int | None) -> Tensor:
    """How many weights have each value of a half of their bits, int64.

    Args:
        height: The heights of a layer's weights.
        safe: Weights that do not count, bool; None for none.
        leading: Count the trailing bits of the weights with these leading bits; None counts the
            leading bits.
    """
    counts = torch.zeros(_BINS if leading is None else 2 * _BINS, dtype=torch.int64)
    for start in range(0, height.numel(), _CHUNK):
        bits = _bits(height[start : start + _CHUNK])
        if safe is not None:
            bits = bits[~safe[start : start + _CHUNK]]
        bits = bits >> 16 if leading is None else bits[bits >> 16 == leading] & 0xFFFF
        counts += torch.bincount(bits, minlength=len(counts)).cpu()
    return counts


def _bits(height: Tensor) -> Tensor:
    """The bits of floats that are not negative: integers in the same order."""
    return (height + 0.0).view(torch.int32)  # -0.0 is 0.0 with another bit
