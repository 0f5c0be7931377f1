"""Masking: how masks, or other products of weights, sit in the modules of a model.

A back-end keeps one bool mask for each layer. Modules see either the Parameter itself, which holds
exact zeros where it is masked, or a product of Parameter and mask while the Parameter keeps its
values. Who decides that is a `mtprune.holding.base.Hold`; a back-end only does it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.bits import zeroed
from mtprune.model.layers import Layer

__all__ = [
    "FromParent",
    "Gate",
    "Masking",
    "Product",
    "attention_parents",
    "masked",
    "reads",
    "standing_in",
]

Product = Callable[[Tensor, Tensor], Tensor]
"""From a Parameter and its mask to the effective weight."""


class Gate:
    """Whether the gradient of masked weights passes through undiminished."""

    def __init__(self) -> None:
        self.dense = False
        # The same as a tensor: a compiled backward reads it anew, where a bool would be frozen in.
        self.flag = torch.tensor(False)

    def set(self, dense: bool) -> None:
        """Open or close it."""
        self.dense = dense
        # Through `.data`: autograd has saved the flag, and is meant to see the new value.
        self.flag.data.fill_(dense)


class Masking(ABC):
    """A back-end. Masks are bool, shaped like their layer.

    Attributes:
        gate: Whether gradients of masked weights pass.
    """

    def __init__(self) -> None:
        self.gate = Gate()
        self._layers: list[Layer] = []

    def put(self, layers: Sequence[Layer], masks: Sequence[Tensor]) -> None:
        """Keep masks, for the first time or anew; weights keep their values until `zero`."""
        self._put(layers, masks, None)

    def show(
        self, layers: Sequence[Layer], masks: Sequence[Tensor], products: Sequence[Product]
    ) -> None:
        """The same, and let modules see a product of Parameter and mask in every forward."""
        self._put(layers, masks, products)

    @torch.no_grad()
    def zero(self) -> None:
        """Set masked weights to exactly 0."""
        for layer in self._layers:
            mask = self.mask(layer)
            if mask is not None:
                weight = layer.values
                zeroed(weight, mask, out=weight)

    def lift(self) -> None:
        """Leave plain modules with their weights as they are."""
        for layer in self._layers:
            mask = self.mask(layer)
            if mask is not None:
                mask.fill_(True)
        self._clear()
        self._layers = []

    def masked(self, layer: Layer) -> Tensor:
        """A layer's weight, zero where it is masked."""
        weight, mask = layer.values, self.mask(layer)
        return weight if mask is None else zeroed(weight, mask)

    @abstractmethod
    def mask(self, layer: Layer) -> Tensor | None:
        """The mask of a layer, on its device, or None if it has none."""

    @abstractmethod
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        """The mask that a layer's gradient goes through on its way to ``.grad``, if any."""

    @abstractmethod
    def _add(self, layer: Layer, mask: Tensor, product: Product | None) -> None:
        """Keep the first mask of a layer, and let its modules see a product of it, if given."""

    @abstractmethod
    def _clear(self) -> None:
        """Let go of all layers."""

    def _put(
        self,
        layers: Sequence[Layer],
        masks: Sequence[Tensor],
        products: Sequence[Product] | None,
    ) -> None:
        self._layers = list(layers)
        for place, (layer, mask) in enumerate(zip(layers, masks, strict=True)):
            kept = self.mask(layer)
            if kept is None:
                # In the weight's own memory format, or the masked weight would take another, and
                # a convolution in another format rounds otherwise.
                own = torch.empty_like(layer.values, dtype=torch.bool)
                product = None if products is None else products[place]
                self._add(layer, own.copy_(mask), product)
            else:
                kept.copy_(mask)


class _Product(torch.autograd.Function):
    """The masked weight, whose backward masks the gradient unless the gate is dense."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, gate: Gate) -> Tensor:
        return zeroed(weight, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, mask, ctx.gate = inputs
        ctx.save_for_backward(mask, ctx.gate.flag)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        mask, flag = ctx.saved_tensors
        if torch.compiler.is_compiling():
            return grad * (mask | flag), None, None
        return (grad if ctx.gate.dense else zeroed(grad, mask)), None, None


def masked(weight: Tensor, mask: Tensor, gate: Gate) -> Tensor:
    """The product that masks a weight, and its gradient unless the gate is open."""
    result: Tensor = _Product.apply(weight, mask, gate)  # type: ignore[no-untyped-call]
    return result


def standing_in(product: Product, parameter: Tensor, mask: Tensor) -> Tensor:
    """A product as it stands in a Parameter's place: it requires a gradient if that does.

    Also where no graph is made: torch chooses how to multiply by whether a weight requires a
    gradient, and the last bit depends on how it does.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return product(parameter, mask)  # nothing is chosen here, and nobody may ask for a gradient
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():  # a tensor that may ask for it
            value = product(parameter, mask)
    else:
        value = product(parameter, mask)
    return value.requires_grad_() if parameter.requires_grad and value.is_leaf else value


def reads(module: nn.Module, attribute: str, value: Tensor | None) -> None:
    """Let a module that reads its weights from a list read this one there."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights[module._flat_weights_names.index(attribute)] = value


class FromParent:
    """A hook of ``MultiheadAttention`` on behalf of its ``out_proj``, which is never called."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, *args: object) -> None:
        """Call the hook with ``out_proj``."""
        self.hook(module.out_proj, None)


def attention_parents(model: nn.Module) -> dict[nn.Module, nn.MultiheadAttention]:
    """The attention whose ``out_proj`` a module is."""
    return {
        module.out_proj: module
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
