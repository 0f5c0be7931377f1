"""Multiply-adds of a model: of each weight, and of all products together."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from mtprune.model.layers import Layer
from mtprune.model.running import untouched

__all__ = ["FlopsPerLayer", "MacCounter", "macs_per_weight"]


def macs_per_weight(
    model: nn.Module, layers: Sequence[Layer], example_inputs: Any
) -> list[Fraction]:
    """The multiply-adds that each weight of a layer takes part in.

    Products are counted, not calls of modules, so that functional use, tied weights, attention and
    several calls are counted right. The model runs once, in eval mode; its buffers and the random
    state are left as they were.

    Args:
        model: The model.
        layers: Its prunable layers.
        example_inputs: A tensor, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        ValueError: If a layer takes part in no product.

    Example:
        >>> from mtprune.model.layers import find_layers
        >>> conv = nn.Conv2d(3, 8, 3, padding=1)
        >>> macs_per_weight(conv, find_layers(conv), torch.zeros(1, 3, 4, 4))
        [Fraction(16, 1)]
    """
    counter = FlopsPerLayer(layers)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # With gradients: the fast paths of attention without them hide their products.
        with untouched(model), torch.enable_grad(), counter:
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            elif isinstance(example_inputs, (tuple, list)):
                model(*example_inputs)
            else:
                model(example_inputs)
    finally:
        for module, training in modes.items():
            module.training = training
    unused = [layer.name for layer in layers if not counter.flops.get(layer.name)]
    if unused:
        raise ValueError(
            f"No multiply-adds of {unused} were seen with these `example_inputs`. Give inputs that "
            "run the whole model, or exclude these layers."
        )
    return [Fraction(counter.flops[x.name], 2 * prod(x.shape)) for x in layers]


def _bilinear(one: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * weight.numel() * one.shape[0]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    *before, queries, width = query.shape
    keys = key.shape[-2]
    return 2 * prod(before) * queries * keys * (width + value.shape[-1])


_COUNTS = {
    **flop_registry,
    torch.ops.aten._trilinear: _bilinear,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


def _grouped(one: Tensor, other: Tensor, *_: Any, **__: Any) -> int:
    """Of products of groups of rows, each with a matrix of a stack."""
    batch = one.shape[0] if one.dim() == other.dim() == 3 else 1
    return 2 * batch * one.shape[-2] * one.shape[-1] * other.shape[-1]


_NAMED = {"aten._grouped_mm": _grouped, "transformers.grouped_mm_fallback": _grouped}
"""Those that not every version of torch has, or that others define."""

_RECURRENT = (torch.ops.aten.mkldnn_rnn_layer, torch.ops.aten._cudnn_rnn)


def _counted(packet: Any) -> Any:
    """What counts the operations of a product; None for what is none."""
    return _COUNTS.get(packet) or _NAMED.get(str(packet))


class FlopsPerLayer(TorchDispatchMode):
    """Adds up, for each layer, the floating-point operations of products that read its memory.

    Attributes:
        flops: By layer, in the order in which layers are first read.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}
        self._starts = [(layer.parameter.data_ptr(), layer) for layer in layers]

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _RECURRENT:  # each weight is used once for every row of every step
            rows = args[0].numel() // args[0].shape[-1]
            for layer in self._layers_in(args[1:]):
                self._add(layer, 2 * rows * prod(layer.shape))
        elif (count := _counted(packet)) is not None:
            for layer in self._layers_in(args):
                self._add(layer, int(count(*args, **(kwargs or {}), out_val=out)))
        return out

    def _layers_in(self, args: Any) -> list[Layer]:
        """The layers whose memory is among the arguments, whole or in part."""
        addresses = [arg.data_ptr() for arg in tree_leaves(args) if isinstance(arg, Tensor)]
        return [
            layer
            for start, layer in self._starts
            if any(start <= address < start + layer.parameter.nbytes for address in addresses)
        ]

    def _add(self, layer: Layer, flops: int) -> None:
        self.flops[layer.name] = self.flops.get(layer.name, 0) + flops


class MacCounter(TorchDispatchMode):
    """Counts the multiply-adds of all code in its context.

    Products of two activations count as kept in full, and so do products with a weight that was
    copied or cast before.

    Attributes:
        macs: Multiply-adds.
        kept: Multiply-adds in which no weight is zero.
        paused: Whether nothing is counted at the moment.

    Args:
        parameters: The weights.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight[0].zero_()
        >>> with MacCounter(layer.parameters()) as counter:
        ...     _ = layer(torch.ones(3, 4))
        >>> counter.macs, counter.kept
        (24, 12)
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs, self.kept, self.paused = 0, 0, False
        self._spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if self.paused:
            return out
        if packet in _RECURRENT:
            rows = args[0].numel() // args[0].shape[-1]
            for weight in self._weights(args[1:]):
                self.macs += rows * weight.numel()
                self.kept += rows * int(weight.count_nonzero())
        elif (count := _counted(packet)) is not None:
            macs = int(count(*args, **(kwargs or {}), out_val=out)) // 2
            weights = self._weights(args)
            self.macs += macs
            if weights and weights[0].numel():
                self.kept += macs * int(weights[0].count_nonzero()) // weights[0].numel()
            else:
                self.kept += macs
        return out

    def _weights(self, args: Any) -> list[Tensor]:
        """The matrices among the arguments that lie in a parameter's memory."""
        weights = []
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and leaf.layout is torch.strided:
                span = bisect_right(self._spans, leaf.data_ptr(), key=lambda span: span[0]) - 1
                if span >= 0 and leaf.data_ptr() < self._spans[span][1]:
                    weights.append(leaf)
        return weights
