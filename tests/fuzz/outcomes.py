"""Outcomes: how a case ends is told by what it raises, and calls of ours are watched."""

import ast
import linecache
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

import mtprune

_OURS = str(Path(mtprune.__file__).parent)
_REFUSALS = (ValueError, TypeError, RuntimeError, OSError, ImportError)


class OutcomeError(Exception):
    """What came of a case, raised where it is found.

    Attributes:
        kind: See `tests.fuzz.engine.KINDS`.
    """

    kind = ""


class RefusedError(OutcomeError):
    """A message of ours: what was asked cannot be done."""

    kind = "refused"


class WrongError(OutcomeError):
    """A result is not what it must be."""

    kind = "wrong"


class ChangedError(OutcomeError):
    """A call refused, and has changed something."""

    kind = "changed"


def check(true: bool, told: str) -> None:
    if not true:
        raise WrongError(told)


@contextmanager
def refusable(live: Callable[[], Any]) -> Iterator[None]:
    """A call of ours that works, or refuses with a message of ours and leaves all as it was.

    Args:
        live: What must be as before if it refuses.
    """
    before = live()
    try:
        yield
    except _REFUSALS as error:
        if not is_ours(error):
            raise
        difference = differs(before, live())
        if difference:
            raise ChangedError(f"{difference} changed by a call that refused: {error}") from error
        raise RefusedError(str(error)) from error


def is_ours(error: BaseException) -> bool:
    """Whether a statement of ours raised an error on purpose, with a sentence."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    file = trace.tb_frame.f_code.co_filename
    raised = file.startswith(_OURS) and trace.tb_lineno in _raises(file)
    return raised and str(error).rstrip().endswith((".", "?", ")"))


def differs(a: Any, b: Any, path: str = "") -> str:
    """Where two nested values differ, to the bit; empty if they are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return "" if bitwise(a, b) else path or "a tensor"
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f"{path} (keys {sorted(map(str, set(a) ^ set(b)))})"
        return next((d for k in a if (d := differs(a[k], b[k], f"{path}/{k}"))), "")
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((d for i, (x, y) in pairs if (d := differs(x, y, f"{path}/{i}"))), "")
    equal = type(a) is type(b) and (a == b or (a != a and b != b))
    return "" if equal else f"{path} ({a!r} and {b!r})"


def bitwise(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits, but for the sign of zeros and NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


@cache
def _raises(file: str) -> frozenset[int]:
    """The lines of a file's `raise` statements."""
    tree = ast.parse("".join(linecache.getlines(file)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return frozenset(
        line for node in found for line in range(node.lineno, (node.end_lineno or 0) + 1)
    )
