"""Granularity: what is kept or pruned as one.

A granularity is a frozen value that pools a layer's saliency over its units before the vote and
spreads the verdict over their weights after it.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Element", "Granularity"]


class Granularity(Protocol):
    """What a method asks of a granularity."""

    def pool(self, saliency: Tensor) -> Tensor:
        """The saliency of a layer's units, flat, from that of its weights, any shape."""
        ...

    def spread(self, mask: Tensor, like: Tensor) -> Tensor:
        """The mask of a layer's weights, shaped as ``like``, from that of its units, flat."""
        ...


@dataclass(frozen=True)
class Element:
    """Every weight on its own."""

    def pool(self, saliency: Tensor) -> Tensor:
        """See `Granularity`."""
        return saliency.reshape(-1)

    def spread(self, mask: Tensor, like: Tensor) -> Tensor:
        """See `Granularity`."""
        return mask.view(like.shape)
