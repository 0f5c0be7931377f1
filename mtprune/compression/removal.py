"""Removal: dead units leave the model, and every tensor they lay in gets smaller.

A unit is dead if nobody reads it, because all weights that do are zero; or if it is always the
same number, because all weights that make it are zero, and that number can be moved into the
biases of its readers. Its entries in weights, biases, norms and their statistics are then cut out,
and the sizes that modules keep beside their tensors follow.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mtprune.compression.attention import narrow, narrowed
from mtprune.compression.plan import Cut, Removal
from mtprune.compression.running import run
from mtprune.structure import NOBODY, Group, Member

__all__ = ["apply", "constants", "cut_out", "find", "removal_of", "remove", "resize", "spare"]

_SIZES: tuple[tuple[type[nn.Module], tuple[tuple[str, int], ...]], ...] = (
    (nn.Linear, (("out_features", 0), ("in_features", 1))),
    (nn.Embedding, (("num_embeddings", 0), ("embedding_dim", 1))),
    (_NormBase, (("num_features", 0),)),
    (nn.GroupNorm, (("num_channels", 0),)),
    (nn.PReLU, (("num_parameters", 0),)),
)
"""Attributes that repeat a size of the weight, and which."""

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""What attention modules call the number of their heads."""

_WIDTHS = ("all_head_size", "inner_dim")
"""What they call the width of all heads together."""

_FIXED = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
"""Modules that derive sizes from one another, and cannot lose a part of one."""


