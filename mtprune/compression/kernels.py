"""Kernels: the forms a Linear or Conv2d can take when many of its weights are zero.

Each is a module that takes the place of the layer. It stores parts under names of its own, so that
a checkpoint of it cannot be loaded into a dense layer unnoticed, and it is for inference: its
parts do not require gradients.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression import native

__all__ = ["KERNELS", "Csr", "Dense", "Kernel", "Rows", "SemiStructured", "Sparse", "Thin"]

Dense = nn.Linear | nn.Conv2d
"""What can be replaced."""

Parts = dict[str, Tensor]

TILE = 64
"""Columns that CSR multiplies at once: what it reads, writes and turns around stays in cache."""


class Kernel(nn.Module, ABC):
    """One form of a layer.

    Args:
        layer: The layer whose place it takes: its sizes are read, not its weight.
        parts: What it stores, by name, as `parts` gives it or as it was saved.
    """

    choice: ClassVar[str]
    portable: ClassVar[bool] = False
    """Whether torch.export and ONNX take it."""

    exports: ClassVar[bool] = False
    """Whether torch.export takes it at least."""

    site = ""
    """The name of the layer in its model, once it is there."""

    def __init__(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.is_conv = isinstance(layer, nn.Conv2d)
        for name in layer.__constants__:
            setattr(self, name, getattr(layer, name))
        self.weight_shape = tuple(layer.weight.shape)
        self.train(layer.training)
        self._hold(layer, parts)
        # Fused kernels read weights without calling layers, and stand back when there are hooks.
        self.register_forward_pre_hook(_check_exporting)

    @classmethod
    @abstractmethod
    def parts(cls, layer: Dense) -> Parts | None:
        """What this form of the layer stores, or None if the layer has no such form."""

    @staticmethod
    def lacking(weight: Tensor) -> str:
        """Why this form cannot run where the weight is; empty if it can."""
        return ""

    @property
    def stored(self) -> list[Tensor]:
        """The numbers that inputs are multiplied by, zeros among them included."""
        return [part for name, part in self.named_parameters() if not name.endswith("bias")]

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The dense weight, made anew: for code that reads it instead of calling the layer."""

    def _hold(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            if part.is_floating_point():
                self.register_parameter(name, nn.Parameter(part, requires_grad=False))
            else:
                self.register_buffer(name, part)
        if "bias" not in parts:
            self.register_parameter("bias", None)

    def _pair(self, name: str) -> tuple[int, int]:
        first, second = getattr(self, name)
        return first, second

    @override
    def extra_repr(self) -> str:
        sizes = "x".join(str(size) for size in self.weight_shape)
        return f"{sizes}, {self.choice}"


def _bias(layer: Dense) -> Parts:
    """The part that is the same in all forms, if the layer has it."""
    return {} if layer.bias is None else {"bias": layer.bias.detach().clone()}


def _check_exporting(module: nn.Module, args: Any) -> None:
    """A hook that says which layer an export fails at, before torch does without."""
    assert isinstance(module, Kernel)
    if module.portable:
        return
    exporting = getattr(torch.compiler, "is_exporting", bool)
    onnx = torch.onnx.is_in_onnx_export()
    if onnx or (exporting() and not module.exports):
        who = "ONNX" if module.exports else "torch.export and ONNX"
        raise RuntimeError(
            f"Layer '{module.site}' has the form '{module.choice}', which {who} "
            f"cannot take. Compress again with portable=True, or with "
            f"plan=mtprune.plan_of(model).replace({module.site!r}, 'dense')."
        )


class Thin(Kernel):
    """A dense layer without its dead outputs and inputs, for the same inputs and outputs.

    Dead outputs are their bias; dead inputs are not read. What is left is a smaller dense layer.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[1., 0, 2], [0, 0, 0], [3, 0, 0]]))
        >>> thin = Thin(layer, Thin.parts(layer))
        >>> thin.inner, thin.rows.tolist(), thin.cols.tolist()
        (Linear(in_features=2, out_features=2, bias=True), [0, 2], [0, 2])
    """

    choice = "thin"
    portable = True
    drops_inputs: ClassVar[bool] = True

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return None
        weight = layer.weight.detach()
        alive = (weight != 0).flatten(2).any(2) if weight.dim() > 2 else weight != 0
        rows, cols = alive.any(1), alive.any(0)
        if not rows.any():  # one is left, because not every kernel can do without any
            rows[0] = cols[0] = True
        if not cls.drops_inputs:
            cols = torch.ones_like(cols)
        if (cols if cls.drops_inputs else rows).all():
            return None
        kept = weight[rows][:, cols]
        if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
            kept = kept.contiguous(memory_format=torch.channels_last)
        parts = {"inner.weight": kept}
        if layer.bias is not None:
            parts["inner.bias"] = layer.bias.detach()[rows]
        if not rows.all():
            parts["rows"] = rows.nonzero().flatten()
            # A copy: what is stored must not be part of the dense layer any more.
            dead = weight.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()
            parts["fill"] = dead.clone()
        if not cols.all():
            parts["cols"] = cols.nonzero().flatten()
        return parts

    @override
    def _hold(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        weight, bias = parts["inner.weight"], parts.get("inner.bias")
        # Without memory: the weights come from the parts.
        self.inner: Dense
        if isinstance(layer, nn.Conv2d):
            self.inner = nn.Conv2d(
                weight.shape[1],
                weight.shape[0],
                (layer.kernel_size[0], layer.kernel_size[1]),
                (layer.stride[0], layer.stride[1]),
                layer.padding if isinstance(layer.padding, str) else layer.padding[:2],  # type: ignore[arg-type]
                (layer.dilation[0], layer.dilation[1]),
                bias=bias is not None,
                padding_mode=layer.padding_mode,
                device="meta",
            )
        else:
            self.inner = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
        self.inner.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.inner.bias = nn.Parameter(bias, requires_grad=False)
        self.dim = -3 if self.is_conv else -1
        self.rows: Tensor | None
        self.cols: Tensor | None
        self.fill: Tensor | None
        self.register_buffer("rows", parts.get("rows"))
        self.register_buffer("cols", parts.get("cols"))
        self.register_buffer("fill", parts.get("fill"))

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
        """The bias of all outputs."""
        return self.inner.bias if self.rows is None or self.inner.bias is None else self.fill


class Rows(Thin):
    """`Thin` that reads all inputs: only dead outputs are dropped."""

    choice = "rows"
    drops_inputs = False


class Csr(Kernel):
    """The kept weights with their places, multiplied by torch's sparse kernels, on a CPU.

    A 1x1 convolution is a product too; a larger one becomes one by unfolding its input.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0., 0, 2], [0, 3, 0]]))
        >>> csr = Csr(layer, Csr.parts(layer))
        >>> csr.weight_values.tolist(), csr.weight_col.tolist(), csr.weight_crow.tolist()
        ([2.0, 3.0], [2, 1], [0, 1, 2])
    """

    choice = "csr"

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        if isinstance(layer, nn.Conv2d) and (
            layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
        ):
            return None
        kept = layer.weight.detach().flatten(1)
        counts = (kept != 0).sum(1)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        row, col = kept.nonzero(as_tuple=True)
        parts = {
            "weight_crow": crow.int(),
            "weight_col": col.int(),
            "weight_values": kept[row, col],
        }
        return {**parts, **_bias(layer)}

    @override
    @staticmethod
    def lacking(weight: Tensor) -> str:
        if weight.device.type != "cpu":
            return f"CSR runs on a CPU, and the layer is on {weight.device}"
        if weight.dtype not in (torch.float32, torch.float64):
            return f"CSR needs float32 or float64, and the layer is {weight.dtype}"
        return ""

    @override
    def _hold(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        _no_beta_warning()
        self.weight_crow: Tensor
        self.weight_col: Tensor
        self.weight_values: Tensor
        self.bias: Tensor | None
        super()._hold(layer, parts)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _no_beta_warning()

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.is_conv:
            return self._convolve(x)
        lines = x.reshape(-1, x.shape[-1])
        out = lines.new_empty(len(lines), self.weight_shape[0])
        for start, y in self._products(lines.t()):
            # Written in this order: a transposed copy to contiguous memory has a kernel of its own.
            out[start : start + TILE] = y.t()
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
        for start, product in self._products(columns):
            out[:, start : start + TILE] = product
        y = out.view(-1, len(batch), height, width).transpose(0, 1)
        return y.contiguous() if x.dim() == 4 else y[0]

    def _products(self, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The weight times ``[inputs, n]``, plus the bias: tiles, and where they start."""
        matrix = self._matrix()
        bias = None if self.bias is None else self.bias[:, None]
        for start in range(0, columns.shape[1], TILE):
            y = matrix @ columns[:, start : start + TILE]
            yield start, y if bias is None else y.add_(bias)

    def _matrix(self) -> Tensor:
        """The weight ``[outputs, inputs]``: a view of the parts, so it costs microseconds."""
        shape = (self.weight_shape[0], torch.Size(self.weight_shape[1:]).numel())
        crow, col, values = self.weight_crow, self.weight_col, self.weight_values
        return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)

    @property
    @override
    def weight(self) -> Tensor:
        return self._matrix().to_dense().view(self.weight_shape)


class Sparse(Kernel):
    """The kept weights with their places, multiplied by native code of our own, on a CPU.

    A convolution is a product too: weights meet the pixels under their tap as they lie, row by row.
    Rows of its kernel are kept apart, so that those that see nothing but padding are left out.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0., 0, 2], [0, 3, 0]]))
        >>> sparse = Sparse(layer, Sparse.parts(layer))
        >>> [sparse.weight_values.tolist(), sparse.weight_column.tolist()]
        [[2.0, 3.0], [2, 1]]
    """

    choice = "sparse"
    exports = True

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
        return {**parts, **_bias(layer)}

    @override
    @staticmethod
    def lacking(weight: Tensor) -> str:
        if weight.device.type != "cpu":
            return f"the sparse product runs on a CPU, and the layer is on {weight.device}"
        if weight.dtype != torch.float32:
            return f"the sparse product needs float32, and the layer is {weight.dtype}"
        return native.lacking()

    @override
    def _hold(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        self.weight_start: Tensor
        self.weight_column: Tensor
        self.weight_values: Tensor
        self.bias: Tensor | None
        super()._hold(layer, parts)
        if isinstance(layer, nn.Conv2d):
            self.margins = _margins(layer)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.is_conv:
            return self._convolve(x) if x.dim() == 4 else self._convolve(x[None])[0]
        if x.shape[-1] != self.weight_shape[1]:
            raise RuntimeError(
                f"The layer takes {self.weight_shape[1]} inputs and got shape {tuple(x.shape)}."
            )
        if not self._at_home(x):
            return F.linear(x, self.weight, self.bias)
        return native.multiply(x, *self._parts(), self.weight_shape[0])

    def _convolve(self, x: Tensor) -> Tensor:
        outputs, channels, *kernel = self.weight_shape
        stride, dilation = self._pair("stride"), self._pair("dilation")
        left, right, top, bottom = self.margins
        if self.padding_mode != "zeros":
            x = F.pad(x, self.margins, str(self.padding_mode))
            left = right = top = bottom = 0
        high, wide = (
            (x.shape[2 + i] + both - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i, both in enumerate((top + bottom, left + right))
        )
        if x.shape[1] != channels or high < 1 or wide < 1:
            raise RuntimeError(
                f"The layer takes {channels} channels and images no smaller than its kernel of "
                f"{kernel}, and got shape {tuple(x.shape)}."
            )
        if not self._at_home(x):
            x = F.pad(x, (left, right, top, bottom))
            return F.conv2d(x, self.weight, self.bias, stride, 0, dilation)
        geometry = (*kernel, *stride, top, left, *dilation)
        return native.convolve(x, *self._parts(), (outputs, high, wide), geometry)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # Past the slow way to attributes of modules: the product itself takes microseconds.
        parameters, buffers = self._parameters, self._buffers
        values, bias = parameters["weight_values"], parameters["bias"]
        return buffers["weight_start"], buffers["weight_column"], values, bias  # type: ignore[return-value]

    def _at_home(self, x: Tensor) -> bool:
        """Whether nothing was moved or cast; if it was, the dense weight is made for each call."""
        value = self._parts()[2]
        return x.is_cpu and value.is_cpu and x.dtype == value.dtype == torch.float32

    @property
    @override
    def weight(self) -> Tensor:
        outputs, inputs, *kernel = self.weight_shape
        flat = torch.Size((inputs, *kernel)).numel()
        full = native.unpack(*self._parts()[:3], outputs, flat)
        if not kernel:
            return full
        return full.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous()


def _margins(layer: nn.Conv2d) -> tuple[int, ...]:
    """How many pixels a convolution pads: left, right, top and bottom."""
    margins: list[int] = []
    for i in (1, 0):
        if isinstance(layer.padding, str):
            both = layer.dilation[i] * (layer.kernel_size[i] - 1) if layer.padding == "same" else 0
            margins += (both // 2, both - both // 2)
        else:
            margins += (layer.padding[i], layer.padding[i])
    return tuple(margins)


class SemiStructured(Kernel):
    """2:4 sparsity on CUDA: of four neighbouring weights at most two are kept.

    Stored are the two values of every four and their places, in half the memory of the dense
    weight; the layout the hardware wants is made at the first call.
    """

    choice = "2:4"

    @override
    @classmethod
    def parts(cls, layer: Dense) -> Parts | None:
        weight = layer.weight.detach()
        if isinstance(layer, nn.Conv2d) or weight.shape[0] % 32 or weight.shape[1] % 64:
            return None
        fours = weight.view(len(weight), -1, 4)
        if ((fours != 0).sum(2) > 2).any():
            return None
        places = (fours != 0).to(torch.uint8).topk(2, dim=2).indices.sort(2).values
        parts = {
            "weight_pairs": fours.gather(2, places).flatten(1),
            "weight_places": places.to(torch.uint8).flatten(1),
        }
        return {**parts, **_bias(layer)}

    @override
    @staticmethod
    def lacking(weight: Tensor) -> str:
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device)[0] < 8:
            return f"2:4 needs a CUDA device of capability 8 or later, and got {weight.device}"
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return f"2:4 needs float16 or bfloat16, and the layer is {weight.dtype}"
        return ""

    @override
    def _hold(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        self.weight_pairs: Tensor
        self.weight_places: Tensor
        self.bias: Tensor | None
        super()._hold(layer, parts)
        self._packed: Tensor | None = None
        self._packed_from = (0, 0)

    @override
    def forward(self, x: Tensor) -> Tensor:
        # Parts that were moved, cast or loaded anew are packed anew.
        now = (self.weight_pairs.data_ptr(), self.weight_pairs._version)
        if self._packed is None or self._packed_from != now:
            self._packed = torch.sparse.to_sparse_semi_structured(self.weight)
            self._packed_from = now
        return F.linear(x, self._packed, self.bias)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # it is made again from the parts

    @property
    @override
    def weight(self) -> Tensor:
        rows, inputs = self.weight_shape
        full = self.weight_pairs.new_zeros(rows, inputs // 4, 4)
        places = self.weight_places.long().view(rows, -1, 2)
        return full.scatter_(2, places, self.weight_pairs.view(rows, -1, 2)).view(rows, inputs)


KERNELS: dict[str, type[Kernel]] = {k.choice: k for k in (Rows, Thin, Sparse, Csr, SemiStructured)}
"""All forms but the dense one."""


@cache
def _no_beta_warning() -> None:
    """Let torch say once, unheard, that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zero = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int32), zero[:0], torch.zeros(0), (1, 1))
