"""Covering: from a granularity and a model to units, and the layers that have none."""

import difflib
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import TypeIs

from mtprune.granularity import NM, Block, Element, Granularity, Grouped, Pieces, Spanning
from mtprune.model.layers import Layer
from mtprune.model.names import strip
from mtprune.model.units import GroupUnits, PieceUnits, Seat, Units
from mtprune.structure import NOBODY, Group, Member

__all__ = ["Covered", "cover", "is_single"]


@dataclass(frozen=True)
class Covered:
    """What a granularity makes of a model.

    Attributes:
        layers: The layers it covers.
        units: Their units; None where every weight is its own.
        dense: The others, and why.
    """

    layers: list[Layer]
    units: Units | None
    dense: dict[str, str]


def is_single(granularity: Granularity) -> bool:
    """Whether every weight is kept or pruned on its own, be it in a pattern."""
    return type(granularity) in (Element, NM) or granularity == Block(1, 1)


def cover(granularity: Granularity, model: nn.Module, layers: Sequence[Layer]) -> Covered:
    """Find the units of a model.

    Args:
        granularity: What is kept or pruned as one.
        model: The model, unwrapped.
        layers: What may be pruned.

    Raises:
        ValueError: If there are no units, or they name what the model does not have.
    """
    if not isinstance(granularity, tuple) and not _spans(granularity):
        return _cut(granularity, layers)
    several = granularity if isinstance(granularity, tuple) else (granularity,)
    groups: dict[str, Group] = {}
    named = set()
    for one in several:
        for group in one.groups(model, layers):
            if group.name in groups:
                raise ValueError(f"Two groups are called '{group.name}'. Give each its own name.")
            groups[group.name] = group
            if isinstance(one, Grouped):
                named.add(group.name)
    if not groups:
        raise ValueError(f"{granularity!r} finds no units in {type(model).__name__}.")
    return _seat(groups.values(), named, model, layers)


def _spans(granularity: Spanning | Pieces) -> TypeIs[Spanning]:
    return hasattr(granularity, "groups")


def _cut(granularity: Pieces, layers: Sequence[Layer]) -> Covered:
    """The units of every layer on its own."""
    dense = {layer.name: why for layer in layers if (why := granularity.left_out(layer))}
    covered = [layer for layer in layers if layer.name not in dense]
    if not covered:
        why = "; ".join(dict.fromkeys(dense.values()))
        raise ValueError(f"{granularity!r} covers nothing in this model: {why}.")
    single = is_single(granularity) or isinstance(granularity, Element)
    return Covered(covered, None if single else PieceUnits(granularity, covered), dense)


def _seat(
    groups: Iterable[Group], named: Container[str], model: nn.Module, layers: Sequence[Layer]
) -> Covered:
    """The units of groups, in the layers they name; found ones may lie in what was excluded."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    by_parameter = {id(layer.parameter): layer for layer in layers}
    by_name = {layer.name: layer for layer in layers}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        shapes.setdefault(name, tuple(buffer.shape))  # some are in no state
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shapes.setdefault(name, tuple(parameter.shape))
        if id(parameter) in by_parameter:
            by_name.setdefault(name, by_parameter[id(parameter)])
    seats: dict[str, list[Seat]] = {}
    alike: list[Group] = []
    for group in groups:
        found: dict[tuple[str, int], list[Member]] = {}
        for member in group.members:
            layer = by_name.get(member.tensor) or by_name.get(strip(member.tensor))
            shape = shapes.get(member.tensor) if layer is None else layer.shape
            _check_member(group, member, shape, shapes)
            if layer is not None:
                found.setdefault((layer.name, member.dim % len(layer.shape)), []).append(member)
        gate = group.gate
        if gate is not None and not any(gate in members for members in found.values()):
            raise ValueError(
                f"'{gate.tensor}' sends tokens to the units of '{group.name}' and is pruned with "
                "them, but it was excluded. Take it out of `exclude`, or prune other units."
            )
        if not found and group.name in named:
            tensors = ", ".join(f"'{member.tensor}'" for member in group.members)
            raise ValueError(
                f"Group '{group.name}' lies in nothing that is pruned: {tensors or 'no tensors'}. "
                "Were its layers excluded, or does it hold biases alone?"
            )
        for (name, dim), members in found.items():
            for member in members:
                seats.setdefault(name, []).append(_sit(len(alike), dim, group.size, member))
        if found:
            alike.append(group)
    if not seats:
        raise ValueError("All layers in which units lie are excluded.")
    covered = [layer for layer in layers if layer.name in seats]
    dense = {x.name: "no unit lies in it" for x in layers if x.name not in seats}
    return Covered(covered, GroupUnits(alike, covered, [seats[x.name] for x in covered]), dense)


def _sit(group: int, dim: int, size: int, member: Member) -> Seat:
    index = member.index()
    owned = (index != NOBODY).nonzero().squeeze(1)
    owned = owned[index[owned].argsort(stable=True)]
    counts = index[owned].bincount(minlength=size)
    starts = (counts.cumsum(0) - counts)[index[owned]]
    table = torch.full((size, int(counts.max()) if size else 0), len(index))
    table[index[owned], torch.arange(len(owned)) - starts] = owned
    index = torch.where(index == NOBODY, size, index)
    return Seat(group, dim, index, table, member.role == "out")


def _check_member(
    group: Group, member: Member, shape: tuple[int, ...] | None, shapes: Mapping[str, object]
) -> None:
    """Refuse what the model does not have.

    Raises:
        ValueError: If it has no such tensor, dimension or length.
    """
    if shape is None:
        near = difflib.get_close_matches(member.tensor, shapes, n=3)
        hint = f" Did you mean {near}?" if near else ""
        raise ValueError(
            f"Group '{group.name}' names '{member.tensor}', which the model does not have.{hint}"
        )
    if not -len(shape) <= member.dim < len(shape) or shape[member.dim] != len(member.units):
        raise ValueError(
            f"Group '{group.name}' gives {len(member.units)} units along dimension {member.dim} "
            f"of '{member.tensor}', which has shape {shape}."
        )
