"""Attention modules that torch lacks: fewer heads than fit the width, or projections as layers."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mtprune.compression.forms.base import linear_of

__all__ = ["NarrowAttention", "SelfAttention", "can_open", "narrow", "narrowed"]

_HINT = "`is_causal` is only a hint: give `attn_mask` too."


def _inputs(inputs: Sequence[Tensor], batch_first: bool) -> list[Tensor]:
    """Queries, keys and values as ``[batch, length, width]``; equal objects stay equal objects."""
    if inputs[0].dim() == 2:
        batched = {id(x): x[None] for x in inputs}
    elif batch_first:
        return list(inputs)
    else:
        batched = {id(x): x.transpose(0, 1) for x in inputs}
    return [batched[id(x)] for x in inputs]


def _attend(
    parts: Sequence[Tensor],
    heads: tuple[int, int],
    mask: Tensor | None,
    padding: Tensor | None,
    *,
    dropout: float,
    causal: bool,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    r"""The outputs of all heads, :math:`\mathrm{softmax}(Q K^T / \sqrt{d} + M) V`, concatenated.

    Args:
        parts: Queries, keys and values, each ``[batch, length, heads * head_dim]``.
        heads: The number of heads, and the width of each.
        mask: ``attn_mask``, as torch's attention takes it.
        padding: ``key_padding_mask``, as torch's attention takes it.
        dropout: The dropout of the attention weights.
        causal: Whether the mask is known to be the causal one.
        need_weights: Whether to return the attention weights too.
        average: Whether attention weights are averaged over heads.

    Returns:
        ``[batch, length, heads * head_dim]``, and the attention weights or None.
    """
    q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in parts)
    causal = causal and padding is None and not need_weights
    bias = None if causal else _mask(mask, padding, q)
    if not need_weights and not heads[0]:
        return parts[0], None  # where torch 2.9 divides by the number of heads, and crashes
    if not need_weights:
        out = F.scaled_dot_product_attention(q, k, v, bias, dropout, causal)
        return out.transpose(1, 2).flatten(2), None
    scores = q @ k.transpose(-2, -1) * heads[1] ** -0.5
    weights = F.dropout((scores if bias is None else scores + bias).softmax(-1), dropout)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return out, weights.sum(1) / max(1, heads[0]) if average else weights


def _mask(mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks added up, as `scaled_dot_product_attention` adds them to the scores."""
    if mask is not None and mask.dim() == 3:
        batch, heads = q.shape[:2]
        if len(mask) != batch * heads:
            raise ValueError(
                f"`attn_mask` has {len(mask)} masks for {batch} sequences and {heads} heads: some "
                "heads were removed. Give one for all heads, [queries, keys]."
            )
        mask = mask.unflatten(0, (batch, heads))
    masks = [None if padding is None else padding[:, None, None], mask]
    biases = [_score_bias(m, q) for m in masks if m is not None]
    return sum(biases[1:], biases[0]) if biases else None


def _score_bias(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add to scores: minus infinity where a bool mask is True, for hidden."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _outputs(
    y: Tensor, weights: Tensor | None, dim: int, batch_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs and attention weights with the dimensions in which the queries came."""
    if dim == 2:
        return y[0], None if weights is None else weights[0]
    return y if batch_first else y.transpose(0, 1), weights


class _Attending(nn.Module, ABC):
    """The call of an attention module; subclasses project inputs into queries, keys and values."""

    out_proj: Any
    num_heads: int
    head_dim: int
    batch_first: bool
    dropout: float

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`; ``is_causal`` is a hint about the mask.

        Raises:
            ValueError: If ``attn_mask`` is for another number of heads, or missing though
                ``is_causal``.
        """
        if is_causal and attn_mask is None:
            raise ValueError(_HINT)
        if query.dim() == 2 and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        heads_out, weights = _attend(
            self._projected(_inputs((query, key, value), self.batch_first)),
            (self.num_heads, self.head_dim),
            attn_mask,
            key_padding_mask,
            dropout=self.dropout if self.training else 0.0,
            causal=is_causal,
            need_weights=need_weights,
            average=average_attn_weights,
        )
        return _outputs(self.out_proj(heads_out), weights, query.dim(), self.batch_first)

    @abstractmethod
    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        """Queries, keys and values, each ``[batch, length, heads * head_dim]``."""


class NarrowAttention(_Attending, nn.MultiheadAttention):
    """A `torch.nn.MultiheadAttention` whose heads together are narrower than its inputs.

    Torch's module assumes that the width of a head is that of the inputs over the number of heads,
    which no longer holds after heads were removed. A narrow attention is called in the same way,
    and its parameters have the same names: ``in_proj_weight``
    ``[3 * heads * head_dim, embed_dim]``, ``out_proj.weight`` ``[embed_dim, heads * head_dim]``.
    Attention weights are those of the remaining heads. Made by `narrow`.
    """

    @override
    def _reset_parameters(self) -> None:
        # Loaders call it; torch's looks for a weight of each of queries, keys and values.
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @override
    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        if inputs[0] is inputs[1] is inputs[2]:
            return list(F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1))
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return list(map(F.linear, inputs, weights, biases))


