"""Products: a sparse matrix times a dense one, and a sparse convolution, by the C code."""

import ctypes
import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from mtprune.compression.forms import building
from mtprune.compression.forms.held import held
from mtprune.compression.forms.indices import BROKEN, check, unpack
from mtprune.compression.forms.packed import Matrix, sparse_matrix

__all__ = ["convolve", "is_eager", "is_plain", "multiply"]

_LARGEST = (1 << 31) - 1
"""Sizes, steps and margins are no larger, so that sums and products of two are no overflow."""


def multiply(
    x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    """``x W^T + b`` for a sparse weight ``[outputs, inputs]``.

    Args:
        x: ``[..., inputs]``, float32 on the CPU, as are all other numbers.
        start: ``[outputs + 1]``, int32: the index at which the values of each output begin.
        column: ``[nonzero]``, int16 or int32: the input of each value.
        value: ``[nonzero]``.
        bias: ``[outputs]`` or None.
        outputs: The number of outputs.

    Returns:
        ``[..., outputs]``.

    Example:
        >>> start, column = torch.tensor([0, 1, 3]).int(), torch.tensor([2, 0, 1]).int()
        >>> multiply(torch.tensor([[1., 10, 100]]), start, column, torch.ones(3), None, 2)
        tensor([[100.,  11.]])
    """
    call = _multiply if is_eager(x) else _multiply_op
    y: Tensor = call(x, start, column, value, bias, outputs)
    return y


def convolve(
    x: Tensor,
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    """The convolution of images with a sparse weight ``[outputs, height, width, channels]``.

    Args:
        x: ``[images, channels, height, width]``, float32 on the CPU.
        start: ``[outputs * kernel height + 1]``, int32: the index at which the values of each
            output and kernel row begin.
        column: ``[nonzero]``, int16 or int32: the index of each value in its output's flat weight.
        value: ``[nonzero]``.
        bias: ``[outputs]`` or None.
        size: The size of the result, ``(outputs, height, width)``.
        geometry: Kernel, stride, padding at the top and left, dilation: height and width of each.

    Returns:
        ``[images, outputs, height, width]``.
    """
    call = _convolve if is_eager(x) else _convolve_op
    y: Tensor = call(x, start, column, value, bias, size, geometry)
    return y


def is_plain(x: Tensor) -> bool:
    """Whether a tensor is its numbers in memory, and nothing but them is computed with.

    It is not while a transform of ``torch.func`` or a forward derivative is taken, nor if its
    numbers are to be negated first.
    """
    return torch.compiler.is_compiling() or not (
        x.layout != torch.strided
        or x.is_neg()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_eager(x: Tensor) -> bool:
    """Whether a plain tensor is computed with now: no gradient, no compiler, no tracing.

    Then torch's dispatcher is passed by: it takes longer than the product for a short sentence.
    """
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def _multiply(
    x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None, outputs: int
) -> Tensor:
    _check_rows(x, outputs)
    *batch, inputs = x.shape
    library = building.library()
    if isinstance(library, str):
        _warn(library)
    if isinstance(library, str) or not _is_native(x, start, column, value, bias):
        weight = _dense((start, column, value), (outputs, inputs), x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    matrix = _packed(library, start, column, value, bias, (outputs, inputs, 1))
    x = x.resolve_neg().contiguous()
    y = x.new_empty((*batch, outputs))
    code = library.mtprune_linear(
        ctypes.addressof(matrix),
        x.data_ptr(),
        math.prod(batch),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if code:
        _fail(code)
    return y


def _convolve(
    x: Tensor,
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    _check_geometry(x, size, geometry)
    library = building.library()
    if isinstance(library, str):
        _warn(library)
    if isinstance(library, str) or not _is_native(x, start, column, value, bias):
        return _convolve_dense(x, start, column, value, bias, size, geometry)
    shape = size[0], math.prod((x.shape[1], *geometry[:2])), geometry[0]
    matrix = _packed(library, start, column, value, bias, shape)
    x = x.resolve_neg().contiguous()
    y = x.new_empty((x.shape[0], *size))
    sizes = (*x.shape, *size[1:], *geometry)
    code = library.mtprune_conv(
        ctypes.addressof(matrix),
        (ctypes.c_int64 * len(sizes))(*sizes),
        x.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    if code:
        _fail(code)
    return y


def _convolve_dense(
    x: Tensor,
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    geometry: Sequence[int],
) -> Tensor:
    kernel, stride, before, dilation = (tuple(geometry[i : i + 2]) for i in (0, 2, 4, 6))
    weight = _dense((start, column, value), (size[0], *kernel, x.shape[1]), x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    ends = [(size[1 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(2)]
    after = [max(0, ends[i] - before[i] - x.shape[2 + i]) for i in range(2)]
    if after == list(before):
        y = F.conv2d(x, weight, bias, stride, before, dilation)
        if y.shape[2:] == tuple(size[1:]):
            return y.contiguous()
    padded = F.pad(x, (before[1], after[1], before[0], after[0]))
    y = F.conv2d(padded, weight, bias, stride, 0, dilation)
    return y[..., : size[1], : size[2]].contiguous()


def _is_native(
    x: Tensor, start: Tensor, column: Tensor, value: Tensor, bias: Tensor | None
) -> bool:
    """Whether the C code can multiply these: on the CPU, and in float32.

    Raises:
        ValueError: If they are on several devices.
    """
    _one_device(x, start, column, value, bias)
    return x.is_cpu and x.dtype == value.dtype == torch.float32


def _one_device(x: Tensor, *parts: Tensor | None) -> None:
    """Refuse a product of what is on several devices; nothing at all may stand in for numbers.

    Raises:
        ValueError: If so.
    """
    others = [part.device for part in parts if part is not None and part.device != x.device]
    if others:
        raise ValueError(
            f"A sparse product has its inputs on {x.device} and its weight on {others[0]}. Move "
            "one of them."
        )


def _dense(
    parts: tuple[Tensor, Tensor, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The dense weight of a sparse one, of another type, whatever stands in its parts.

    Args:
        parts: Starts, columns and values.
        shape: ``(outputs, inputs)``, or that of the stored convolution, ``(outputs, height, width,
            channels)``; the result has its channels before its height.
        dtype: The type of the result.

    Raises:
        ValueError: If its indices are out of range.
    """

    def make() -> Tensor:
        rows, columns = shape[0], math.prod(shape[1:])
        check(*parts, rows, 1 if len(shape) == 2 else shape[1], columns)
        full = unpack(*parts, rows, columns).view(shape)
        return full if len(shape) == 2 else full.permute(0, 3, 1, 2).contiguous()

    return (held("dense", parts, shape, make) if building.unavailable() else make()).to(dtype)


def _check_rows(x: Tensor, outputs: int) -> None:
    """Refuse inputs that are no rows, and numbers of outputs that are none.

    Raises:
        ValueError: If so.
    """
    if x.dim() < 1 or x.shape[-1] > _LARGEST or not 0 <= outputs <= _LARGEST:
        raise ValueError(
            f"A sparse product takes rows [..., inputs], and makes from 0 to {_LARGEST} outputs. "
            f"Got shape {tuple(x.shape)} and {outputs}."
        )


def _check_geometry(x: Tensor, size: Sequence[int], geometry: Sequence[int]) -> None:
    """Refuse sizes that are none.

    Raises:
        ValueError: If so.
    """
    right = (
        x.dim() == 4
        and len(size) == 3
        and len(geometry) == 8
        and min(size) >= 0
        and min(geometry[:4]) >= 1
        and min(geometry[4:6]) >= 0
        and min(geometry[6:]) >= 1
        and max(*x.shape, *size, *geometry) <= _LARGEST
        and math.prod((x.shape[1], *geometry[:2])) <= _LARGEST
    )
    if not right:
        raise ValueError(
            f"A sparse convolution takes images [count, channels, height, width], a size of three "
            f"and a geometry of eight numbers, none above {_LARGEST}. Got shape {tuple(x.shape)}, "
            f"{list(size)} and {list(geometry)}."
        )


def _packed(
    library: ctypes.CDLL,
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int],
) -> Matrix:
    """A sparse weight as the C code reads it: outputs, inputs, and groups of each output's values.

    Raises:
        ValueError: If its parts do not fit each other.
    """

    def make() -> Matrix:
        if (
            start.dtype != torch.int32
            or column.dtype not in (torch.int16, torch.int32)
            or value.dtype != torch.float32
            or (bias is not None and (bias.shape != shape[:1] or bias.dtype != torch.float32))
        ):
            raise ValueError(BROKEN)
        matrix = sparse_matrix(start, column, value, bias, *shape)
        if library.mtprune_check(ctypes.addressof(matrix)):
            raise ValueError(BROKEN)
        return matrix

    others = (start, column) if bias is None else (start, column, bias)
    return held("packed", (*others, value), shape, make)


def _fail(code: int) -> NoReturn:
    if code == 1:
        raise MemoryError("There is no memory left for a sparse product.")
    raise ValueError(BROKEN)


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"Sparse layers are multiplied as dense ones, which are kept beside them: {reason}. Save "
        "the model where it was compressed and load it here: then its layers are dense alone.",
        stacklevel=2,
    )


_SPARSE = "Tensor x, Tensor start, Tensor column, Tensor value, Tensor? bias"

_multiply_op = torch.library.custom_op(
    "mtprune::sparse_linear",
    _multiply,
    mutates_args=(),
    schema=f"({_SPARSE}, int outputs) -> Tensor",
)
_convolve_op = torch.library.custom_op(
    "mtprune::sparse_conv2d",
    _convolve,
    mutates_args=(),
    schema=f"({_SPARSE}, SymInt[] size, int[] geometry) -> Tensor",
)


@_multiply_op.register_fake
def _shape_of_product(x: Tensor, *weight: Any) -> Tensor:
    _one_device(x, *weight[:4])
    return x.new_empty((*x.shape[:-1], weight[-1]))


@_convolve_op.register_fake
def _shape_of_convolution(x: Tensor, *weight: Any) -> Tensor:
    _one_device(x, *weight[:4])
    return x.new_empty((x.shape[0], *weight[-2]))


def _no_backward(context: Any, gradient: Tensor) -> None:
    raise RuntimeError(
        "Sparse layers are for inference: there is no gradient through them. Train the dense model "
        "and compress it then."
    )


_multiply_op.register_autograd(_no_backward)
_convolve_op.register_autograd(_no_backward)
