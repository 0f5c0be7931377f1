"""Progress bars, where tqdm is installed."""

import sys
from collections.abc import Iterable
from typing import TypeVar

__all__ = ["bar", "is_watched"]

T = TypeVar("T")


def bar(items: Iterable[T], shown: bool, label: str) -> Iterable[T]:
    """The same items, with a progress bar if one is wanted and can be shown.

    Example:
        >>> list(bar([1, 2], shown=False, label="observing"))
        [1, 2]
    """
    if not shown:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    watched: Iterable[T] = tqdm(items, desc=label, leave=False)
    return watched


def is_watched() -> bool:
    """Whether somebody may read along: errors go to a terminal, not to a file."""
    return sys.stderr.isatty()
