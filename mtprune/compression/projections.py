"""Projections: what attention multiplies by, as Linear layers that can take another form."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["SelfAttention", "can_open"]


class SelfAttention(nn.Module):
    r"""Attention whose projections are Linear layers, called as `MultiheadAttention` is.

    For queries, keys and values of all heads side by side in one projection,
    :math:`[Q, K, V] = x W_{in}^T + b_{in}` and
    :math:`y = \mathrm{softmax}(Q K^T / \sqrt{d} + M) V W_{out}^T + b_{out}`.

    Args:
        in_proj: From the width to ``3 * heads * head_dim``: queries, then keys, then values.
        out_proj: From ``heads * head_dim`` to the width.
        num_heads: How many heads there are; they need not fill the width.
        batch_first: Whether inputs are ``[batch, length, width]``, not ``[length, batch, width]``.
        dropout: Of the attention weights, in training.

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
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_proj = in_proj
        self.out_proj = out_proj
        self.num_heads = num_heads
        self.batch_first = batch_first
        self.dropout = dropout
        # What torch's encoder layers ask before they read weights themselves: they must not.
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> "SelfAttention":
        """The same attention, with the same parameters, if `can_open`."""
        own = cls(
            _linear(attention.in_proj_weight, attention.in_proj_bias),
            _linear(cast(nn.Parameter, attention.out_proj.weight), attention.out_proj.bias),
            attention.num_heads,
            batch_first=attention.batch_first,
            dropout=attention.dropout,
        )
        return own.train(attention.training)

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
        """Output and, if asked for, attention weights; arguments and shapes are torch's."""
        if is_causal and attn_mask is None:
            raise ValueError("`is_causal` is a hint about `attn_mask`. Give the mask too.")
        batched = query.dim() == 3
        q, k, v = self._heads(query, key, value, batched)
        mask: Tensor | None = None
        if is_causal and key_padding_mask is None and not need_weights:
            causal = True
        else:
            causal = False
            mask = self._mask(q, k, attn_mask, key_padding_mask, batched)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        # [batch, heads, length, head_dim], and back to how the input came.
        order = (0, 2, 1, 3) if self.batch_first or not batched else (2, 0, 1, 3)
        y: Tensor = self.out_proj(mixed.permute(order).flatten(2))
        if batched:
            return y, weights
        return y[0], None if weights is None else weights[0]

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, batched: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``[batch, heads, length, head_dim]``."""
        if query is key and key is value:
            parts = self._project(query, batched)
            return parts[0], parts[1], parts[2]
        # One projection makes all three: what is not asked for is made and left.
        keys = self._project(key, batched)
        values = keys if value is key else self._project(value, batched)
        return self._project(query, batched)[0], keys[1], values[2]

    def _project(self, x: Tensor, batched: bool) -> Tensor:
        """``[3, batch, heads, length, head_dim]``."""
        y: Tensor = self.in_proj(x if batched else x[None])
        y = y.unflatten(-1, (3, self.num_heads, -1))
        return y.permute((2, 0, 3, 1, 4) if self.batch_first or not batched else (2, 1, 3, 0, 4))

    def _mask(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None, batched: bool
    ) -> Tensor | None:
        """What is added to the scores ``[batch, heads, queries, keys]``."""
        mask: Tensor | None = None
        if attn_mask is not None:
            mask = _added(attn_mask, q)
            if mask.dim() == 3:  # one for each head of each example
                mask = mask.view(q.shape[0], self.num_heads, q.shape[2], k.shape[2])
        if padding is not None:
            if not batched:
                padding = padding[None]
            hidden = _added(padding, q)[:, None, None, :]
            mask = hidden if mask is None else mask + hidden
        return mask


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A layer of parameters that there are already."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, "meta")
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: minus infinity where a bool mask hides."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def can_open(attention: nn.MultiheadAttention) -> bool:
    """Whether `SelfAttention.of` does all that an attention does.

    Example:
        >>> can_open(nn.MultiheadAttention(8, 2)), can_open(nn.MultiheadAttention(8, 2, kdim=4))
        (True, False)
    """
    inside: list[nn.Module] = list(attention.modules())
    return (
        type(attention) is nn.MultiheadAttention
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in inside)
    )
