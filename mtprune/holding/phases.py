"""Two phases: weights that may come back, then masks for good."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from mtprune.holding.base import Held, Hold, M, MaskHold, Masks, View, differ, shaped
from mtprune.model.layers import Layer
from mtprune.reading import Entry

__all__ = ["OpenHold", "Phased"]


class OpenHold(Hold[M]):
    """The hold of a phase in which pruned weights keep their values and may come back."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether the phase has begun and not ended."""

    @abstractmethod
    def close(self, layers: Sequence[Layer], decision: M | None) -> None:
        """End the phase: plain modules whose weights are what their masks are to be put on.

        Args:
            layers: The layers that are pruned.
            decision: The last one, not taken yet; None if the one before it was.
        """

    @abstractmethod
    def discard(self) -> None:
        """End the phase, and leave weights as they are."""

    @override
    def trained(self, layer: Layer) -> Tensor:
        return layer.values

    @override
    def release(self) -> None:
        self.discard()


@dataclass(frozen=True)
class HeldPhase(Held):
    """One of two phases as a checkpoint holds it.

    Attributes:
        is_open: Whether it is the first.
        inner: What holds in it.
    """

    is_open: bool
    inner: Any

    @property
    @override
    def kept(self) -> Mapping[str, int]:
        counts: Mapping[str, int] = self.inner.kept
        return counts


class Phased(Hold[M]):
    """An open phase first, then the masks of a back-end.

    Args:
        first: The hold of the open phase.
        last: The hold of the masks that are for good.
    """

    def __init__(self, first: OpenHold[M], last: MaskHold[Any]) -> None:
        self._first = first
        self._last = last
        self._layers: list[Layer] = []
        self.gate = first.gate
        self.no_fold = first.no_fold

    @property
    def _now(self) -> Hold[Any]:
        return self._first if self._first.is_open else self._last

    @override
    def take(self, layers: Sequence[Layer], decision: M) -> bool:
        self._layers = list(layers)
        before = [self.mask(layer).clone() for layer in layers]
        if decision.final:
            self._first.close(layers, decision)
            self._last.take(layers, decision)
        else:
            self._first.take(layers, decision)
        return differ(before, shaped(layers, decision.masks))

    @override
    def enforce(self) -> None:
        self._now.enforce()

    @override
    def release(self) -> None:
        if self._first.is_open:
            masks = [self.mask(layer).clone() for layer in self._layers]
            self._first.close(self._layers, None)
            self._last.take(self._layers, Masks([mask.reshape(-1) for mask in masks]))
        self._last.release()

    @override
    def mask(self, layer: Layer) -> Tensor:
        return self._now.mask(layer)

    @override
    def view(self, layer: Layer) -> View:
        return self._now.view(layer)

    @override
    def trained(self, layer: Layer) -> Tensor:
        return self._now.trained(layer)

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self._now.gradient_mask(layer)

    @override
    def noted(self) -> list[float]:
        return self._first.noted()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"open": self._first.is_open, **self._now.state_dict()}

    @override
    def read(self, entry: Entry, layers: Sequence[Layer]) -> "HeldPhase":
        is_open = entry["open"].flag()
        return HeldPhase(is_open, (self._first if is_open else self._last).read(entry, layers))

    @override
    def load(self, held: "HeldPhase") -> None:
        self._first.discard()
        if held.is_open:
            self._last.discard()
            self._layers = list(held.inner.layers)
        (self._first if held.is_open else self._last).load(held.inner)
