"""Progress bars, where tqdm is installed."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["bar", "is_watched", "stages"]

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


@contextmanager
def stages(count: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar over stages of unlike kinds; its function names the stage that begins.

    Example:
        >>> with stages(2, shown=False) as begin:
        ...     begin("reading")
        ...     begin("writing")
    """
    try:
        from tqdm.auto import tqdm
    except ImportError:
        shown = False
    if not shown:
        yield lambda label: None
        return
    with tqdm(total=count, leave=False, bar_format="{desc}: {n_fmt}/{total_fmt}{bar}") as shown_bar:

        def begin(label: str) -> None:
            shown_bar.update()
            shown_bar.set_description(label)

        yield begin


def is_watched() -> bool:
    """Whether somebody may read along: errors go to a terminal, not to a file."""
    return sys.stderr.isatty()