def remove(model: nn.Module, groups: Sequence[Group], batches: Sequence[Any] = ()) -> Removal:
    """Remove the dead units of all groups from a model, in place.

    Args:
        model: A model in eval mode with zeros in its weights. Tensors that get smaller are
            replaced; the model is for nobody else to hold.
        groups: The units, and where they lie.
        batches: What the model is run on to see which constants its layers are given. Without,
            constants are known only where a group says what is ``between``.

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
    given = constants(model, _readers(groups), batches) if batches else _declared(model, groups)
    removal = find(model, groups, given)
    apply(model, removal, given)
    return removal


def find(
    model: nn.Module, groups: Sequence[Group], given: Mapping[str, Tensor] | None = None
) -> Removal:
    """What would be left of every tensor without the dead units.

    Units that are read only by units that go, go too.

    Args:
        model: The model.
        groups: The units, and where they lie.
        given: The constants that layers are given, as from `constants`.
    """
    tensors = _tensors(model)
    used = {m.tensor: tensors[m.tensor] != 0 for group in groups for m in group.members}
    gone = [torch.zeros(group.size, dtype=torch.bool) for group in groups]
    again = True
    while again:
        again = False
        for group, dead in zip(groups, gone, strict=True):
            found = (_unread(group, used) | _constant(group, used, given or {})) & ~dead
            spare(model, group, dead, found)
            if found.any():
                again = True
                dead |= found
                for member in group.members:
                    used[member.tensor].movedim(member.dim, 0)[~_stays(member, dead)] = False
    return removal_of(model, groups, gone)


def apply(model: nn.Module, removal: Removal, given: Mapping[str, Tensor] | None = None) -> None:
    """Cut what a removal cuts, in place, and move constants into the biases of who read them.

    Args:
        model: A model with the zeros that the removal was found with.
        removal: What to cut.
        given: The constants that layers are given, as from `constants`.

    Raises:
        ValueError: If the removal is not of this model.
    """
    _check_fits(model, removal)
    moved = {}
    for cut in removal.cuts:
        layer = model.get_submodule(_layer(cut.tensor))
        if cut.tensor.endswith("weight") and isinstance(layer, (nn.Linear, _ConvNd)):
            bias = _moved(cut, layer, (given or {}).get(_layer(cut.tensor)))
            if bias is not None:
                moved[layer] = bias
    resize(model, removal)
    with torch.no_grad():
        for layer, bias in moved.items():
            if layer.bias is None:
                layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
            else:
                layer.bias += bias


@torch.no_grad()
def resize(model: nn.Module, removal: Removal) -> None:
    """Cut what a removal cuts, in place, whatever the values are.

    Args:
        model: A model of the shapes that the removal was found with.
        removal: What to cut.

    Raises:
        ValueError: If the removal is not of this model, or a module cannot have the sizes left.
    """
    _check_fits(model, removal)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            owners.setdefault(id(tensor), []).append((module, attribute))
    tensors = _tensors(model)
    touched: dict[nn.Module, str] = {}
    for cut in removal.cuts:
        tensor = tensors[cut.tensor]
        smaller = cut_out(tensor, cut)
        for module, attribute in owners[id(tensor)]:
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
            touched[module] = _layer(cut.tensor)
    for module, name in touched.items():
        _tell(module, name)
    for path, count in removal.counts:
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, count)


def constants(model: nn.Module, layers: Iterable[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    """What each layer is given at each of its inputs, where that is always the same number.

    NaN stands where it is not, and where the number could not be moved into the layer's bias:
    a convolution that pads with zeros does not see it everywhere.

    Args:
        model: The model, in eval mode.
        layers: The names of Linear layers and convolutions; others are left out.
        batches: What the model is run on.
    """
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    found: dict[str, nn.Linear | _ConvNd] = {}
    handles = []
    held = ExitStack()
    for name in layers:
        layer = model.get_submodule(name)
        parent = model.get_submodule(_layer(name))
        if isinstance(parent, nn.MultiheadAttention):  # torch's does not call what it holds
            held.enter_context(narrowed(parent))
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        found[name] = layer
        dim = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)

        def note(
            module: nn.Module, args: Any, kwargs: Any, name: str = name, dim: int = dim
        ) -> None:
            x = (args[0] if args else kwargs["input"]).detach().movedim(dim, 0).flatten(1)
            if x.numel():
                least, most = x.aminmax(dim=1)
                low[name] = least.minimum(low.get(name, least))
                high[name] = most.maximum(high.get(name, most))

        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with held:
            run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    seen = {}
    for name, layer in found.items():
        if name in low:
            # A weighted mean of equal numbers may differ from them in the last places.
            near = 64 * torch.finfo(low[name].dtype).eps * high[name].abs()
            same = high[name] - low[name] <= near
            seen[name] = _movable(layer, torch.where(same, high[name], torch.nan))
    return seen


def _declared(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """The constants of units whose weights are zero, from their biases and what is between."""
    tensors = _tensors(model)
    found: dict[str, Tensor] = {}
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
        used = {m.tensor: tensors[m.tensor] != 0 for m in makers}
        value = torch.where(_silent(group, used).to(value.device), value, torch.nan)
        for member in group.members:
            layer = model.get_submodule(_layer(member.tensor))
            if member.role == "in" and isinstance(layer, (nn.Linear, _ConvNd)):
                index = member.index(value.device)
                mine = torch.where(index == NOBODY, torch.nan, value[index.clamp_min(0)])
                mine = _movable(layer, mine)
                before = found.get(_layer(member.tensor))
                found[_layer(member.tensor)] = (
                    mine if before is None else torch.where(index == NOBODY, before, mine)
                )
    return found


def _movable(layer: nn.Linear | _ConvNd, value: Tensor) -> Tensor:
    """The same with NaN where a constant at an input is not the same at all outputs."""
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


def _moved(cut: Cut, layer: nn.Linear | _ConvNd, given: Tensor | None) -> Tensor | None:
    """What the inputs that go give to the outputs that stay, ``[outputs]``; None if nothing."""
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return None  # its inputs go with its outputs
    weight = layer.weight.detach()
    if isinstance(layer, _ConvNd) and layer.transposed:
        weight = weight.transpose(0, 1)
        rows, columns = cut.kept[1], cut.kept[0]
    else:
        rows, columns = cut.kept[:2]
    if columns is None:
        return None
    weight = weight if rows is None else weight[list(rows)]
    lost = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    lost[list(columns)] = False
    lost &= (weight != 0).movedim(1, 0).flatten(1).any(1)
    if not lost.any():
        return None
    if given is None or given[lost].isnan().any():
        raise ValueError(
            f"The plan does not fit the weights: '{_layer(cut.tensor)}' still reads input "
            f"{int(lost.nonzero()[0])}, which is to go and is not a constant."
        )
    if not given[lost].any():
        return None
    whole = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return whole[:, lost] @ given[lost].to(whole)


def _check_fits(model: nn.Module, removal: Removal) -> None:
    """Complain about a removal that is not of this model."""
    tensors = _tensors(model)
    for cut in removal.cuts:
        shape = tuple(tensors[cut.tensor].shape) if cut.tensor in tensors else None
        if shape != cut.shape:
            got = "no such tensor" if shape is None else f"shape {shape}"
            raise ValueError(
                f"The plan is for another model: it has '{cut.tensor}' with shape {cut.shape}, "
                f"and this model has {got}."
            )


def _check(model: nn.Module, groups: Iterable[Group]) -> None:
    """Complain about groups that are not of this model."""
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
    """What is at a path: a module, or a function that a module holds; None if nothing is."""
    found: Any = model
    for attribute in path.split("."):
        found = getattr(found, attribute, None)
    return found


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


def _touched(group: Group, member: Member, used: Mapping[str, Tensor]) -> Tensor:
    """For each unit, whether any of a member's entries is not zero, ``[size]``."""
    along = used[member.tensor].movedim(member.dim, 0).flatten(1).any(1).cpu()
    index = member.index()
    found = torch.zeros(group.size, dtype=torch.bool)
    found[index[along & (index != NOBODY)]] = True
    return found


