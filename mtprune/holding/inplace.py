"""The ``"inplace"`` back-end: bool masks beside the model. Parameter names never change."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mtprune.holding.masking import FromParent, Masking, Product, attention_parents, reads
from mtprune.model.layers import Layer

__all__ = ["InplaceMasking"]


class InplaceMasking(Masking):
    """Masks in a dictionary. A product is put in the Parameter's place while its module runs.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._masks: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._shown: set[str] = set()
        self._attention = attention_parents(model)

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        mask = self._masks.get(layer.name)
        device = layer.parameter.device
        if mask is not None and mask.device != device:  # the model has moved since
            mask = self._masks[layer.name] = mask.to(device)
        return mask

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self.mask(layer) if layer.name in self._shown else None

    @override
    def _add(self, layer: Layer, mask: Tensor, product: Product | None) -> None:
        self._masks[layer.name] = mask
        if product is None:
            return
        self._shown.add(layer.name)

        def effective(parameter: Tensor) -> Tensor:
            known = self.mask(layer)
            assert known is not None
            return product(parameter, known)

        for module, attribute in layer.places:
            enter: Callable[..., None] = _Shadow(attribute, effective)
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
        self._masks, self._handles, self._shown = {}, [], set()


class _Shadow:
    """Forward pre-hook: put the product before the Parameter, under the same name."""

    def __init__(self, attribute: str, effective: Callable[[Tensor], Tensor]) -> None:
        self.attribute = attribute
        self.effective = effective

    def __call__(self, module: nn.Module, *_: object) -> None:
        parameter = module._parameters[self.attribute]
        assert parameter is not None
        value = self.effective(parameter)
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
