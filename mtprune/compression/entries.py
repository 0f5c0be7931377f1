"""Entries: the tensors of a model by name, and the entries that units have in them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.structure import NOBODY, Group, Member

__all__ = [
    "check_groups",
    "has_nonzero",
    "layer_of",
    "readers_of",
    "stays",
    "tensors_of",
    "thing_at",
]


def check_groups(model: nn.Module, groups: Iterable[Group]) -> None:
    """Check that groups are of this model."""
    tensors = tensors_of(model)
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
        if group.between is not None and not callable(thing_at(model, group.between)):
            raise ValueError(
                f"Group '{group.name}' has '{group.between}' in between, and the model has no "
                "such module."
            )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def thing_at(model: nn.Module, path: str) -> Any:
    """The module, or function of a module, at a path; None if nothing is at the path."""
    value: Any = model
    for attribute in path.split("."):
        value = getattr(value, attribute, None)
    return value


def readers_of(groups: Iterable[Group]) -> list[str]:
    """The names of the modules that read units."""
    return list(
        dict.fromkeys(layer_of(m.tensor) for g in groups for m in g.members if m.role == "in")
    )


def layer_of(tensor: str) -> str:
    """The name of the module that has a tensor."""
    return tensor.rpartition(".")[0]


def stays(member: Member, dead: Tensor) -> Tensor:
    """For each index along a member's dimension, whether it stays."""
    index = member.index()
    return ~dead[index.clamp_min(0)] | (index == NOBODY)


def has_nonzero(group: Group, member: Member, nonzero: Mapping[str, Tensor]) -> Tensor:
    """For each unit, whether any of a member's entries is not zero, ``[size]``."""
    along = nonzero[member.tensor].movedim(member.dim, 0).flatten(1).any(1).cpu()
    index = member.index()
    units = torch.zeros(group.size, dtype=torch.bool)
    units[index[along & (index != NOBODY)]] = True
    return units
