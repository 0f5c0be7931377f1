"""Units: what a granularity makes of the layers of a model.

Units come in groups of those that are alike: the heads of one block, or the blocks of one matrix.
Here is how saliency gets from weights to units, how masks get back, and what units cost together.
A weight may belong to two units, the row of one and the column of another: it stays if both stay,
and it is counted once.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor
from typing_extensions import override

from mtprune.granularity import Pieces
from mtprune.model.layers import Layer
from mtprune.structure import Group

__all__ = ["GroupUnits", "PieceUnits", "Seat", "Units"]


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


class PieceUnits(Units):
    """Units inside layers: a group for each matrix, of which a stack has several."""

    spanning = False

    def __init__(
        self, granularity: Pieces, layers: Sequence[Layer], prices: Sequence[Fraction] = ()
    ) -> None:
        self._layouts = [layer.layout for layer in layers]
        pairs = list(zip(layers, self._layouts, strict=True))
        counts = [layout.count(layer.shape) for layer, layout in pairs]
        names = [name for x, layout in pairs for name in layout.names(x.name, x.shape)]
        super().__init__(names, layers, prices or [Fraction(1)] * len(layers))
        self._granularity = granularity
        self._owners = [place for place, count in enumerate(counts) for _ in range(count)]
        ends = list(accumulate(counts, initial=0))
        self._groups = [range(*span) for span in pairwise(ends)]

    @override
    def among(self, places: Sequence[int], prices: Sequence[Fraction] = ()) -> "PieceUnits":
        return PieceUnits(self._granularity, [self.layers[i] for i in places], prices)

    @override
    def pool(self, place: int, values: Tensor) -> Tensor:
        matrices = self._layouts[place].matrices(values.view(self.layers[place].shape))
        return torch.cat([self._granularity.pool(matrix) for matrix in matrices])

    @override
    def gather(self, pooled: Mapping[int, Tensor]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for place, values in pooled.items():
            groups = self._groups[place]
            parts = values.to("cpu", torch.float32).split([len(self._sizes[g]) for g in groups])
            found.update(zip(groups, parts, strict=True))
        return found

    @override
    def spread(self, masks: Sequence[Tensor]) -> list[Tensor]:
        found = []
        for place, groups in enumerate(self._groups):
            layout, shape = self._layouts[place], self._shapes[place]
            matrices = [self._granularity.spread(masks[group], shape) for group in groups]
            found.append(layout.weight(torch.stack(matrices)).contiguous())
        return found

    @override
    def standing(self, masks: Iterable[Tensor]) -> list[Tensor]:
        pooled = {
            place: self.pool(place, mask.cpu().to(torch.float32))
            for place, mask in enumerate(masks)
        }
        return [kept > 0 for _, kept in sorted(self.gather(pooled).items())]

    @override
    def weigh(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> Fraction:
        chosen = range(len(self.layers)) if places is None else places
        kept = (
            self.prices[i] * int(self._sizes[group][masks[group]].sum())
            for i in chosen
            for group in self._groups[i]
        )
        return sum(kept, Fraction(0))

    @override
    def added(self, masks: Sequence[Tensor], places: Sequence[int] | None = None) -> list[Tensor]:
        chosen = range(len(self.layers)) if places is None else places
        return [
            cost if place in chosen else torch.zeros_like(cost)
            for place, cost in zip(self._owners, self.costs, strict=True)
        ]

    @override
    def _costs(self) -> list[Tensor]:
        return [
            size.to(torch.float64) * float(self.prices[place])
            for size, place in zip(self._sizes, self._owners, strict=True)
        ]

    @override
    def holding(self, group: int) -> list[int]:
        return [self._owners[group]]

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The shape of each matrix of every layer, outputs first."""
        return [
            tuple(layout.matrices(torch.empty(layer.shape, device="meta")).shape[1:])
            for layout, layer in zip(self._layouts, self.layers, strict=True)
        ]

    @cached_property
    def _sizes(self) -> list[Tensor]:
        """How many weights each unit has."""
        sizes = [self._granularity.pool(torch.ones(s)).to(torch.int64) for s in self._shapes]
        return [sizes[place] for place in self._owners]


@dataclass(frozen=True)
class Seat:
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


class GroupUnits(Units):
    """Units that span layers."""

    spanning = True

    def __init__(
        self,
        groups: Sequence[Group],
        layers: Sequence[Layer],
        seats: Sequence[Sequence[Seat]],
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
    def among(self, places: Sequence[int], prices: Sequence[Fraction] = ()) -> "GroupUnits":
        left = sorted({seat.group for place in places for seat in self._seats[place]})
        seats = [
            [Seat(left.index(s.group), s.dim, s.index, s.table, s.made) for s in self._seats[place]]
            for place in places
        ]
        return GroupUnits(
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

    def _along(self, seats: Sequence[Seat], masks: Sequence[Tensor]) -> dict[int, Tensor]:
        """What stays along each dimension of a layer."""
        kept: dict[int, Tensor] = {}
        for seat in seats:
            mask = masks[seat.group]
            along = torch.cat([mask, mask.new_ones(1)])[seat.index]
            kept[seat.dim] = kept[seat.dim] & along if seat.dim in kept else along
        return kept
