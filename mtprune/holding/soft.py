"""Soft thresholds while they are learned.

A weight is there twice, as the optimizer trains it and as the model sees it: shrunk by its layer's
threshold, zero below it, and multiplied by its layer's gain. Closing the phase writes the weights
that the model sees into the Parameters.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import distributed
from mtprune.facts import Count, Subject, count
from mtprune.holding.base import Held, HeldMasks, Masks, View, packed, read_masks, shaped, whole
from mtprune.holding.masking import Gate, Masking
from mtprune.holding.phases import OpenHold
from mtprune.holding.thresholds import soft_threshold
from mtprune.model.layers import Layer
from mtprune.reading import Entry

__all__ = ["EDGE", "SoftHold", "SoftThresholds", "Watch"]

Watch = Literal["slope", "edge"]

EDGE = 0.1
"""How far above the threshold weights are at its edge, as a share of it."""


@dataclass(frozen=True, kw_only=True)
class SoftThresholds(Masks):
    """Soft thresholds; masks say which weights are above them.

    Attributes:
        thresholds: For each layer, its threshold, 0-dim.
        leak: The share of the gradient that passes to weights below.
        gains: For each layer, the factor on the weights that are left, 0-dim; None for none.
    """

    thresholds: Sequence[Tensor]
    leak: float = 0.0
    gains: Sequence[Tensor] | None = None

    @property
    @override
    def slopes(self) -> Mapping[str, float]:
        slopes: Mapping[str, float] = self.memory.get("slopes", {})
        return slopes

    @override
    def tensors(self) -> Iterable[Tensor]:
        return [*self.masks, *self.thresholds]

    @override
    def count(self, subject: Subject, place: int, alone: Mapping[str, Tensor]) -> Count:
        tau = float(self.thresholds[place])
        return count(subject, self.masks[place], alone, threshold=tau)


class _Leak:
    """How much gradient passes below the thresholds: all of it while the gate is open."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.share = 0.0
        self._tensor = torch.tensor(0.0)

    def set(self, share: float) -> None:
        """Set the share that passes."""
        self.share = share
        self._tensor.data.fill_(share)

    @property
    def now(self) -> float:
        """See `mtprune.holding.thresholds.Leak`."""
        return 1.0 if self.gate.dense else self.share

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `mtprune.holding.thresholds.Leak`."""
        return self._tensor, self.gate.flag


class _Threshold:
    """The threshold of one layer: the product of its weight.

    Args:
        leak: How much gradient passes below it.
        like: The layer's weight.
        watch: The number to note in every backward; see `SoftHold`.
    """

    reads_mask = False  # what is below it follows from the weight

    def __init__(self, leak: _Leak, like: Tensor, watch: Watch | None) -> None:
        self.leak = leak
        self.fixed = like.new_zeros((), requires_grad=False)
        self.gain = like.new_ones((), requires_grad=False)
        self.gained = False
        self.edge = EDGE if watch == "edge" else 0.0
        self.slack = like.new_zeros((), dtype=torch.float32, requires_grad=True) if watch else None
        self.called = False

    def tau(self, weight: Tensor) -> Tensor:
        """The threshold for a weight, 0-dim, of its type and where it is."""
        if self.fixed.device != weight.device:  # the model has moved
            self.fixed, self.gain = self.fixed.to(weight.device), self.gain.to(weight.device)
        # Kept as it is: a forward may compute in a narrower type than the weights are trained in.
        return self.fixed if self.fixed.dtype == weight.dtype else self.fixed.to(weight.dtype)

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The weight as the model sees it."""
        self.called = True
        if self.slack is not None and self.slack.device != weight.device:
            self.slack = self.slack.detach().to(weight.device).requires_grad_()
        soft = soft_threshold(weight, self.tau(weight), self.leak, self.slack, self.edge)
        return soft * self.gain if self.gained else soft

    def seen(self, weight: Tensor) -> Tensor:
        """The weight as the model sees it, without a graph."""
        soft = soft_threshold(weight, self.tau(weight))
        return soft * self.gain if self.gained else soft


@dataclass(frozen=True)
class Thresholded(Held):
    """Soft thresholds as a checkpoint holds them.

    Attributes:
        layers: The layers that have one.
        thresholds: Theirs, and masks of their shapes.
        noted: What has been noted of each layer.
        masks: The masks alone.
    """

    layers: Sequence[Layer]
    thresholds: SoftThresholds
    noted: Tensor
    masks: HeldMasks

    @property
    @override
    def kept(self) -> Mapping[str, int]:
        return self.masks.kept


def _positive(entry: Entry) -> Tensor:
    """A number that is not negative, as a tensor."""
    value = entry.tensor((), (torch.float64, torch.float32, torch.bfloat16, torch.float16))
    if value < 0:
        raise entry.wrong("must not be negative")
    return value


