"""Lowering: weights of low rank, held there after every optimizer step.

A pruned component is a direction in which a weight is zero. So the Parameter itself holds the
weight of low rank, whatever the back-end: forwards run at full speed, parameter names stay, and
whoever reads the weight reads what the model sees. An optimizer step leads out of the kept
directions a little, and after it the weight is projected back.

While gates are learned nothing is removed. The Parameter holds every component times its gate.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import distributed, ranks
from mtprune.components import Layer
from mtprune.masking import Masking

__all__ = ["RankMasking"]

_ROUNDING = 16  # times the precision of its type: how far off a projected weight may be


class RankMasking(Masking):
    """Projections instead of masks, which stay all True: a matrix of low rank has no zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._vectors: dict[str, Tensor] = {}  # the components that are scored, or gated
        self._gates: dict[str, Tensor] = {}
        self._ranks: dict[str, int] = {}
        self._spans: dict[str, tuple[Tensor, bool]] = {}

    @torch.no_grad()
    def lower(
        self,
        layers: Sequence[Layer],
        kept: Sequence[Tensor],
        gates: Sequence[Tensor] | None = None,
    ) -> None:
        """Keep some components of every layer, of those that were scored.

        Args:
            layers: The layers.
            kept: For each, what is kept, bool ``[m]``.
            gates: If given, nothing is removed yet, and each component is to be that many times
                what it was before there were gates, ``[m]``.
        """
        self._layers = list(layers)
        for place, layer in enumerate(layers):
            if gates is not None:
                self._let_through(layer, gates[place])
            elif not bool(kept[place].all()):
                self._keep(layer, kept[place])
        if gates is None:
            self._gates, self._vectors = {}, {}  # a new basis for the next update
        self.enforce()

    def rank(self, layer: Layer) -> int:
        """How many components a layer has left."""
        return self._ranks.get(layer.name, min(layer.shape))

    @override
    def kept(self, layer: Layer) -> int:
        """How many parameters two factors of the layer have, or the layer if that is less."""
        return ranks.parameters(layer.shape, self.rank(layer))

    @override
    @torch.no_grad()
    def enforce(self) -> None:
        """Project the weights back to the directions that are kept."""
        for layer in self._layers:
            if layer.name in self._spans:
                layer.parameter.detach().copy_(self._projected(layer))

    @override
    @torch.no_grad()
    def remove(self) -> None:
        """Let go; only a weight that has left its directions since is projected once more.

        What the directions are stays known, for who saves the state now.
        """
        for layer in self._layers:
            if layer.name in self._spans:
                weight, there = layer.parameter.detach(), self._projected(layer)
                off, size = (weight - there).norm(), there.norm()
                if not bool(off <= _ROUNDING * torch.finfo(weight.dtype).eps * size):
                    weight.copy_(there)
        self._layers = []

    @override
    def lift(self) -> None:
        """Stop holding ranks; weights stay as they are."""
        self._clear()
        self._layers = []

    @override
    def scored(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """The weight, each of its components a column, or a row of a wide one."""
        return self.rotated(layer, layer.parameter.detach()), None

    @override
    @torch.no_grad()
    def rotated(self, layer: Layer, matrix: Tensor) -> Tensor:
        """The components are found when they are first asked for after an update."""
        vectors = self._basis(layer)
        return ranks.rotate(matrix.to(vectors.dtype), vectors)

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        return None

    def rank_state(self) -> dict[str, Any]:
        """As plain containers; empty before the first update."""
        return {
            "vectors": {name: vectors.clone() for name, vectors in self._vectors.items()},
            "gates": {name: gates.clone() for name, gates in self._gates.items()},
            "ranks": dict(self._ranks),
            "spans": {name: [span.clone(), inside] for name, (span, inside) in self._spans.items()},
        }

    def restore(self, layers: Sequence[Layer], state: Mapping[str, Any]) -> None:
        """Go on from `rank_state`."""
        self._layers = list(layers)
        self._vectors = {name: vectors.clone() for name, vectors in state["vectors"].items()}
        self._gates = {name: gates.clone() for name, gates in state["gates"].items()}
        self._ranks = dict(state["ranks"])
        self._spans = {
            name: (span.clone(), bool(inside)) for name, (span, inside) in state["spans"].items()
        }

    @override
    def _add(self, layer: Layer, mask: Tensor) -> None:
        """Nothing: masks are all True."""

    @override
    def _clear(self) -> None:
        self._vectors, self._gates, self._ranks, self._spans = {}, {}, {}, {}

    def _basis(self, layer: Layer) -> Tensor:
        """The components that are scored until the next update, columns ``[m, m]``."""
        vectors = self._vectors.get(layer.name)
        if vectors is None:
            try:
                _, exact = ranks.components(layer.parameter)
            except ValueError:
                raise RuntimeError(
                    f"Weights of '{layer.name}' are not finite. Check the training; ranks are "
                    "unchanged."
                ) from None
            # Equal on all ranks to the last bit, also where their libraries differ.
            vectors = distributed.first_(exact.to(_dtype(layer.parameter)).contiguous())
        self._vectors[layer.name] = _moved(vectors, layer)
        return self._vectors[layer.name]

    def _keep(self, layer: Layer, kept: Tensor) -> None:
        """Remember the narrower of what is kept and what is not."""
        vectors = self._basis(layer)
        kept = kept.to(vectors.device)
        rank = int(kept.count_nonzero())
        inside = 2 * rank < len(kept)
        self._spans[layer.name] = vectors[:, kept if inside else ~kept].contiguous(), inside
        self._ranks[layer.name] = rank

    def _projected(self, layer: Layer) -> Tensor:
        """A layer's weight without what is not kept."""
        span, inside = self._spans[layer.name]
        span = _moved(span, layer)
        self._spans[layer.name] = span, inside
        weight = layer.parameter.detach()
        seen = weight.to(span.dtype)
        part = ranks.spread(ranks.rotate(seen, span), span, layer.shape)
        return (part if inside else seen - part).to(weight.dtype)

    def _let_through(self, layer: Layer, gates: Tensor) -> None:
        """Multiply every component by what its gate has become."""
        vectors = self._basis(layer)
        gates = gates.to(vectors)
        before = self._gates.get(layer.name, torch.ones_like(gates)).to(vectors)
        weight = layer.parameter.detach()
        seen = weight.to(vectors.dtype)
        # Only the difference is computed in the basis: what does not change is not rounded.
        change = ranks.rotate(seen, vectors) * ranks.per_component(
            gates / before - 1.0, layer.shape
        )
        weight.copy_(seen + ranks.spread(change, vectors, layer.shape))
        self._gates[layer.name] = gates


def _dtype(weight: Tensor) -> torch.dtype:
    """What to compute in: half precision cannot tell components apart."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _moved(vectors: Tensor, layer: Layer) -> Tensor:
    """Where the model is now, and of a type that its weights can use."""
    return vectors.to(layer.parameter.device, _dtype(layer.parameter))
