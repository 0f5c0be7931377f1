"""Masking: how masks take hold of a model, and how they let go.

Two back-ends, one engine. ``"prune"`` installs real ``torch.nn.utils.prune`` state
(``weight_orig``, ``weight_mask``, ``prune.is_pruned``); ``"inplace"`` keeps bool masks beside the
model and zeroes weights after every optimizer step. This is the only file that touches
``torch.nn.utils.prune``, whose traps are all handled here:

* Repeated pruning through its functions stacks masks that only shrink. Ours is installed once,
  and its buffer is rewritten.
* It leaves a graph tensor on the module, so that ``deepcopy`` fails and a module read without
  being called (``MultiheadAttention`` reads ``out_proj.weight``) sees a stale weight. After each
  forward we put the Parameter itself there: it holds exact zeros, because it is masked after
  every optimizer step, so that whoever reads it reads the masked weight and can train it.
* It moves the weight behind the bias in ``_parameters``, so that a positional optimizer state is
  swapped silently. The order is restored.
* Its product's gradient is zero at pruned weights, which hides what should grow. Ours lets the
  dense gradient pass while `Gate.dense` is set, that is, inside ``observe``.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from mtprune.bits import zeroed
from mtprune.components import Layer

__all__ = [
    "BACKENDS",
    "Gate",
    "Masking",
    "accept_pruned_keys",
    "make_masking",
    "plain_copy",
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
    """A back-end. Masks are bool, shaped like their layer."""

    def __init__(self) -> None:
        self.gate = Gate()
        self._layers: list[Layer] = []

    def install(self, layers: Sequence[Layer], masks: Sequence[Tensor]) -> None:
        """Make the masks hold, for the first time or anew; pruned weights become exactly 0."""
        self._layers = list(layers)
        for layer, mask in zip(layers, masks, strict=True):
            held = self.mask(layer)
            if held is None:
                # In the weight's own memory format, or the masked weight would take another, and
                # a convolution in another format rounds otherwise.
                own = torch.empty_like(layer.parameter, dtype=torch.bool, requires_grad=False)
                self._add(layer, own.copy_(mask))
            else:
                held.copy_(mask)
        self.enforce()

    @torch.no_grad()
    def enforce(self) -> None:
        """Zero pruned weights that an optimizer step has moved."""
        for layer in self._layers:
            mask = self.mask(layer)
            if mask is not None:
                weight = layer.parameter.detach()
                zeroed(weight, mask, out=weight)

    def remove(self) -> None:
        """Bake the zeros in and leave plain modules."""
        self.enforce()
        self._clear()
        self._layers = []

    def lift(self) -> None:
        """Leave plain modules with their weights as they are."""
        for layer in self._layers:
            mask = self.mask(layer)
            if mask is not None:
                mask.fill_(True)
        self.remove()

    def current(self, layer: Layer) -> Tensor:
        """The mask of a layer; all True if it has none."""
        mask = self.mask(layer)
        if mask is None:
            return torch.ones(layer.shape, dtype=torch.bool, device=layer.parameter.device)
        return mask

    def effective(self, layer: Layer) -> Tensor:
        """A layer's weight as the model sees it: zero where it is pruned."""
        weight, mask = layer.parameter.detach(), self.mask(layer)
        return weight if mask is None else zeroed(weight, mask)

    def scored(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        """The weight that is scored, as a tensor and the mask to put on it."""
        return layer.parameter.detach(), self.mask(layer)

    def rotated(self, layer: Layer, grad: Tensor) -> Tensor:
        """A layer's gradient in the basis that `scored` has its weight in."""
        return grad

    def kept(self, layer: Layer) -> int:
        """How many of a layer's parameters are kept."""
        return int(self.current(layer).count_nonzero())

    def gradient_mask(self, layer: Layer) -> Tensor | None:
        """The mask that a layer's gradient goes through on its way to ``.grad``, if any."""
        return None

    def trained(self, layer: Layer) -> Tensor:
        """A layer's weight as the optimizer sees it, but zero where it is pruned for good."""
        return self.effective(layer)

    @abstractmethod
    def mask(self, layer: Layer) -> Tensor | None:
        """The mask of a layer, on its device, or None if it has none."""

    @abstractmethod
    def _add(self, layer: Layer, mask: Tensor) -> None:
        """Hold the first mask of a layer."""

    @abstractmethod
    def _clear(self) -> None:
        """Let go of all layers."""


class InplaceMasking(Masking):
    """Bool masks beside the model; weights are zeroed in place. Parameter names never change."""

    def __init__(self) -> None:
        super().__init__()
        self._masks: dict[str, Tensor] = {}

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        mask = self._masks.get(layer.name)
        device = layer.parameter.device
        if mask is not None and mask.device != device:  # the model has moved since
            mask = self._masks[layer.name] = mask.to(device)
        return mask

    @override
    def _add(self, layer: Layer, mask: Tensor) -> None:
        self._masks[layer.name] = mask

    @override
    def _clear(self) -> None:
        self._masks = {}


class PruneMasking(Masking):
    """Masks as ``torch.nn.utils.prune`` keeps them: ``weight_orig`` and ``weight_mask``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._handles: list[RemovableHandle] = []
        self._orders: dict[nn.Module, list[str]] = {}
        self._attention: dict[nn.Module, nn.MultiheadAttention] = {
            module.out_proj: module
            for module in model.modules()
            if isinstance(module, nn.MultiheadAttention)
        }

    @override
    def mask(self, layer: Layer) -> Tensor | None:
        module, attribute = layer.places[0]
        return module._buffers.get(attribute + "_mask")

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self.mask(layer)

    @override
    def _add(self, layer: Layer, mask: Tensor) -> None:
        for module, attribute in layer.places:
            self._orders.setdefault(module, list(module._parameters))
            order = list(module._parameters)
            with torch.no_grad():
                method = MaskedWeight.install(module, attribute, mask, self._product(layer))
            # One tensor for all uses of a tied weight: one mask, never two that disagree.
            module._buffers[attribute + "_mask"] = mask
            _reorder(module, [n + "_orig" if n == attribute else n for n in order])
            release = _Release(attribute)
            release(module)
            self._handles.append(module.register_forward_hook(release, always_call=True))
            self._handles.append(module.register_load_state_dict_post_hook(release))
            parent = self._attention.get(module)
            if parent is not None:
                refresh = _FromParent(method)
                self._handles.append(parent.register_forward_pre_hook(refresh))
                expose = _FromParent(release)
                self._handles.append(parent.register_forward_hook(expose, always_call=True))

    def _product(self, layer: Layer) -> Product:
        """How the effective weight comes about from the Parameter and the mask."""
        return partial(_masked, gate=self.gate)

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
        return self.product(getattr(module, self._tensor_name + "_orig"), mask)


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


def _masked(weight: Tensor, mask: Tensor, gate: Gate) -> Tensor:
    result: Tensor = _Product.apply(weight, mask, gate)  # type: ignore[no-untyped-call]
    return result


class _Release:
    """Forward hook: put the Parameter itself where the product of this forward was."""

    def __init__(self, attribute: str) -> None:
        self.attribute = attribute
        self.parameter: Tensor | None = None

    def __call__(self, module: nn.Module, *_: object) -> None:
        held = module._parameters.get(self.attribute + "_orig")
        if isinstance(held, nn.Parameter):  # else it is a guest, brought by functional_call
            self.parameter = held
        if self.parameter is not None and held is not None:
            _expose(module, self.attribute, self.parameter)


class _FromParent:
    """A hook of ``MultiheadAttention`` on behalf of its ``out_proj``, which is never called."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, *args: object) -> None:
        self.hook(module.out_proj, None)


def _expose(module: nn.Module, attribute: str, parameter: Tensor | None) -> None:
    """Make an attribute read as a Parameter that is registered, under whatever name."""
    if attribute in module._parameters:
        module.__dict__.pop(attribute, None)
    else:
        module.__dict__[attribute] = parameter
    if isinstance(module, nn.RNNBase):  # reads its weights from a list
        module._flat_weights[module._flat_weights_names.index(attribute)] = parameter


def _reorder(module: nn.Module, order: Sequence[str]) -> None:
    held = dict(module._parameters)
    module._parameters.clear()
    for name in order:
        module._parameters[name] = held.pop(name)
    module._parameters.update(held)


BACKENDS = ("prune", "inplace")


def make_masking(backend: str, model: nn.Module) -> Masking:
    """The back-end of that name.

    Raises:
        ValueError: If there is none.
    """
    if backend == "prune":
        return PruneMasking(model)
    if backend == "inplace":
        return InplaceMasking()
    raise ValueError(f"`backend` must be one of {BACKENDS}. Got {backend!r}.")


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with plain weights, whatever masks `torch.nn.utils.prune` holds in it now.

    Example:
        >>> lin = prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5)
        >>> other = plain_copy(lin)
        >>> [name for name, _ in other.named_parameters()], int((other.weight == 0).sum())
        (['bias', 'weight'], 2)
    """
    # The effective weight has a history, and what has one is not copied by deepcopy.
    held = [
        value
        for module in model.modules()
        for value in (*vars(module).values(), *getattr(module, "_flat_weights", ()))
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in held})
    for module in copied.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, prune.BasePruningMethod):
                    hook.remove(module)
                if isinstance(hook, (prune.BasePruningMethod, _Release, _FromParent)):
                    del hooks[key]
    return copied


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
