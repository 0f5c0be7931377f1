"""Loosening: masks that may open again, then the masks of a back-end ever after.

While masks may open, what they hide keeps its value: a weight is there twice, as the optimizer has
it and as the model sees it. So, whatever the back-end, the modules hold ``weight_orig`` and
``weight_mask`` then. The training's gradient goes through the mask, the gradient inside ``observe``
does not: that is the straight-through estimator.
"""

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from mtprune.components import Layer
from mtprune.masking import Masking, Product, PruneMasking

__all__ = ["LooseMasking"]


class _Called:
    """A product that remembers whether anybody asked for it, and whether a gradient came back."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.called = False
        self.scored = False

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        self.called = True
        return self.product(weight, mask)


class LooseMasking(PruneMasking):
    """Masks that hide weights and leave them be, until a back-end's take over.

    Args:
        hard: The back-end.
        model: The model.
    """

    def __init__(self, hard: Masking, model: nn.Module) -> None:
        super().__init__(model)
        self.gate = hard.gate
        self._hard = hard
        self._products: dict[str, _Called] = {}
        self._warned = False

    @property
    def is_loose(self) -> bool:
        """Whether there are masks that may open again."""
        return bool(self._layers)

    def loosen(self, layers: Sequence[Layer], masks: Sequence[Tensor]) -> None:
        """Let masks hide weights, for the first time or anew.

        Warns:
            UserWarning: If some weights are read without their modules being called.
        """
        self._hard.lift()
        known = dict(self._products)
        silent = [name for name, p in known.items() if p.scored and not p.called]
        super().install(layers, masks)
        for name, product in self._products.items():
            product.called &= name in known  # installing asks once
        if silent and not self._warned:
            self._warned = True
            warnings.warn(
                f"The weights {silent} are read without their modules being called, so masks do "
                "not hide them until they are final. Call the modules, or exclude them.",
                stacklevel=5,
            )

    @override
    def install(self, layers: Sequence[Layer], masks: Sequence[Tensor]) -> None:
        """Make the masks final, and what they hide zero."""
        self._let_go()
        self._hard.install(layers, masks)

    @override
    def enforce(self) -> None:
        """Nothing, while masks may open: what they hide keeps its value."""
        if not self.is_loose:
            self._hard.enforce()

    @override
    def remove(self) -> None:
        if self.is_loose:
            super().enforce()
            self._let_go()
        self._hard.remove()

    @override
    def lift(self) -> None:
        self._let_go()
        self._hard.lift()

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        return super().mask(layer) if self.is_loose else self._hard.mask(layer)

    @override
    def scored(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """While masks may open, the weight as it would be if it came back."""
        if not self.is_loose:
            return self._hard.scored(layer)
        if layer.name in self._products:
            self._products[layer.name].scored = True
        return layer.parameter.detach(), None

    @override
    def trained(self, layer: Layer) -> Tensor:
        return layer.parameter.detach() if self.is_loose else self._hard.trained(layer)

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self.mask(layer) if self.is_loose else self._hard.gradient_mask(layer)

    @override
    def _product(self, layer: Layer) -> Product:
        return self._products.setdefault(layer.name, _Called(super()._product(layer)))

    def _let_go(self) -> None:
        """Leave plain modules with their weights as they are."""
        for layer in self._layers:
            mask = super().mask(layer)
            if mask is not None:
                mask.fill_(True)
        self._clear()
        self._layers = []
        self._products.clear()
