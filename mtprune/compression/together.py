"""Together: encoder layers that run as one block of native code instead of layer by layer.

Such a layer keeps its parts under their names, and its class tells it from others: whenever the
native code cannot run, it is called part by part, as it was.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.attention import SelfAttention, can_open
from mtprune.compression.forms import Form, building, products
from mtprune.compression.forms.base import linear_of
from mtprune.compression.forms.block import Block
from mtprune.compression.forms.packed import (
    Matrix,
    dense_matrix,
    norm_of,
    sparse_matrix,
)
from mtprune.compression.forms.sparse import Sparse

__all__ = ["Together", "can_join", "join", "separate"]

SPARSE_BELOW = 0.35
"""The share of weights that are not zero below which a block multiplies them as a sparse matrix."""


class Together(nn.TransformerEncoderLayer):
    """A `torch.nn.TransformerEncoderLayer` that runs as one block. Made by `join`.

    The block is packed at the first call and again when a weight has changed, unless it was
    changed in place behind autograd's back, through ``.data``. With a mask of queries, gradients,
    hooks on a part, another type or device, in training, while it is traced or compiled, or without
    native code, its parts are called one by one.
    """

    _packed: "_Packed | None" = None

    @override
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        alone = src_mask is None and not is_causal and not self.training
        if not (alone and src.dim() == 3 and _is_native(src, src_key_padding_mask)):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        packed = self._packed
        if packed is None or not packed.is_current(self):
            packed = self._packed = _Packed(self)
        block = packed.block
        if block is None or (packed.trains and torch.is_grad_enabled()):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        first = packed.batch_first
        x = src if first else src.transpose(0, 1)
        y = block(x, None if src_key_padding_mask is None else _scores_of(src_key_padding_mask))
        return y if first else y.transpose(0, 1)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}


def can_join(layer: nn.Module) -> bool:
    """Whether a layer can run as one block, if the machine has native code.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> can_join(layer), can_join(nn.TransformerEncoderLayer(8, 2, 16, activation=torch.sin))
        (True, False)
    """
    return type(layer) in (nn.TransformerEncoderLayer, Together) and _parts_fit(layer)


def join(layer: nn.Module) -> None:
    """Let a layer run as one block, in place: the object gets another class.

    Raises:
        ValueError: If it cannot.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> x = torch.randn(2, 3, 8)
        >>> before = layer(x)
        >>> join(layer)
        >>> with torch.no_grad():
        ...     torch.allclose(layer(x), before, atol=1e-5)
        True
    """
    if not can_join(layer):
        raise ValueError(f"A {type(layer).__name__} of this kind cannot run as one block.")
    layer.__class__ = Together


def separate(layer: nn.Module) -> None:
    """Undo `join`."""
    if isinstance(layer, Together):
        layer.__class__ = nn.TransformerEncoderLayer  # type: ignore[assignment]


class _Packed:
    """The block of a layer, and what it was made of.

    Attributes:
        block: None if the layer cannot run as one as it is now.
        batch_first: Whether the layer takes ``[batch, length, width]``.
        trains: Whether a part of the layer requires gradients.
    """

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        modules = list(layer.modules())
        self._children = [(m._modules, dict(m._modules)) for m in modules]
        self._hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in modules[1:]]
        self._tensors = [
            (holder, name, tensor, tensor.data_ptr(), _version(tensor))
            for m in modules
            for holder in (m._parameters, m._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        ]
        self._settings = _settings(layer)
        self._hooked = self._count_hooks()
        self.batch_first = bool(layer.self_attn.batch_first)
        self.trains = any(parameter.requires_grad for parameter in layer.parameters())
        forms = sum(isinstance(m, Form) for m in modules)
        fits = self._hooked == forms and _parts_fit(layer)  # each form has a hook of its own
        self.block = _block_of(layer) if fits else None

    def is_current(self, layer: nn.TransformerEncoderLayer) -> bool:
        """Whether the layer still is what the block was made of."""
        return (
            all(
                holder.get(name) is tensor
                and tensor.data_ptr() == address
                and _version(tensor) == version
                for holder, name, tensor, address, version in self._tensors
            )
            and all(now == before for now, before in self._children)
            and self._count_hooks() == self._hooked
            and _settings(layer) == self._settings
        )

    def _count_hooks(self) -> int:
        return sum(len(after) + len(before) for after, before in self._hooks)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those made for inference do not say."""
    return 0 if tensor.is_inference() else tensor._version


