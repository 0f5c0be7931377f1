"""The sparse form: kept weights and their indices, multiplied by the C code of `products`."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.forms import building, indices, products
from mtprune.compression.forms.base import Dense, Form, Parts, bias_part, check_bias

__all__ = ["Sparse"]


class Sparse(Form):
    """Kept weights and their indices, multiplied by the C code of `products` on a CPU.

    A convolution is a product too: each weight is multiplied with the pixels under its tap. The
    rows of the kernel are stored one after the other. At the first product they are packed in the
    order in which the C code reads them.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0., 0, 2], [0, 3, 0]]))
        >>> sparse = Sparse(layer, Sparse.parts(layer))
        >>> [sparse.weight_values.tolist(), sparse.weight_column.tolist()]
        [[2.0, 3.0], [2, 1]]
    """

    choice = "sparse"
    exporters = ("torch.export",)
    min_zeros = 0.5

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        weight = layer.weight.detach()
        groups = 1
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1:
                return None
            groups = layer.kernel_size[0]
            weight = weight.permute(0, 2, 3, 1)  # channels fastest
        flat = weight.flatten(1)
        row, column = flat.nonzero(as_tuple=True)
        if len(column) > torch.iinfo(torch.int32).max:
            return None
        counts = (flat != 0).view(len(flat) * groups, -1).sum(1)
        narrow = flat.shape[1] <= torch.iinfo(torch.int16).max + 1
        parts = {
            "weight_start": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
            "weight_column": column.to(torch.int16 if narrow else torch.int32),
            "weight_values": flat[row, column],
        }
        return {**parts, **bias_part(layer)}

    @override
    @staticmethod
    def why_not(weight: Tensor) -> str:
        if weight.device.type != "cpu":
            return f"the sparse product runs on a CPU, and the layer is on {weight.device}"
        if weight.dtype != torch.float32:
            return f"the sparse product needs float32, and the layer is {weight.dtype}"
        return ""

    @override
    @staticmethod
    def unavailable() -> str:
        return building.unavailable()

    @override
    def _store(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        self.weight_start: Tensor
        self.weight_column: Tensor
        self.weight_values: Tensor
        self.bias: Tensor | None
        super()._store(layer, parts)
        if isinstance(layer, nn.Conv2d):
            self.margins = _margins(layer)

    @override
    def check(self) -> None:
        outputs, inputs, *kernel = self.weight_shape
        start, column, value, bias = self._parts()
        kinds = torch.int32, torch.int16
        if start.dtype != torch.int32 or column.dtype not in kinds:
            raise ValueError(f"its indices are of the types {start.dtype} and {column.dtype}")
        if not value.is_meta:
            groups = kernel[0] if kernel else 1
            indices.check(start, column, value, outputs, groups, math.prod((inputs, *kernel)))
            check_bias(bias, outputs)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.is_conv:
            return self._convolve(x) if x.dim() == 4 else self._convolve(x[None])[0]
        if x.shape[-1] != self.weight_shape[1]:
            raise RuntimeError(
                f"The layer takes {self.weight_shape[1]} inputs and got shape {tuple(x.shape)}."
            )
        if not self._is_native(x):
            return F.linear(x, self.weight, self.bias)
        return products.multiply(x, *self._parts(), self.weight_shape[0])

    def _convolve(self, x: Tensor) -> Tensor:
        outputs, channels, *kernel = self.weight_shape
        stride, dilation = self._pair("stride"), self._pair("dilation")
        left, right, top, bottom = self.margins
        if self.padding_mode != "zeros":
            x = F.pad(x, self.margins, str(self.padding_mode))
            left = right = top = bottom = 0
        height, width = (
            (x.shape[2 + i] + padding - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i, padding in enumerate((top + bottom, left + right))
        )
        if x.shape[1] != channels or height < 1 or width < 1:
            raise RuntimeError(
                f"The layer takes {channels} channels and images no smaller than its kernel of "
                f"{kernel}, and got shape {tuple(x.shape)}."
            )
        if not self._is_native(x):
            x = F.pad(x, (left, right, top, bottom))
            return F.conv2d(x, self.weight, self.bias, stride, 0, dilation)
        geometry = (*kernel, *stride, top, left, *dilation)
        return products.convolve(x, *self._parts(), (outputs, height, width), geometry)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # Not by attributes, which modules look up slowly: the product itself takes microseconds.
        parameters, buffers = self._parameters, self._buffers
        values, bias = parameters["weight_values"], parameters["bias"]
        return buffers["weight_start"], buffers["weight_column"], values, bias  # type: ignore[return-value]

    def _is_native(self, x: Tensor) -> bool:
        """Whether the native code can multiply: the layer and its input are float32 on the CPU.

        After a move or a cast it cannot, nor for what `products.is_plain` says: then each call
        makes the dense weight.
        """
        values = self._parts()[2]
        return (
            x.is_cpu
            and values.is_cpu
            and x.dtype == values.dtype == torch.float32
            and products.is_plain(x)
        )

    @property
    @override
    def weight(self) -> Tensor:
        outputs, inputs, *kernel = self.weight_shape
        flat = torch.Size((inputs, *kernel)).numel()
        full = indices.unpack(*self._parts()[:3], outputs, flat)
        if not kernel:
            return full
        return full.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()


def _margins(layer: nn.Conv2d) -> tuple[int, ...]:
    """How many pixels a convolution pads: left, right, top and bottom."""
    margins: list[int] = []
    for i in (1, 0):
        if isinstance(layer.padding, str):
            total = layer.dilation[i] * (layer.kernel_size[i] - 1) if layer.padding == "same" else 0
            margins += (total // 2, total - total // 2)
        else:
            margins += (layer.padding[i], layer.padding[i])
    return tuple(margins)
