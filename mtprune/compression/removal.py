"""Removal: dead units leave the model, and every tensor with entries of them gets smaller.

A unit is dead if all weights that read it are zero; or if it is a constant, because all weights
that make it are zero, and the constant can be moved into the biases of the layers that read it. Its
entries in weights, biases, norms and their statistics are cut out, and modules are given the new
sizes that they keep as attributes.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mtprune import checks
from mtprune.compression.attention import narrow, narrowed
from mtprune.compression.plan import Cut, Removal
from mtprune.compression.running import runs
from mtprune.model.layers import is_conv1d
from mtprune.structure import NOBODY, Group, Member

__all__ = [
    "apply",
    "constants",
    "cut_out",
    "find",
    "keep_one",
    "pruned",
    "removal_of",
    "remove",
    "removed",
    "resize",
]

_SIZES: tuple[tuple[type[nn.Module], tuple[tuple[str, int], ...]], ...] = (
    (nn.Linear, (("out_features", 0), ("in_features", 1))),
    (nn.Embedding, (("num_embeddings", 0), ("embedding_dim", 1))),
    (_NormBase, (("num_features", 0),)),
    (nn.GroupNorm, (("num_channels", 0),)),
    (nn.PReLU, (("num_parameters", 0),)),
)
"""For each type of module, attributes that repeat a size of its weight, and the dimension."""

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Attributes of attention modules for the number of heads."""

_WIDTHS = ("all_head_size", "inner_dim")
"""Attributes of attention modules for the width of all heads together."""

_FIXED = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
"""Modules whose tensors must keep their shapes, because one size follows from another."""


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
        >>> members = (Member("0.weight", 0, (0, 1, 2)), Member("0.bias", 0, (0, 1, 2)),
        ...            Member("2.weight", 1, (0, 1, 2), "in"))
        >>> remove(model, [Group("hidden", 3, members)])["2.weight"].kept
        (None, (0, 2))
        >>> model[0], model[2].weight.tolist()
        (Linear(in_features=1, out_features=2, bias=True), [[1.0, 2.0]])
    """
    _check(model, groups)
    inputs = constants(model, _readers(groups), batches) if batches else _declared(model, groups)
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
    tensors = _tensors(model)
    nonzero = {m.tensor: tensors[m.tensor] != 0 for group in groups for m in group.members}
    dead = [torch.zeros(group.size, dtype=torch.bool) for group in groups]
    changed = True
    while changed:
        changed = False
        for group, units in zip(groups, dead, strict=True):
            more = (_unread(group, nonzero) | _constant(group, nonzero, inputs or {})) & ~units
            keep_one(model, group, units, more)
            if more.any():
                changed = True
                units |= more
                for member in group.members:
                    nonzero[member.tensor].movedim(member.dim, 0)[~_stays(member, units)] = False
    return removal_of(model, groups, dead)


def apply(model: nn.Module, removal: Removal, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Cut the tensors of a removal, in place, and move constants into biases.

    Args:
        model: A model with the zeros that the removal was found with.
        removal: The cuts.
        inputs: The constant inputs of layers, as from `constants`.

    Raises:
        ValueError: If the removal is not of this model.
    """
    _check_fits(model, removal)
    biases = {}
    for cut in removal.cuts:
        layer = model.get_submodule(_layer(cut.tensor))
        if cut.tensor.endswith("weight") and isinstance(layer, (nn.Linear, _ConvNd)):
            bias = _moved_bias(cut, layer, (inputs or {}).get(_layer(cut.tensor)))
            if bias is not None:
                biases[layer] = bias
    resize(model, removal)
    with torch.no_grad():
        for layer, bias in biases.items():
            if layer.bias is None:
                layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
            else:
                layer.bias += bias


