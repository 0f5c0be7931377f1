"""Components: sets of layers that are pruned together, and who shares them.

Where a layer belongs is decided for each parameter, not for each module: a norm or an adapter that
only one task uses is private to it wherever it sits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mtprune.model.layers import KINDS, Layer
from mtprune.model.selectors import Spec, label, match, resolve, selected

__all__ = ["SHARED", "UNDECLARED", "Declared", "assign", "declare", "meant"]

SHARED = "shared"
"""The component of shared weights unless the user names another."""

UNDECLARED = "undeclared"
"""The component of weights that several tasks use although nobody declared them shared."""


@dataclass(frozen=True)
class Declared:
    """One thing the user declared shared, with the layers it holds.

    Attributes:
        component: The component it belongs to.
        label: How the user would call it.
        names: The names of its layers.
    """

    component: str
    label: str
    names: tuple[str, ...]


def declare(model: nn.Module, layers: Sequence[Layer], spec: Spec) -> list[Declared]:
    """Resolve ``shared_modules`` to the layers it names.

    Args:
        model: The model, unwrapped.
        layers: Its prunable layers.
        spec: A `Spec`, a mapping component -> `Spec`, or ``"auto"`` (nothing is declared).

    Raises:
        ValueError: If something is not in the model, holds nothing prunable, or is in two
            components.
    """
    if isinstance(spec, str) and spec == "auto":
        return []
    if callable(spec) and not isinstance(spec, (nn.Module, type)):
        spec = spec(model)
    named = spec if isinstance(spec, Mapping) else {SHARED: spec}
    by_parameter = {id(layer.parameter): layer for layer in layers}
    owner: dict[str, str] = {}
    declared = []
    for component, items in named.items():
        if not isinstance(component, str):
            raise TypeError(f"A component's name must be a string. Got {component!r}.")
        resolved = resolve(model, items, "shared_modules")
        matches = [match(model, item, "shared_modules") for item in resolved]
        anything = any(id(p) in by_parameter for matched in matches for p in matched)
        for item, matched in zip(resolved, matches, strict=True):
            members = {id(p): by_parameter[id(p)] for p in matched if id(p) in by_parameter}
            called = label(model, item)
            if not members:
                # A list of all children, or of all parameters, holds norms and biases too.
                if anything and not isinstance(item, str):
                    continue
                raise ValueError(_nothing_prunable(model, item, called))
            if not any(layer.parameter.requires_grad for layer in members.values()):
                raise ValueError(
                    f"Shared {called} has nothing prunable: all its weights are frozen "
                    "(requires_grad=False). Unfreeze it or leave it out of `shared_modules`."
                )
            for layer in members.values():
                if owner.setdefault(layer.name, component) != component:
                    raise ValueError(
                        f"Layer '{layer.name}' is in components '{owner[layer.name]}' and "
                        f"'{component}'. A layer belongs to one component."
                    )
            names = tuple(layer.name for layer in members.values())
            declared.append(Declared(component, called, names))
    if not declared:
        raise ValueError(
            "`shared_modules` is empty. Name the modules that tasks share, or use 'auto'."
        )
    return declared


def meant(model: nn.Module, spec: Spec) -> set[int]:
    """The ids of all parameters in what was declared; of all of the model for ``"auto"``."""
    if isinstance(spec, str) and spec == "auto":
        return {id(parameter) for parameter in model.parameters()}
    if callable(spec) and not isinstance(spec, (nn.Module, type)):
        spec = spec(model)
    parts = spec.values() if isinstance(spec, Mapping) else [spec]
    return {i for items in parts for i in selected(model, items, "shared_modules")}


def assign(
    names: Sequence[str],
    users: Mapping[str, Sequence[str]],
    declared: Sequence[Declared],
    tasks: Sequence[str],
) -> dict[str, str]:
    """The component of every layer that some task uses.

    A layer with one user among several tasks is private to it. One with more is in the component
    it was declared in; undeclared ones are in ``"shared"`` when nothing was declared at all.

    Args:
        names: The layers' names.
        users: The tasks that use each layer.
        declared: What the user declared shared.
        tasks: All tasks.

    Example:
        >>> assign(["trunk", "head"], {"trunk": ["a", "b"], "head": ["a"]}, [], ["a", "b"])
        {'trunk': 'shared', 'head': 'a'}
    """
    owner = {name: d.component for d in declared for name in d.names}
    fallback = UNDECLARED if declared else SHARED
    result = {}
    for name in names:
        using = users[name]
        if len(using) == 1 and (len(tasks) > 1 or name not in owner):
            result[name] = using[0]
        elif using:
            result[name] = owner.get(name, fallback)
    return result


def _nothing_prunable(model: nn.Module, item: Any, called: str) -> str:
    matched = {id(p) for p in match(model, item, "shared_modules")}
    kinds = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if any(id(p) in matched for p in module._parameters.values())
        }
    )
    contents = f"Found parameters of {', '.join(kinds)}." if kinds else "It has no parameters."
    return f"Shared {called} has nothing prunable. Prunable: {KINDS}. {contents}"
