"""Masks, and what the weights that stay gain when the others go."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import distributed
from mtprune.holding.base import MaskHold, Masks
from mtprune.model.inputs import bias_of
from mtprune.model.layers import Layer
from mtprune.model.parts import local
from mtprune.refitting import Refit

__all__ = ["RefitHold", "Refitted", "move"]


@dataclass(frozen=True, kw_only=True)
class Refitted(Masks):
    """Masks, and from what the weights that stay are fitted when the masks take hold.

    Attributes:
        refit: How they are fitted.
        rows: For each layer a sample of its inputs, or no rows: then it is not fitted.
        weights: The weights before, flat ``[n]``.
    """

    refit: Refit
    rows: Sequence[Tensor]
    weights: Sequence[Tensor]

    @classmethod
    def of(
        cls, masks: Masks, refit: Refit, rows: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> "Refitted":
        """Masks that were decided, with what they are fitted from."""
        decided = {f.name: getattr(masks, f.name) for f in fields(Masks)}
        return cls(**decided, refit=refit, rows=rows, weights=weights)

    def change(self, place: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What a layer's weight and bias gain."""
        kept, weight = self.masks[place].view(shape), self.weights[place].view(shape)
        return self.refit.change(self.rows[place], weight.masked_fill(kept, 0.0), kept)


class RefitHold(MaskHold[Any]):
    """Masked weights are zero; the others move once, when masks change."""

    @override
    def take(self, layers: Sequence[Layer], decision: Refitted) -> bool:
        # All before the first is moved: if memory does not suffice, nothing has changed.
        changes = [decision.change(place, layer.part.shape) for place, layer in enumerate(layers)]
        changed = super().take(layers, decision)
        for layer, (weight, bias) in zip(layers, changes, strict=True):
            move(layer, weight, bias)
        return changed


@torch.no_grad()
def move(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Add to a layer's weight and to the bias that is trained with it, on all ranks the same."""
    for parameter, change in ((layer.parameter, weight), (bias_of(layer), bias)):
        if parameter is not None:
            values = local(parameter)
            added = change.to(values.device).contiguous()
            if layer.part.is_whole:  # else every rank fits rows of its own
                distributed.first_(added)
            values.copy_(values.to(torch.promote_types(values.dtype, added.dtype)) + added)
