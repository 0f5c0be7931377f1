"""Removal: dead units leave the model, and every tensor with entries of them gets smaller.

A unit is dead if all weights that read it are zero; or if it is a constant, because all weights
that make it are zero, and the constant can be moved into the biases of the layers that read it. Its
entries in weights, biases, norms and their statistics are cut out, and modules are given the new
sizes that they keep as attributes.
"""

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtprune.compression.constants import constants, declared, moved_bias
from mtprune.compression.cuts import Cut, Removal, Taken
from mtprune.compression.dead import dead_units
from mtprune.compression.entries import check_groups, layer_of, readers_of, stays, tensors_of
from mtprune.compression.resizing import check_fits, resize
from mtprune.structure import NOBODY, Argument, Group

__all__ = ["apply", "find", "removal_of", "remove"]

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Attributes of attention modules for the number of heads."""

_WIDTHS = ("all_head_size", "inner_dim")
"""Attributes of attention modules for the width of all heads together."""


def remove(model: nn.Module, groups: Sequence[Group], batches: Sequence[Any] = ()) -> Removal:
    """Remove the dead units of all groups from a model, in place.

    Args:
        model: A model in eval mode with zeros in its weights. Tensors that get smaller are
            replaced by new ones.
        groups: The units, and the tensors that hold their entries.
        batches: Example inputs, to find the constant inputs of layers. Without batches, constants
            are known only for groups with an activation ``between``.

    Raises:
        ValueError: If a group does not fit the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with torch.no_grad():
        ...     _ = model[2].weight.copy_(torch.tensor([[1.0, 0.0, 2.0]]))
        >>> from mtprune.structure import Member
        >>> members = (Member("0.weight", 0, (0, 1, 2)), Member("0.bias", 0, (0, 1, 2)),
        ...            Member("2.weight", 1, (0, 1, 2), "in"))
        >>> remove(model, [Group("hidden", 3, members)])["2.weight"].kept
        (None, (0, 2))
        >>> model[0], model[2].weight.tolist()
        (Linear(in_features=1, out_features=2, bias=True), [[1.0, 2.0]])
    """
    check_groups(model, groups)
    inputs = constants(model, readers_of(groups), batches) if batches else declared(model, groups)
    removal = find(model, groups, inputs)
    apply(model, removal, inputs)
    return removal


def find(
    model: nn.Module, groups: Sequence[Group], inputs: Mapping[str, Tensor] | None = None
) -> Removal:
    """The removal of all dead units, and of the units that only dead units read.

    Args:
        model: The model.
        groups: The units, and the tensors that hold their entries.
        inputs: The constant inputs of layers, as from `constants`.
    """
    return removal_of(model, groups, dead_units(model, groups, inputs))


def apply(model: nn.Module, removal: Removal, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Cut the tensors of a removal, in place, and move constants into biases.

    Args:
        model: A model with the zeros that the removal was found with.
        removal: The cuts.
        inputs: The constant inputs of layers, as from `constants`.

    Raises:
        ValueError: If the removal is not of this model.
    """
    check_fits(model, removal)
    biases = {}
    for cut in removal.cuts:
        layer = model.get_submodule(layer_of(cut.tensor))
        if cut.tensor.endswith("weight") and isinstance(layer, (nn.Linear, _ConvNd)):
            bias = moved_bias(cut, layer, (inputs or {}).get(layer_of(cut.tensor)))
            if bias is not None:
                biases[layer] = bias
    resize(model, removal)
    with torch.no_grad():
        for layer, bias in biases.items():
            if layer.bias is None:
                layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
            else:
                layer.bias += bias


def removal_of(model: nn.Module, groups: Sequence[Group], dead: Sequence[Tensor]) -> Removal:
    """The removal of these units, whatever their weights.

    Args:
        model: The model.
        groups: The groups.
        dead: For each group the units to remove, bool ``[size]``.
    """
    tensors = tensors_of(model)
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(id(tensor), name)
    left: dict[str, dict[int, Tensor]] = {}
    counts: dict[str, int] = {}
    taken: list[Taken] = []
    for group, units in zip(groups, dead, strict=True):
        for path, count in _counts(model, group, int((~units).sum())).items():
            counts[path] = max(count, counts.get(path, 0))  # of all blocks: of the largest
        if not units.any():
            continue
        taken += (_taken(argument, units) for argument in group.arguments)
        for member in group.members:
            dims = left.setdefault(first_names[id(tensors[member.tensor])], {})
            kept = stays(member, units)
            dims[member.dim] = dims[member.dim] & kept if member.dim in dims else kept
    cuts = []
    for name, dims in left.items():
        indices = tuple(
            tuple(dims[d].nonzero().flatten().tolist()) if d in dims and not dims[d].all() else None
            for d in range(tensors[name].dim())
        )
        if any(i is not None for i in indices):
            cuts.append(Cut(name, tuple(tensors[name].shape), indices))
    changed = {path: n for path, n in counts.items() if n != attrgetter(path)(model)}
    return Removal(tuple(cuts), tuple(changed.items()), tuple(taken))


def _taken(argument: Argument, dead: Tensor) -> Taken:
    """What a module still takes of an argument without these units."""
    units = argument.units
    kept = tuple(i for i, unit in enumerate(units) if unit == NOBODY or not dead[unit])
    return Taken(argument.module, argument.name, argument.dim, len(units), kept)


def _counts(model: nn.Module, group: Group, left: int) -> dict[str, int]:
    """The new values of attributes that count the units of a group, by their paths.

    Args:
        model: The model.
        group: The units, before removal.
        left: The number of units after removal.
    """
    if group.counts:
        return {path: attrgetter(path)(model) * left // group.size for path in group.counts}
    makers = [m for m in group.members if m.role == "out" and m.tensor.endswith("weight")]
    are_heads = any(
        m.role == "with" and isinstance(model.get_submodule(layer_of(m.tensor)), nn.Linear)
        for m in group.members
    )
    counts: dict[str, int] = {}
    if are_heads and makers:
        path = layer_of(layer_of(makers[0].tensor))
        parent = model.get_submodule(path)
        width = len(makers[0].units)
        values = dict.fromkeys(_COUNTS, (group.size, left))
        values |= dict.fromkeys(_WIDTHS, (width, width // group.size * left))
        for name, (before, after) in values.items():
            if getattr(parent, name, None) == before:
                counts[f"{path}.{name}" if path else name] = after
    return counts
