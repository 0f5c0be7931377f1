"""The rank form: a Linear or Conv2d of low rank as two smaller ones in sequence."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.forms.base import (
    EXPORTERS,
    Dense,
    Form,
    Parts,
    check_bias,
    conv_of,
    linear_of,
    pointwise_of,
)
from mtprune.model import factors

__all__ = ["Rank"]


class Rank(Form):
    """A layer of rank r as two in sequence, with ``r (in + out)`` parameters.

    A Linear becomes two of them. A Conv2d without groups, whose matrix has its inputs times its
    kernel as ``in``, becomes one with its kernel, stride, padding and dilation to r channels, and
    one with a kernel of size 1. Each parameter is multiplied once for every row or position of the
    output, as in the layer.

    For matrices whose `mtprune.factors.numerical_rank` is below break-even, where two layers are
    smaller than one. Rank 0 is legal: then the outputs are the bias.

    Example:
        >>> layer = nn.Linear(6, 4)
        >>> _ = nn.init.ones_(layer.weight)
        >>> rank = Rank(layer, Rank.parts(layer))
        >>> [tuple(part.shape) for part in rank.parameters()]
        [(1, 6), (4, 1), (4,)]
        >>> conv = nn.Conv2d(3, 8, 5, stride=2)
        >>> _ = nn.init.ones_(conv.weight)
        >>> [tuple(part.shape) for part in Rank(conv, Rank.parts(conv)).parameters()]
        [(1, 3, 5, 5), (8, 1, 1, 1), (8,)]
    """

    choice = "rank"
    exporters = EXPORTERS

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return None
        weight = layer.weight.detach()
        if not _may_be_low(weight):
            return None
        rank = factors.numerical_rank(weight)
        if rank > factors.most(tuple(weight.shape)):
            return None
        up, down = factors.factors(weight, rank)
        if isinstance(layer, nn.Conv2d):
            up, down = up[:, :, None, None], down.view(rank, *weight.shape[1:])
            if weight.is_contiguous(memory_format=torch.channels_last):
                down = down.contiguous(memory_format=torch.channels_last)
        parts = {"down.weight": down, "up.weight": up}
        if layer.bias is not None:
            parts["up.bias"] = layer.bias.detach().clone()
        return parts

    @override
    def _store(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        for name in ("down.weight", "up.weight"):
            if parts[name].dim() != layer.weight.dim():
                raise ValueError(f"its {name} has shape {tuple(parts[name].shape)}")
        held = {name: nn.Parameter(part, requires_grad=False) for name, part in parts.items()}
        down, up, bias = held["down.weight"], held["up.weight"], held.get("up.bias")
        self.down: Dense
        self.up: Dense
        if isinstance(layer, nn.Conv2d):
            self.down, self.up = conv_of(layer, down, None), pointwise_of(up, bias)
        else:
            self.down, self.up = linear_of(down, None), linear_of(up, bias)

    @override
    def check(self) -> None:
        (outputs, *inputs), rank = self.weight_shape, len(self.down.weight)
        ones = [1] * (len(inputs) - 1)  # the kernel of size 1
        shapes = tuple(self.down.weight.shape), tuple(self.up.weight.shape)
        if shapes != ((rank, *inputs), (outputs, rank, *ones)):
            raise ValueError(f"its factors have shapes {shapes}: no {self.weight_shape}")
        check_bias(self.up.bias, outputs)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.is_conv and not len(self.down.weight):
            return self._nothing(x)
        y: Tensor = self.up(self.down(x))
        return y

    def _nothing(self, x: Tensor) -> Tensor:
        """The outputs of a convolution of rank 0, which torch has no layer for."""
        assert isinstance(self.down, nn.Conv2d)
        one = self.down.weight.new_zeros(1, 1, *self.weight_shape[2:])
        positions = torch.zeros_like(self.down._conv_forward(x.narrow(-3, 0, 1), one, None))
        bias = positions.new_zeros(self.weight_shape[0]) if self.up.bias is None else self.up.bias
        return positions + bias.to(positions.dtype).view(-1, 1, 1)

    @property
    @override
    def weight(self) -> Tensor:
        product = self.up.weight.flatten(1) @ self.down.weight.flatten(1)
        return product.view(self.weight_shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias of all outputs."""
        return self.up.bias


def _may_be_low(weight: Tensor) -> bool:
    """Whether a matrix could be below break-even, from one corner, in an eighth of the time.

    Singular values of a corner are no larger than those of the matrix.
    """
    matrix = weight.flatten(1).to(torch.float64)
    norm = matrix.norm()
    if not weight.numel() or not bool(norm.isfinite()):
        return False
    least = factors.most(tuple(weight.shape)) + 1
    corner = torch.linalg.svdvals(matrix[:least, :least])
    return bool(corner[-1] <= factors.rounding(weight.dtype) * norm)
