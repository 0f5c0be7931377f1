"""Anatomy: where the parts of an encoder layer are, and how the layer is called."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.attention import SelfAttention, can_open
from mtprune.compression.forms import Form
from mtprune.compression.forms.base import linear_of

__all__ = ["Anatomy", "Bert", "Call", "Family", "Torch", "family_of"]


@dataclass(frozen=True)
class Anatomy:
    """The parts of an encoder layer: attention and feed-forward, each with a residual and a norm.

    Attributes:
        project: What makes queries, keys and values of all heads: one layer, or three.
        out: The layer that the heads' outputs go through.
        up: The first layer of the feed-forward.
        down: The second one.
        norms: The norm of the attention, and that of the feed-forward.
        heads: The number of heads, and the numbers of each.
        norm_first: Whether norms are at the beginning, not after the residual is added.
        activation: One of `mtprune.compression.forms.block.ACTIVATIONS`.
    """

    project: tuple[Any, ...]
    out: Any
    up: Any
    down: Any
    norms: tuple[Any, Any]
    heads: tuple[int, int]
    norm_first: bool
    activation: str

    @property
    def is_known(self) -> bool:
        """Whether all parts are of kinds that native code can read."""
        matrices = (*self.project, self.out, self.up, self.down)
        return all(map(_is_matrix, matrices)) and all(
            type(norm) is nn.LayerNorm and norm.normalized_shape == (self.down.out_features,)
            for norm in self.norms
        )


class Call(NamedTuple):
    """What a call of a layer comes to.

    Attributes:
        x: ``[sentences, length, width]``.
        mask: ``[sentences, length]``, added to the scores of keys; or None.
    """

    x: Tensor
    mask: Tensor | None


class Family(ABC):
    """A kind of encoder layer."""

    @abstractmethod
    def has(self, cls: type) -> bool:
        """Whether layers of a class are of this kind."""

    @abstractmethod
    def anatomy(self, layer: Any) -> Anatomy | None:
        """The parts of a layer; None if it has others."""

    @abstractmethod
    def call(self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        """What a call comes to; None if a block cannot do it. Tensors are on a CPU, in float32."""

    def result(self, layer: Any, y: Tensor) -> Tensor:
        """What the layer returns for the outputs ``[sentences, length, width]``."""
        return y

    @abstractmethod
    def settings(self, layer: Any) -> tuple[Any, ...]:
        """What is no tensor and no module, and changes outputs."""


class Torch(Family):
    """`torch.nn.TransformerEncoderLayer`."""

    @override
    def has(self, cls: type) -> bool:
        return cls is nn.TransformerEncoderLayer

    @override
    def anatomy(self, layer: Any) -> Anatomy | None:
        attention, activation = layer.self_attn, _activation(layer.activation)
        if activation is None:
            return None
        if type(attention) is SelfAttention:
            project = attention.in_proj
        elif can_open(attention):
            project = linear_of(attention.in_proj_weight, attention.in_proj_bias)
        else:
            return None
        return Anatomy(
            (project,),
            attention.out_proj,
            layer.linear1,
            layer.linear2,
            (layer.norm1, layer.norm2),
            (attention.num_heads, attention.head_dim),
            bool(layer.norm_first),
            activation,
        )

    @override
    def call(self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        names = ("src", "src_mask", "src_key_padding_mask", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, padding = given.get("src"), given.get("src_key_padding_mask")
        if given.get("src_mask") is not None or given.get("is_causal") or x is None or x.dim() != 3:
            return None
        x = x if layer.self_attn.batch_first else x.transpose(0, 1)
        return Call(x, None if padding is None else _scores(padding, hides=True))

    @override
    def result(self, layer: Any, y: Tensor) -> Tensor:
        return y if layer.self_attn.batch_first else y.transpose(0, 1)

    @override
    def settings(self, layer: Any) -> tuple[Any, ...]:
        attention, norms = layer.self_attn, (layer.norm1.eps, layer.norm2.eps)
        heads = attention.num_heads, attention.head_dim
        return (*heads, layer.norm_first, layer.activation, *norms)


class Bert(Family):
    """Layers of transformers that are built as BERT's are."""

    CLASSES = frozenset(
        f"transformers.models.{name}"
        for name in (
            "bert.modeling_bert.BertLayer",
            "roberta.modeling_roberta.RobertaLayer",
            "xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer",
            "camembert.modeling_camembert.CamembertLayer",
            "electra.modeling_electra.ElectraLayer",
        )
    )

    @override
    def has(self, cls: type) -> bool:
        if f"{cls.__module__}.{cls.__qualname__}" not in self.CLASSES:
            return False
        # Older ones return a tuple, and may add embeddings of distances.
        version = str(getattr(sys.modules.get("transformers"), "__version__", "0"))
        return version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 5

    @override
    def anatomy(self, layer: Any) -> Anatomy | None:
        attention, activation = (
            layer.attention.self,
            _activation(layer.intermediate.intermediate_act_fn),
        )
        if activation is None or layer.is_decoder or layer.add_cross_attention:
            return None
        return Anatomy(
            (attention.query, attention.key, attention.value),
            layer.attention.output.dense,
            layer.intermediate.dense,
            layer.output.dense,
            (layer.attention.output.LayerNorm, layer.output.LayerNorm),
            (attention.num_attention_heads, attention.attention_head_size),
            False,
            activation,
        )

    @override
    def call(self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        names = ("hidden_states", "attention_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, mask = given.pop("hidden_states", None), given.pop("attention_mask", None)
        given.pop("position_ids", None)  # it is not for layers of this kind
        others = (*args[2:], *given.values())
        if x is None or x.dim() != 3 or not all(o is None or o is False for o in others):
            return None
        if mask is None:
            return Call(x, None)
        if mask.dim() != 4 or mask.shape[1] != 1:
            return None
        first = mask[:, 0, 0]
        if mask.stride(2) and mask.shape[2] > 1 and not bool((mask[:, 0] == first[:, None]).all()):
            return None  # queries have masks of their own
        return Call(x, _scores(first.expand(x.shape[:2]), hides=False))

    @override
    def settings(self, layer: Any) -> tuple[Any, ...]:
        attention = layer.attention.self
        norms = layer.attention.output.LayerNorm.eps, layer.output.LayerNorm.eps
        heads = attention.num_attention_heads, attention.attention_head_size, attention.scaling
        flags = layer.is_decoder, layer.add_cross_attention, attention.is_causal
        return (*heads, *flags, layer.intermediate.intermediate_act_fn, *norms)


_FAMILIES: tuple[Family, ...] = (Torch(), Bert())


def family_of(cls: type) -> Family | None:
    """The family of the layers of a class; None if they are of none.

    Example:
        >>> type(family_of(nn.TransformerEncoderLayer)).__name__, family_of(nn.Linear)
        ('Torch', None)
    """
    return next((family for family in _FAMILIES if family.has(cls)), None)


def _scores(mask: Tensor, hides: bool) -> Tensor:
    """A mask as numbers to add to scores: minus infinity where a bool mask hides.

    Args:
        mask: Bool, or numbers to add.
        hides: Whether a bool mask is True for what is hidden, not for what is seen.
    """
    if mask.dtype != torch.bool:
        return mask.to(torch.float32)
    hidden = mask if hides else ~mask
    return torch.zeros(mask.shape).masked_fill_(hidden, float("-inf"))


def _is_matrix(module: Any) -> bool:
    plain = nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear
    return type(module) in plain or (isinstance(module, Form) and not module.is_conv)


def _activation(function: Any) -> str | None:
    """An activation as the native code names it; None if it does not know it."""
    if function in (F.relu, torch.relu) or type(function) is nn.ReLU:
        return "relu"
    kind = f"{type(function).__module__}.{type(function).__name__}"
    if function is F.gelu or (kind == "transformers.activations.GELUActivation"):
        return "gelu" if getattr(function, "act", F.gelu) is F.gelu else None
    if type(function) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(function.approximate)
    return None
