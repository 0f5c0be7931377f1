"""Softening: soft thresholds while they are learned, the masks of a back-end ever after.

While thresholds are learned a weight is there twice, as the optimizer trains it and as the model
sees it. So, whatever the back-end, the modules hold ``weight_orig`` then, and ``weight_mask`` says
what was above the threshold at the last update. Hardening writes what the model sees into the
Parameter and hands the masks to the back-end.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune.components import Layer
from mtprune.masking import Gate, Masking, Product, PruneMasking
from mtprune.thresholds import soft_threshold

__all__ = ["EDGE", "SoftMasking", "Threshold", "Watch"]

Watch = Literal["slope", "edge"]

EDGE = 0.1
"""How far above the threshold weights are at its edge, as a share of it."""


class Leaking:
    """How much gradient passes below the thresholds: all of it while the gate is open."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.share = 0.0
        self._tensor = torch.tensor(0.0)

    def set(self, share: float) -> None:
        """Let that much pass."""
        self.share = share
        self._tensor.data.fill_(share)

    @property
    def now(self) -> float:
        """See `mtprune.thresholds.Leak`."""
        return 1.0 if self.gate.dense else self.share

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `mtprune.thresholds.Leak`."""
        return self._tensor, self.gate.flag


class Threshold:
    """The threshold of one layer, and what makes its weight of it.

    Args:
        leak: How much gradient passes below it.
        like: The layer's weight.
        watch: What to note in every backward; see `SoftMasking`.
    """

    def __init__(self, leak: Leaking, like: Tensor, watch: Watch | None) -> None:
        self.leak = leak
        self.fixed = like.new_zeros((), requires_grad=False)
        self.gain = like.new_ones((), requires_grad=False)
        self.gained = False
        self.edge = EDGE if watch == "edge" else 0.0
        self.slack = like.new_zeros((), dtype=torch.float32, requires_grad=True) if watch else None
        self.called = False

    def tau(self, weight: Tensor) -> Tensor:
        """The threshold for a weight, 0-dim, of its type and where it is."""
        if self.fixed.device != weight.device or self.fixed.dtype != weight.dtype:
            # The model has moved, or become another type.
            self.fixed, self.gain = self.fixed.to(weight), self.gain.to(weight)
        return self.fixed

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The weight as the model sees it."""
        self.called = True
        if self.slack is not None and self.slack.device != weight.device:
            self.slack = self.slack.detach().to(weight.device).requires_grad_()
        soft = soft_threshold(weight, self.tau(weight), self.leak, self.slack, self.edge)
        return soft * self.gain if self.gained else soft

    def seen(self, weight: Tensor) -> Tensor:
        """The same, for those who only look."""
        soft = soft_threshold(weight, self.tau(weight))
        return soft * self.gain if self.gained else soft


