"""Form: a module that takes the place of a Linear or Conv2d and computes the same outputs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

__all__ = [
    "EXPORTERS",
    "Dense",
    "Form",
    "Parts",
    "bias_part",
    "check_bias",
    "conv_of",
    "exporter",
    "linear_of",
    "pointwise_of",
]

Dense = nn.Linear | nn.Conv2d
"""The layers that can take another form."""

Parts = dict[str, Tensor]
"""The tensors that a form stores, by name."""

_NUMBERS = ("weight", "values", "pairs", "bias", "fill")
"""How the names of parts end that are numbers."""

EXPORTERS = ("torch.export", "ONNX")
"""The exporters that a form may be made for."""


class Form(nn.Module, ABC):
    """One form of a layer.

    A form stores parts under names of its own, so that a checkpoint of it cannot be loaded into a
    dense layer unnoticed. Forms are for inference: their parts do not require gradients.

    A subclass sets ``choice``, and defines `parts`, `weight` and ``forward``. A form is saved as
    its parts, and loaded by calling its class with them.

    Args:
        layer: The layer whose place it takes. Its sizes are read, its weight is not.
        parts: The tensors that the form stores, as `parts` returned them or as they were saved.
    """

    choice: ClassVar[str]
    """The name of the form in plans."""

    exporters: ClassVar[tuple[str, ...]] = ()
    """Which of `EXPORTERS` can export the form."""

    min_zeros: ClassVar[float] = 0.0
    """The share of zeros in the weight from which the form is timed."""

    frozen: ClassVar[bool] = False
    """Whether parts must not require gradients even if a loader lets all parameters require them:
    the product of the form has no gradient, and does not say so itself."""

    site = ""
    """The name of the layer in its model, set when the model is complete."""

    def __init__(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.is_conv = isinstance(layer, nn.Conv2d)
        for name in layer.__constants__:
            setattr(self, name, getattr(layer, name))
        self.weight_shape = tuple(layer.weight.shape)
        self.train(layer.training)
        if layer.bias is not None and not any(name.endswith("bias") for name in parts):
            raise ValueError("it lacks the layer's bias")
        _check_types(parts)
        self._store(layer, parts)
        self.check()
        # Fused kernels read weights without calling layers, and stand back when there are hooks.
        self.register_forward_pre_hook(_check_exporting)

    @classmethod
    def build(cls, layer: Dense) -> Self | None:
        """The layer in this form, or None if the layer has no such form."""
        parts = cls.parts(layer)
        return None if parts is None else cls(layer, parts)

    @classmethod
    @abstractmethod
    def parts(cls, layer: Dense) -> Parts | None:
        """The tensors that this form stores of a layer, or None if the layer has no such form."""

    @staticmethod
    def why_not(weight: Tensor) -> str:
        """Why this form cannot run with such a weight: its device, its type; empty if it can."""
        return ""

    @staticmethod
    def unavailable() -> str:
        """Why no layer can have this form on this machine, for plans to say; empty if some can."""
        return ""

    @classmethod
    def is_portable(cls) -> bool:
        """Whether all exporters can export the form."""
        return cls.exporters == EXPORTERS

    def check(self) -> None:
        """Refuse parts that do not fit each other or the layer: they may come from a file.

        Parts on the meta device, which are filled later, have nothing to check but shapes.

        Raises:
            ValueError: With what is wrong.
        """

    @property
    def stored(self) -> list[Tensor]:
        """The numbers that inputs are multiplied by, zeros among them included."""
        return [part for name, part in self.named_parameters() if not name.endswith("bias")]

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The dense weight, made anew: for code that reads it instead of calling the layer."""

    def dense(self) -> Dense:
        """The dense layer with this weight, for convolutions without groups."""
        weight, bias = nn.Parameter(self.weight, False), cast(nn.Parameter | None, self.bias)
        if self.is_conv:
            return conv_of(cast(nn.Conv2d, self), weight, bias).train(self.training)
        return linear_of(weight, bias).train(self.training)

    def _store(self, layer: Dense, parts: Mapping[str, Tensor]) -> None:
        """Register the parts: numbers as parameters, indices as buffers."""
        for name, part in parts.items():
            if part.is_floating_point():
                self.register_parameter(name, nn.Parameter(part, requires_grad=False))
            else:
                self.register_buffer(name, part)
        if "bias" not in parts:
            self.register_parameter("bias", None)

    def _pair(self, name: str) -> tuple[int, int]:
        """A setting of a convolution, for height and width."""
        height, width = getattr(self, name)
        return height, width

    @override
    def extra_repr(self) -> str:
        sizes = "x".join(str(size) for size in self.weight_shape)
        return f"{sizes}, {self.choice}"