@torch.no_grad()
def resize(model: nn.Module, removal: Removal) -> None:
    """Cut the tensors of a removal, in place, whatever their values are.

    Args:
        model: A model of the shapes that the removal was found with.
        removal: The cuts.

    Raises:
        ValueError: If the removal is not of this model, or a module cannot have the new sizes.
    """
    _check_fits(model, removal)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            owners.setdefault(id(tensor), []).append((module, attribute))
    tensors = _tensors(model)
    resized: dict[nn.Module, str] = {}
    for cut in removal.cuts:
        tensor = tensors[cut.tensor]
        smaller = cut_out(tensor, cut)
        for module, attribute in owners[id(tensor)]:
            _replace(module, attribute, smaller, cut)
            resized[module] = _layer(cut.tensor)
    for module, name in resized.items():
        _set_sizes(module, name)
    for path, count in removal.counts:
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, count)


def _check_count(model: nn.Module, path: str, count: int) -> None:
    """Refuse a new value for anything but a number of units, which only gets smaller."""
    value = _between(model, path)
    if not checks.is_whole(value) or not 0 <= count <= value:
        raise ValueError(
            f"The plan is for another model: it sets '{path}' to {count}, and this model has "
            f"{value if checks.is_whole(value) else 'no number of units'} there."
        )


def _replace(module: nn.Module, attribute: str, smaller: Tensor, cut: Cut) -> None:
    """Replace a tensor of a module by the part that stays, and adapt the module's groups."""
    if isinstance(module, _FIXED):
        raise ValueError(
            f"'{cut.tensor}' belongs to a {type(module).__name__}, which cannot lose a "
            "part. Leave the group out."
        )
    if isinstance(module, nn.MultiheadAttention):
        narrow(module)
    if isinstance(module, _ConvNd) and attribute == "weight" and module.groups > 1:
        module.groups = _groups_left(module.groups, cut)
    if isinstance(module, nn.GroupNorm) and attribute == "weight":
        module.num_groups = _groups_left(module.num_groups, cut)
    if attribute in module._parameters:
        module._parameters[attribute] = smaller  # type: ignore[assignment]
    else:
        module._buffers[attribute] = smaller


def constants(model: nn.Module, layers: Iterable[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    """The constant inputs of layers, ``[inputs]`` each: numbers that never change over the batches.

    NaN stands for an input that changes, and for a constant that cannot be moved into the bias of
    the layer: a convolution that pads with zeros does not read it at the border.

    Args:
        model: The model, in eval mode.
        layers: Names of modules; Linear layers and convolutions among them count.
        batches: Example inputs.
    """
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    readers: dict[str, nn.Linear | _ConvNd] = {}
    handles = []
    narrowings = ExitStack()
    for name in layers:
        layer = model.get_submodule(name)
        parent = model.get_submodule(_layer(name))
        if isinstance(parent, nn.MultiheadAttention):  # torch's does not call its layers
            narrowings.enter_context(narrowed(parent))
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        readers[name] = layer
        dim = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)

        def record(
            module: nn.Module, args: Any, kwargs: Any, name: str = name, dim: int = dim
        ) -> None:
            x = (args[0] if args else kwargs["input"]).detach().movedim(dim, 0).flatten(1)
            if x.numel():
                least, most = x.aminmax(dim=1)
                low[name] = least.minimum(low.get(name, least))
                high[name] = most.maximum(high.get(name, most))

        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))

    def is_constant(name: str) -> Tensor:
        # A weighted mean of equal numbers may differ from them in the last places.
        rounding = 64 * torch.finfo(low[name].dtype).eps * high[name].abs()
        return high[name] - low[name] <= rounding

    def is_known() -> bool:
        # What has varied once is no constant any more: most models are seen through at once.
        return low.keys() == readers.keys() and not any(bool(is_constant(n).any()) for n in low)

    def look() -> None:
        for _ in runs(model, batches):
            if is_known():
                return

    try:
        with narrowings:
            look()
            if not is_known():
                with torch.random.fork_rng(devices=[]):  # nor is noise a constant
                    torch.manual_seed(0)
                    look()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: _movable(layer, torch.where(is_constant(name), high[name], torch.nan))
        for name, layer in readers.items()
        if name in low
    }


