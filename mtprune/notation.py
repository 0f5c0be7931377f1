"""Notation: methods as plain data that JSON can hold, and back.

* A frozen value is ``{"type": "Cubic", "begin": 0, "end": 100, "every": 10}``, with all its fields.
* A function of the package is ``{"function": "saliency.taylor"}``; `votes.at_least` has its ``m``.
* What is yours is called as you call it: ``{"own": "energy"}``, or a type of that name.
* What the model is called with is no part of a method: ``{"argument": "example_inputs"}``.
* Numbers, strings, lists (for tuples) and mappings are themselves; ``{"number": "inf"}`` is no
  number of JSON.

A mapping of a method has numbers for values, so one with a string under these keys is never meant.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache, partial
from importlib import import_module
from types import FunctionType
from typing import Any

from mtprune import checks
from mtprune.reading import Entry

__all__ = ["FORMAT", "method_from", "noted"]

FORMAT = 1
"""The version of the notation."""

_ADVICE = "Take what to_dict() gave; what a newer mtprune has written needs a newer mtprune."
_VALUES = (
    *("methods", "schedule", "granularity", "allocation", "weighting"),
    *("refitting", "structure", "patterns", "latency"),
)
_FUNCTIONS = ("saliency", "votes", "weighting")
# What the package asks and is told meanwhile: no part of any method.
_NO_VALUES = ("Ballot", "Budget", "Decision", "Masks", "Needs", "Pace", "Sample", "Timing")
_NO_PARTS = ("saliency.asks", "weighting.noise_weights", "weighting.parse_weighting")
_MARKS = ("type", "function", "own", "argument", "number")

Own = Mapping[str, Any]
"""What is not of this package, by the name that it has in the notation."""


@cache
def _types() -> dict[str, type]:
    """The frozen values of the package that methods are made of, by name."""
    found = {}
    for module in (import_module(f"mtprune.{name}") for name in _VALUES):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and is_dataclass(value) and name not in _NO_VALUES:
                found[name] = value
    return found


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    """The functions of the package that methods are made of, by module and name."""
    found: dict[str, Callable[..., Any]] = {}
    for name in _FUNCTIONS:
        module = import_module(f"mtprune.{name}")
        values = {f"{name}.{key}": getattr(module, key) for key in module.__all__}
        found |= {key: value for key, value in values.items() if isinstance(value, FunctionType)}
    return {key: value for key, value in found.items() if key not in _NO_PARTS}


# From a method to data.


def noted(method: object, own: Own | None = None) -> dict[str, Any]:
    """A method as plain data.

    Args:
        method: The method.
        own: Functions, classes and values that are not of this package, by name.

    Raises:
        ValueError: If it has parts that the notation cannot say, with what to do.
    """
    checks.mapping("own", own or {}, "name -> function, class or value")
    for name in own or {}:
        if name in _types():
            raise ValueError(f"`own` names '{name}', which this package has. Choose another name.")
    return {"format": FORMAT, **_value(method, own or {}, "")}


def _value(value: Any, own: Own, where: str) -> Any:
    """One value; ``where`` is its path in the method."""
    for name, mine in own.items():
        if value is mine:
            return {"own": name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"number": str(float(value))}
    if isinstance(value, Mapping):
        return _mapping(value, own, where)
    if callable(value) and not is_dataclass(value):
        return _function(value, own, where)
    if is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, own, where)
    if isinstance(value, Collection):
        return [_value(part, own, f"{where}[{place}]") for place, part in enumerate(value)]
    raise _unknown(value, where)


def _mapping(value: Mapping[Any, Any], own: Own, where: str) -> dict[str, Any]:
    for key, part in value.items():
        if not isinstance(key, str) or (key in _MARKS and isinstance(part, str)):
            raise ValueError(
                f"`{where}` has the key {key!r}, which JSON cannot tell from others. Name it "
                "otherwise."
            )
    return {key: _value(part, own, f"{where}[{key!r}]") for key, part in value.items()}


def _function(value: Any, own: Own, where: str) -> dict[str, Any]:
    from mtprune.votes import mth_smallest

    for name, known in _functions().items():
        if value is known:
            return {"function": name}
    if isinstance(value, partial) and value.func is mth_smallest:
        return {"function": "votes.at_least", **value.keywords}
    raise _unknown(value, where)


def _dataclass(value: Any, own: Own, where: str) -> dict[str, Any]:
    cls, known = type(value), {**_types(), **own}
    name = next((name for name, kind in known.items() if kind is cls), None)
    if name is None:
        raise _unknown(value, where)
    found: dict[str, Any] = {"type": name}
    for field in fields(cls):
        part = getattr(value, field.name)
        if not field.compare:  # not what the method is, but what it is shown
            if part is not None:
                found[field.name] = {"argument": field.name}
        elif field.init:
            inner = f"{where}.{field.name}" if where else field.name
            found[field.name] = _value(part, own, inner)
    return found


def _unknown(value: Any, where: str) -> ValueError:
    kind, name = type(value).__name__, getattr(value, "__name__", "")
    subject = f"`{where}` is {name or f'a {kind}'}" if where else f"This method is a {kind}"
    called = name or kind
    named = called if isinstance(value, FunctionType) or is_dataclass(value) else "..."
    if not called.isidentifier():  # a lambda
        called, named = "mine", "..."
    own = f"own={{{called!r}: {named}}}"
    return ValueError(
        f"{subject}, which is not of this package, and JSON holds no code. Give it a name, here "
        f"and where it is read: to_dict({own}), mtprune.method_from(data, {own})."
    )


# And back.


def method_from(data: Any, *, own: Own | None = None, example_inputs: Any = None) -> Any:
    """The method from the data that ``method.to_dict()`` returned.

    Nothing in the data is run: names stand for what this package has, and for what you name. What
    an older version has left out is as it was then.

    Args:
        data: The data, as JSON gives it back.
        own: Functions, classes and values that are not of this package, by the names that they
            had in ``to_dict``.
        example_inputs: What the model is called with, if the method measures multiply-adds or
            finds channels.

    Raises:
        ValueError: If it is not the data of a method, or of a version or with names that are not
            known here. The error names them.

    Example:
        >>> import json, mtprune
        >>> method = mtprune.Vote(0.9, vote=mtprune.votes.majority)
        >>> data = json.loads(json.dumps(method.to_dict()))
        >>> data["vote"], mtprune.method_from(data) == method
        ({'function': 'votes.majority'}, True)
    """
    entry = Entry(data, "This method", _ADVICE)
    kind = entry["format"].whole()
    if kind != FORMAT:
        raise ValueError(
            f"This method has format {kind}, and this version of mtprune reads {FORMAT}. Update "
            "mtprune."
        )
    inner = {key: value for key, value in data.items() if key != "format"}
    method = _Reader(own or {}, {"example_inputs": example_inputs}).value(
        Entry(inner, "This method", _ADVICE)
    )
    if not (hasattr(method, "decide") and hasattr(method, "needs")):
        raise entry["type"].wrong("must be a method such as 'Vote'")
    return method


class _Reader:
    """Reads values.

    Args:
        own: See `method_from`.
        arguments: What is no part of a method, by name.
    """

    def __init__(self, own: Own, arguments: Mapping[str, Any]) -> None:
        checks.mapping("own", own, "name -> function, class or value")
        self._own = own
        self._arguments = arguments

    def value(self, entry: Entry) -> Any:
        """The value of an entry."""
        if isinstance(entry.value, Mapping):
            read: dict[str, Callable[[Entry], Any]] = {
                "type": self._dataclass,
                "function": self._function,
                "own": lambda part: self._own[self._named(part["own"], self._own)],
                "argument": self._misplaced,
                "number": lambda part: float(part["number"].text(("inf", "-inf", "nan"))),
            }
            marks = [mark for mark in read if isinstance(entry.value.get(mark), str)]
            if marks:
                return read[marks[0]](entry)
            return {key: self.value(part) for key, part in entry.mapping().items()}
        if isinstance(entry.value, (list, tuple)):
            return tuple(map(self.value, entry.items()))
        if checks.is_number(entry.value):
            entry.number()  # which refuses what is beyond all numbers
        return entry.plain()

    def _named(self, entry: Entry, known: Collection[str]) -> str:
        """A name that must be known."""
        name = entry.text()
        if name not in known:
            raise ValueError(
                f"This method has '{name}', which is neither of this version of mtprune nor in "
                f"`own`. Update mtprune; or, if it is yours, pass method_from(data, "
                f"own={{{name!r}: ...}})."
            )
        return name

    def _dataclass(self, entry: Entry) -> Any:
        known = {**_types(), **{n: v for n, v in self._own.items() if isinstance(v, type)}}
        name = self._named(entry["type"], known)
        cls: Any = known[name]
        given = [field for field in fields(cls) if field.init]
        needed = [f.name for f in given if f.default is f.default_factory is MISSING]
        parts = entry.fields(["type", *needed], optional=[field.name for field in given])
        shown = {field.name for field in given if not field.compare}
        values = {
            key: self._argument(part, key) if key in shown else self.value(part)
            for key, part in parts.items()
            if key != "type"
        }
        try:
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"This method has a {name} that cannot be: {error}") from error

    def _function(self, entry: Entry) -> Any:
        name = self._named(entry["function"], _functions())
        parts = entry.mapping()
        del parts["function"]
        if name == "votes.at_least":
            return _functions()[name](entry.fields(["function", "m"])["m"].whole(least=1))
        entry.fields(["function"])
        return _functions()[name]

    def _argument(self, entry: Entry, name: str) -> Any:
        """What a value is shown, which is passed beside the data."""
        if entry.value is None:
            return None
        entry.fields(["argument"])["argument"].text([name])
        if self._arguments.get(name) is None:
            raise ValueError(
                f"This method was made with `{name}`, which are no part of it. Pass "
                f"method_from(data, {name}=...): what the model is called with."
            )
        return self._arguments[name]

    def _misplaced(self, entry: Entry) -> Any:
        raise entry.wrong("must be no argument: only what a model is called with is one")
