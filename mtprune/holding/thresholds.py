r"""Thresholds: the soft threshold, and how one is set.

The soft threshold moves every weight towards zero by :math:`\tau` and stops there,

.. math:: S(w, \tau) = \operatorname{sign}(w)\, \max(|w| - \tau, 0),

so that a threshold can be learned: the loss has a derivative in it. How many weights fall below is
a different question, and one with an exact answer: `mtprune.selection.waterline`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from mtprune.census import HERE, Census

__all__ = ["Leak", "nearest_threshold", "shrinkage", "soft_threshold"]


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
        edge: If positive, the gradient of ``slack`` is instead the sum of :math:`|g|` over the
            weights at the edge, those above the threshold by less than this share of it.

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
        # Both are sign(w) * relu(|w| - tau) to the bit. The first takes one pass, where reading a
        # number is free; elsewhere that would wait for a device, or compile it in as a constant.
        if tau.device.type == "cpu" and not _traced(weight):
            return torch.nn.functional.softshrink(weight, float(tau))
        return weight - weight.clamp(-tau, tau)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, tau, ctx.leak, _, ctx.edge = inputs
        # A weight above the threshold never becomes zero (floats underflow gradually), so that the
        # result, which the layer keeps anyway, marks these weights.
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
    """Whether the call is traced, by a compiler or a transform of ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(weight)


def shrinkage(weight: Tensor, grad: Tensor) -> Tensor:
    """The part of each weight in the derivative of the loss in its threshold, ``-g * sign(w)``.

    A saliency of the effective weight, which is zero below the threshold.
    """
    return -grad * weight.sign()


def nearest_threshold(size: Tensor, above: Tensor, wanted: float, census: Census = HERE) -> Tensor:
    """The threshold nearest to ``wanted`` that has the weights ``above`` above it, and no others.

    If a weight on the line stays above and another that is as large does not, no threshold parts
    them, and the result is the largest threshold that has both above.

    Args:
        size: The absolute weights of a layer, any shape.
        above: The weights above the threshold, bool, same shape.
        wanted: The threshold before rounding.
        census: Counts over all ranks, where each has a part of the layer.

    Returns:
        0-dim, of the type of ``size``.

    Example:
        >>> size = torch.tensor([1.0, 2.0, 4.0])
        >>> [nearest_threshold(size, size > 2, wanted) for wanted in (3.0, 9.0, 0.0)]
        [tensor(3.), tensor(2.), tensor(2.)]
    """
    nothing = size.new_zeros(1)  # a rank may have no part of a small layer
    over = torch.where(above, size, torch.inf)
    lowest = census.least(torch.cat([over.reshape(-1), nothing + torch.inf]).amin())
    under = torch.where(above | (size >= lowest), 0.0, size)
    highest = census.most(torch.cat([under.reshape(-1), nothing]).amax())
    tau = highest.clamp(min=wanted)
    return torch.where(tau < lowest, tau, highest)
