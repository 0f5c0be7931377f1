r"""Thresholds: the soft threshold, and the level below which an exact number of weights lies.

The soft threshold moves every weight towards zero by :math:`\tau` and stops there,

.. math:: S(w, \tau) = \operatorname{sign}(w)\, \max(|w| - \tau, 0),

so that a threshold can be learned: the loss has a derivative in it. How many weights fall below is
a different question, and one with an exact answer: `waterline`.
"""

import math
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Leak", "between", "follow", "shrinkage", "soft_threshold", "waterline"]

_BINS = 1 << 15  # the leading 16 bits of a float32 that is not negative
_CHUNK = 1 << 20  # weights looked at together: bounds the memory of all temporaries


class Leak(Protocol):
    """How much gradient passes to weights below the threshold, read when a backward runs."""

    @property
    def now(self) -> float:
        """From 0, none, to 1, all."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The largest of these 0-dim tensors is the same.

        A compiled backward reads them anew, where a number would be frozen in.
        """
        ...


def soft_threshold(
    weight: Tensor,
    tau: Tensor,
    leak: Leak | None = None,
    slack: Tensor | None = None,
    edge: float = 0.0,
) -> Tensor:
    r"""Move every weight towards zero by ``tau``, and stop there.

    With :math:`g` the gradient of the result and :math:`m = 1[|w| > \tau]`, the gradients are
    :math:`g\,(m + \text{leak}\,(1 - m))` in the weight,
    :math:`-\sum g\, \operatorname{sign}(w)\, m` in ``tau``, and ``tau`` times that in ``slack``.

    Args:
        weight: Any shape.
        tau: 0-dim, not negative.
        leak: Gradient that passes below the threshold; none unless given.
        slack: 0-dim, stands for a change of :math:`\log \tau`; its value is not used.
        edge: If positive, ``slack`` gets something else: the sum of :math:`|g|` over the weights at
            the edge, those above the threshold by less than this share of it.

    Returns:
        The weights that are left, same shape; exact zeros where ``|weight| <= tau``.

    Example:
        >>> soft_threshold(torch.tensor([-3.0, 0.5, 1.0, 2.0]), torch.tensor(1.0))
        tensor([-2.,  0.,  0.,  1.])
    """
    result: Tensor = _SoftThreshold.apply(  # type: ignore[no-untyped-call]
        weight, tau, leak, slack, edge
    )
    return result


class _SoftThreshold(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, tau: Tensor, leak: Leak | None, slack: Tensor | None, edge: float
    ) -> Tensor:
        # Both are sign(w) * relu(|w| - tau) to the bit. In one pass where reading a number is free;
        # a device would have to be waited for, and a compiler would take it for a constant.
        if tau.device.type == "cpu" and not _traced(weight):
            return torch.nn.functional.softshrink(weight, float(tau))
        return weight - weight.clamp(-tau, tau)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tau, ctx.leak, _, ctx.edge = inputs
        # A weight above the threshold never becomes zero (floats underflow gradually), so that the
        # result, which the layer keeps anyway, says which ones those are.
        ctx.save_for_backward(output, tau, *([] if ctx.leak is None else ctx.leak.tensors))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        output, tau, *leak = ctx.saved_tensors
        if leak and torch.compiler.is_compiling():
            share = torch.stack(leak).amax().to(grad)
            of_weight = torch.where(output != 0, grad, grad * share)
        elif not leak or ctx.leak.now == 0.0:
            of_weight = grad * (output != 0)
        elif ctx.leak.now == 1.0:
            of_weight = grad
        else:
            of_weight = torch.where(output != 0, grad, grad * ctx.leak.now)
        of_tau = of_slack = None
        if ctx.needs_input_grad[1]:
            of_tau = shrinkage(output, grad).sum().to(tau.dtype)
        if ctx.needs_input_grad[3] and ctx.edge:
            near = (output != 0) & (output.abs() < ctx.edge * tau)
            of_slack = torch.where(near, grad.abs(), 0.0).sum(dtype=torch.float32)
        elif ctx.needs_input_grad[3]:
            of_slack = shrinkage(output, grad).sum(dtype=torch.float32) * tau
        return of_weight, of_tau, None, of_slack, None


def _traced(weight: Tensor) -> bool:
    """Whether somebody looks on: a compiler, or a transform of ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(weight)


def shrinkage(weight: Tensor, grad: Tensor) -> Tensor:
    """What each weight adds to the derivative of the loss in its threshold, ``-g * sign(w)``.

    A saliency: ``weight`` is the effective one, zero below the threshold.
    """
    return -grad * weight.sign()


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


def between(size: Tensor, above: Tensor, wanted: float) -> Tensor:
    """The threshold nearest to ``wanted`` that has the weights ``above`` above it, and no others.

    Where a weight on the line stays above and another that is as large does not, no threshold
    parts them: the largest one that has both above is taken.

    Args:
        size: How large the weights of a layer are, any shape.
        above: Bool, same shape.
        wanted: The threshold it should be but for rounding.

    Returns:
        0-dim, of the type of ``size``.

    Example:
        >>> size = torch.tensor([1.0, 2.0, 4.0])
        >>> between(size, size > 2, 3.0), between(size, size > 2, 9.0), between(size, size > 2, 0.0)
        (tensor(3.), tensor(2.), tensor(2.))
    """
    lowest = torch.where(above, size, torch.inf).amin()
    highest = torch.where(above | (size >= lowest), 0.0, size).amax()
    tau = highest.clamp(min=wanted)
    return torch.where(tau < lowest, tau, highest)


def follow(trim: float, smooth: float | None, wanted: float, got: float) -> tuple[float, float]:
    r"""One step of a PI controller on what is added to the common log-threshold.

    With the error :math:`e` and its moving average :math:`\xi`, that changes by
    :math:`0.3\, e + 2\, (\xi_t - \xi_{t-1})`, at most by 0.1.

    Sohrabi et al., "On PI controllers for updating Lagrange multipliers in constrained
    optimization", ICML 2024.

    Args:
        trim: What is added now.
        smooth: Moving average of the error; None at first.
        wanted: Sparsity there should be.
        got: Sparsity there is.

    Returns:
        The next one, and the next moving average.

    Example:
        >>> follow(-2.0, None, wanted=0.5, got=0.4)
        (-1.97, 0.09999999999999998)
    """
    error = wanted - got
    average = error if smooth is None else 0.8 * smooth + 0.2 * error
    change = 0.3 * error + 2.0 * (average - (average if smooth is None else smooth))
    return trim + max(-0.1, min(0.1, change)), average