class SoftHold(OpenHold[SoftThresholds]):
    """Soft thresholds in front of every weight.

    Args:
        masks: The back-end.
        watch: The number to note of every layer in every backward: ``"slope"``, the derivative of
            the loss in the log-threshold; ``"edge"``, the sum of ``|gradient|`` over the weights
            just above it; or none.
    """

    no_fold = (
        "fold=True cannot train thresholds. Call observe() without it, then "
        "pruner.weigh(losses).backward()."
    )

    def __init__(self, masks: Masking, watch: Watch | None = None) -> None:
        self.gate = masks.gate
        self._masks = masks
        self._layers: list[Layer] = []
        self._leak = _Leak(self.gate)
        self._thresholds: dict[str, _Threshold] = {}
        self._watch = watch
        self._noted = torch.zeros(0)
        self._warned = False

    @property
    @override
    def is_open(self) -> bool:
        return bool(self._thresholds)

    @override
    def take(self, layers: Sequence[Layer], decision: SoftThresholds) -> bool:
        """See `Hold`.

        Warns:
            UserWarning: If some weights are read without their modules being called.
        """
        silent = [name for name, threshold in self._thresholds.items() if not threshold.called]
        if self._warned or len(silent) == len(self._thresholds):  # said, or the model has not run
            silent = []
        self._set(layers, shaped(layers, decision.masks), decision)
        if silent:
            self._warned = True
            warnings.warn(
                f"The weights {silent} are read without their modules being called, so they are "
                "not thresholded until masks are fixed. Call the modules, or exclude them.",
                stacklevel=5,
            )
        return True

    @override
    @torch.no_grad()
    def close(self, layers: Sequence[Layer], decision: SoftThresholds | None) -> None:
        if decision is not None:
            self.take(layers, decision)
        for layer in self._layers:
            layer.values.copy_(self._effective(layer))
        self.discard()

    @override
    def discard(self) -> None:
        for threshold in self._thresholds.values():
            threshold.fixed.zero_()
            threshold.gain.fill_(1.0)
        self._masks.lift()
        self._layers = []
        self._thresholds.clear()

    @override
    @torch.no_grad()
    def enforce(self) -> None:
        """Weights below their threshold move on, for they may come back; the watch is read."""
        if not self._watch:
            return
        slack = [threshold.slack for threshold in self._thresholds.values()]
        grads = [x.new_zeros(()) if x.grad is None else x.grad for x in slack if x is not None]
        values = torch.stack([grad.to(grads[0].device) for grad in grads])
        # Neither infinite nor NaN, as where a GradScaler overflows.
        self._noted = self._noted.to(values.device) + torch.where(values.isfinite(), values, 0.0)
        for x in slack:
            if x is not None:
                x.grad = None

    @override
    @torch.no_grad()
    def mask(self, layer: Layer) -> Tensor:
        threshold, weight = self._thresholds.get(layer.name), layer.values
        if threshold is None:
            return whole(layer)
        return weight.abs() > threshold.tau(weight)

    @override
    def view(self, layer: Layer) -> View:
        return View(self._effective(layer))

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return None

    @override
    def noted(self) -> list[float]:
        """The watch, summed over backwards since thresholds were last set, its mean over ranks."""
        noted: list[float] = distributed.mean_(self._noted.clone()).tolist()
        return noted

    @override
    def state_dict(self) -> dict[str, Any]:
        now = [(layer, self._thresholds[layer.name]) for layer in self._layers]
        gained = all(threshold.gained for _, threshold in now)
        return {
            "masks": packed(self._layers, self._masks),
            "thresholds": {x.name: t.tau(x.values).detach().clone() for x, t in now},
            "gains": {x.name: t.gain.clone() for x, t in now} if gained else {},
            "leak": self._leak.share,
            "noted": self._noted.clone(),
        }

    @override
    def read(self, entry: Entry, layers: Sequence[Layer]) -> "Thresholded":
        parts = entry.fields(["open", "masks", "thresholds", "gains", "leak", "noted"])
        held = read_masks(parts["masks"], layers)
        names = [layer.name for layer in held.layers]
        given = bool(parts["gains"].mapping(names))
        return Thresholded(
            held.layers,
            SoftThresholds(
                held.masks,
                thresholds=[_positive(parts["thresholds"][name]) for name in names],
                leak=parts["leak"].number(0.0, 1.0),
                gains=[_positive(parts["gains"][name]) for name in names] if given else None,
            ),
            parts["noted"].tensor((len(names),), torch.float32).clone(),
            held,
        )

    @override
    def load(self, held: "Thresholded") -> None:
        self._set(held.layers, held.thresholds.masks, held.thresholds)
        self._noted = held.noted

    @torch.no_grad()
    def _set(
        self, layers: Sequence[Layer], masks: Sequence[Tensor], decision: SoftThresholds
    ) -> None:
        """Let thresholds hold, for the first time or anew."""
        self._layers = list(layers)
        self._leak.set(decision.leak)
        for layer, tau in zip(layers, decision.thresholds, strict=True):
            if layer.name not in self._thresholds:
                self._thresholds[layer.name] = _Threshold(self._leak, layer.values, self._watch)
            self._thresholds[layer.name].fixed.fill_(tau)
        gains = decision.gains
        for layer, gain in zip(layers, gains or (), strict=gains is not None):
            self._thresholds[layer.name].gain.fill_(gain)
            self._thresholds[layer.name].gained = True
        self._noted = torch.zeros(len(layers))
        self._masks.show(layers, masks, [self._thresholds[layer.name] for layer in layers])
        for threshold in self._thresholds.values():
            threshold.called = False  # a back-end may ask once at first

    @torch.no_grad()
    def _effective(self, layer: Layer) -> Tensor:
        """A layer's weight as the model sees it."""
        weight, threshold = layer.values, self._thresholds.get(layer.name)
        return weight if threshold is None else threshold.seen(weight)
