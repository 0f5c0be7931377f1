"""Waterline: the level below which an exact number of weights lies, or weights of an exact cost."""

import math
from collections.abc import Collection, Sequence
from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["waterline"]

_BINS = 1 << 15  # the leading 16 bits of a float32 that is not negative
_CHUNK = 1 << 20  # weights looked at together: bounds the memory of all temporaries


def waterline(
    heights: Sequence[Tensor],
    budget: Fraction | int,
    costs: Sequence[Fraction | int],
    groups: Sequence[Collection[int]] = (),
    least: Sequence[int] = (),
) -> list[Tensor]:
    """Let the lowest weights go under, as many as the budget says, exactly.

    Two histograms over the bits of the heights instead of a sort: the first finds the leading 16
    bits of the line, the second the rest. Among weights that lie on it, earlier positions go under
    first.

    Args:
        heights: For each layer, how high its weights are: flat, not negative, float32.
        budget: What those under water may cost in all.
        costs: What a weight of each layer costs; with 1 throughout the budget is a count.
        groups: Sets of layers that must not go under whole; disjoint, or one inside the other.
        least: For each group, how many of its highest weights stay above.

    Returns:
        For each layer a bool tensor ``[n]``, True above.

    Raises:
        ValueError: If the groups do not leave enough to fill the budget.

    Example:
        >>> waterline([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0])], 2, [1, 1])
        [tensor([ True, False]), tensor([False,  True])]
    """
    safe: list[Tensor | None] = [None] * len(heights)
    while True:
        above = _line(heights, budget, costs, safe)
        starved = [
            (group, count)
            for group, count in zip(groups, least, strict=True)
            if sum(int(above[i].sum()) for i in group) < count
        ]
        if not starved:
            return above
        for group, count in starved:
            members = sorted(group)
            inner = [
                ([members.index(i) for i in other], few)
                for other, few in zip(groups, least, strict=True)
                if set(other) < set(group)
            ]
            own = [heights[i] for i in members]
            lost = sum(height.numel() for height in own) - count
            ones = [1] * len(own)
            kept = waterline(own, lost, ones, [g for g, _ in inner], [n for _, n in inner])
            for i, mask in zip(members, kept, strict=True):
                before = safe[i]
                safe[i] = mask if before is None else before | mask


def _line(
    heights: Sequence[Tensor],
    budget: Fraction | int,
    costs: Sequence[Fraction | int],
    safe: Sequence[Tensor | None],
) -> list[Tensor]:
    """`waterline` for weights some of which are safe."""
    free = [
        h.numel() - (0 if s is None else int(s.sum())) for h, s in zip(heights, safe, strict=True)
    ]
    available = sum((c * n for c, n in zip(costs, free, strict=True)), Fraction(0))
    if budget > available:
        raise ValueError(f"Only {float(available):g} of {float(budget):g} can go under.")
    if budget == available:
        return [_none(h) if s is None else s.clone() for h, s in zip(heights, safe, strict=True)]
    high = [_counted(h, s, None) for h, s in zip(heights, safe, strict=True)]
    bin_, spent = _last_full(high, budget, costs)
    low = [_counted(h, s, bin_) for h, s in zip(heights, safe, strict=True)]
    line, more = _last_full(low, budget - spent, costs)
    left = budget - spent - more
    level = (bin_ << 16) | line
    above = []
    for height, kept, cost in zip(heights, safe, costs, strict=True):
        bits = _bits(height)
        under = bits < level
        on = bits == level
        if kept is not None:
            under, on = under & ~kept, on & ~kept
        ties = on.nonzero().squeeze(1)
        # What costs nothing goes under with the rest; what does goes as long as it fits.
        count = ties.numel() if cost == 0 else min(ties.numel(), math.floor(left / cost))
        under[ties[:count]] = True
        left -= count * cost
        above.append(~under)
    return above


def _last_full(
    counts: Sequence[Tensor], budget: Fraction | int, costs: Sequence[Fraction | int]
) -> tuple[int, Fraction]:
    """The first bin that does not go under whole, and what all bins below it cost."""
    common = math.lcm(*(Fraction(cost).denominator for cost in costs))
    total = torch.zeros_like(counts[0])
    for count, cost in zip(counts, costs, strict=True):
        total += count * int(cost * common)
    sums = total.cumsum(0)
    bin_ = int((sums <= math.floor(budget * common)).sum())
    # Bins of no cost at the very end are full, too.
    bin_ = min(bin_, len(sums) - 1)
    return bin_, Fraction(int(sums[bin_ - 1]) if bin_ else 0, common)


def _counted(height: Tensor, safe: Tensor | None, bin_: int | None) -> Tensor:
    """How many weights have each value of their leading 16 bits; or, in one bin, of the others."""
    counts = torch.zeros(_BINS if bin_ is None else 2 * _BINS, dtype=torch.int64)
    for start in range(0, height.numel(), _CHUNK):
        bits = _bits(height[start : start + _CHUNK])
        if safe is not None:
            bits = bits[~safe[start : start + _CHUNK]]
        bits = bits >> 16 if bin_ is None else bits[bits >> 16 == bin_] & 0xFFFF
        counts += torch.bincount(bits, minlength=len(counts)).cpu()
    return counts


def _bits(height: Tensor) -> Tensor:
    """The bits of floats that are not negative: integers in the same order."""
    return (height + 0.0).view(torch.int32)  # -0.0 is 0.0 with another bit


def _none(height: Tensor) -> Tensor:
    return torch.zeros_like(height, dtype=torch.bool)
