r"""Refitting: the weights that stay make up for those that go, layer by layer.

With inputs :math:`X` ``[n, c]`` of a layer, a row :math:`w` of its weight, kept set S and pruned
set P, the outputs that are lost are fitted by least squares with a little damping:

.. math:: (F_{SS} + \lambda I)\,\delta = F_{SP}\,w_P, \qquad F = X^T X, \qquad
          \lambda = \mathrm{damping} \cdot \mathrm{mean}\,\mathrm{diag}\,F_{SS},

then :math:`w_S` moves by :math:`\delta` and :math:`w_P` is 0. A bias is a kept weight of an input
that is always 1. A few steps of conjugate gradients solve it for all rows at once from a sample of
the inputs. No Hessian is stored: memory grows as ``n * (c + rows)``, and each step is two products
of the layer's size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from mtprune import checks, distributed
from mtprune.model.inputs import bias_of, why_no_windows
from mtprune.model.layers import Layer
from mtprune.statistics import Seen, Statistic

__all__ = ["Refit", "Sample"]


@dataclass(frozen=True)
class Sample(Statistic):
    """Rows of a layer's inputs, each equally likely, over all batches, calls and ranks.

    Every row draws a key, and those with the smallest keys stay. So samples of two batches merge
    into the sample of both. A row is its key, the inputs, and 1 if a bias is trained with the
    layer, else 0: ``[rows, 1 + columns + 1]``.

    Attributes:
        size: The most rows that are kept; fewer inputs are kept as they are.
    """

    size: int
    asks = frozenset({"inputs", "generator"})
    dtype = torch.float32

    @override
    def fits(self, layer: Layer) -> str:
        return why_no_windows(layer)

    @override
    def of(self, seen: Seen) -> Tensor:
        windows = seen.windows
        keys = torch.rand(len(windows), generator=seen.generator)
        order = keys.argsort(stable=True)[: self.size]
        inputs = windows.at(order.to(seen.device))
        one = inputs.new_full((len(inputs), 1), float(bias_of(seen.layer) is not None))
        return torch.cat([keys[order].to(inputs)[:, None], inputs, one], 1)

    @override
    def is_sum(self, layer: Layer, value: Tensor) -> bool:
        groups = getattr(layer.places[0][0], "groups", 1)
        columns = 2 + groups * math.prod(layer.shape[1:])
        return value.dim() == 2 and len(value) <= self.size and value.shape[1] == columns

    @override
    def zero(self, layer: Layer, weight: Tensor) -> Tensor:
        return torch.zeros(0, 2, device=weight.device)

    @override
    def merge(self, total: Tensor, value: Tensor) -> Tensor:
        return self._smallest(torch.cat([total, value]))

    @override
    def reduce(self, value: Tensor) -> Tensor:
        return self._smallest(distributed.rows(value))

    def _smallest(self, rows: Tensor) -> Tensor:
        return rows[rows[:, 0].argsort(stable=True)[: self.size]]


@dataclass(frozen=True)
class Refit:
    """How the weights that stay make up for those that go: see the module.

    Attributes:
        samples: The most rows of inputs, or windows of a convolution, that a layer is fitted on.
        damping: Of the mean squared input, added to each: more moves weights less.
        steps: Steps of conjugate gradients.

    Example:
        >>> from mtprune import Vote
        >>> Vote(sparsity=0.9, observations=4, refit=Refit(samples=512)).refit
        Refit(samples=512, damping=0.1, steps=12)
    """

    samples: int = 1024
    damping: float = 0.1
    steps: int = 12
    name: ClassVar[str] = "rows of inputs"

    def __post_init__(self) -> None:
        """Validate."""
        checks.whole("samples", self.samples, least=1)
        checks.inside("damping", self.damping, "[0, inf)", must="must be a number, at least 0")
        checks.whole("steps", self.steps, least=1)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What must be seen of each layer."""
        return {self.name: Sample(self.samples)}

    @torch.no_grad()
    def change(self, rows: Tensor, lost: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What to add to a layer's weight and bias, so that its outputs lose less.

        The squared error of the outputs on the rows does not grow, in any row of the weight: one
        in which rounding would let it grow stays as it is.

        Args:
            rows: What `Sample` kept.
            lost: What the weight has lost, ``[out, ...]``: zero where it is as it was.
            kept: Which weights may move, bool, same shape.

        Returns:
            Two tensors, of the weight's shape, exactly zero where nothing may move, and ``[out]``.

        Example:
            >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0]])  # two inputs that are always the same
            >>> rows = torch.cat([torch.zeros(2, 1), x, torch.zeros(2, 1)], 1)
            >>> lost, kept = torch.tensor([[0.0, 3.0]]), torch.tensor([[True, False]])
            >>> Refit(damping=0.0).change(rows, lost, kept)[0]
            tensor([[3., 0.]])
        """
        size, columns = len(lost), lost[:1].numel()
        groups = (rows.shape[1] - 2) // columns if columns else 0  # a rank may have no row
        if not len(rows) or not groups:
            return torch.zeros_like(lost, dtype=torch.float32), lost.new_zeros(size)
        with torch.autocast(rows.device.type, enabled=False):
            inputs = rows[:, 1:-1].unflatten(1, (groups, columns)).transpose(0, 1)
            inputs = torch.cat([inputs, rows[:, -1:].expand(groups, -1, -1)], 2)
            inputs = inputs / inputs.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
            gap = pad(lost.to(torch.float32).reshape(groups, -1, columns), (0, 1))
            free = pad(kept.reshape(groups, -1, columns), (0, 1), value=bool(rows[0, -1]))
            moved = self._solve(inputs, gap, free).flatten(0, 1)
        return moved[:, :-1].reshape(lost.shape), moved[:, -1]

    def _solve(self, inputs: Tensor, gap: Tensor, free: Tensor) -> Tensor:
        """Conjugate gradients on every row.

        Args:
            inputs: X of each group, ``[groups, n, c]``.
            gap: What each row has lost, ``[groups, rows, c]``.
            free: Where it may move, bool, same shape.
        """
        wanted = gap @ inputs.mT  # the outputs that are lost
        power = inputs.square().sum(1)
        number = free.sum(2, keepdim=True).clamp_min(1)
        damping = self.damping * (free.to(power.dtype) @ power[:, :, None]) / number
        residual = (wanted @ inputs) * free
        direction, moved = residual, torch.zeros_like(gap)
        square = residual.square().sum(2, keepdim=True)
        for _ in range(self.steps):
            image = ((direction @ inputs.mT) @ inputs) * free + damping * direction
            step = _ratio(square, (direction * image).sum(2, keepdim=True))
            moved = moved + step * direction
            residual = residual - step * image
            before, square = square, residual.square().sum(2, keepdim=True)
            direction = residual + _ratio(square, before) * direction
        left = (wanted - moved @ inputs.mT).square().sum(2, keepdim=True)
        better = left <= wanted.square().sum(2, keepdim=True)
        return torch.where(better & free, moved, 0.0)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """A quotient, 0 where there is nothing left to divide by."""
    return torch.where(whole > 0, part / whole, 0.0)