def _settings(layer: nn.TransformerEncoderLayer) -> tuple[Any, ...]:
    """What is no tensor and changes outputs."""
    attention, one, two = layer.self_attn, layer.norm1, layer.norm2
    heads = attention.num_heads, attention.head_dim, attention.batch_first
    return (*heads, layer.norm_first, layer.activation, one.eps, two.eps)


def _is_native(x: Tensor, padding: Tensor | None) -> bool:
    """Whether native code can run on these inputs now."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and products.is_eager(x)
        and products.is_plain(x)
        and (padding is None or (products.is_eager(padding) and padding.is_cpu))
        and not torch.is_autocast_enabled("cpu")
        and not torch.nn.modules.module._has_any_global_hook()
        and not building.unavailable()
    )


def _scores_of(padding: Tensor) -> Tensor:
    """A mask as numbers to add to scores: minus infinity where a bool mask is True, for hidden."""
    if padding.dtype != torch.bool:
        return padding.to(torch.float32)
    return torch.zeros(padding.shape).masked_fill_(padding, float("-inf"))


def _parts_fit(layer: nn.Module) -> bool:
    """Whether native code knows all parts of a layer."""
    assert isinstance(layer, nn.TransformerEncoderLayer)
    attention, norms = _attention(layer), (layer.norm1, layer.norm2)
    attends = type(attention) is SelfAttention or can_open(attention)
    return (
        attends
        and _activation(layer) is not None
        and all(type(norm) is nn.LayerNorm for norm in norms)
        and all(norm.normalized_shape == (layer.linear2.out_features,) for norm in norms)
        and all(map(_is_matrix, (layer.linear1, layer.linear2, attention.out_proj)))
        and (type(attention) is not SelfAttention or _is_matrix(attention.in_proj))
        and all(
            p.dtype == torch.float32 and p.is_cpu and type(p.data) is Tensor
            for p in layer.parameters()
        )
    )


def _attention(layer: nn.TransformerEncoderLayer) -> Any:
    """The attention of a layer; one of ours may stand in the place of torch's."""
    return layer.self_attn


def _is_matrix(module: nn.Module) -> bool:
    plain = nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear
    return type(module) in plain or (isinstance(module, Form) and not module.is_conv)


def _activation(layer: nn.TransformerEncoderLayer) -> str | None:
    """The activation as the native code names it; None if it does not know it."""
    function = layer.activation
    if function in (F.relu, torch.relu) or type(function) is nn.ReLU:
        return "relu"
    if function is F.gelu:
        return "gelu"
    if type(function) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
    return None


def _block_of(layer: nn.TransformerEncoderLayer) -> Block:
    attention = _attention(layer)
    if isinstance(attention, SelfAttention):
        project = attention.in_proj
    else:
        project = linear_of(attention.in_proj_weight, attention.in_proj_bias)
    activation = _activation(layer)
    assert activation is not None
    return Block(
        [_matrix(m) for m in (project, attention.out_proj, layer.linear1, layer.linear2)],
        [norm_of(norm.weight, norm.bias, norm.eps) for norm in (layer.norm1, layer.norm2)],
        (attention.num_heads, attention.head_dim),
        norm_first=bool(layer.norm_first),
        activation=activation,
    )


def _matrix(layer: Any) -> Matrix:
    """A layer as the native code is best at: as a dense matrix, or as a sparse one."""
    if isinstance(layer, Form):
        layer.check()
    weight, bias = layer.weight.detach(), layer.bias
    if int(weight.count_nonzero()) >= SPARSE_BELOW * weight.numel():
        return dense_matrix(weight, bias)
    parts = Sparse.parts(linear_of(nn.Parameter(weight, requires_grad=False), None))
    assert parts is not None
    start, column, value = (parts[f"weight_{name}"] for name in ("start", "column", "values"))
    return sparse_matrix(start, column, value, bias, *weight.shape)
