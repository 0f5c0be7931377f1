"""Attention with fewer heads: what torch's module cannot say."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

__all__ = ["NarrowAttention", "narrow", "narrowed"]


class NarrowAttention(nn.MultiheadAttention):
    """A `torch.nn.MultiheadAttention` whose heads together are narrower than what they read.

    Torch's module takes the size of a head to be the inputs' over the number of heads, which no
    longer holds when heads are gone. It is called as that module, and its parameters have the same
    names: ``in_proj_weight`` ``[3 * heads * head_dim, embed_dim]``, ``out_proj.weight``
    ``[embed_dim, heads * head_dim]``. Attention weights are those of the heads that are left.
    Made by `narrow`.
    """

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
        """As `torch.nn.MultiheadAttention.forward`; ``is_causal`` is a hint there, not needed here.

        Raises:
            ValueError: If ``attn_mask`` is for another number of heads, or missing though
                ``is_causal``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("`is_causal` is only a hint: give `attn_mask` too.")
        inputs = [query, key, value]
        if query.dim() == 2:
            inputs = [x[None] for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        q, k, v = self._projected(inputs)
        mask = self._mask(key_padding_mask, attn_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            read = weights @ v
        else:
            read = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out: Tensor = self.out_proj(read.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.sum(1) / max(1, self.num_heads)
        if query.dim() == 2:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, inputs: list[Tensor]) -> list[Tensor]:
        """Queries, keys and values, each ``[batch, heads, length, head_dim]``."""
        if inputs[0] is inputs[1] is inputs[2]:
            parts = F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            parts = tuple(map(F.linear, inputs, weights, biases))
        return [p.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in parts]

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks added up, as `scaled_dot_product_attention` adds them to the scores."""
        if mask is not None and mask.dim() == 3:
            if len(mask) != len(q) * self.num_heads:
                raise ValueError(
                    f"`attn_mask` has {len(mask)} masks for {len(q)} sequences and "
                    f"{self.num_heads} heads: some heads were removed. Give one for all heads, "
                    "[queries, keys]."
                )
            mask = mask.unflatten(0, (len(q), self.num_heads))
        masks = [None if padding is None else padding[:, None, None], mask]
        added = [_added(m, q) for m in masks if m is not None]
        return sum(added[1:], added[0]) if added else None


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask to add: minus infinity where a bool one is True, which stands for what is hidden."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def narrow(attention: nn.MultiheadAttention) -> NarrowAttention:
    """Let a module's heads go without its width: the same object, from now on of another class.

    So everything that holds it still does, and its parameters stay where they are.

    Raises:
        ValueError: If its keys and values have sizes, or a token, of their own.

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
    # What looks for fused kernels asks this first; they take the heads to be as wide as the inputs.
    attention._qkv_same_embed_dim = False
    assert isinstance(attention, NarrowAttention)
    return attention


@contextmanager
def narrowed(attention: nn.MultiheadAttention) -> Iterator[None]:
    """`narrow` for a while, if possible: unlike torch's module, ours calls its ``out_proj``."""
    before, same = type(attention), attention._qkv_same_embed_dim
    try:
        if _is_plain(attention):
            narrow(attention)
        yield
    finally:
        attention.__class__, attention._qkv_same_embed_dim = before, same


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    own = attention.in_proj_weight is None or attention.bias_k is not None
    return not (own or attention.add_zero_attn)