def _declared(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """The constant inputs of layers, from the biases and activations that groups declare."""
    tensors = _tensors(model)
    inputs: dict[str, Tensor] = {}
    for group in groups:
        if group.between is None:
            continue
        makers = [m for m in group.members if m.role == "out"]
        value = torch.zeros(group.size)
        for member in makers:
            tensor = tensors[member.tensor].detach()
            if tensor.dim() == 1 and member.units == tuple(range(group.size)):
                value = value.to(tensor) + tensor
        value = _between(model, group.between)(value)
        nonzero = {m.tensor: tensors[m.tensor] != 0 for m in makers}
        value = torch.where(_unmade(group, nonzero).to(value.device), value, torch.nan)
        for member in group.members:
            layer = model.get_submodule(_layer(member.tensor))
            if member.role == "in" and isinstance(layer, (nn.Linear, _ConvNd)):
                index = member.index(value.device)
                read = torch.where(index == NOBODY, torch.nan, value[index.clamp_min(0)])
                read = _movable(layer, read)
                others = inputs.get(_layer(member.tensor))
                inputs[_layer(member.tensor)] = (
                    read if others is None else torch.where(index == NOBODY, others, read)
                )
    return inputs


def _movable(layer: nn.Linear | _ConvNd, value: Tensor) -> Tensor:
    """Constant inputs, with NaN for those that do not add the same number at all positions."""
    if isinstance(layer, nn.Linear):
        return value
    padded = (
        layer.padding_mode == "zeros"
        and layer.padding != "valid"
        and (
            any(size > 1 for size in layer.kernel_size)
            if isinstance(layer.padding, str)
            else any(layer.padding)
        )
    )
    if padded or layer.transposed or layer.groups > 1:
        return torch.where(value == 0, value, torch.nan)
    return value


def _moved_bias(cut: Cut, layer: nn.Linear | _ConvNd, inputs: Tensor | None) -> Tensor | None:
    """The sum that removed constant inputs add to the outputs that stay, ``[outputs]``.

    Args:
        cut: The cut of the layer's weight.
        layer: The layer before the cut.
        inputs: The constant inputs of the layer, ``[inputs]``, or None.

    Returns:
        The sum, or None if it is zero.
    """
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return None  # inputs and outputs are removed together
    weight = layer.weight.detach()
    if isinstance(layer, _ConvNd) and layer.transposed:
        weight = weight.transpose(0, 1)
        rows, columns = cut.kept[1], cut.kept[0]
    else:
        rows, columns = cut.kept[:2]
    if columns is None:
        return None
    weight = weight if rows is None else weight[list(rows)]
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[list(columns)] = False
    removed &= (weight != 0).movedim(1, 0).flatten(1).any(1)
    if not removed.any():
        return None
    if inputs is None or inputs[removed].isnan().any():
        raise ValueError(
            f"The plan does not fit the weights: '{_layer(cut.tensor)}' still reads input "
            f"{int(removed.nonzero()[0])}, which is to go and is not a constant."
        )
    if not inputs[removed].any():
        return None
    matrix = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return matrix[:, removed] @ inputs[removed].to(matrix)


def _check_fits(model: nn.Module, removal: Removal) -> None:
    """Check that a removal is of this model."""
    tensors = _tensors(model)
    for cut in removal.cuts:
        shape = tuple(tensors[cut.tensor].shape) if cut.tensor in tensors else None
        if shape != cut.shape:
            got = "no such tensor" if shape is None else f"shape {shape}"
            raise ValueError(
                f"The plan is for another model: it has '{cut.tensor}' with shape {cut.shape}, "
                f"and this model has {got}."
            )
    for path, count in removal.counts:
        _check_count(model, path, count)


def _check(model: nn.Module, groups: Iterable[Group]) -> None:
    """Check that groups are of this model."""
    tensors = _tensors(model)
    for group in groups:
        for member in group.members:
            if member.tensor not in tensors:
                raise ValueError(
                    f"Group '{group.name}' names '{member.tensor}', and the model has no such "
                    "parameter or buffer."
                )
            shape = tuple(tensors[member.tensor].shape)
            if not 0 <= member.dim < len(shape) or shape[member.dim] != len(member.units):
                raise ValueError(
                    f"Group '{group.name}' names {len(member.units)} units along dimension "
                    f"{member.dim} of '{member.tensor}', whose shape is {shape}."
                )
        if group.between is not None and not callable(_between(model, group.between)):
            raise ValueError(
                f"Group '{group.name}' has '{group.between}' in between, and the model has no "
                "such module."
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _between(model: nn.Module, path: str) -> Any:
    """The module, or function of a module, at a path; None if nothing is at the path."""
    value: Any = model
    for attribute in path.split("."):
        value = getattr(value, attribute, None)
    return value


def _readers(groups: Iterable[Group]) -> list[str]:
    """The names of the modules that read units."""
    return list(
        dict.fromkeys(_layer(m.tensor) for g in groups for m in g.members if m.role == "in")
    )


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _stays(member: Member, dead: Tensor) -> Tensor:
    """For each index along a member's dimension, whether it stays."""
    index = member.index()
    return ~dead[index.clamp_min(0)] | (index == NOBODY)


def _has_nonzero(group: Group, member: Member, nonzero: Mapping[str, Tensor]) -> Tensor:
    """For each unit, whether any of a member's entries is not zero, ``[size]``."""
    along = nonzero[member.tensor].movedim(member.dim, 0).flatten(1).any(1).cpu()
    index = member.index()
    units = torch.zeros(group.size, dtype=torch.bool)
    units[index[along & (index != NOBODY)]] = True
    return units


def _unread(group: Group, nonzero: Mapping[str, Tensor]) -> Tensor:
    """Units that only zero weights read, bool ``[size]``."""
    readers = [_has_nonzero(group, m, nonzero) for m in group.members if m.role == "in"]
    if not readers:
        return torch.zeros(group.size, dtype=torch.bool)
    return ~torch.stack(readers).any(0)


def _unmade(group: Group, nonzero: Mapping[str, Tensor]) -> Tensor:
    """Units that only zero weights make, so that they are constants, bool ``[size]``."""
    makers = [
        _has_nonzero(group, m, nonzero)
        for m in group.members
        if m.role == "out" and nonzero[m.tensor].dim() > 1
    ]
    if not makers:
        return torch.zeros(group.size, dtype=torch.bool)
    return ~torch.stack(makers).any(0)


def _constant(group: Group, nonzero: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Constant units that can be moved into the biases of all their readers, bool ``[size]``."""
    units = _unmade(group, nonzero)
    for member in group.members:
        if member.role != "in" or not units.any():
            continue
        value = inputs.get(_layer(member.tensor))
        stuck = nonzero[member.tensor].movedim(member.dim, 0).flatten(1).any(1).cpu()
        if value is not None and len(value) == len(stuck):
            stuck &= value.isnan().cpu()
        index = member.index()
        units[index[stuck & (index != NOBODY)]] = False
    return units


def pruned(model: nn.Module, group: Group) -> Tensor:
    """Units that zero weights alone make, or zero weights alone read, bool ``[size]``."""
    tensors = _tensors(model)
    nonzero = {m.tensor: tensors[m.tensor] != 0 for m in group.members}
    return _unread(group, nonzero) | _unmade(group, nonzero)


def removed(group: Group, removal: Removal) -> Tensor:
    """The units of a group that a removal removes, bool ``[size]``."""
    gone = torch.zeros(group.size, dtype=torch.bool)
    for member in group.members:
        cut = removal[member.tensor]
        kept = None if cut is None else cut.kept[member.dim]
        if kept is not None:
            index = member.index()
            left = torch.zeros(len(index), dtype=torch.bool)
            left[list(kept)] = True
            gone[index[~left & (index != NOBODY)]] = True
    return gone


def keep_one(model: nn.Module, group: Group, dead: Tensor, more: Tensor) -> None:
    """Keep one unit in any tensor that would become empty.

    Linear layers and attention run without any unit; other modules do not.

    Args:
        model: The model.
        group: The units.
        dead: Units that are removed already, bool ``[size]``.
        more: Units that are to be removed too, bool ``[size]``; changed in place.
    """
    kinds = (nn.Linear, nn.MultiheadAttention)
    for member in group.members:
        runs_empty = isinstance(model.get_submodule(_layer(member.tensor)), kinds)
        if not runs_empty and not _stays(member, dead | more).any():
            index = member.index()
            more[index[more[index]][-1]] = False


def removal_of(model: nn.Module, groups: Sequence[Group], dead: Sequence[Tensor]) -> Removal:
    """The removal of these units, whatever their weights.

    Args:
        model: The model.
        groups: The groups.
        dead: For each group the units to remove, bool ``[size]``.
    """
    tensors = _tensors(model)
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first_names.setdefault(id(tensor), name)
    stays: dict[str, dict[int, Tensor]] = {}
    counts: dict[str, int] = {}
    for group, units in zip(groups, dead, strict=True):
        if not units.any():
            continue
        for member in group.members:
            dims = stays.setdefault(first_names[id(tensors[member.tensor])], {})
            kept = _stays(member, units)
            dims[member.dim] = dims[member.dim] & kept if member.dim in dims else kept
        counts.update(_counts(model, group, int((~units).sum())))
    cuts = []
    for name, dims in stays.items():
        indices = tuple(
            tuple(dims[d].nonzero().flatten().tolist()) if d in dims and not dims[d].all() else None
            for d in range(tensors[name].dim())
        )
        if any(i is not None for i in indices):
            cuts.append(Cut(name, tuple(tensors[name].shape), indices))
    return Removal(tuple(cuts), tuple(counts.items()))


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
        m.role == "with" and isinstance(model.get_submodule(_layer(m.tensor)), nn.Linear)
        for m in group.members
    )
    counts: dict[str, int] = {}
    if are_heads and makers:
        path = _layer(_layer(makers[0].tensor))
        parent = model.get_submodule(path)
        width = len(makers[0].units)
        values = dict.fromkeys(_COUNTS, (group.size, left))
        values |= dict.fromkeys(_WIDTHS, (width, width // group.size * left))
        for name, (before, after) in values.items():
            if getattr(parent, name, None) == before:
                counts[f"{path}.{name}" if path else name] = after
    return counts


def cut_out(tensor: Tensor, cut: Cut) -> Tensor:
    """The part of a tensor that stays, of the same kind and in the same memory format.

    Args:
        tensor: The tensor.
        cut: The indices to keep.
    """
    part = tensor.detach()
    for dim, kept in enumerate(cut.kept):
        if kept is not None:
            part = part.index_select(dim, torch.tensor(kept, dtype=torch.long, device=part.device))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last):
        part = part.contiguous(memory_format=last)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(part, requires_grad=tensor.requires_grad)
    return part


def _groups_left(groups: int, cut: Cut) -> int:
    """The number of groups of channels after a cut: of whole groups, or of as many of each."""
    rows = cut.kept[0]
    if rows is None:
        return groups
    each = cut.shape[0] // groups
    left = [sum(1 for row in rows if row // each == g) for g in range(groups)]
    nonempty = [count for count in left if count]
    if all(count == each for count in nonempty):
        return len(nonempty)
    if len(set(left)) == 1:
        return groups
    raise ValueError(
        f"'{cut.tensor}' has {groups} groups of {each} channels, and would be left with {left} of "
        "each. Whole groups must go, or as many of each."
    )


def _set_sizes(module: nn.Module, name: str) -> None:
    """Set the sizes that a module keeps as attributes from its tensors, and check that they agree.

    Raises:
        ValueError: If a bias or statistic has another length than the module has outputs.
    """
    tensors = {**module._parameters, **module._buffers}
    vectors = {k: len(v) for k, v in tensors.items() if v is not None and v.dim() == 1}
    weight = tensors.get("weight")
    outputs = None
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        sizes = (first, second) if module.transposed else (second, first)
        module.in_channels, module.out_channels = sizes
        outputs = module.out_channels
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif is_conv1d(module):
        module.nx, module.nf = module.weight.shape  # type: ignore[assignment,misc]
        outputs = module.nf  # type: ignore[assignment]
    for kind, attributes in _SIZES:
        if isinstance(module, kind):
            shape = next(tuple(v.shape) for v in (weight, *tensors.values()) if v is not None)
            for attribute, dim in attributes:
                setattr(module, attribute, shape[dim])
            outputs = shape[0]
    for key, length in vectors.items():
        if key != "weight" and outputs is not None and length != outputs:
            raise ValueError(
                f"'{name}' is left with {outputs} outputs, and its '{key}' with {length} entries. "
                f"Name '{name}.{key}' in the group too."
            )
