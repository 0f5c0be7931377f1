"""Dead units: those that can go, because nobody reads them, or they never change, or are closed."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtprune.compression.cuts import Removal
from mtprune.compression.entries import has_nonzero, layer_of, stays, tensors_of
from mtprune.model.routing import closed
from mtprune.structure import NOBODY, Group

__all__ = ["dead_units", "keep_some", "pruned", "removed", "unmade"]


def dead_units(
    model: nn.Module, groups: Sequence[Group], inputs: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """All dead units of each group, bool ``[size]``, also those that only dead units read.

    Args:
        model: The model.
        groups: The units, and the tensors that hold their entries.
        inputs: The constant inputs of layers, as from `constants`.
    """
    tensors = tensors_of(model)
    nonzero = {m.tensor: tensors[m.tensor] != 0 for group in groups for m in group.members}
    shut = {group.name: closed(model, group) for group in groups if group.gate is not None}
    dead = [torch.zeros(group.size, dtype=torch.bool) for group in groups]
    changed = True
    while changed:
        changed = False
        for group, units in zip(groups, dead, strict=True):
            if group.gate is not None:
                more = shut[group.name] & ~units
            else:
                more = _unread(group, nonzero) | _constant(group, nonzero, inputs or {})
                more &= ~units
            keep_some(model, group, units, more)
            if more.any():
                changed = True
                units |= more
                for member in group.members:
                    nonzero[member.tensor].movedim(member.dim, 0)[~stays(member, units)] = False
    return dead


def pruned(model: nn.Module, group: Group) -> Tensor:
    """Units that zero weights alone make, or zero weights alone read, bool ``[size]``.

    Where a tensor decides which units are used, those that it never uses.
    """
    tensors = tensors_of(model)
    nonzero = {m.tensor: tensors[m.tensor] != 0 for m in group.members}
    if group.gate is not None:
        return ~has_nonzero(group, group.gate, nonzero)
    return _unread(group, nonzero) | unmade(group, nonzero)


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


def keep_some(model: nn.Module, group: Group, dead: Tensor, more: Tensor) -> None:
    """Keep as many units as must stay, and one in any tensor that would become empty.

    Linear layers and attention run without any unit; other modules do not.

    Args:
        model: The model.
        group: The units.
        dead: Units that are removed already, bool ``[size]``.
        more: Units that are to be removed too, bool ``[size]``; changed in place.
    """
    left = (~(dead | more)).nonzero().flatten()
    if len(left) < group.least:
        more[more.nonzero().flatten()[len(left) - group.least :]] = False
    kinds = (nn.Linear, nn.MultiheadAttention)
    for member in group.members:
        runs_empty = isinstance(model.get_submodule(layer_of(member.tensor)), kinds)
        if not runs_empty and not stays(member, dead | more).any():
            index = member.index()
            more[index[more[index]][-1]] = False


def _unread(group: Group, nonzero: Mapping[str, Tensor]) -> Tensor:
    """Units that only zero weights read, bool ``[size]``."""
    readers = [has_nonzero(group, m, nonzero) for m in group.members if m.role == "in"]
    if not readers:
        return torch.zeros(group.size, dtype=torch.bool)
    return ~torch.stack(readers).any(0)


def unmade(group: Group, nonzero: Mapping[str, Tensor]) -> Tensor:
    """Units that only zero weights make, so that they are constants, bool ``[size]``."""
    makers = [
        has_nonzero(group, m, nonzero)
        for m in group.members
        if m.role == "out" and nonzero[m.tensor].dim() > 1
    ]
    if not makers:
        return torch.zeros(group.size, dtype=torch.bool)
    return ~torch.stack(makers).any(0)


def _constant(group: Group, nonzero: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
    """Constant units that can be moved into the biases of all their readers, bool ``[size]``."""
    units = unmade(group, nonzero)
    for member in group.members:
        if member.role != "in" or not units.any():
            continue
        value = inputs.get(layer_of(member.tensor))
        stuck = nonzero[member.tensor].movedim(member.dim, 0).flatten(1).any(1).cpu()
        if value is not None and len(value) == len(stuck):
            stuck &= value.isnan().cpu()
        index = member.index()
        units[index[stuck & (index != NOBODY)]] = False
    return units
