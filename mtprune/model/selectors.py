"""Selectors: modules and parameters as users name them.

By module, parameter, name or glob, by a callable on the model, or by a collection of these.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mtprune.model.names import strip, unwrap

__all__ = ["Spec", "label", "match", "resolve", "selected"]

Spec = Any
"""Modules, parameters, names or globs, a callable on the model, or a collection of these."""


def selected(model: nn.Module, spec: Spec, argument: str) -> set[int]:
    """The ids of all parameters that a specification stands for."""
    return {id(p) for item in resolve(model, spec, argument) for p in match(model, item, argument)}


def resolve(model: nn.Module, spec: Spec, argument: str) -> list[Any]:
    """A specification as a flat list of modules, parameters and names."""
    if isinstance(spec, Mapping):
        raise TypeError(f"`{argument}` takes modules, parameters and names, not a mapping.")
    result: list[Any] = []
    for item in _items(spec):
        if isinstance(item, type):
            raise TypeError(f"`{argument}` holds the class {item.__name__}. Pass a module of it.")
        if callable(item) and not isinstance(item, nn.Module):
            result += resolve(model, item(model), argument)
        else:
            result.append(item)
    return result


def _items(spec: Spec) -> Iterator[Any]:
    """A specification's single items: a module list or a parameter is one item, a list is many."""
    if isinstance(spec, (str, nn.Module, Tensor)) or callable(spec):
        yield spec
    elif isinstance(spec, Iterable):
        for item in spec:
            yield from _items(item)
    else:
        raise TypeError(
            "Modules are named by module, parameter, name or glob, or a collection of these. "
            f"Got {spec!r}."
        )


def match(model: nn.Module, item: Any, argument: str) -> list[nn.Parameter]:
    """The parameters one item stands for.

    Raises:
        ValueError: If it stands for nothing in this model.
    """
    if isinstance(item, nn.Module):
        if not any(item is module for module in model.modules()):
            inner = unwrap(item)
            if inner is item:
                raise ValueError(
                    f"`{argument}` holds a {type(item).__name__} that is not in the model. Pass a "
                    "module of the model itself, not of a copy."
                )
            item = inner
        return list(item.parameters())
    if isinstance(item, Tensor):
        if not any(item is parameter for parameter in model.parameters()):
            raise ValueError(
                f"`{argument}` holds a tensor of shape {tuple(item.shape)} that is not a parameter "
                "of the model."
            )
        return [item] if isinstance(item, nn.Parameter) else []
    if isinstance(item, str):
        return _by_name(model, item, argument)
    raise TypeError(f"`{argument}` cannot be resolved from {item!r}.")


def _by_name(model: nn.Module, pattern: str, argument: str) -> list[nn.Parameter]:
    wanted = strip(pattern)
    known: list[str] = []
    matched: list[nn.Parameter] = []
    hit = False
    for path, module in model.named_modules():
        known.append(strip(path))
        if path and fnmatchcase(strip(path), wanted):
            hit = True
            matched += module.parameters()
    for path, parameter in model.named_parameters(remove_duplicate=False):
        known.append(strip(path))
        if fnmatchcase(strip(path), wanted):
            hit = True
            matched.append(parameter)
    if not hit:
        near = difflib.get_close_matches(wanted, known, n=1)
        raise ValueError(
            f"`{argument}` '{pattern}' matches no module or parameter of the model."
            + (f" Did you mean '{near[0]}'?" if near else "")
        )
    return matched


def label(model: nn.Module, item: Any) -> str:
    """How a user would call an item."""
    if isinstance(item, str):
        return f"'{item}'"
    named: Callable[[], Iterable[tuple[str, Any]]] = (
        model.named_modules if isinstance(item, nn.Module) else model.named_parameters
    )
    for path, found in named():
        if found is item:
            return f"'{strip(path)}'" if path else "the model"
    return repr(item)
