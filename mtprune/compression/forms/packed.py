"""Packed: a weight as the native code reads it, made once and kept beside it."""

import ctypes

import torch
from torch import Tensor

from mtprune.compression.forms import indices

__all__ = ["Matrix", "Norm", "dense_matrix", "norm_of", "sparse_matrix"]

LINES, GROUP, DENSE = 64, 192, 6
"""As in ``packed.h``: outputs of a tile and inputs of a group of a sparse product, and outputs in a
bundle of a dense one."""

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class _Struct(ctypes.Structure):
    """A struct of the C code that keeps the tensors alive into which it points."""

    kept: tuple[Tensor, ...]


class Matrix(_Struct):
    """A weight ``[outputs, inputs]`` and its bias."""

    _fields_ = (
        ("outputs", _LONG),
        ("inputs", _LONG),
        ("bias", _POINTER),
        ("dense", _POINTER),
        ("cell", _POINTER),
        ("line", _POINTER),
        ("column", _POINTER),
        ("value", _POINTER),
        ("lines", _LONG),
        ("weights", _LONG),
    )


class Norm(_Struct):
    """What a LayerNorm multiplies with, adds, and divides by at least."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("eps", ctypes.c_double))


def dense_matrix(weight: Tensor, bias: Tensor | None) -> Matrix:
    """A dense weight: for each bundle of outputs, and each input, the weights of all of them.

    Example:
        >>> matrix = dense_matrix(torch.ones(2, 3), None)
        >>> matrix.kept[0].shape  # bundles, inputs, outputs of the bundle
        torch.Size([1, 3, 6])
    """
    outputs, inputs = weight.shape
    bundles = -(-outputs // DENSE)
    full = weight.new_zeros(bundles * DENSE, inputs)
    full[:outputs] = weight
    packed = full.view(bundles, DENSE, inputs).transpose(1, 2).contiguous()
    # No bundle is no pointer, which would be a sparse weight.
    packed = packed if packed.numel() else packed.new_zeros(1)
    bias = _own(bias)
    matrix = Matrix(outputs, inputs, _at(bias), _at(packed))
    matrix.kept = (packed, *_tensors(bias))
    return matrix


def sparse_matrix(
    start: Tensor,
    column: Tensor,
    value: Tensor,
    bias: Tensor | None,
    outputs: int,
    inputs: int,
    groups: int = 1,
) -> Matrix:
    """A sparse weight in cells: for each tile of outputs, groups of inputs.

    A cell holds lines, which are parts of rows with anything in them, in the order of their counts.

    Args:
        start: ``[outputs * groups + 1]``: the index at which the values of each group of each
            output begin.
        column: ``[nonzero]``: the input of each value.
        value: ``[nonzero]``.
        bias: ``[outputs]`` or None.
        outputs: The number of outputs.
        inputs: The number of inputs.
        groups: Into how many groups of inputs each output's values are divided.

    Raises:
        ValueError: If indices are out of range.

    Example:
        >>> start, column = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
        >>> matrix = sparse_matrix(start, column, torch.tensor([5.0, 6, 7]), None, 2, 3)
        >>> cell, line, column, value = matrix.kept
        >>> line.tolist(), column.tolist(), value.tolist()  # the second row is the shorter one
        ([[1, 1], [0, 2]], [1, 0, 2], [7.0, 5.0, 6.0])
    """
    indices.check(start, column, value, outputs, groups, inputs)
    wide = column.long() & 0xFFFF if column.dtype == torch.int16 else column.long()
    counts = start[::groups].long().diff()
    row = torch.arange(outputs).repeat_interleave(counts, output_size=len(wide))
    across = -(-inputs // GROUP)
    cells = -(-outputs // LINES) * across
    cell = row // LINES * across + wide // GROUP
    line = cell * LINES + row % LINES
    counts = torch.bincount(line, minlength=cells * LINES)
    # By cell, then by the count of the line, then by line; weights of a line stay in their order.
    order = ((cell * (GROUP + 1) + counts[line]) * LINES + row % LINES).argsort(stable=True)
    used = counts.nonzero().flatten()
    rank = ((used // LINES * (GROUP + 1) + counts[used]) * LINES + used % LINES).argsort()
    used = used[rank]
    begins = torch.stack(
        [
            _begins(torch.bincount(used // LINES, minlength=cells)),
            _begins(torch.bincount(cell, minlength=cells)),
        ],
        dim=1,
    )
    parts = (
        begins.int(),
        torch.stack([used % LINES, counts[used]], dim=1).to(torch.uint8),
        (wide % GROUP)[order].to(torch.uint8),
        value.detach()[order].resolve_neg().contiguous(),
    )
    bias = _own(bias)
    pointers = (part.data_ptr() for part in parts)
    matrix = Matrix(outputs, inputs, _at(bias), None, *pointers, len(used), len(wide))
    matrix.kept = (*parts, *_tensors(bias))
    return matrix


def norm_of(weight: Tensor | None, bias: Tensor | None, eps: float) -> Norm:
    """The norm with these parameters, ``[width]`` each."""
    weight, bias = _own(weight), _own(bias)
    norm = Norm(_at(weight), _at(bias), eps)
    norm.kept = (*_tensors(weight), *_tensors(bias))
    return norm


def _begins(counts: Tensor) -> Tensor:
    """Where each of some runs begins, and the last one ends."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _own(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach().resolve_neg().clone().contiguous()


def _at(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


def _tensors(part: Tensor | None) -> tuple[Tensor, ...]:
    return () if part is None else (part,)
