"""Straight-through masks: they hide weights, which keep their values and may come back.

A weight is there twice, as the optimizer has it and as the model sees it. The training's gradient
goes through the mask, the gradient inside ``observe`` does not: that is the straight-through
estimator.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from typing_extensions import override

from mtprune.holding.base import HeldMasks, Masks, View, packed, read_masks, shaped, whole
from mtprune.holding.masking import Masking, masked
from mtprune.holding.phases import OpenHold
from mtprune.model.layers import Layer
from mtprune.reading import Entry

__all__ = ["StraightThrough"]


class _Product:
    """The masked weight; remembers whether a module asked for it, and whether it was scored."""

    def __init__(self, masks: Masking) -> None:
        self.product = partial(masked, gate=masks.gate)
        self.called = False
        self.scored = False

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        self.called = True
        return self.product(weight, mask)


class StraightThrough(OpenHold[Masks]):
    """Masks that hide weights and leave them be.

    Args:
        masks: The back-end.
    """

    def __init__(self, masks: Masking) -> None:
        self._masks = masks
        self._layers: list[Layer] = []
        self._products: dict[str, _Product] = {}
        self._warned = False
        self.gate = masks.gate

    @property
    @override
    def is_open(self) -> bool:
        return bool(self._layers)

    @override
    def take(self, layers: Sequence[Layer], decision: Masks) -> bool:
        """See `Hold`.

        Warns:
            UserWarning: If some weights are read without their modules being called.
        """
        silent = [name for name, p in self._products.items() if p.scored and not p.called]
        self._show(layers, shaped(layers, decision.masks))
        if silent and not self._warned:
            self._warned = True
            warnings.warn(
                f"The weights {silent} are read without their modules being called, so masks do "
                "not hide them until they are final. Call the modules, or exclude them.",
                stacklevel=5,
            )
        return True

    @override
    def close(self, layers: Sequence[Layer], decision: Masks | None) -> None:
        self.discard()

    @override
    def discard(self) -> None:
        self._masks.lift()
        self._layers = []
        self._products.clear()

    @override
    def enforce(self) -> None:
        """Nothing: hidden weights keep their values."""

    @override
    def mask(self, layer: Layer) -> Tensor:
        mask = self._masks.mask(layer)
        return whole(layer) if mask is None else mask

    @override
    def view(self, layer: Layer) -> View:
        """The weight as it would be if it came back."""
        if layer.name in self._products:
            self._products[layer.name].scored = True
        return View(layer.values)

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self._masks.gradient_mask(layer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"masks": packed(self._layers, self._masks)}

    @override
    def read(self, entry: Entry, layers: Sequence[Layer]) -> HeldMasks:
        return read_masks(entry.fields(["open", "masks"])["masks"], layers)

    @override
    def load(self, held: HeldMasks) -> None:
        self._show(held.layers, held.masks)

    def _show(self, layers: Sequence[Layer], masks: Sequence[Tensor]) -> None:
        known = set(self._products)
        self._layers = list(layers)
        products = [self._products.setdefault(x.name, _Product(self._masks)) for x in layers]
        self._masks.show(layers, masks, products)
        for name, product in self._products.items():
            product.called &= name in known  # a back-end may ask once at first
