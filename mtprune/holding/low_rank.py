"""Weights of low rank, held there after every optimizer step.

A pruned direction of a weight is one in which the weight is zero. So the Parameter itself holds the
weight of low rank, whatever the back-end: forwards run at full speed, parameter names stay, and
every reader of the weight reads the one the model uses. An optimizer step leads out of the kept
directions a little, and after it the weight is projected back.

While gates are learned no direction is removed. The Parameter holds every one times its gate.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import distributed
from mtprune.facts import Count, Subject, count_rank
from mtprune.holding.base import Decision, Held, Hold, View, by_task, whole
from mtprune.holding.masking import Gate
from mtprune.model import factors
from mtprune.model.layers import Layer
from mtprune.reading import Entry

__all__ = ["LowRankHold", "LowRanks"]

_FLOATS = (torch.float32, torch.float64)
_ROUNDING = 16  # times the precision of its type: how far off a projected weight may be


@dataclass(frozen=True, kw_only=True)
class LowRanks(Decision):
    """The singular directions of its weight that each layer keeps, largest first.

    Masks stay all True: a matrix of low rank has no zeros.

    Attributes:
        directions: For each layer, bool ``[m]``, True = keep; those of a stack matrix by matrix,
            ``[matrices * m]``.
        directions_alone: For each voter and each layer it uses, those that voter alone would keep.
        gates: The factor on each direction, ``[m]`` for each layer, while none is removed yet;
            None once they are.
    """

    directions: Sequence[Tensor]
    directions_alone: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    gates: Sequence[Tensor] | None = None

    @override
    def tensors(self) -> Iterable[Tensor]:
        return [*self.masks, *self.directions]

    @override
    def count(self, subject: Subject, place: int, alone: Mapping[str, Tensor]) -> Count:
        directions = by_task(self.directions_alone, subject.tasks, place)
        return count_rank(subject, self.directions[place], directions)


@dataclass(frozen=True)
class HeldRanks(Held):
    """Directions as a checkpoint holds them.

    Attributes:
        layers: The layers that are pruned.
        vectors: The directions of each layer that are scored, or gated.
        gates: The factor on each.
        ranks: How many directions of each matrix are kept.
        spans: The directions of each matrix that are kept, or with False the others.
    """

    layers: Sequence[Layer]
    vectors: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]
    ranks: Mapping[str, int]
    spans: Mapping[str, tuple[Tensor, bool]]

    @property
    @override
    def kept(self) -> Mapping[str, int]:
        return {layer.name: _kept(layer, self.ranks) for layer in self.layers}


class LowRankHold(Hold[LowRanks]):
    """Projections instead of masks, which stay all True."""

    def __init__(self) -> None:
        self.gate = Gate()
        self._layers: list[Layer] = []
        self._vectors: dict[str, Tensor] = {}  # the directions that are scored, or gated
        self._gates: dict[str, Tensor] = {}
        # Of single matrices, of which a stack has several:
        self._ranks: dict[str, int] = {}
        self._spans: dict[str, tuple[Tensor, bool]] = {}

    @override
    @torch.no_grad()
    def take(self, layers: Sequence[Layer], decision: LowRanks) -> bool:
        self._layers = list(layers)
        before = dict(self._ranks)
        for place, layer in enumerate(layers):
            if decision.gates is not None:
                self._let_through(layer, decision.gates[place])
            elif not bool(decision.directions[place].all()):
                self._keep(layer, decision.directions[place])
        if decision.gates is None:
            self._gates, self._vectors = {}, {}  # a new basis for the next update
        self.enforce()
        return before != self._ranks

    @override
    def kept(self, layer: Layer) -> int:
        """How many parameters two factors of its matrices have, or a matrix if that is less."""
        return _kept(layer, self._ranks)

    @override
    @torch.no_grad()
    def enforce(self) -> None:
        """Project the weights back to the directions that are kept."""
        for matrix, weight in self._held():
            weight.copy_(self._projected(matrix, weight))

    @override
    @torch.no_grad()
    def release(self) -> None:
        """Let go; a weight that has left its directions since is projected once more.

        The directions stay known, for a checkpoint that is taken later.
        """
        for matrix, weight in self._held():
            there = self._projected(matrix, weight)
            off, size = (weight - there).norm(), there.norm()
            if not bool(off <= _ROUNDING * torch.finfo(weight.dtype).eps * size):
                weight.copy_(there)
        self._layers = []

    @override
    def mask(self, layer: Layer) -> Tensor:
        return whole(layer)

    @override
    @torch.no_grad()
    def view(self, layer: Layer) -> View:
        """The weight, each of its directions a column of the matrix, or a row of a wide one.

        The directions are found when they are first asked for after an update.
        """
        vectors = self._basis(layer)
        weight = layer.parameter.detach().to(vectors.dtype)
        return View(factors.rotate(weight, vectors).view(layer.shape), basis=vectors)

    @override
    def trained(self, layer: Layer) -> Tensor:
        return layer.parameter.detach()

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "masks": {},
            "vectors": {name: vectors.clone() for name, vectors in self._vectors.items()},
            "gates": {name: gates.clone() for name, gates in self._gates.items()},
            "ranks": dict(self._ranks),
            "spans": {name: [span.clone(), inside] for name, (span, inside) in self._spans.items()},
        }

    @override
    def read(self, entry: Entry, layers: Sequence[Layer]) -> HeldRanks:
        parts = entry.fields(["masks", "vectors", "gates", "ranks", "spans"], optional=["open"])
        sizes = {x.name: factors.full(x.layout.shape(x.shape)) for x in layers}
        full = {n: sizes[x.name] for x in layers for n in x.layout.names(x.name, x.shape)}
        parts["masks"].mapping(among=())
        ranks = {n: part.whole(most=full[n]) for n, part in parts["ranks"].mapping(full).items()}
        spans = {}
        for name, pair in parts["spans"].mapping(ranks).items():
            span, inside = pair.items(2)
            size, is_inside = full[name], inside.flag()
            columns = ranks[name] if is_inside else size - ranks[name]
            spans[name] = span.tensor((size, columns), _FLOATS).clone(), is_inside
        # Those of a stack are in a tensor with one more dimension.
        first = {x.name: (x.matrices,) if x.layout.stacked else () for x in layers}
        vectors = parts["vectors"].mapping(sizes)
        return HeldRanks(
            layers,
            {
                name: part.tensor((*first[name], sizes[name], sizes[name]), _FLOATS).clone()
                for name, part in vectors.items()
            },
            {
                name: part.tensor((math.prod(first[name]) * sizes[name],), _FLOATS).clone()
                for name, part in parts["gates"].mapping(sizes).items()
            },
            ranks,
            spans,
        )

    @override
    def load(self, held: HeldRanks) -> None:
        self._layers = list(held.layers)
        self._vectors, self._gates = dict(held.vectors), dict(held.gates)
        self._ranks, self._spans = dict(held.ranks), dict(held.spans)

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        """The matrices of which not all directions are kept, by name."""
        for layer in self._layers:
            for name, weight in _matrices(layer):
                if name in self._spans:
                    yield name, weight

    def _basis(self, layer: Layer) -> Tensor:
        """The directions that are scored until the next update, columns ``[m, m]``.

        One such matrix for each of a stack, ``[matrices, m, m]``.
        """
        vectors = self._vectors.get(layer.name)
        if vectors is None:
            try:
                found = [factors.directions(weight)[1] for _, weight in _matrices(layer)]
            except ValueError:
                raise RuntimeError(
                    f"Weights of '{layer.name}' are not finite. Check the training; ranks are "
                    "unchanged."
                ) from None
            exact = torch.stack(found) if layer.layout.stacked else found[0]
            # Equal on all ranks to the last bit, also where their libraries differ.
            vectors = distributed.first_(exact.to(_dtype(layer.parameter)).contiguous())
        self._vectors[layer.name] = _moved(vectors, layer.parameter)
        return self._vectors[layer.name]

    def _keep(self, layer: Layer, kept: Tensor) -> None:
        """Remember the kept directions of each matrix or the others, whichever are fewer."""
        every = layer.layout.each(self._basis(layer))
        parts = kept.to(every[0].device).chunk(len(every))
        for (name, _), vectors, part in zip(_matrices(layer), every, parts, strict=True):
            rank = int(part.count_nonzero())
            if name not in self._ranks and rank == len(part):
                continue
            inside = 2 * rank < len(part)
            self._spans[name] = vectors[:, part if inside else ~part].contiguous(), inside
            self._ranks[name] = rank

    def _projected(self, matrix: str, weight: Tensor) -> Tensor:
        """A matrix that is zero in the directions that are not kept."""
        span, inside = self._spans[matrix]
        span = _moved(span, weight)
        self._spans[matrix] = span, inside
        seen = weight.to(span.dtype)
        part = factors.spread(factors.rotate(seen, span), span, tuple(weight.shape))
        return (part if inside else seen - part).to(weight.dtype)

    def _let_through(self, layer: Layer, gates: Tensor) -> None:
        """Multiply every direction by its gate as it is now."""
        basis = self._basis(layer)
        gates = gates.to(basis)
        before = self._gates.get(layer.name, torch.ones_like(gates)).to(basis)
        every = layer.layout.each(basis)
        changes = (gates / before - 1.0).chunk(len(every))
        for (_, weight), vectors, change in zip(_matrices(layer), every, changes, strict=True):
            shape = tuple(weight.shape)
            seen = weight.to(vectors.dtype)
            # Only the difference is computed in the basis: what does not change is not rounded.
            moved = factors.rotate(seen, vectors) * factors.per_direction(change, shape)
            weight.copy_(seen + factors.spread(moved, vectors, shape))
        self._gates[layer.name] = gates


def _matrices(layer: Layer) -> list[tuple[str, Tensor]]:
    """The matrices of a layer by name, views of its memory."""
    names = layer.layout.names(layer.name, layer.shape)
    return list(zip(names, layer.layout.each(layer.parameter.detach()), strict=True))


def _kept(layer: Layer, ranks: Mapping[str, int]) -> int:
    """How many parameters a layer keeps whose matrices have these ranks, or their full ones."""
    shape = layer.layout.shape(layer.shape)
    known = (ranks.get(n, factors.full(shape)) for n in layer.layout.names(layer.name, layer.shape))
    return sum(factors.parameters(shape, rank) for rank in known)


def _dtype(weight: Tensor) -> torch.dtype:
    """The type to compute in: half precision cannot tell directions apart."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _moved(vectors: Tensor, weight: Tensor) -> Tensor:
    """Vectors on the device of the model now, and of a type that its weights can use."""
    return vectors.to(weight.device, _dtype(weight))
