"""Units: what a granularity makes of the layers of a model.

Units come in groups of those that are alike: the heads of one block, or the blocks of one matrix.
Here is how saliency gets from weights to units, how masks get back, and what units cost together.
A weight may belong to two units, the row of one and the column of another: it stays if both stay,
and it is counted once.
"""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs, override

from mtprune.granularity import NM, Block, Element, Granularity, Grouped, Pieces, Spanning
from mtprune.model.layers import Layer
from mtprune.model.names import strip
from mtprune.structure import NOBODY, Group, Member

__all__ = ["Covered", "Units", "cover", "is_single"]


class Units(ABC):
    """The units of some layers, group by group.

    Attributes:
        names: The groups' names.
        layers: The layers they lie in.
        prices: What a weight of each layer counts in a budget.
        least: How many units of each group must stay.
        spanning: Whether units may lie in several layers.
    """

    spanning: bool

    def __init__(
        self,
        names: Sequence[str],
        layers: Sequence[Layer],
        prices: Sequence[Fraction],
        least: Sequence[int] = (),
    ) -> None:
        self.names = tuple(names)
        self.layers = tuple(layers)
        self.prices = tuple(prices)
        self.least = tuple(least) or (0,) * len(self.names)

    @abstractmethod
    def among(self, places: Sequence[int], prices: Sequence[Fraction] = ()) -> "Units":
        """The units of some of the layers only; what is outside is left as it is.

        Args:
            places: Which layers.
            prices: What a weight of each of them counts; 1 unless given.
        """

    @abstractmethod
    def pool(self, place: int, values: Tensor) -> Tensor:
        """What a layer holds of the saliency of each unit in it, flat.

        Args:
            place: Which layer.
            values: The saliency of its weights.
        """

    @abstractmethod
    def gather(self, pooled: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The sums of units over layers, ``{group: [units]}``.

        Args:
            pooled: What `pool` gave for some of the layers.
        """

    @abstractmethod
    def spread(self, masks: Sequence[Tensor]) -> list[Tensor]:
        """The masks of the layers' weights, in their shapes, from those of units."""

    @abstractmethod
    def standing(self, masks: Iterable[Tensor]) -> list[Tensor]:
        """The units of which some weight is kept, from the masks of the layers' weights."""

    @abstractmethod
    def weigh(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> Fraction:
        """What the weights that stay count together, in all layers or in some."""

    @abstractmethod
    def added(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        """The least a unit would add to what `weigh` counts, for each group float64 ``[units]``."""

    @cached_property
    def costs(self) -> list[Tensor]:
        """What goes if a unit goes alone, for each group float64 ``[units]``."""
        return self._costs()

    @abstractmethod
    def _costs(self) -> list[Tensor]: ...

    @abstractmethod
    def holding(self, group: int) -> list[int]:
        """The layers in which a group has weights, the one that makes its units first."""

    @property
    def groups(self) -> Sequence[Group]:
        """The groups as they name tensors; none where units lie inside layers."""
        return ()

    @property
    def gated(self) -> Sequence[Group]:
        """The groups in which a tensor decides which units are used."""
        return [group for group in self.groups if group.gate is not None]

    def everything(self) -> list[Tensor]:
        """Masks that keep all."""
        return [torch.ones(len(cost), dtype=torch.bool) for cost in self.costs]


class _Pieces(Units):
    """Units inside layers: a group for each."""

    spanning = False

    def __init__(
        self, granularity: Pieces, layers: Sequence[Layer], prices: Sequence[Fraction] = ()
    ) -> None:
        super().__init__([x.name for x in layers], layers, prices or [Fraction(1)] * len(layers))
        self._granularity = granularity

    @override
    def among(self, places: Sequence[int], prices: Sequence[Fraction] = ()) -> "_Pieces":
        return _Pieces(self._granularity, [self.layers[i] for i in places], prices)

    @override
    def pool(self, place: int, values: Tensor) -> Tensor:
        return self._granularity.pool(values)

    @override
    def gather(self, pooled: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {place: values.to("cpu", torch.float32) for place, values in pooled.items()}

    @override
    def spread(self, masks: Sequence[Tensor]) -> list[Tensor]:
        return [
            self._granularity.spread(mask, layer.shape)
            for mask, layer in zip(masks, self.layers, strict=True)
        ]

    @override
    def standing(self, masks: Iterable[Tensor]) -> list[Tensor]:
        return [
            self._granularity.pool(mask.cpu().view(layer.shape).to(torch.float32)) > 0
            for layer, mask in zip(self.layers, masks, strict=True)
        ]

    @override
    def weigh(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> Fraction:
        chosen = range(len(self.layers)) if places is None else places
        kept = (self.prices[i] * int(self._sizes[i][masks[i]].sum()) for i in chosen)
        return sum(kept, Fraction(0))

    @override
    def added(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        chosen = range(len(self.layers)) if places is None else places
        return [
            cost if place in chosen else torch.zeros_like(cost)
            for place, cost in enumerate(self.costs)
        ]

    @override
    def _costs(self) -> list[Tensor]:
        return [
            size.to(torch.float64) * float(price)
            for size, price in zip(self._sizes, self.prices, strict=True)
        ]

    @override
    def holding(self, group: int) -> list[int]:
        return [group]

    @cached_property
    def _sizes(self) -> list[Tensor]:
        """How many weights each unit has."""
        ones = (torch.ones(layer.shape) for layer in self.layers)
        return [self._granularity.pool(one).to(torch.int64) for one in ones]


@dataclass(frozen=True)
class _Seat:
    """Where the units of a group lie in a layer.

    Attributes:
        group: Which group.
        dim: Along which dimension of the layer.
        index: For each index along it, the unit, or the number of units for none.
        table: For each unit, its indices, ``[units, most]``; the dimension's length for none.
        made: Whether the layer makes the units.
    """

    group: int
    dim: int
    index: Tensor
    table: Tensor
    made: bool


class _Groups(Units):
    """Units that span layers."""

    spanning = True

    def __init__(
        self,
        groups: Sequence[Group],
        layers: Sequence[Layer],
        seats: Sequence[Sequence[_Seat]],
        prices: Sequence[Fraction] = (),
    ) -> None:
        names, least = [group.name for group in groups], [group.least for group in groups]
        super().__init__(names, layers, prices or [Fraction(1)] * len(layers), least)
        self._groups = groups
        self._seats = seats

    @property
    @override
    def groups(self) -> Sequence[Group]:
        return self._groups

    @override
    def among(self, places: Sequence[int], prices: Sequence[Fraction] = ()) -> "_Groups":
        left = sorted({seat.group for place in places for seat in self._seats[place]})
        seats = [
            [
                _Seat(left.index(s.group), s.dim, s.index, s.table, s.made)
                for s in self._seats[place]
            ]
            for place in places
        ]
        return _Groups(
            [self._groups[g] for g in left], [self.layers[i] for i in places], seats, prices
        )

    @override
    def pool(self, place: int, values: Tensor) -> Tensor:
        sums = []
        for seat in self._seats[place]:
            along = values.movedim(seat.dim, 0).reshape(values.shape[seat.dim], -1).sum(1)
            # Sums of what a table says, because scattered additions on a GPU come in any order.
            padded = torch.cat([along, along.new_zeros(1)])
            sums.append(padded[seat.table.to(along.device)].sum(1))
        return torch.cat(sums)

    @override
    def gather(self, pooled: Mapping[int, Tensor]) -> dict[int, Tensor]:
        total: dict[int, Tensor] = {}
        for place, values in sorted(pooled.items()):
            sizes = [self._groups[seat.group].size for seat in self._seats[place]]
            parts = values.to("cpu", torch.float32).split(sizes)
            for seat, part in zip(self._seats[place], parts, strict=True):
                total[seat.group] = total[seat.group] + part if seat.group in total else part
        return total

    @override
    def spread(self, masks: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for layer, seats in zip(self.layers, self._seats, strict=True):
            whole = torch.ones(layer.shape, dtype=torch.bool)
            for dim, along in self._along(seats, masks).items():
                whole &= along.view([-1 if d == dim else 1 for d in range(len(layer.shape))])
            found.append(whole)
        return found

    @override
    def standing(self, masks: Iterable[Tensor]) -> list[Tensor]:
        pooled = {
            place: self.pool(place, mask.cpu().view(layer.shape).to(torch.float32))
            for place, (layer, mask) in enumerate(zip(self.layers, masks, strict=True))
        }
        return [kept > 0 for _, kept in sorted(self.gather(pooled).items())]

    @override
    def weigh(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> Fraction:
        total = Fraction(0)
        for place in range(len(self.layers)) if places is None else places:
            # A mask is an outer product, so what it keeps is a product of counts.
            along = self._along(self._seats[place], masks)
            shape = self.layers[place].shape
            left = (int(along[d].sum()) if d in along else n for d, n in enumerate(shape))
            total += self.prices[place] * prod(left)
        return total

    @override
    def added(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        added = [torch.zeros(group.size, dtype=torch.float64) for group in self._groups]
        for place in range(len(self.layers)) if places is None else places:
            shape, seats = self.layers[place].shape, self._seats[place]
            along = self._along(seats, masks)
            left = {d: int(along[d].sum()) if d in along else n for d, n in enumerate(shape)}
            most: dict[int, Tensor] = {}  # what it adds along one dimension it adds at least
            for seat in seats:
                # Along this dimension, where all other groups let it in.
                others = [s for s in seats if s.dim == seat.dim and s is not seat]
                free = self._along(others, masks).get(
                    seat.dim, torch.ones(shape[seat.dim], dtype=torch.bool)
                )
                own = torch.cat([free, free.new_zeros(1)])[seat.table].sum(1)
                size = (
                    own
                    * float(self.prices[place])
                    * prod(n for d, n in left.items() if d != seat.dim)
                )
                most[seat.group] = (
                    torch.maximum(most[seat.group], size) if (seat.group in most) else size
                )
            for group, size in most.items():
                added[group] += size
        return added

    @override
    def _costs(self) -> list[Tensor]:
        costs = [torch.zeros(group.size, dtype=torch.float64) for group in self._groups]
        for layer, seats, price in zip(self.layers, self._seats, self.prices, strict=True):
            for group in {seat.group for seat in seats}:
                removed: dict[int, Tensor] = {}
                for seat in seats:
                    if seat.group == group:
                        own = (seat.table < layer.shape[seat.dim]).sum(1)
                        removed[seat.dim] = removed[seat.dim] + own if seat.dim in removed else own
                left = prod(layer.shape) // prod(layer.shape[d] for d in removed)
                kept = torch.full_like(costs[group], left)
                for dim, own in removed.items():
                    kept *= layer.shape[dim] - own
                costs[group] += (prod(layer.shape) - kept) * float(price)
        return costs

    @override
    def holding(self, group: int) -> list[int]:
        having = {
            place: any(s.made for s in seats if s.group == group)
            for place, seats in enumerate(self._seats)
            if any(s.group == group for s in seats)
        }
        return sorted(having, key=lambda place: not having[place])

    def _along(self, seats: Sequence[_Seat], masks: Sequence[Tensor]) -> dict[int, Tensor]:
        """What stays along each dimension of a layer."""
        kept: dict[int, Tensor] = {}
        for seat in seats:
            mask = masks[seat.group]
            along = torch.cat([mask, mask.new_ones(1)])[seat.index]
            kept[seat.dim] = kept[seat.dim] & along if seat.dim in kept else along
        return kept


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
    return Covered(covered, None if single else _Pieces(granularity, covered), dense)


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
    seats: dict[str, list[_Seat]] = {}
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
    return Covered(covered, _Groups(alike, covered, [seats[x.name] for x in covered]), dense)


def _sit(group: int, dim: int, size: int, member: Member) -> _Seat:
    index = member.index()
    owned = (index != NOBODY).nonzero().squeeze(1)
    owned = owned[index[owned].argsort(stable=True)]
    counts = index[owned].bincount(minlength=size)
    starts = (counts.cumsum(0) - counts)[index[owned]]
    table = torch.full((size, int(counts.max()) if size else 0), len(index))
    table[index[owned], torch.arange(len(owned)) - starts] = owned
    index = torch.where(index == NOBODY, size, index)
    return _Seat(group, dim, index, table, member.role == "out")


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