def _unread(group: Group, used: Mapping[str, Tensor]) -> Tensor:
    """Units whose readers all have zeros for them, ``[size]``."""
    readers = [_touched(group, m, used) for m in group.members if m.role == "in"]
    if not readers:
        return torch.zeros(group.size, dtype=torch.bool)
    return ~torch.stack(readers).any(0)


def _silent(group: Group, used: Mapping[str, Tensor]) -> Tensor:
    """Units that no weight makes, so that they are constants, ``[size]``."""
    makers = [
        _touched(group, m, used)
        for m in group.members
        if m.role == "out" and used[m.tensor].dim() > 1
    ]
    if not makers:
        return torch.zeros(group.size, dtype=torch.bool)
    return ~torch.stack(makers).any(0)


def _constant(group: Group, used: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Tensor:
    """Units that are constants which all their readers can have in their biases, ``[size]``."""
    found = _silent(group, used)
    for member in group.members:
        if member.role != "in" or not found.any():
            continue
        value = given.get(_layer(member.tensor))
        read = used[member.tensor].movedim(member.dim, 0).flatten(1).any(1).cpu()
        if value is not None and len(value) == len(read):
            read &= value.isnan().cpu()
        index = member.index()
        found[index[read & (index != NOBODY)]] = False
    return found


def spare(model: nn.Module, group: Group, dead: Tensor, found: Tensor) -> None:
    """Take back a unit where a tensor would have none: Linear layers and attention may, others not.

    Args:
        model: The model.
        group: The units.
        dead: Those that have gone already, bool ``[size]``.
        found: Those that are to go, too; changed in place.
    """
    kinds = (nn.Linear, nn.MultiheadAttention)
    for member in group.members:
        runs_empty = isinstance(model.get_submodule(_layer(member.tensor)), kinds)
        if not runs_empty and not _stays(member, dead | found).any():
            index = member.index()
            found[index[found[index]][-1]] = False


def removal_of(model: nn.Module, groups: Sequence[Group], gone: Sequence[Tensor]) -> Removal:
    """What is left of every tensor without these units, whatever their weights.

    Args:
        model: The model.
        groups: The groups.
        gone: For each, which of its units go, bool ``[size]``.
    """
    tensors = _tensors(model)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    stays: dict[str, dict[int, Tensor]] = {}
    counts: dict[str, int] = {}
    for group, dead in zip(groups, gone, strict=True):
        if not dead.any():
            continue
        for member in group.members:
            dims = stays.setdefault(first[id(tensors[member.tensor])], {})
            mine = _stays(member, dead)
            dims[member.dim] = dims[member.dim] & mine if member.dim in dims else mine
        counts.update(_counts(model, group, int((~dead).sum())))
    cuts = []
    for name, dims in stays.items():
        kept = tuple(
            tuple(dims[d].nonzero().flatten().tolist()) if d in dims and not dims[d].all() else None
            for d in range(tensors[name].dim())
        )
        if any(k is not None for k in kept):
            cuts.append(Cut(name, tuple(tensors[name].shape), kept))
    return Removal(tuple(cuts), tuple(counts.items()))


def _counts(model: nn.Module, group: Group, left: int) -> dict[str, int]:
    """What the attention module of a group of heads counts, and what it becomes."""
    if group.counts:
        return {path: attrgetter(path)(model) * left // group.size for path in group.counts}
    makers = [m for m in group.members if m.role == "out" and m.tensor.endswith("weight")]
    heads = any(
        m.role == "with" and isinstance(model.get_submodule(_layer(m.tensor)), nn.Linear)
        for m in group.members
    )
    found: dict[str, int] = {}
    if heads and makers:
        path = _layer(_layer(makers[0].tensor))
        parent = model.get_submodule(path)
        width = len(makers[0].units)
        each = dict.fromkeys(_COUNTS, (group.size, left))
        each |= dict.fromkeys(_WIDTHS, (width, width // group.size * left))
        for name, (before, after) in each.items():
            if getattr(parent, name, None) == before:
                found[f"{path}.{name}" if path else name] = after
    return found


def cut_out(tensor: Tensor, cut: Cut) -> Tensor:
    """The part of a tensor that stays, of the same kind and in the same memory format.

    Args:
        tensor: The tensor.
        cut: What to keep of it.
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
    """How many groups of channels a layer has left; whole ones go, or the same of each."""
    rows = cut.kept[0]
    if rows is None:
        return groups
    each = cut.shape[0] // groups
    left = [sum(1 for row in rows if row // each == g) for g in range(groups)]
    whole = [count for count in left if count]
    if all(count == each for count in whole):
        return len(whole)
    if len(set(left)) == 1:
        return groups
    raise ValueError(
        f"'{cut.tensor}' has {groups} groups of {each} channels, and would be left with {left} of "
        "each. Whole groups must go, or as many of each."
    )


def _tell(module: nn.Module, name: str) -> None:
    """Set the sizes that a module keeps beside its tensors, and see that they agree."""
    held = {**module._parameters, **module._buffers}
    lines = {k: len(v) for k, v in held.items() if v is not None and v.dim() == 1}
    weight = held.get("weight")
    outputs = None
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        sizes = (first, second) if module.transposed else (second, first)
        module.in_channels, module.out_channels = sizes
        outputs = module.out_channels
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    for kind, attributes in _SIZES:
        if isinstance(module, kind):
            shape = next(tuple(v.shape) for v in (weight, *held.values()) if v is not None)
            for attribute, dim in attributes:
                setattr(module, attribute, shape[dim])
            outputs = shape[0]
    for key, length in lines.items():
        if key != "weight" and outputs is not None and length != outputs:
            raise ValueError(
                f"'{name}' is left with {outputs} outputs, and its '{key}' with {length} entries. "
                f"Name '{name}.{key}' in the group too."
            )
