"""Inputs of layers: the rows that a weight multiplies."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtprune.model.layers import Layer

__all__ = ["rows", "why_no_inputs"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def why_no_inputs(layer: Layer) -> str:
    """Why a layer's inputs cannot be told as rows; empty if they can.

    Example:
        >>> from mtprune.model.layers import find_layers
        >>> [why_no_inputs(layer) for layer in find_layers(nn.LSTM(2, 2))][0]
        'inputs are not gathered for LSTM'
    """
    for module, attribute in layer.places:
        kind = type(module).__name__
        if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
            return f"inputs are not gathered for {kind} with groups"
        plain = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and attribute == "weight"
        if not plain or kind == "NonDynamicallyQuantizableLinear":  # attention's, never called
            return f"inputs are not gathered for {kind}"
    return ""


def rows(module: nn.Module, value: Tensor) -> Tensor:
    """What a layer multiplies its weight by, float32 ``[rows, columns]``.

    The layer computes ``rows @ weight.flatten(1).T``, without its bias, in another order: one row
    for each place where the weight is applied.

    Args:
        module: A Linear layer or a convolution without groups.
        value: What it is called with.

    Example:
        >>> conv, image = nn.Conv2d(2, 3, 2, bias=False), torch.ones(1, 2, 4, 4)
        >>> rows(conv, image).shape
        torch.Size([9, 8])
    """
    value = value.to(torch.float32)
    if not isinstance(module, _CONVOLUTIONS):
        return value.reshape(-1, value.shape[-1])
    spatial = len(module.kernel_size)
    batched = value if value.dim() == spatial + 2 else value.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = F.pad(batched, padding, mode=mode)
    for dim in range(spatial):
        reach = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
        windows = windows.unfold(2 + dim, reach, module.stride[dim])
        windows = windows[..., :: module.dilation[dim]]
    # [batch, channels, *places, *kernel] -> [batch, *places, channels, *kernel]
    return windows.movedim(1, 1 + spatial).flatten(1 + spatial).flatten(0, spatial)
