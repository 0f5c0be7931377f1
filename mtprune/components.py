"""Components: which weights are pruned, and who shares them.

A `Layer` is one prunable tensor. It is remembered by where it lives, module and attribute, never
as a Parameter object, because wrappers and checkpoints replace those. What belongs together is
decided for each parameter, not for each module: a norm or an adapter that only one task uses is
private to it wherever it sits.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import batchnorm, normalization
from torch.nn.utils import parametrize

__all__ = [
    "SHARED",
    "UNDECLARED",
    "Declared",
    "Layer",
    "assign",
    "declare",
    "find_layers",
    "own_name",
    "prunable",
    "unwrap",
]

SHARED = "shared"
"""The component of shared weights unless the user names another."""

UNDECLARED = "undeclared"
"""The component of weights that several tasks use although nobody declared them shared."""

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

_PARALLEL = ("DistributedDataParallel", "DataParallel")

_PLAIN = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_NORMS = (
    batchnorm._NormBase,
    normalization.LayerNorm,
    normalization.GroupNorm,
    normalization.RMSNorm,
)
KINDS = (
    "Linear, Bilinear, Conv1d-3d, ConvTranspose1d-3d, RNN, LSTM, GRU and their cells, "
    "MultiheadAttention"
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable tensor.

    Attributes:
        name: Its name in ``model.named_parameters()`` before pruning, without wrapper prefixes.
        places: Module and attribute of each of its uses: several when weights are tied.
        shape: Its shape.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter as it is now, pruned or not."""
        module, attribute = self.places[0]
        held = module._parameters
        found = held.get(attribute, held.get(attribute + "_orig"))
        if found is None:
            raise RuntimeError(f"'{self.name}' is gone: its module no longer has '{attribute}'.")
        return found


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


Spec = Any
"""Modules, parameters, names or globs, a callable on the model, or a collection of these."""


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside ``torch.compile``, DDP and DataParallel."""
    while True:
        children = dict(model.named_children())
        inner = children.get("_orig_mod")
        if inner is None and type(model).__name__ in _PARALLEL:
            inner = children.get("module")
        if inner is None:
            return model
        model = inner


def find_layers(model: nn.Module, include: Spec = (), exclude: Spec = ()) -> list[Layer]:
    """The prunable layers of a model, in order of ``named_parameters()``.

    Args:
        model: The model, unwrapped.
        include: Also prune these embeddings and bare Parameters.
        exclude: Do not prune these.

    Raises:
        ValueError: If a layer that would be pruned cannot be: parametrized, pruned already, lazy,
            scripted or quantized.
    """
    exclude = _resolved(model, exclude, "exclude")
    excluded = {id(p) for item in exclude for p in _match(model, item, "exclude")}
    include = _resolved(model, include, "include")
    included = {id(p) for item in include for p in _match(model, item, "include")}
    held_out = _excluded_modules(model, exclude)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        if path in held_out:
            continue
        for attribute in _refuse_unless_plain(path, module, excluded):
            places.setdefault(id(module._parameters[attribute]), []).append((module, attribute))
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in included or _never(module, attribute):
                continue
            if (module, attribute) not in places.get(id(parameter), ()):
                places.setdefault(id(parameter), []).append((module, attribute))
    # A tied weight is one layer with every place it is used in, prunable by itself or not.
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            known = places.get(id(parameter))
            if known is not None and (module, attribute) not in known:
                known.append((module, attribute))
    layers = []
    for name, parameter in model.named_parameters():
        if id(parameter) in places and id(parameter) not in excluded and parameter.numel():
            found = tuple(places[id(parameter)])
            layers.append(Layer(own_name(model, name), found, tuple(parameter.shape)))
    return layers


def prunable(model: nn.Module, include: Spec = ()) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
    """Every weight that is, was or could be pruned, with its mask if its module holds one.

    Args:
        model: The model, unwrapped, pruned or not.
        include: As for `find_layers`.
    """
    resolved = _resolved(model, include, "include")
    included = {id(p) for item in resolved for p in _match(model, item, "include")}
    for module in model.modules():
        default = _default_attributes(module)
        for name, parameter in module._parameters.items():
            mask = module._buffers.get(name.removesuffix("_orig") + "_mask")
            masked = name.endswith("_orig") and mask is not None
            chosen = name in default or (id(parameter) in included and not _never(module, name))
            if parameter is not None and (masked or chosen):
                yield parameter, mask if masked else None


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
        resolved = _resolved(model, items, "shared_modules")
        matches = [_match(model, item, "shared_modules") for item in resolved]
        anything = any(id(p) in by_parameter for matched in matches for p in matched)
        for item, matched in zip(resolved, matches, strict=True):
            found = {id(p): by_parameter[id(p)] for p in matched if id(p) in by_parameter}
            label = _label(model, item)
            if not found:
                # A list of all children, or of all parameters, holds norms and biases too.
                if anything and not isinstance(item, str):
                    continue
                raise ValueError(_nothing_prunable(model, item, label))
            if not any(layer.parameter.requires_grad for layer in found.values()):
                raise ValueError(
                    f"Shared {label} has nothing prunable: all its weights are frozen "
                    "(requires_grad=False). Unfreeze it or leave it out of `shared_modules`."
                )
            for layer in found.values():
                if owner.setdefault(layer.name, component) != component:
                    raise ValueError(
                        f"Layer '{layer.name}' is in components '{owner[layer.name]}' and "
                        f"'{component}'. A layer belongs to one component."
                    )
            names = tuple(layer.name for layer in found.values())
            declared.append(Declared(component, label, names))
    if not declared:
        raise ValueError(
            "`shared_modules` is empty. Name the modules that tasks share, or use 'auto'."
        )
    return declared


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


def strip(name: str) -> str:
    """A dotted name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def own_name(model: nn.Module, name: str) -> str:
    """A parameter's name without what real wrappers inside the model add to it."""
    owner, kept = model, []
    for part in name.split("."):
        wraps = type(owner).__name__ in _PARALLEL if part == "module" else part in WRAPPERS
        if not wraps:
            kept.append(part)
        child = owner._modules.get(part)
        owner = owner if child is None else child
    return ".".join(kept)