def bias_part(layer: Dense) -> Parts:
    """A copy of the layer's bias as a part, if the layer has one."""
    return {} if layer.bias is None else {"bias": layer.bias.detach().clone()}


def _check_types(parts: Mapping[str, Tensor]) -> None:
    """Refuse numbers of several types.

    Raises:
        ValueError: If so.
    """
    numbers = {name: part for name, part in parts.items() if name.endswith(_NUMBERS)}
    kinds = {part.dtype for part in numbers.values()}
    if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
        raise ValueError(f"its numbers are of the types {sorted(map(str, kinds))}")


def check_bias(bias: Tensor | None, outputs: int) -> None:
    """Refuse a bias that is not one number for each output.

    Raises:
        ValueError: If so.
    """
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"its bias has shape {tuple(bias.shape)}, and there are {outputs} outputs")


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear that holds these very parameters, which may be empty.

    Args:
        weight: ``[outputs, inputs]``.
        bias: ``[outputs]`` or None.
    """
    outputs, inputs = weight.shape
    # Built without memory, and with a size that torch does not warn of.
    layer = nn.Linear(max(1, inputs), max(1, outputs), bias is not None, "meta")
    layer.in_features, layer.out_features = inputs, outputs
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def conv_of(layer: nn.Conv2d, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Conv2d:
    """A convolution with the settings of a layer that holds these very parameters.

    Args:
        layer: Whose kernel, stride, padding and dilation it has; not its groups.
        weight: ``[outputs, inputs, height, width]`` with the layer's kernel; outputs may be none.
        bias: ``[outputs]`` or None.
    """
    outputs, inputs, *_ = weight.shape
    conv = nn.Conv2d(
        inputs,
        max(1, outputs),
        (layer.kernel_size[0], layer.kernel_size[1]),
        (layer.stride[0], layer.stride[1]),
        layer.padding if isinstance(layer.padding, str) else layer.padding[:2],  # type: ignore[arg-type]
        (layer.dilation[0], layer.dilation[1]),
        bias=bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",  # without memory: the parameters are given
    )
    conv.out_channels = outputs
    conv.weight = weight
    if bias is not None:
        conv.bias = bias
    return conv


def pointwise_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Conv2d:
    """A convolution with a kernel of size 1 that holds these very parameters.

    Args:
        weight: ``[outputs, inputs, 1, 1]``; inputs may be none.
        bias: ``[outputs]`` or None.
    """
    outputs, inputs, *_ = weight.shape
    conv = nn.Conv2d(max(1, inputs), outputs, 1, bias=bias is not None, device="meta")
    conv.in_channels = inputs
    conv.weight = weight
    if bias is not None:
        conv.bias = bias
    return conv


def exporter() -> str:
    """Which of `EXPORTERS` is at work; empty if none is."""
    if torch.onnx.is_in_onnx_export():
        return "ONNX"
    exporting = getattr(torch.compiler, "is_exporting", _is_exporting)
    return "torch.export" if exporting() else ""


def _is_exporting() -> bool:
    """``torch.compiler.is_exporting`` before torch 2.7, as far as the export is not strict."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _check_exporting(form: nn.Module, args: Any) -> None:
    """A hook that names the layer at which an export fails: torch fails without a name."""
    assert isinstance(form, Form)
    if form.exporters == EXPORTERS:
        return
    at_work = exporter()
    if at_work and at_work not in form.exporters:
        unable = " and ".join(name for name in EXPORTERS if name not in form.exporters)
        raise RuntimeError(
            f"Layer '{form.site}' has the form '{form.choice}', which {unable} "
            f"cannot take. Compress again with portable=True, or with "
            f"plan=mtprune.plan_of(model).replace({form.site!r}, 'dense')."
        )
