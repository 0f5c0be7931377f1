"""The CSR form: kept weights and their indices, multiplied by torch's sparse kernels on a CPU."""

import math
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.forms import indices, products
from mtprune.compression.forms.base import Dense, Form, Parts, bias_part, check_bias

__all__ = ["Csr"]

TILE = 64
"""Columns that are multiplied at once: few enough for a tile to stay in cache."""


class Csr(Form):
    """Kept weights and their indices, multiplied by torch's sparse kernels on a CPU.

    A 1x1 convolution is a matrix product; a larger one becomes one by unfolding its input.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0., 0, 2], [0, 3, 0]]))
        >>> csr = Csr(layer, Csr.parts(layer))
        >>> csr.weight_values.tolist(), csr.weight_col.tolist(), csr.weight_crow.tolist()
        ([2.0, 3.0], [2, 1], [0, 1, 2])
    """

    choice = "csr"
    min_zeros = 0.5
    frozen = True

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        if isinstance(layer, nn.Conv2d) and (
            layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            return None
        matrix = layer.weight.detach().flatten(1)
        counts = (matrix != 0).sum(1)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        row, col = matrix.nonzero(as_tuple=True)
        parts = {
            "weight_crow": crow.int(),
            "weight_col": col.int(),
            "weight_values": matrix[row, col],
        }
        return {**parts, **bias_part(layer)}

    @override
    @staticmethod
    def why_not(weight: Tensor) -> str:
        if weight.device.type != "cpu":
            return f"CSR runs on a CPU, and the layer is on {weight.device}"
        if weight.dtype not in (torch.float32, torch.float64):
            return f"CSR needs float32 or float64, and the layer is {weight.dtype}"
        return ""

    @override
    def _store(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        _no_beta_warning()
        self.weight_crow: Tensor
        self.weight_col: Tensor
        self.weight_values: Tensor
        self.bias: Tensor | None
        super()._store(layer, parts)

    @override
    def check(self) -> None:
        parts = self._parts()
        if not self.weight_values.is_meta:
            indices.check(*parts, self.weight_shape[0], 1, self._columns)
            check_bias(self.bias, self.weight_shape[0])

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _no_beta_warning()

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self._is_native(x):
            return self._dense(x)
        if not torch.is_autocast_enabled("cpu"):
            return self._convolve(x) if self.is_conv else self._multiply(x)
        with torch.autocast("cpu", enabled=False):  # there are no sparse kernels in half precision
            return self._convolve(x) if self.is_conv else self._multiply(x)

    def _is_native(self, x: Tensor) -> bool:
        """Whether torch's sparse kernels can multiply: after a cast or a move they cannot."""
        values = self.weight_values
        return (
            products.is_plain(x)
            and x.is_cpu
            and values.is_cpu
            and x.dtype == values.dtype
            and x.dtype in (torch.float32, torch.float64)
        )

    def _dense(self, x: Tensor) -> Tensor:
        if not self.is_conv:
            return F.linear(x, self.weight, self.bias)
        stride, padding = self._pair("stride"), self._pair("padding")
        return F.conv2d(x, self.weight, self.bias, stride, padding, self._pair("dilation"))

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), self.weight_shape[0])
        for start, tile in self._products(rows.t()):
            # Written in this order: a transposed copy to contiguous memory has a kernel of its own.
            out[start : start + TILE] = tile.t()
        return out.view(*x.shape[:-1], self.weight_shape[0])

    def _convolve(self, x: Tensor) -> Tensor:
        batch = x if x.dim() == 4 else x[None]
        kernel, stride = self._pair("kernel_size"), self._pair("stride")
        padding, dilation = self._pair("padding"), self._pair("dilation")
        height, width = (
            (batch.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i]
            + 1
            for i in range(2)
        )
        if kernel == (1, 1) and padding == (0, 0):
            columns = batch[:, :, :: stride[0], :: stride[1]].flatten(2)
        else:
            columns = F.unfold(batch, kernel, dilation, padding, stride)
        columns = columns.transpose(0, 1).reshape(columns.shape[1], -1)
        out = columns.new_empty(self.weight_shape[0], columns.shape[1])
        for start, tile in self._products(columns):
            out[:, start : start + TILE] = tile
        y = out.view(-1, len(batch), height, width).transpose(0, 1)
        return y.contiguous() if x.dim() == 4 else y[0]

    def _products(self, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The weight times ``[inputs, n]``, plus the bias: tiles and the columns they start at."""
        matrix = self._matrix()
        bias = None if self.bias is None else self.bias[:, None]
        for start in range(0, columns.shape[1], TILE):
            tile = matrix @ columns[:, start : start + TILE]
            yield start, tile if bias is None else tile.add_(bias)

    def _matrix(self) -> Tensor:
        """The weight ``[outputs, inputs]``: a view of the parts, so it costs microseconds."""
        # Its kernels look neither at strides nor at where indices point. These are looked at in
        # every call, a small part of the product: no count of versions tells all that was written,
        # as by `data`, by NumPy, or in inference mode.
        crow, col, values = (part.contiguous() for part in self._parts())
        shape = (self.weight_shape[0], self._columns)
        indices.check_range(crow, col, values, *shape)
        return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight_crow, self.weight_col, self.weight_values

    @property
    def _columns(self) -> int:
        return math.prod(self.weight_shape[1:])

    @property
    @override
    def weight(self) -> Tensor:
        shape = (self.weight_shape[0], self._columns)
        if not self.weight_values.is_meta:
            indices.check_range(*self._parts(), *shape)
        return indices.unpack(*self._parts(), *shape).view(self.weight_shape)


@cache
def _no_beta_warning() -> None:
    """Use up torch's warning that its CSR tensors are in beta, which it gives once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), zero[:0], torch.zeros(0), (1, 1))
