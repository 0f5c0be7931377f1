"""Inputs of layers: the rows that a weight multiplies."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtprune.model.layers import Layer

__all__ = ["Windows", "bias_of", "rows", "why_no_inputs", "why_no_windows"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def why_no_inputs(layer: Layer) -> str:
    """Why a layer's inputs cannot be told as rows; empty if they can.

    Example:
        >>> from mtprune.model.layers import find_layers
        >>> [why_no_inputs(layer) for layer in find_layers(nn.LSTM(2, 2))][0]
        'inputs are not gathered for LSTM'
    """
    for module, _ in layer.places:
        if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
            return f"inputs are not gathered for {type(module).__name__} with groups"
    return why_no_windows(layer)


def why_no_windows(layer: Layer) -> str:
    """Why a layer's inputs cannot be told as `Windows`; empty if they can."""
    for module, attribute in layer.places:
        kind = type(module).__name__
        plain = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and attribute == "weight"
        if not plain or kind == "NonDynamicallyQuantizableLinear":  # attention's, never called
            return f"inputs are not gathered for {kind}"
    return ""


def bias_of(layer: Layer) -> nn.Parameter | None:
    """The bias that is trained with a layer's weight; None if its uses do not share one."""
    found = {id(b): b for b in (module._parameters.get("bias") for module, _ in layer.places)}
    bias = next(iter(found.values())) if len(found) == 1 else None
    return bias if bias is not None and bias.requires_grad else None


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
    return Windows(module, value).all


class Windows:
    """What goes into a layer, place by place: not copied before somebody asks.

    A row holds the inputs of all groups of a convolution, one group after the other.

    Args:
        module: A Linear layer or a convolution.
        value: What it is called with.

    Example:
        >>> conv, image = nn.Conv2d(2, 4, 2, groups=2), torch.ones(1, 2, 4, 4)
        >>> windows = Windows(conv, image)
        >>> len(windows), windows.at(torch.tensor([0, 8])).shape
        (9, torch.Size([2, 8]))
    """

    def __init__(self, module: nn.Module, value: Tensor) -> None:
        self._kernel = 1
        if not isinstance(module, _CONVOLUTIONS):
            self._view = value if value.dim() > 1 else value.unsqueeze(0)
            return
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
        self._view = windows.movedim(1, 1 + spatial)
        self._kernel = 1 + spatial

    @property
    def _places(self) -> torch.Size:
        return self._view.shape[: -self._kernel]

    def __len__(self) -> int:
        """How many rows there are."""
        return prod(self._places)

    @property
    def columns(self) -> int:
        """How long a row is."""
        return prod(self._view.shape[-self._kernel :])

    @property
    def all(self) -> Tensor:
        """All rows, float32 ``[rows, columns]``."""
        view = self._view.to(torch.float32)
        return view.flatten(-self._kernel).reshape(-1, self.columns)

    def at(self, places: Tensor) -> Tensor:
        """Some of the rows, float32 ``[places, columns]``."""
        where = torch.unravel_index(places, self._places)
        return self._view[where].to(torch.float32).reshape(-1, self.columns)
