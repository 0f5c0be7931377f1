"""Indices: which places of a matrix the values of a sparse one stand in.

They may come from a file, and kernels read wherever they point, so they are looked at first.
"""

import torch
from torch import Tensor

__all__ = ["BROKEN", "check", "check_range", "unpack"]

BROKEN = "The parts of a sparse weight do not fit each other. Compress or load the model again."
"""What is said of parts that do not fit each other."""


def unpack(start: Tensor, column: Tensor, value: Tensor, rows: int, columns: int) -> Tensor:
    """The dense matrix ``[rows, columns]`` of a sparse one, each row of which has as many groups.

    Args:
        start: ``[rows * groups + 1]``, the index at which the values of each group begin.
        column: ``[nonzero]``, the column of each value.
        value: ``[nonzero]``.
        rows: The number of rows.
        columns: The number of columns.

    Example:
        >>> unpack(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), torch.ones(3), 2, 3)
        tensor([[0., 0., 1.],
                [1., 1., 0.]])
    """
    groups = (len(start) - 1) // max(1, rows)
    row = torch.arange(len(start) - 1, device=start.device).div(
        max(1, groups), rounding_mode="floor"
    )
    row = row.repeat_interleave(start.long().diff(), output_size=len(value))
    full = value.new_zeros(rows, columns)
    full[row, column.long()] = value
    return full


def check(
    start: Tensor, column: Tensor, value: Tensor, rows: int, groups: int, columns: int
) -> None:
    """Refuse parts of a sparse matrix that do not fit each other; see `unpack`.

    Raises:
        ValueError: If so.
    """
    right = (
        start.dim() == column.dim() == value.dim() == 1
        and not start.is_floating_point()
        and not column.is_floating_point()
        and start.numel() == rows * groups + 1
        and column.numel() == value.numel()
        and int(start[0]) == 0
        and int(start[-1]) == value.numel()
        and bool((start[1:] >= start[:-1]).all())
    )
    if right and column.numel():
        # Short numbers may be unsigned, as for the C code: what is negative is then too large.
        wide = column.long() & 0xFFFF if column.dtype == torch.int16 else column.long()
        group = torch.arange(rows * groups, device=start.device) % groups
        group = group.repeat_interleave(start.long().diff(), output_size=value.numel())
        each = columns // groups
        right = bool(((wide >= group * each) & (wide < (group + 1) * each)).all())
    if not right:
        raise ValueError(BROKEN)


def check_range(start: Tensor, column: Tensor, value: Tensor, rows: int, columns: int) -> None:
    """Refuse parts of a sparse matrix, without groups, that point out of it: `check`, in one pass.

    Raises:
        ValueError: If so.
    """
    count = value.numel()
    right = (
        start.dim() == column.dim() == value.dim() == 1
        and start.dtype == column.dtype
        and start.dtype in (torch.int32, torch.int64)
        and len(start) == rows + 1
        and len(column) == count
    )
    if right:
        low, high = torch.aminmax(column) if count else (0, -1)
        ends = start.tolist() if rows < 2 else (int(start[0]), int(start[-1]))
        right = ends[0] == 0 and ends[-1] == count and int(low) >= 0 and int(high) < columns
        right = right and (rows < 1 or int(start.diff().amin()) >= 0)
    if not right:
        raise ValueError(BROKEN)
