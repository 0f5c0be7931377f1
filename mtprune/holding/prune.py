"""The ``"prune"`` back-end: real ``torch.nn.utils.prune`` state.

``weight_orig``, ``weight_mask`` and ``prune.is_pruned`` are there as its own functions leave them.
This is the only file that touches ``torch.nn.utils.prune``, whose traps are all handled here:

* Repeated pruning through its functions stacks masks that only shrink. Ours is installed once,
  and its buffer is rewritten.
* It leaves a graph tensor on the module, so that ``deepcopy`` fails and a module read without
  being called (``MultiheadAttention`` reads ``out_proj.weight``) sees a stale weight. After each
  forward we put the Parameter itself there: it holds exact zeros, because it is masked after
  every optimizer step, so that whoever reads it reads the masked weight and can train it.
* It moves the weight behind the bias in ``_parameters``, so that a positional optimizer state is
  swapped silently. The order is restored.
* Its product's gradient is zero at pruned weights, which hides weights that should grow. Ours lets
  the dense gradient pass while `Gate.dense` is set, that is, inside ``observe``.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mtprune.holding.inplace import settle
from mtprune.holding.masking import (
    FromParent,
    Masking,
    Product,
    attention_parents,
    masked,
    reads,
    standing_in,
)
from mtprune.model.layers import Layer

__all__ = ["PruneMasking", "accept_pruned_keys", "plain_copy"]


class PruneMasking(Masking):
    """Masks as ``torch.nn.utils.prune`` keeps them: ``weight_orig`` and ``weight_mask``.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []
        self._orders: dict[nn.Module, list[str]] = {}
        self._attention = attention_parents(model)

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        module, attribute = layer.places[0]
        return module._buffers.get(attribute + "_mask")

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self.mask(layer)

    @override
    def _add(self, layer: Layer, mask: Tensor, product: Product | None) -> None:
        product = product or partial(masked, gate=self.gate)
        for module, attribute in layer.places:
            self._orders.setdefault(module, list(module._parameters))
            order = list(module._parameters)
            with torch.no_grad():
                method = MaskedWeight.install(module, attribute, mask, product)
            # One tensor for all uses of a tied weight: one mask, never two that disagree.
            module._buffers[attribute + "_mask"] = mask
            _reorder(module, [n + "_orig" if n == attribute else n for n in order])
            release = _Release(attribute)
            release(module)
            self._handles.append(module.register_forward_hook(release, always_call=True))
            self._handles.append(module.register_load_state_dict_post_hook(release))
            parent = self._attention.get(module)
            if parent is not None:
                refresh = FromParent(method)
                self._handles.append(parent.register_forward_pre_hook(refresh))
                expose = FromParent(release)
                self._handles.append(parent.register_forward_hook(expose, always_call=True))

    @override
    def _clear(self) -> None:
        for layer in self._layers:
            parameter = layer.parameter
            storage = parameter.data
            for module, attribute in layer.places:
                if attribute not in module._parameters:  # else somebody called prune.remove
                    prune.remove(module, attribute)
                _expose(module, attribute, module._parameters[attribute])
            if parameter.data_ptr() != storage.data_ptr():
                # It puts new memory under the Parameter, which optimizers and graphs hold on to.
                parameter.data = storage.copy_(parameter.data)
        for module, order in self._orders.items():
            _reorder(module, order)
        for handle in self._handles:
            handle.remove()
        self._handles, self._orders = [], {}


class MaskedWeight(prune.BasePruningMethod):
    """A ``torch.nn.utils.prune`` method that is told its mask, and what to make of it."""

    PRUNING_TYPE = "unstructured"

    def __init__(self, mask: Tensor, product: Product) -> None:
        self.product = product
        self._given: Tensor | None = mask

    @classmethod
    def install(
        cls, module: nn.Module, attribute: str, mask: Tensor, product: Product
    ) -> "MaskedWeight":
        """Install on one attribute of a module."""
        method: MaskedWeight = cls.apply(  # type: ignore[no-untyped-call]
            module, attribute, mask=mask, product=product
        )
        method._given = None  # it lives on as the module's buffer
        return method

    @override
    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask that was given."""
        if self._given is None:
            raise RuntimeError("MaskedWeight is installed by a pruner and holds one mask.")
        return self._given

    @override
    def apply_mask(self, module: nn.Module) -> Tensor:
        """The effective weight."""
        mask = getattr(module, self._tensor_name + "_mask")
        parameter = getattr(module, self._tensor_name + "_orig")
        return standing_in(self.product, parameter, mask)


class _Release:
    """Forward hook: put the Parameter itself where the product of this forward was."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
        self.parameter: Tensor | None = None

    def __call__(self, module: nn.Module, *_: object) -> None:
        registered = module._parameters.get(self.attribute + "_orig")
        if isinstance(registered, nn.Parameter):  # else it is a guest, brought by functional_call
            self.parameter = registered
        if self.parameter is not None and registered is not None:
            _expose(module, self.attribute, self.parameter)


def _expose(module: nn.Module, attribute: str, parameter: Tensor | None) -> None:
    """Make an attribute read as a Parameter that is registered, under whatever name."""
    if attribute in module._parameters:
        module.__dict__.pop(attribute, None)
    else:
        module.__dict__[attribute] = parameter
    reads(module, attribute, parameter)


def _reorder(module: nn.Module, order: Sequence[str]) -> None:
    parameters = dict(module._parameters)
    module._parameters.clear()
    for name in order:
        module._parameters[name] = parameters.pop(name)
    module._parameters.update(parameters)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with plain weights, whatever masks it holds now, with either back-end.

    Example:
        >>> lin = prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5)
        >>> other = plain_copy(lin)
        >>> [name for name, _ in other.named_parameters()], int((other.weight == 0).sum())
        (['bias', 'weight'], 2)
    """
    # The effective weight has a history, and what has one is not copied by deepcopy.
    computed = [
        value
        for module in model.modules()
        for value in (*vars(module).values(), *getattr(module, "_flat_weights", ()))
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    settle(copied)
    effective: dict[nn.Parameter, Tensor] = {}
    for module in copied.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, prune.BasePruningMethod):
                    _settle_once(module, hook, effective)
                if isinstance(hook, (prune.BasePruningMethod, _Release, FromParent)):
                    del hooks[key]
    return copied


def _settle_once(
    module: nn.Module, hook: prune.BasePruningMethod, effective: dict[nn.Parameter, Tensor]
) -> None:
    """Write the effective weight into the Parameter: once for all uses of a tied one."""
    parameter = module._parameters[hook._tensor_name + "_orig"]
    assert parameter is not None
    if parameter not in effective:
        effective[parameter] = hook.apply_mask(module).detach()
    hook.remove(module)
    parameter.data = effective[parameter]


class _PrunedKeys:
    """Load hook: take a checkpoint with or without ``_orig``/``_mask``, whatever we have now."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        plain, orig = prefix + self.attribute, prefix + self.attribute + "_orig"
        mask = prefix + self.attribute + "_mask"
        if self.attribute in module._parameters:
            if orig in state:
                state[plain] = state.pop(orig)
            state.pop(mask, None)
        else:
            if plain in state:
                state[orig] = state.pop(plain)
            if orig in state:
                state.setdefault(mask, module._buffers[self.attribute + "_mask"])


def accept_pruned_keys(layers: Iterable[Layer]) -> list[RemovableHandle]:
    """Let the layers' modules load checkpoints saved before, during or after pruning."""
    return [
        module.register_load_state_dict_pre_hook(_PrunedKeys(attribute))
        for layer in layers
        for module, attribute in layer.places
    ]
