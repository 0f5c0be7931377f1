"""Resizing: tensors are cut, and modules are given the sizes that they keep as attributes."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mtprune import checks
from mtprune.compression.attention import narrow
from mtprune.compression.cuts import Cut, Removal
from mtprune.compression.entries import layer_of, tensors_of, thing_at
from mtprune.compression.settings import can_own, own
from mtprune.compression.taking import check_takes, take
from mtprune.model.layout import is_conv1d
from mtprune.model.routing import reopen

__all__ = ["check_fits", "cut_out", "resize"]

_SIZES: tuple[tuple[type[nn.Module], tuple[tuple[str, int], ...]], ...] = (
    (nn.Linear, (("out_features", 0), ("in_features", 1))),
    (nn.Embedding, (("num_embeddings", 0), ("embedding_dim", 1))),
    (_NormBase, (("num_features", 0),)),
    (nn.GroupNorm, (("num_channels", 0),)),
    (nn.PReLU, (("num_parameters", 0),)),
)
"""For each type of module, attributes that repeat a size of its weight, and the dimension."""


_FIXED = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
"""Modules whose tensors must keep their shapes, because one size follows from another."""


@torch.no_grad()
def resize(model: nn.Module, removal: Removal) -> None:
    """Cut the tensors of a removal, in place, whatever their values are.

    Args:
        model: A model of the shapes that the removal was found with.
        removal: The cuts.

    Raises:
        ValueError: If the removal is not of this model, or a module cannot have the new sizes.
    """
    check_fits(model, removal)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            owners.setdefault(id(tensor), []).append((module, attribute))
    tensors = tensors_of(model)
    resized: dict[nn.Module, str] = {}
    for cut in removal.cuts:
        tensor = tensors[cut.tensor]
        smaller = cut_out(tensor, cut)
        for module, attribute in owners[id(tensor)]:
            _replace(module, attribute, smaller, cut)
            resized[module] = layer_of(cut.tensor)
    for module, name in resized.items():
        _set_sizes(module, name)
    reopen(resized)
    for path, count in removal.counts:
        owner, _, attribute = path.rpartition(".")
        setattr(own(model, owner), attribute, count)
    for part in removal.taken:
        take(model.get_submodule(part.module), part)


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


def check_fits(model: nn.Module, removal: Removal) -> None:
    """Check that a removal is of this model."""
    tensors = tensors_of(model)
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
    for part in removal.taken:
        check_takes(model, part)


def _check_count(model: nn.Module, path: str, count: int) -> None:
    """Refuse a new value for anything but a number of units, which only gets smaller."""
    value = thing_at(model, path)
    known = checks.is_whole(value) and can_own(model, path.rpartition(".")[0])
    if not known or not 0 <= count <= value:
        raise ValueError(
            f"The plan is for another model: it sets '{path}' to {count}, and this model has "
            f"{value if known else 'no number of units'} there."
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