def _never(module: nn.Module, attribute: str) -> bool:
    """Biases and norms are never pruned, whoever asks."""
    return isinstance(module, _NORMS) or attribute.startswith("bias") or attribute.endswith("bias")


def _default_attributes(module: nn.Module) -> list[str]:
    """The attributes under which a module of a prunable kind keeps its weights."""
    if isinstance(module, nn.MultiheadAttention):
        return [a for a in _ATTENTION if getattr(module, a, None) is not None]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(module, nn.RNNBase):
        return [a for group in module._all_weights for a in group if a.startswith("weight")]
    return ["weight"] if isinstance(module, _PLAIN) else []


def _refuse_unless_plain(path: str, module: nn.Module, excluded: Collection[int]) -> list[str]:
    """The prunable attributes of one module.

    Raises:
        ValueError: If one of them is not a plain Parameter.
    """
    kind = type(module)
    where = f"'{path}' ({kind.__name__})" if path else f"The model ({kind.__name__})"
    if kind.__module__.startswith("torch.jit") or kind.__name__ in (
        "RecursiveScriptModule",
        "TopLevelTracedModule",
    ):
        raise ValueError(f"{where} is scripted and cannot be pruned. Prune before scripting.")
    if ".quantized" in kind.__module__ or "torch.nn.quantized" in kind.__module__:
        raise ValueError(
            f"{where} is quantized and cannot be pruned. Prune before quantizing, or exclude it."
        )
    found = []
    for attribute in _default_attributes(module):
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            if id(parameter) in excluded:
                continue
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"{where} is lazy: its '{attribute}' has no shape yet. Run one forward pass "
                    "before building the pruner."
                )
            if hasattr(parameter, "placements"):
                raise ValueError(
                    f"{where} is sharded (FSDP2): its '{attribute}' is a DTensor. Sharded models "
                    "cannot be pruned yet; use DistributedDataParallel."
                )
            found.append(attribute)
        elif attribute + "_orig" in module._parameters and attribute + "_mask" in module._buffers:
            raise ValueError(
                f"{where} is pruned already: it has '{attribute}_orig'. Call "
                f"torch.nn.utils.prune.remove(module, '{attribute}') first."
            )
        elif parametrize.is_parametrized(module, attribute) or attribute in module.__dict__:
            raise ValueError(
                f"{where} computes its '{attribute}' from other parameters (weight_norm, "
                "spectral_norm or another parametrization), so a mask on it would not hold. "
                f"Remove the parametrization, or pass exclude=['{path}']."
            )
    return found


def _excluded_modules(model: nn.Module, exclude: Sequence[Any]) -> set[str]:
    """Paths of all modules inside an excluded one: nothing in them is even looked at."""
    result: set[str] = set()
    for path, module in model.named_modules():
        for item in exclude:
            named = isinstance(item, str) and fnmatchcase(strip(path), strip(item))
            if named or item is module:
                result.update(sub for sub, _ in module.named_modules(prefix=path))
    return result


def _resolved(model: nn.Module, spec: Spec, argument: str) -> list[Any]:
    """A specification as a flat list of modules, parameters and names."""
    if isinstance(spec, Mapping):
        raise TypeError(f"`{argument}` takes modules, parameters and names, not a mapping.")
    result: list[Any] = []
    for item in _items(spec):
        if isinstance(item, type):
            raise TypeError(f"`{argument}` holds the class {item.__name__}. Pass a module of it.")
        if callable(item) and not isinstance(item, nn.Module):
            result += _resolved(model, item(model), argument)
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


def _match(model: nn.Module, item: Any, argument: str) -> list[nn.Parameter]:
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


def _label(model: nn.Module, item: Any) -> str:
    if isinstance(item, str):
        return f"'{item}'"
    named: Callable[[], Iterable[tuple[str, Any]]] = (
        model.named_modules if isinstance(item, nn.Module) else model.named_parameters
    )
    for path, found in named():
        if found is item:
            return f"'{strip(path)}'" if path else "the model"
    return repr(item)


def _nothing_prunable(model: nn.Module, item: Any, label: str) -> str:
    matched = {id(p) for p in _match(model, item, "shared_modules")}
    kinds = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if any(id(p) in matched for p in module._parameters.values())
        }
    )
    held = f"Found parameters of {', '.join(kinds)}." if kinds else "It has no parameters."
    return f"Shared {label} has nothing prunable. Prunable: {KINDS}. {held}"
