"""Checks of arguments: an error says what an argument must be, and what it is.

Each check takes the name of an argument and its value, and raises if the value breaks the rule. In
messages the name stands in backticks. Three words vary:

* ``of``: which entry of the argument is meant, such as ``" of task 'depth'"``;
* ``must``: the rule in other words;
* ``why``: what to know about the value that was given.
"""

from collections.abc import Collection, Mapping
from typing import Any

__all__ = [
    "either",
    "function",
    "has_methods",
    "inside",
    "is_number",
    "is_whole",
    "mapping",
    "message",
    "number",
    "object_with",
    "one_of",
    "share",
    "sparsity",
    "whole",
]


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def has_methods(value: object, *names: str) -> bool:
    """Whether a value has these methods, and is no class."""
    methods = (getattr(value, name, None) for name in names)
    return not isinstance(value, type) and all(map(callable, methods))


def whole(name: str, value: Any, least: int, *, of: str = "", must: str = "") -> None:
    """A whole number, at least ``least``.

    Raises:
        ValueError: If it is none.

    Example:
        >>> whole("every", 2.5, least=1)
        Traceback (most recent call last):
        ValueError: `every` must be a whole number, at least 1. Got 2.5.
    """
    if not is_whole(value) or value < least:
        must = must or f"must be a whole number, at least {least}"
        raise ValueError(message(name, value, must, of))


def number(name: str, value: object, *, of: str = "", must: str = "must be a number") -> None:
    """A number of any size.

    Raises:
        TypeError: If it is none.
    """
    if not is_number(value):
        raise TypeError(message(name, value, must, of))


def inside(
    name: str, value: Any, interval: str, *, of: str = "", must: str = "", why: str = ""
) -> None:
    """A number inside an interval.

    Args:
        name: The argument.
        value: Its value.
        interval: In the usual notation: ``"(0, 1]"`` is without 0 and with 1.
        of: See the module.
        must: See the module.
        why: See the module.

    Raises:
        ValueError: If it is outside, or no number.

    Example:
        >>> inside("ratio", 0, "(0, 1]")
        Traceback (most recent call last):
        ValueError: `ratio` must be in (0, 1]. Got 0.
    """
    if not _is_inside(value, interval):
        raise ValueError(message(name, value, must or f"must be in {interval}", of, why))


def share(name: str, value: Any, interval: str, must: str) -> None:
    """A share inside an interval; what looks like a percentage is answered with the share.

    Raises:
        ValueError: If it is outside.
    """
    if not _is_inside(value, interval):
        hint = f" Did you mean {value / 100:g}?" if 2.0 <= value < 100.0 else ""
        raise ValueError(message(name, value, must) + hint)


def sparsity(name: str, value: Any) -> None:
    """A share of zeros, in [0, 1).

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.

    Example:
        >>> sparsity("sparsity", 90)
        Traceback (most recent call last):
        ValueError: `sparsity` must be in [0, 1). Got 90. Did you mean 0.9?
    """
    number(name, value, must="must be a number in [0, 1)")
    share(name, value, "[0, 1)", "must be in [0, 1)")


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """One of many names.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> one_of("scale", "max", ("rms", "none"))
        Traceback (most recent call last):
        ValueError: `scale` must be one of ('rms', 'none'). Got 'max'.
    """
    if value not in known:
        raise ValueError(message(name, value, f"must be one of {known}"))


def either(name: str, value: object, known: Collection[str | None], other: str = "") -> None:
    """One of a few names.

    Args:
        name: The argument.
        value: Its value.
        known: The names.
        other: What it could be besides, in words; the caller has found that it is not.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> either("rule", "lamb", ("adam", "sgd"))
        Traceback (most recent call last):
        ValueError: `rule` must be 'adam' or 'sgd'. Got 'lamb'.
    """
    if value not in known:
        *first, last = [*map(repr, known), *([other] if other else [])]
        raise ValueError(message(name, value, f"must be {', '.join(first)} or {last}"))


def function(name: str, value: object) -> None:
    """Anything that can be called.

    Raises:
        TypeError: If it cannot.
    """
    if not callable(value):
        raise TypeError(message(name, value, "must be a function"))


def object_with(name: str, value: object, *methods: str, must: str) -> None:
    """An object with these methods, and no class.

    Raises:
        TypeError: If it lacks one.
    """
    if not has_methods(value, *methods):
        raise TypeError(message(name, value, must))


def mapping(
    name: str,
    value: object,
    form: str,
    *,
    of: str = "",
    filled: bool = False,
) -> None:
    """A mapping.

    Args:
        name: The argument.
        value: Its value.
        form: What it maps to what, in words.
        of: See the module.
        filled: Refuse an empty one too.

    Raises:
        TypeError: If it is none.
        ValueError: If it is none, or empty, and must be ``filled``.

    Example:
        >>> mapping("priority", 2.0, "task -> factor")
        Traceback (most recent call last):
        TypeError: `priority` must be a mapping task -> factor. Got 2.0.
    """
    if not isinstance(value, Mapping) or (filled and not value):
        error = ValueError if filled else TypeError
        raise error(message(name, value, f"must be a mapping {form}", of))


def message(name: str, value: object, must: str, of: str = "", why: str = "") -> str:
    """What an error says; see the module."""
    return f"`{name}`{of} {must}. Got {value!r}{why and f': {why}'}."


def _is_inside(value: Any, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(", "))
    try:
        above = value >= low if interval.startswith("[") else value > low
        below = value <= high if interval.endswith("]") else value < high
        return bool(above and below) and not isinstance(value, bool)
    except TypeError:  # no number
        return False