class SoftMasking(PruneMasking):
    """Soft thresholds first, then the masks of a back-end.

    Args:
        hard: The back-end.
        model: The model.
        watch: What to note of every layer in every backward: ``"slope"``, the derivative of the
            loss in the log-threshold; ``"edge"``, the sum of ``|gradient|`` over the weights just
            above it; or nothing.
    """

    def __init__(self, hard: Masking, model: nn.Module, watch: Watch | None = None) -> None:
        super().__init__(model)
        self.gate = hard.gate
        self.leak = Leaking(self.gate)
        self.thresholds: dict[str, Threshold] = {}
        self._hard = hard
        self._watch = watch
        self._seen = torch.zeros(0)
        self._warned = False

    @property
    def is_soft(self) -> bool:
        """Whether thresholds are being learned."""
        return bool(self.thresholds)

    @torch.no_grad()
    def soften(
        self,
        layers: Sequence[Layer],
        taus: Sequence[Tensor],
        masks: Sequence[Tensor],
        leak: float = 0.0,
        gains: Sequence[Tensor] | None = None,
    ) -> None:
        """Make thresholds hold, for the first time or anew.

        Args:
            layers: The layers.
            taus: For each, its threshold, 0-dim.
            masks: For each, what is above it, for those who look.
            leak: How much gradient passes below.
            gains: For each, what is left is multiplied by that, 0-dim; by nothing unless given.

        Warns:
            UserWarning: If some weights are read without their modules being called.
        """
        silent = [name for name, threshold in self.thresholds.items() if not threshold.called]
        if self._warned or len(silent) == len(self.thresholds):  # said, or the model has not run
            silent = []
        self.leak.set(leak)
        for layer, tau in zip(layers, taus, strict=True):
            if layer.name not in self.thresholds:
                self.thresholds[layer.name] = Threshold(self.leak, layer.parameter, self._watch)
            self.thresholds[layer.name].fixed.fill_(tau)
        for layer, gain in zip(layers, gains or (), strict=gains is not None):
            self.thresholds[layer.name].gain.fill_(gain)
            self.thresholds[layer.name].gained = True
        self._seen = torch.zeros(len(layers))
        super().install(layers, masks)
        for threshold in self.thresholds.values():
            threshold.called = False  # installing asks once
        if silent:
            self._warned = True
            warnings.warn(
                f"The weights {silent} are read without their modules being called, so they are "
                "not thresholded until masks are fixed. Call the modules, or exclude them.",
                stacklevel=5,
            )

    @override
    def install(self, layers: Sequence[Layer], masks: Sequence[Tensor]) -> None:
        """Harden, if that has not been done, and make the masks hold."""
        self._harden()
        self._hard.install(layers, masks)

    @override
    def enforce(self) -> None:
        """While thresholds are learned, weights below them move on, for they may come back."""
        if not self.is_soft:
            self._hard.enforce()
        elif self._watch:
            self._settle()

    @override
    def remove(self) -> None:
        self._harden()
        self._hard.remove()

    @override
    def lift(self) -> None:
        self._discard()
        self._hard.lift()

    @override
    @torch.no_grad()
    def current(self, layer: Layer) -> Tensor:
        if not self.is_soft:
            return self._hard.current(layer)
        threshold, weight = self.thresholds.get(layer.name), layer.parameter
        if threshold is None:
            return torch.ones_like(weight, dtype=torch.bool)
        return weight.abs() > threshold.tau(weight)

    @override
    @torch.no_grad()
    def effective(self, layer: Layer) -> Tensor:
        if not self.is_soft:
            return self._hard.effective(layer)
        weight, threshold = layer.parameter.detach(), self.thresholds.get(layer.name)
        return weight if threshold is None else threshold.seen(weight)

    @override
    def scored(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        return (self.effective(layer), None) if self.is_soft else self._hard.scored(layer)

    @override
    def trained(self, layer: Layer) -> Tensor:
        return layer.parameter.detach() if self.is_soft else self._hard.trained(layer)

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return None if self.is_soft else self._hard.gradient_mask(layer)

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        return super().mask(layer) if self.is_soft else self._hard.mask(layer)

    def seen(self) -> Tensor:
        """What was noted of each soft layer, ``[layers]``.

        Summed over all backwards since thresholds were last set.
        """
        return self._seen

    def soft_state(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """The thresholds as plain containers; empty once masks are fixed."""
        if not self.is_soft:
            return {}
        return {
            "thresholds": {
                x.name: self.thresholds[x.name].tau(x.parameter).detach().clone() for x in layers
            },
            "gains": {x.name: self.thresholds[x.name].gain.clone() for x in layers}
            if all(self.thresholds[x.name].gained for x in layers)
            else {},
            "leak": self.leak.share,
            "seen": self._seen.clone(),
        }

    def restore(
        self, layers: Sequence[Layer], masks: Sequence[Tensor], state: Mapping[str, Any]
    ) -> None:
        """Go on from `soft_state`."""
        taus = [state["thresholds"][layer.name] for layer in layers]
        gains = [state["gains"][layer.name] for layer in layers] if state["gains"] else None
        self.soften(layers, taus, masks, state["leak"], gains)
        self._seen = state["seen"].clone()

    @override
    def _product(self, layer: Layer) -> Product:
        return self.thresholds[layer.name]

    @torch.no_grad()
    def _settle(self) -> None:
        """Take up what was noted in the last backward."""
        slack = [threshold.slack for threshold in self.thresholds.values()]
        grads = [x.new_zeros(()) if x.grad is None else x.grad for x in slack if x is not None]
        found = torch.stack([grad.to(grads[0].device) for grad in grads])
        # Neither infinite nor NaN, as where a GradScaler overflows.
        self._seen = self._seen.to(found.device) + torch.where(found.isfinite(), found, 0.0)
        for x in slack:
            if x is not None:
                x.grad = None

    @torch.no_grad()
    def _harden(self) -> None:
        """Write what the model sees into the Parameters, and leave plain modules."""
        for layer in self._layers:
            layer.parameter.copy_(self.effective(layer))
        self._discard()

    def _discard(self) -> None:
        """Leave plain modules with their weights as they are."""
        for threshold in self.thresholds.values():
            threshold.fixed.zero_()
            threshold.gain.fill_(1.0)
        self._clear()
        self._layers = []
        self.thresholds.clear()