def narrow(attention: nn.MultiheadAttention) -> NarrowAttention:
    """Turn an attention into a `NarrowAttention`, in place: the object gets another class.

    References to the attention and to its parameters stay valid.

    Raises:
        ValueError: If keys and values have sizes, or a token, of their own.

    Example:
        >>> attention = nn.MultiheadAttention(8, 4, batch_first=True).eval()
        >>> x = torch.randn(2, 3, 8)
        >>> before, _ = attention(x, x, x)
        >>> after, _ = narrow(attention)(x, x, x)
        >>> torch.allclose(before, after, atol=1e-6)
        True
    """
    if isinstance(attention, NarrowAttention):
        return attention
    if not _is_plain(attention):
        raise ValueError(
            "Heads can be removed from a MultiheadAttention with one size for queries, keys and "
            "values, and without add_bias_kv and add_zero_attn. Leave this one as it is."
        )
    attention.__class__ = NarrowAttention
    # Fused kernels assume that heads are as wide as the inputs, and are not used if this is False.
    attention._qkv_same_embed_dim = False
    assert isinstance(attention, NarrowAttention)
    return attention


@contextmanager
def narrowed(attention: nn.MultiheadAttention) -> Iterator[None]:
    """`narrow` for a while, if possible: unlike torch's module, ours calls its ``out_proj``."""
    cls, fusable = type(attention), attention._qkv_same_embed_dim
    try:
        if _is_plain(attention):
            narrow(attention)
        yield
    finally:
        attention.__class__, attention._qkv_same_embed_dim = cls, fusable


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether one matrix projects queries, keys and values, and nothing is added to keys."""
    is_special = attention.in_proj_weight is None or attention.bias_k is not None
    return not (is_special or attention.add_zero_attn)


class SelfAttention(_Attending):
    r"""Attention whose projections are Linear layers, called as `MultiheadAttention` is.

    For queries, keys and values of all heads in one projection,
    :math:`[Q, K, V] = x W_{in}^T + b_{in}` and
    :math:`y = \mathrm{softmax}(Q K^T / \sqrt{d} + M) V W_{out}^T + b_{out}`.

    Args:
        in_proj: From the width to ``3 * heads * head_dim``: queries, then keys, then values.
        out_proj: From ``heads * head_dim`` to the width.
        num_heads: The number of heads, which need not fill the width.
        head_dim: The width of each head.
        batch_first: Whether inputs are ``[batch, length, width]``, not ``[length, batch, width]``.
        dropout: The dropout of the attention weights, in training.

    Example:
        >>> dense = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> own = SelfAttention.of(dense)
        >>> x = torch.randn(3, 5, 8)
        >>> torch.allclose(own(x, x, x)[0], dense(x, x, x)[0], atol=1e-6)
        True
    """

    def __init__(
        self,
        in_proj: nn.Module,
        out_proj: nn.Module,
        num_heads: int,
        head_dim: int,
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.out_proj = out_proj
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.batch_first = batch_first
        self.dropout = dropout
        # Torch's encoder layers check these two, and then do not read the weights themselves.
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> "SelfAttention":
        """The same attention, with the same parameters, if `can_open`."""
        own = cls(
            linear_of(attention.in_proj_weight, attention.in_proj_bias),
            linear_of(cast(nn.Parameter, attention.out_proj.weight), attention.out_proj.bias),
            attention.num_heads,
            attention.head_dim,
            batch_first=attention.batch_first,
            dropout=attention.dropout,
        )
        return own.train(attention.training)

    def is_dense(self) -> bool:
        """Whether both projections are Linear layers."""
        return all(type(layer) is nn.Linear for layer in (self.in_proj, self.out_proj))

    def closed(self) -> nn.MultiheadAttention:
        """The attention that this one was made of, with torch's fused projections, if `is_dense`.

        Example:
            >>> own = SelfAttention.of(nn.MultiheadAttention(8, 2))
            >>> own.closed()
            MultiheadAttention(
              (out_proj): NonDynamicallyQuantizableLinear(in_features=8, out_features=8, bias=True)
            )
        """
        into, out = cast(nn.Linear, self.in_proj), cast(nn.Linear, self.out_proj)
        attention = nn.MultiheadAttention(
            out.out_features,
            1,  # not all numbers of heads fit the width
            self.dropout,
            out.bias is not None,
            batch_first=self.batch_first,
            device="meta",
        )
        mine: Any = attention
        mine.in_proj_weight, mine.in_proj_bias = into.weight, into.bias
        mine.out_proj.weight, mine.out_proj.bias = out.weight, out.bias
        attention.num_heads, attention.head_dim = self.num_heads, self.head_dim
        if self.num_heads * self.head_dim != attention.embed_dim:
            narrow(attention)
        return attention.train(self.training)

    @override
    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        # One projection computes all three of an input, also those that the input is not used for.
        projected = {key: self.in_proj(x) for key, x in {id(x): x for x in inputs}.items()}
        return [projected[id(x)].chunk(3, -1)[i] for i, x in enumerate(inputs)]


def can_open(attention: nn.MultiheadAttention) -> bool:
    """Whether `SelfAttention.of` can replace an attention.

    Example:
        >>> can_open(nn.MultiheadAttention(8, 2)), can_open(nn.MultiheadAttention(8, 2, kdim=4))
        (True, False)
    """
    modules: list[nn.Module] = list(attention.modules())
    return (
        type(attention) in (nn.MultiheadAttention, NarrowAttention)
        and _is_plain(attention)
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in modules)
    )
