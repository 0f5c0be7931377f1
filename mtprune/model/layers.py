"""Layers: the prunable tensors of a model.

A `Layer` is remembered by where it lives, module and attribute, never as a Parameter object,
because wrappers and checkpoints replace those.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import batchnorm, normalization
from torch.nn.utils import parametrize

from mtprune.model.layout import PLAIN, Layout, is_conv1d, is_stack, layout_of
from mtprune.model.names import own_name, strip
from mtprune.model.parts import Part, Sharding, local
from mtprune.model.selectors import Spec, label, match, resolve, selected

__all__ = [
    "KINDS",
    "Layer",
    "default_attributes",
    "find_layers",
    "is_another_linear",
    "is_embedding",
    "never_pruned",
]

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
    "MultiheadAttention, transformers' Conv1D, and stacks of experts' matrices"
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable tensor.

    Attributes:
        name: Its name in ``model.named_parameters()`` before pruning, without wrapper prefixes.
        places: Module and attribute of each of its uses: several when weights are tied.
        shape: Its shape, of all of it wherever it is.
        sharding: How the model's weights are spread over ranks.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    shape: tuple[int, ...]
    sharding: Sharding = field(default_factory=Sharding)

    @property
    def matrices(self) -> int:
        """How many matrices it holds: one for each expert, or one."""
        return self.layout.count(self.shape)

    @property
    def layout(self) -> Layout:
        """Where its matrices lie in it."""
        found = (layout_of(module, attribute, self.shape) for module, attribute in self.places)
        return next((layout for layout in found if layout != PLAIN), PLAIN)

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter as it is now, pruned or not: the one that an optimizer has."""
        return self.sharding.parameter(*self.places[0], self._found)

    @property
    def leaf(self) -> nn.Parameter:
        """The Parameter that a forward computes with, and graphs lead to."""
        return self.sharding.leaf(*self.places[0], self._found)

    @property
    def values(self) -> Tensor:
        """What is here of the Parameter, without a graph: its memory, not a copy."""
        return local(self.parameter)

    @property
    def part(self) -> Part:
        """What of the layer is on this rank."""
        return self.sharding.part(*self.places[0], self.parameter)

    @property
    def _found(self) -> nn.Parameter:
        module, attribute = self.places[0]
        parameters = module._parameters
        found = parameters.get(attribute, parameters.get(attribute + "_orig"))
        if found is None:
            raise RuntimeError(f"'{self.name}' is gone: its module no longer has '{attribute}'.")
        return found


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
    exclude = resolve(model, exclude, "exclude")
    excluded = selected(model, exclude, "exclude")
    included = selected(model, include, "include")
    _check_included(model, include)
    held_out = _excluded_modules(model, exclude)
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        if path in held_out:
            continue
        for attribute in _refuse_unless_plain(path, module, excluded):
            places.setdefault(id(module._parameters[attribute]), []).append((module, attribute))
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in included:
                continue
            if never_pruned(module, attribute):
                continue
            if (module, attribute) not in places.get(id(parameter), ()):
                places.setdefault(id(parameter), []).append((module, attribute))
    # A tied weight is one layer with every place it is used in, prunable by itself or not.
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            known = places.get(id(parameter))
            if known is not None and (module, attribute) not in known:
                known.append((module, attribute))
    layers, sharding = [], Sharding(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in places and id(parameter) not in excluded and parameter.numel():
            uses = tuple(places[id(parameter)])
            shape = tuple(parameter.shape)
            layers.append(Layer(own_name(model, name), uses, shape, sharding))
    return layers


def _check_included(model: nn.Module, include: Spec) -> None:
    """Refuse to include what is never pruned.

    Raises:
        ValueError: If an item names biases and norms alone. A list of all parameters of something
            may hold them among others.
    """
    useless = []
    items = resolve(model, include, "include")
    for item in items:
        asked = {id(parameter) for parameter in match(model, item, "include")}
        uses = [
            (module, attribute)
            for module in model.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in asked
        ]
        if uses and all(never_pruned(module, attribute) for module, attribute in uses):
            useless.append(item)
    for item in useless:
        if isinstance(item, str) or len(useless) == len(items):
            raise ValueError(
                f"`include` names {label(model, item)}, which is a bias or belongs to a norm. "
                "These are never pruned: leave it out."
            )


def never_pruned(module: nn.Module, attribute: str) -> bool:
    """Biases and norms are never pruned, whoever asks."""
    return isinstance(module, _NORMS) or attribute.startswith("bias") or attribute.endswith("bias")


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows of its weight up."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag))


def default_attributes(module: nn.Module) -> list[str]:
    """The attributes under which a module of a prunable kind keeps its weights."""
    if isinstance(module, nn.MultiheadAttention):
        return [a for a in _ATTENTION if getattr(module, a, None) is not None]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    if isinstance(module, nn.RNNBase):
        return [a for group in module._all_weights for a in group if a.startswith("weight")]
    if isinstance(module, _PLAIN) or is_conv1d(module):
        return ["weight"]
    names = [
        name.removesuffix("_orig")  # as it is called under a mask
        for name, parameter in module._parameters.items()
        if parameter is not None and is_stack(module, parameter.shape)
    ]
    return [name for name in names if not never_pruned(module, name)]


def is_another_linear(module: nn.Module) -> bool:
    """Whether a module of another class than Linear computes what a Linear does.

    Transformers' Conv1D, whose weight is transposed, and Falcon's own.
    """
    if type(module).__name__ == "FalconLinear":
        return isinstance(module, nn.Linear)
    return is_conv1d(module)


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
    for attribute in default_attributes(module):
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            if id(parameter) in excluded:
                continue
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"{where} is lazy: its '{attribute}' has no shape yet. Run one forward pass "
                    "before building the pruner."
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
