"""Layout: how a weight is a matrix, or several: which of its dimensions are outputs and inputs.

Most weights are ``[outputs, inputs]``, those of convolutions with a kernel behind. Transformers'
Conv1D is ``[inputs, outputs]``. Experts have a matrix each, in a stack ``[experts, outputs,
inputs]``, or ``[experts, inputs, outputs]`` where their module computes ``x @ W``, as GPT-OSS does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["PLAIN", "Layout", "is_conv1d", "is_stack", "layout_of"]

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_shared_experts")
"""Attributes of modules for the number of experts whose matrices they hold in one tensor."""

_WIDTHS = ("hidden_size", "hidden_dim")
"""Attributes of modules for what goes into their experts, and comes out."""


@dataclass(frozen=True)
class Layout:
    """Where the matrices of a weight lie in it.

    Attributes:
        stacked: Whether it is a stack of matrices along its first dimension.
        transposed: Whether inputs come before outputs.

    Example:
        >>> import torch
        >>> layout = Layout(stacked=True, transposed=True)
        >>> layout.inputs, layout.matrices(torch.zeros(4, 16, 8)).shape
        (1, torch.Size([4, 8, 16]))
    """

    stacked: bool = False
    transposed: bool = False

    @property
    def outputs(self) -> int:
        """The dimension of the outputs."""
        return int(self.stacked) + int(self.transposed)

    @property
    def inputs(self) -> int:
        """The dimension of the inputs."""
        return int(self.stacked) + int(not self.transposed)

    def count(self, shape: Sequence[int]) -> int:
        """How many matrices a weight of that shape holds."""
        return shape[0] if self.stacked else 1

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each matrix of a weight of that shape, as it lies in memory.

        Example:
            >>> Layout(stacked=True, transposed=True).shape((4, 16, 8))
            (16, 8)
        """
        return tuple(shape[1:] if self.stacked else shape)

    def names(self, name: str, shape: Sequence[int]) -> list[str]:
        """What the matrices of a weight are called.

        Example:
            >>> Layout(stacked=True).names("up_proj", (2, 8, 4)), Layout().names("0.weight", (8, 4))
            (['up_proj[0]', 'up_proj[1]'], ['0.weight'])
        """
        return [f"{name}[{i}]" for i in range(shape[0])] if self.stacked else [name]

    def each(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Views of the matrices of a weight, as they lie in memory."""
        return weight.unbind(0) if self.stacked else (weight,)

    def matrices(self, weight: Tensor) -> Tensor:
        """A view of a weight as ``[matrices, outputs, inputs, *kernel]``."""
        stack = weight if self.stacked else weight.unsqueeze(0)
        return stack.transpose(1, 2) if self.transposed else stack

    def weight(self, matrices: Tensor) -> Tensor:
        """The inverse of `matrices`."""
        stack = matrices.transpose(1, 2) if self.transposed else matrices
        return stack if self.stacked else stack.squeeze(0)


PLAIN = Layout()
"""One matrix, outputs first."""


def layout_of(module: nn.Module, attribute: str, shape: Sequence[int]) -> Layout:
    """Where the matrices of a module's weight lie.

    Modules of transformers tell by ``is_transposed``. Of others with stacks, the dimension that is
    as long as their ``hidden_size`` is that of the inputs; or of the outputs, in a ``down_proj``.

    Args:
        module: The module.
        attribute: Under which name it has the weight.
        shape: The shape of the weight.

    Example:
        >>> experts = nn.Module()
        >>> experts.num_experts, experts.hidden_size = 4, 8
        >>> layout_of(experts, "gate_up_proj", (4, 8, 32))
        Layout(stacked=True, transposed=True)
        >>> layout_of(experts, "down_proj", (4, 8, 16))
        Layout(stacked=True, transposed=False)
    """
    if is_conv1d(module):
        return Layout(transposed=True) if attribute == "weight" else PLAIN
    if not is_stack(module, shape):
        return PLAIN
    told = getattr(module, "is_transposed", None)
    return Layout(True, told if isinstance(told, bool) else _reads_first(module, attribute, shape))


def _reads_first(module: nn.Module, attribute: str, shape: Sequence[int]) -> bool:
    """Whether the inputs of a stack are its second dimension, told by their number."""
    widths = [getattr(module, name, None) for name in _WIDTHS]
    _, first, second = shape
    is_width = [size in widths for size in (first, second)]
    if is_width[0] == is_width[1]:  # square, or not known: as most have it
        return False
    return is_width[0] != attribute.startswith("down")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D: a Linear whose weight is ``[inputs, outputs]``."""
    if type(module).__name__ != "Conv1D":
        return False
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return (
        isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.dim() == 2
        and tuple(bias.shape) == (weight.shape[1],)
    )


def is_stack(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a tensor of this shape is a stack of matrices, one for each expert of the module."""
    if len(shape) != 3:
        return False
    counts = (getattr(module, name, None) for name in _EXPERTS)
    return any(isinstance(n, int) and n == shape[0] for n in counts)
