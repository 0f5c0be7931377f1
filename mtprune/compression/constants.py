"""Constants: inputs of layers that never change, and can be moved into biases."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mtprune.compression.attention import narrowed
from mtprune.compression.cuts import Cut
from mtprune.compression.dead import unmade
from mtprune.compression.entries import layer_of, tensors_of, thing_at
from mtprune.compression.running import runs
from mtprune.structure import NOBODY, Group

__all__ = ["constants", "declared", "moved_bias"]


def constants(model: nn.Module, layers: Iterable[str], batches: Sequence[Any]) -> dict[str, Tensor]:
    """The constant inputs of layers, ``[inputs]`` each: numbers that never change over the batches.

    NaN stands for an input that changes, and for a constant that cannot be moved into the bias of
    the layer: a convolution that pads with zeros does not read it at the border.

    Args:
        model: The model, in eval mode.
        layers: Names of modules; Linear layers and convolutions among them count.
        batches: Example inputs.
    """
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    readers: dict[str, nn.Linear | _ConvNd] = {}
    handles = []
    narrowings = ExitStack()
    for name in layers:
        layer = model.get_submodule(name)
        parent = model.get_submodule(layer_of(name))
        if isinstance(parent, nn.MultiheadAttention):  # torch's does not call its layers
            narrowings.enter_context(narrowed(parent))
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        readers[name] = layer
        dim = -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)

        def record(
            module: nn.Module, args: Any, kwargs: Any, name: str = name, dim: int = dim
        ) -> None:
            x = (args[0] if args else kwargs["input"]).detach().movedim(dim, 0).flatten(1)
            if x.numel():
                least, most = x.aminmax(dim=1)
                low[name] = least.minimum(low.get(name, least))
                high[name] = most.maximum(high.get(name, most))

        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))

    def is_constant(name: str) -> Tensor:
        # A weighted mean of equal numbers may differ from them in the last places.
        rounding = 64 * torch.finfo(low[name].dtype).eps * high[name].abs()
        return high[name] - low[name] <= rounding

    def is_known() -> bool:
        # What has varied once is no constant any more: most models are seen through at once.
        return low.keys() == readers.keys() and not any(bool(is_constant(n).any()) for n in low)

    def look() -> None:
        for _ in runs(model, batches):
            if is_known():
                return

    try:
        with narrowings:
            look()
            if not is_known():
                with torch.random.fork_rng(devices=[]):  # nor is noise a constant
                    torch.manual_seed(0)
                    look()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: _movable(layer, torch.where(is_constant(name), high[name], torch.nan))
        for name, layer in readers.items()
        if name in low
    }


def declared(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """The constant inputs of layers, from the biases and activations that groups declare."""
    tensors = tensors_of(model)
    inputs: dict[str, Tensor] = {}
    for group in groups:
        if group.between is None:
            continue
        makers = [m for m in group.members if m.role == "out"]
        value = torch.zeros(group.size)
        for member in makers:
            tensor = tensors[member.tensor].detach()
            if tensor.dim() == 1 and member.units == tuple(range(group.size)):
                value = value.to(tensor) + tensor
        value = thing_at(model, group.between)(value)
        nonzero = {m.tensor: tensors[m.tensor] != 0 for m in makers}
        value = torch.where(unmade(group, nonzero).to(value.device), value, torch.nan)
        for member in group.members:
            layer = model.get_submodule(layer_of(member.tensor))
            if member.role == "in" and isinstance(layer, (nn.Linear, _ConvNd)):
                index = member.index(value.device)
                read = torch.where(index == NOBODY, torch.nan, value[index.clamp_min(0)])
                read = _movable(layer, read)
                others = inputs.get(layer_of(member.tensor))
                inputs[layer_of(member.tensor)] = (
                    read if others is None else torch.where(index == NOBODY, others, read)
                )
    return inputs


def _movable(layer: nn.Linear | _ConvNd, value: Tensor) -> Tensor:
    """Constant inputs, with NaN for those that do not add the same number at all positions."""
    if isinstance(layer, nn.Linear):
        return value
    padded = (
        layer.padding_mode == "zeros"
        and layer.padding != "valid"
        and (
            any(size > 1 for size in layer.kernel_size)
            if isinstance(layer.padding, str)
            else any(layer.padding)
        )
    )
    if padded or layer.transposed or layer.groups > 1:
        return torch.where(value == 0, value, torch.nan)
    return value


def moved_bias(cut: Cut, layer: nn.Linear | _ConvNd, inputs: Tensor | None) -> Tensor | None:
    """The sum that removed constant inputs add to the outputs that stay, ``[outputs]``.

    Args:
        cut: The cut of the layer's weight.
        layer: The layer before the cut.
        inputs: The constant inputs of the layer, ``[inputs]``, or None.

    Returns:
        The sum, or None if it is zero.
    """
    if isinstance(layer, _ConvNd) and layer.groups > 1:
        return None  # inputs and outputs are removed together
    weight = layer.weight.detach()
    if isinstance(layer, _ConvNd) and layer.transposed:
        weight = weight.transpose(0, 1)
        rows, columns = cut.kept[1], cut.kept[0]
    else:
        rows, columns = cut.kept[:2]
    if columns is None:
        return None
    weight = weight if rows is None else weight[list(rows)]
    removed = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    removed[list(columns)] = False
    removed &= (weight != 0).movedim(1, 0).flatten(1).any(1)
    if not removed.any():
        return None
    if inputs is None or inputs[removed].isnan().any():
        raise ValueError(
            f"The plan does not fit the weights: '{layer_of(cut.tensor)}' still reads input "
            f"{int(removed.nonzero()[0])}, which is to go and is not a constant."
        )
    if not inputs[removed].any():
        return None
    matrix = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return matrix[:, removed] @ inputs[removed].to(matrix)
