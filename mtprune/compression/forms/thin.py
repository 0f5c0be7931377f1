"""The thin form: a dense layer without its dead outputs and inputs."""

from collections.abc import Mapping
from typing import ClassVar

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
)

__all__ = ["Thin"]


class Thin(Form):
    """A dense layer without its dead outputs and inputs, for the same inputs and outputs.

    An output is dead if its weights are all zero: it is its bias. An input is dead if no weight
    reads it: it is left out. Between them is a smaller dense layer.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1., 0, 2], [0, 0, 0], [3, 0, 0]]))
        >>> thin = Thin(layer, Thin.parts(layer))
        >>> thin.inner, thin.rows.tolist(), thin.cols.tolist()
        (Linear(in_features=2, out_features=2, bias=True), [0, 2], [0, 2])
    """

    choice = "thin"
    exporters = EXPORTERS
    drops_inputs: ClassVar[bool] = True
    """Whether dead inputs are dropped too."""

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return None
        weight = layer.weight.detach()
        alive = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
        rows, cols = alive.any(1), alive.any(0)
        if not rows.any():  # one stays, because not every layer can be empty
            rows[0] = cols[0] = True
        if not cls.drops_inputs:
            cols = torch.ones_like(cols)
        if (cols if cls.drops_inputs else rows).all():
            return None
        inner = weight[rows][:, cols]
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            inner = inner.contiguous(memory_format=torch.channels_last)
        parts = {"inner.weight": inner}
        if layer.bias is not None:
            parts["inner.bias"] = layer.bias.detach()[rows]
        if not rows.all():
            parts["rows"] = rows.nonzero().flatten()
            # A copy: no part may share memory with the dense layer.
            fill = weight.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()
            parts["fill"] = fill.clone()
        if not cols.all():
            parts["cols"] = cols.nonzero().flatten()
        return parts

    @override
    def _store(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        weight = nn.Parameter(parts["inner.weight"], requires_grad=False)
        bias = None
        if "inner.bias" in parts:
            bias = nn.Parameter(parts["inner.bias"], requires_grad=False)
        self.inner: Dense
        if isinstance(layer, nn.Conv2d):
            self.inner = conv_of(layer, weight, bias)
        else:
            self.inner = linear_of(weight, bias)
        self.dim = -3 if self.is_conv else -1
        self.rows: Tensor | None
        self.cols: Tensor | None
        self.fill: Tensor | None
        self.register_buffer("rows", parts.get("rows"))
        self.register_buffer("cols", parts.get("cols"))
        self.register_buffer("fill", parts.get("fill"))

    @override
    def check(self) -> None:
        outputs, inputs, *kernel = self.weight_shape
        rows, cols = (
            size if places is None else _count(places, size)
            for places, size in ((self.rows, outputs), (self.cols, inputs))
        )
        inner = tuple(self.inner.weight.shape)
        if inner != (rows, cols, *kernel):
            raise ValueError(f"its inner weight has shape {inner}, not {(rows, cols, *kernel)}")
        check_bias(self.inner.bias, rows)
        if (self.rows is None) != (self.fill is None):
            raise ValueError("it has dead outputs without their biases, or biases without them")
        check_bias(self.fill, outputs)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.cols is not None:
            x = x.index_select(self.dim, self.cols)
        y: Tensor = self.inner(x)
        if self.rows is None or self.fill is None:
            return y
        shape = list(y.shape)
        shape[self.dim] = len(self.fill)
        fill = self.fill.to(y.dtype).view(-1, 1, 1) if self.is_conv else self.fill.to(y.dtype)
        return fill.expand(shape).clone().index_copy_(self.dim, self.rows, y)

    @property
    @override
    def weight(self) -> Tensor:
        inner = self.inner.weight
        full = inner.new_zeros(self.weight_shape)
        rows = torch.arange(full.shape[0], device=full.device) if self.rows is None else self.rows
        cols = torch.arange(full.shape[1], device=full.device) if self.cols is None else self.cols
        full[rows[:, None], cols] = inner
        return full

    @property
    def bias(self) -> Tensor | None:
        """The bias of all outputs, dead ones included."""
        return self.inner.bias if self.rows is None or self.inner.bias is None else self.fill


def _count(places: Tensor, size: int) -> int:
    """How many places there are.

    Raises:
        ValueError: If they are no rising indices below ``size``.
    """
    if places.dim() != 1 or places.dtype != torch.long:
        raise ValueError(f"its indices are {places.dtype} of shape {tuple(places.shape)}")
    if not places.is_meta and len(places):
        rising = bool((places[1:] > places[:-1]).all())
        if not rising or int(places[0]) < 0 or int(places[-1]) >= size:
            raise ValueError(f"its indices do not rise from 0 to at most {size - 1}")
    return len(places)
