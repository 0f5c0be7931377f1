"""The rank form: a matrix of low rank as two layers, one after the other."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune import ranks
from mtprune.compression.kernels import Dense, Kernel, Parts

__all__ = ["Rank"]


class Rank(Kernel):
    """A Linear of low rank as two of them: ``r (in + out)`` parameters, and as many products.

    For matrices whose `mtprune.ranks.numerical_rank` is below break-even, where two layers are
    smaller than one. Rank 0 is legal: what is left is the bias.

    Example:
        >>> layer = nn.Linear(6, 4)
        >>> _ = nn.init.ones_(layer.weight)
        >>> rank = Rank(layer, Rank.parts(layer))
        >>> [tuple(part.shape) for part in rank.parameters()]
        [(1, 6), (4, 1), (4,)]
    """

    choice: ClassVar[str] = "rank"

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        if isinstance(layer, nn.Conv2d) or not _may_be_low(layer.weight):
            return None
        rank = ranks.numerical_rank(layer.weight)
        if rank > ranks.most((layer.weight.shape[0], layer.weight.shape[1])):
            return None
        up, down = ranks.factors(layer.weight, rank)
        parts = {"down.weight": down, "up.weight": up}
        if layer.bias is not None:
            parts["up.bias"] = layer.bias.detach().clone()
        return parts

    @override
    def _hold(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        self.down = _linear(parts["down.weight"], None)
        self.up = _linear(parts["up.weight"], parts.get("up.bias"))

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y

    @property
    @override
    def weight(self) -> Tensor:
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of all outputs."""
        return self.up.bias


def _may_be_low(weight: Tensor) -> bool:
    """Whether a matrix could be below break-even, from a corner of it, in an eighth of the time.

    Singular values of a corner are no larger than those of the matrix.
    """
    size = weight.detach().to(torch.float64).norm()
    if not weight.numel() or not bool(size.isfinite()):
        return False
    least = ranks.most((weight.shape[0], weight.shape[1])) + 1
    corner = torch.linalg.svdvals(weight.detach()[:least, :least].to(torch.float64))
    return bool(corner[-1] <= ranks.rounding(weight.dtype) * size)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these tensors, which may be empty."""
    outputs, inputs = weight.shape
    # Built without memory, and with a size that torch does not warn of.
    layer = nn.Linear(max(1, inputs), max(1, outputs), bias is not None, "meta")
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
