"""The rank form: a Linear of low rank as two smaller ones in sequence."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.forms.base import EXPORTERS, Dense, Form, Parts, check_bias, linear_of
from mtprune.model import factors

__all__ = ["Rank"]


class Rank(Form):
    """A Linear of rank r as two in sequence, with ``r (in + out)`` parameters and multiply-adds.

    For matrices whose `mtprune.factors.numerical_rank` is below break-even, where two layers are
    smaller than one. Rank 0 is legal: then the outputs are the bias.

    Example:
        >>> layer = nn.Linear(6, 4)
        >>> _ = nn.init.ones_(layer.weight)
        >>> rank = Rank(layer, Rank.parts(layer))
        >>> [tuple(part.shape) for part in rank.parameters()]
        [(1, 6), (4, 1), (4,)]
    """

    choice = "rank"
    exporters = EXPORTERS

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        if isinstance(layer, nn.Conv2d) or not _may_be_low(layer.weight):
            return None
        rank = factors.numerical_rank(layer.weight)
        if rank > factors.most((layer.weight.shape[0], layer.weight.shape[1])):
            return None
        up, down = factors.factors(layer.weight, rank)
        parts = {"down.weight": down, "up.weight": up}
        if layer.bias is not None:
            parts["up.bias"] = layer.bias.detach().clone()
        return parts

    @override
    def _store(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        factors = {name: nn.Parameter(part, requires_grad=False) for name, part in parts.items()}
        self.down = linear_of(factors["down.weight"], None)
        self.up = linear_of(factors["up.weight"], factors.get("up.bias"))

    @override
    def check(self) -> None:
        (outputs, inputs), rank = self.weight_shape, len(self.down.weight)
        shapes = tuple(self.down.weight.shape), tuple(self.up.weight.shape)
        if shapes != ((rank, inputs), (outputs, rank)):
            raise ValueError(f"its factors have shapes {shapes}: no {self.weight_shape}")
        check_bias(self.up.bias, outputs)

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
    """Whether a matrix could be below break-even, from one corner, in an eighth of the time.

    Singular values of a corner are no larger than those of the matrix.
    """
    norm = weight.detach().to(torch.float64).norm()
    if not weight.numel() or not bool(norm.isfinite()):
        return False
    least = factors.most((weight.shape[0], weight.shape[1])) + 1
    corner = torch.linalg.svdvals(weight.detach()[:least, :least].to(torch.float64))
    return bool(corner[-1] <= factors.rounding(weight.dtype) * norm)
