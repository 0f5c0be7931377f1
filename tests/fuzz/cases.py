"""Cases: frozen values that chance draws, JSON holds, and minimising makes simpler.

A case is a frozen dataclass whose fields are numbers, strings, tuples, mappings of these, or such
dataclasses. The default of every field is its simplest value: so JSON leaves it out, and a simpler
case is one that has a default where the other has something else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

C = TypeVar("C")


def to_json(case: Any) -> dict[str, Any]:
    """A case without what is at its simplest."""
    return {
        field.name: to_json(value) if is_dataclass(value) else _plain(value)
        for field in fields(case)
        if (value := getattr(case, field.name)) != _default(field)
    }


def from_json(kind: type[C], given: Mapping[str, Any]) -> C:
    """The case of a kind that `to_json` gives this for."""
    hints = get_type_hints(kind)
    unknown = sorted(set(given) - set(hints))
    if unknown:
        raise ValueError(f"{kind.__name__} has no {unknown}. It has {sorted(hints)}.")
    return kind(
        **{
            name: from_json(hints[name], value) if is_dataclass(hints[name]) else _frozen(value)
            for name, value in given.items()
        }
    )


def simpler(case: C) -> Iterator[C]:
    """The neighbours of a case that are simpler in one place: the largest steps first."""
    for step in (_defaults, _nearer, _inside):
        for field in fields(case):  # type: ignore[arg-type]
            value = getattr(case, field.name)
            for other in step(value, _default(field)):
                yield replace(case, **{field.name: other})  # type: ignore[type-var]


def _defaults(value: Any, default: Any) -> Iterator[Any]:
    if value != default:
        yield default


def _nearer(value: Any, default: Any) -> Iterator[Any]:
    """A tuple or mapping with one entry less, a number half way to the default."""
    if isinstance(value, tuple):
        yield from (value[:i] + value[i + 1 :] for i in range(len(value)) if len(value) > 1)
    elif isinstance(value, Mapping):
        yield from ({k: v for k, v in value.items() if k != key} for key in value)
    elif type(value) is int and type(default) is int and abs(value - default) > 1:
        yield (value + default) // 2
        yield value - 1 if value > default else value + 1


def _inside(value: Any, default: Any) -> Iterator[Any]:
    """A value of which one part is simpler; entries of a tuple may become its first."""
    if is_dataclass(value):
        yield from simpler(value)
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            for first in default[:1] if isinstance(default, tuple) else ():
                if part != first:
                    yield (*value[:i], first, *value[i + 1 :])


def _default(field: "Field[Any]") -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(inner) for key, inner in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value
