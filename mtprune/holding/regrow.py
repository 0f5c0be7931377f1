"""Masks that exchange weights: those that come back start at zero, without a past."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from mtprune.holding.base import MaskHold, Masks, shaped
from mtprune.holding.masking import Masking
from mtprune.model.layers import Layer
from mtprune.model.parts import local

__all__ = ["RegrowHold"]


class RegrowHold(MaskHold[Masks]):
    """Masks under which pruned weights may grow again.

    Args:
        masks: The back-end.
        optimizer: The optimizer, which remembers weights.
    """

    def __init__(self, masks: Masking, optimizer: Optimizer) -> None:
        super().__init__(masks)
        self._optimizer = optimizer

    @override
    def take(self, layers: Sequence[Layer], decision: Masks) -> bool:
        for layer, new in zip(layers, shaped(layers, decision.masks), strict=True):
            self._restart(layer, new & ~self.mask(layer))
        return super().take(layers, decision)

    @torch.no_grad()
    def _restart(self, layer: Layer, where: Tensor) -> None:
        """Let some weights start at zero, with none of the optimizer's memory of them.

        All state of the weight's shape is forgotten: momenta, second moments, and others.
        """
        layer.values.masked_fill_(where, 0.0)
        for value in self._optimizer.state.get(layer.parameter, {}).values():
            if isinstance(value, Tensor) and tuple(value.shape) == layer.shape:
                here = local(value)
                here.masked_fill_(where.to(here.device), 0)
