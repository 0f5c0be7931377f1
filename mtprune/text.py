"""Text: tables for people."""

from collections.abc import Sequence
from itertools import zip_longest

__all__ = ["columns"]


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    r"""One line for each row, with the cells of a column below each other.

    Args:
        rows: The cells, row by row; a short row ends early.
        left: The first so many columns are flush left, the others flush right.

    Example:
        >>> print(*columns([["layer", "kept"], ["up", "1,024"], ["down", "7"]]), sep="\n")
        layer   kept
        up     1,024
        down       7
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=False)
        justified = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells))
        lines.append("  ".join(justified).rstrip())
    return lines
