"""The ``"inplace"`` back-end: bool masks beside the model. Parameter names never change."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mtprune.bits import pack_bits, unpack_bits
from mtprune.holding.masking import (
    FromParent,
    Masking,
    Product,
    attention_parents,
    reads,
    standing_in,
)
from mtprune.model.layers import Layer

__all__ = ["InplaceMasking", "Shadow", "settle"]


class InplaceMasking(Masking):
    """Masks in a dictionary. A product is put in the Parameter's place while its module runs.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._masks: dict[str, _Mask] = {}
        self._handles: list[RemovableHandle] = []
        self._shown: set[str] = set()
        self._attention = attention_parents(model)

    @override
    def show(
        self, layers: Sequence[Layer], masks: Sequence[Tensor], products: Sequence[Product]
    ) -> None:
        hooks = len(self._handles)
        super().show(layers, masks, products)
        for layer, product in zip(layers, products, strict=True):
            if not layer.part.is_whole and getattr(product, "reads_mask", True):
                self._masks[layer.name].share(layer)
        if len(self._handles) != hooks:
            _compile_anew()

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        mask = self._masks.get(layer.name)
        return None if mask is None else mask.here(layer)

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self.mask(layer) if layer.name in self._shown else None

    @override
    def _add(self, layer: Layer, mask: Tensor, product: Product | None) -> None:
        own = self._masks[layer.name] = _Mask(mask)
        if product is None:
            return
        self._shown.add(layer.name)
        for module, attribute in layer.places:
            enter: Callable[..., None] = Shadow(attribute, own, product)
            leave: Callable[..., None] = _Uncover(attribute)
            caller: nn.Module = module
            parent = self._attention.get(module)
            if parent is not None:
                caller, enter, leave = parent, FromParent(enter), FromParent(leave)
            self._handles.append(caller.register_forward_pre_hook(enter))
            self._handles.append(caller.register_forward_hook(leave, always_call=True))

    @override
    def _clear(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _compile_anew()
        self._masks, self._handles, self._shown = {}, [], set()


def _compile_anew() -> None:
    """Drop compiled code: it has no guard on hooks, and would go on without them or with them."""
    if "torch._dynamo" in sys.modules:  # else nothing was compiled
        torch.compiler.reset()


class _Mask:
    """A mask, kept where its layer is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.bits: Tensor | None = None  # that of all of a layer which is not here

    def here(self, layer: Layer) -> Tensor:
        """The mask of what is here of its layer."""
        part = layer.part
        if self.tensor.shape != part.shape:  # the model has been spread over ranks since
            self.bits = pack_bits(self.tensor)
            self.tensor = part.of(self.tensor).clone()
        return self._at(layer.parameter.device)

    def of(self, weight: Tensor) -> Tensor:
        """The mask of a weight that a module computes with, all of the layer."""
        if self.bits is None or self.tensor.shape == weight.shape:
            return self._at(weight.device)
        return unpack_bits(self.bits.to(weight.device), weight.shape)

    def share(self, layer: Layer) -> None:
        """Keep the bits of all of the layer: its modules are to compute with them."""
        self.bits = pack_bits(layer.part.whole(self.here(layer)))

    def _at(self, device: torch.device) -> Tensor:
        if self.tensor.device != device:  # the model has moved since
            self.tensor = self.tensor.to(device)
        return self.tensor


class Shadow:
    """Forward pre-hook: put the product before the Parameter, under the same name."""

    def __init__(self, attribute: str, mask: _Mask, product: Product) -> None:
        self.attribute = attribute
        self.mask = mask
        self.product = product

    def __call__(self, module: nn.Module, *_: object) -> None:
        """Before a forward."""
        parameter = module._parameters[self.attribute]
        assert parameter is not None
        value = standing_in(self.product, parameter, self.mask.of(parameter))
        # What stands in the instance's own dictionary is read first.
        module.__dict__[self.attribute] = value
        reads(module, self.attribute, value)


class _Uncover:
    """Forward hook: let the attribute read as the Parameter again."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, module: nn.Module, *_: object) -> None:
        module.__dict__.pop(self.attribute, None)
        reads(module, self.attribute, module._parameters[self.attribute])


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Write the products that modules compute with into the Parameters, and take the hooks off.

    Args:
        model: A copy of a model, which no pruner looks after.
    """
    settled = set()
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                shadow: object = hook.hook if isinstance(hook, FromParent) else hook
                if not isinstance(shadow, (Shadow, _Uncover)):
                    continue
                owner: Any = module.out_proj if isinstance(hook, FromParent) else module
                weight = owner._parameters[shadow.attribute]
                if isinstance(shadow, Shadow) and id(weight) not in settled:
                    weight.copy_(shadow.product(weight, shadow.mask.of(weight)))
                    settled.add(id(weight))  # a tied weight has a shadow at each of its places
                del hooks[key]
