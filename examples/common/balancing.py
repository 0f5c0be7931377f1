"""Balancing: how the losses of several tasks become one step. What multitask training has for it.

| balance | step |
|---|---|
| `Equal` | the gradient of the sum |
| `Uncertainty` | of the sum weighed by learned variances |
| `PCGrad` | the sum of gradients without what opposes other tasks |
| `Famo` | weights under which all losses fall at one rate |

A balance takes losses that are weighed by now as the problem weighs them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Losses = Mapping[str, Tensor]


class Balance(Protocol):
    """Turns losses into gradients, step by step."""

    def backward(self, losses: Losses) -> None:
        """Add to the gradients of the net."""
        ...

    def after(self, losses: Callable[[], Losses]) -> None:
        """Look at what the optimizer's step has done; ``losses`` computes those of the batch."""
        ...


# The arithmetic.


def uncertainty_total(logs: Tensor, losses: Tensor) -> Tensor:
    r""":math:`\sum_k e^{-s_k} L_k + s_k`, least where :math:`s_k = \log L_k`.

    Kendall et al., "Multi-task learning using uncertainty to weigh losses for scene geometry and
    semantics", CVPR 2018, up to halves.

    Args:
        logs: The logarithms s of the variances, ``[tasks]``.
        losses: ``[tasks]``.
    """
    return ((-logs).exp() * losses + logs).sum()


def project(gradients: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The sum of the tasks' gradients, ``[n]``, each without what opposes another's.

    Yu et al., "Gradient surgery for multi-task learning", NeurIPS 2020: a gradient that has a
    negative product with another's is projected onto the plane which that one is normal to, one
    after the other in random order.

    Args:
        gradients: ``[tasks, n]``.
        generator: Of the order.
    """
    total = torch.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        for j in torch.randperm(len(gradients), generator=generator).tolist():
            other = gradients[j]
            product = gradient @ other
            if i != j and product < 0:
                gradient = gradient - product / other.square().sum() * other
        total += gradient
    return total


def famo_total(logits: Tensor, losses: Tensor) -> Tensor:
    r""":math:`c \sum_k z_k \log L_k` with :math:`z = softmax(\xi)`, :math:`c = 1 / \sum z_k / L_k`.

    The gradient is a convex combination of the tasks' gradients.

    Args:
        logits: :math:`\xi`, ``[tasks]``.
        losses: Positive, ``[tasks]``.
    """
    shares = logits.detach().softmax(0)
    scale = 1 / (shares / losses.detach()).sum()
    return scale * (shares * losses.log()).sum()


def famo_gradient(logits: Tensor, before: Tensor, after: Tensor) -> Tensor:
    r"""What to descend the logits by: :math:`J^T \delta`, J of the softmax.

    Liu et al., "FAMO: fast adaptive multitask optimization", NeurIPS 2023. :math:`\delta_k = \log
    L_k - \log L_k'` is how much a step has lowered a loss: what fell fast will count less.

    Args:
        logits: ``[tasks]``.
        before: Losses before the step, ``[tasks]``.
        after: Those of the same batch after it, ``[tasks]``.
    """
    shares, fall = logits.softmax(0), before.log() - after.log()
    return shares * (fall - (shares * fall).sum())


# Balances.


class Equal:
    """The sum of the losses."""

    def backward(self, losses: Losses) -> None:
        """See `Balance`."""
        torch.stack(list(losses.values())).sum().backward()

    def after(self, losses: Callable[[], Losses]) -> None:
        """See `Balance`."""


class Uncertainty(Equal):
    """Weights by learned variances, one for each task.

    Args:
        tasks: How many.
        rate: Of Adam on the logarithms of the variances.
    """

    def __init__(self, tasks: int, rate: float = 0.025) -> None:
        self.logs = torch.zeros(tasks, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logs], rate)

    def backward(self, losses: Losses) -> None:
        """See `Balance`."""
        self.optimizer.zero_grad()
        values = torch.stack(list(losses.values()))
        uncertainty_total(self.logs.to(values.device), values).backward()
        self.optimizer.step()


class PCGrad(Equal):
    """Gradients without what opposes other tasks.

    Args:
        parameters: Of the net.
        seed: Of the order in which gradients are projected.
    """

    def __init__(self, parameters: Sequence[Tensor], seed: int = 0) -> None:
        self.parameters = list(parameters)
        self.generator = torch.Generator().manual_seed(seed)

    def backward(self, losses: Losses) -> None:
        """See `Balance`."""
        rows = []
        for loss in losses.values():
            found = torch.autograd.grad(
                loss, self.parameters, retain_graph=True, materialize_grads=True, allow_unused=True
            )
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
        total = project(torch.stack(rows), self.generator)
        sizes = [parameter.numel() for parameter in self.parameters]
        for parameter, part in zip(self.parameters, total.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)


class Famo(Equal):
    """Weights under which all losses fall at one rate.

    Args:
        tasks: How many.
        rate: Of Adam on the logits.
        decay: Draws the logits to 0.
    """

    def __init__(self, tasks: int, rate: float = 0.025, decay: float = 0.001) -> None:
        self.logits = torch.zeros(tasks)
        self.optimizer = torch.optim.Adam([self.logits], rate, weight_decay=decay)
        self.before = torch.ones(tasks)

    def backward(self, losses: Losses) -> None:
        """See `Balance`."""
        values = torch.stack(list(losses.values())).clamp(min=1e-8)
        self.before = values.detach().cpu()
        famo_total(self.logits.to(values.device), values).backward()

    def after(self, losses: Callable[[], Losses]) -> None:
        """See `Balance`."""
        with torch.no_grad():
            values = torch.stack(list(losses().values())).clamp(min=1e-8).cpu()
        self.logits.grad = famo_gradient(self.logits, self.before, values)
        self.optimizer.step()
