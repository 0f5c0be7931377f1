"""Attention without some heads: called as torch's, and equal to torch's with these heads at 0."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mtprune.compression.attention import NarrowAttention, narrow

HEADS, SIZE = 4, 3
WIDTH = HEADS * SIZE


def pair(kept, **options):
    """Torch's module with heads at 0, and a narrow one without them."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **options}).eval()
    rows = [i for i in range(WIDTH) if i // SIZE in kept]
    index = torch.tensor([part * WIDTH + i for part in range(3) for i in rows], dtype=torch.long)
    thin = narrow(copy.deepcopy(dense))
    with torch.no_grad():
        gone = [i for i in range(WIDTH) if i not in rows]
        if dense.in_proj_bias is not None:
            dense.in_proj_bias.normal_()
            dense.out_proj.bias.normal_()
            thin.in_proj_bias = nn.Parameter(dense.in_proj_bias[index])
            thin.out_proj.bias.copy_(dense.out_proj.bias)
        dense.out_proj.weight[:, gone] = 0
        thin.in_proj_weight = nn.Parameter(dense.in_proj_weight[index])
        thin.out_proj.weight = nn.Parameter(dense.out_proj.weight[:, rows])
    thin.num_heads = len(kept)
    return dense, thin


def padding(batch, length):
    """Sequences of all lengths, the first one full."""
    lengths = torch.arange(length, length - batch, -1).clamp_min(1)
    return torch.arange(length) >= lengths[:, None]


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1,), (0, 2, 3), ()], ids=str)
@pytest.mark.parametrize("weights", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("masked", ["", "padding", "causal", "both", "float"])
def test_same_as_with_heads_at_0(kept, weights, masked):
    dense, thin = pair(kept)
    x = torch.randn(4, 6, WIDTH)
    options = {"need_weights": weights}
    if masked in ("padding", "both"):
        options["key_padding_mask"] = padding(4, 6)
    if masked in ("causal", "both"):
        options["attn_mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
        options["is_causal"] = masked == "causal"
    if masked == "float":
        options["attn_mask"] = torch.randn(6, 6)
        options["key_padding_mask"] = torch.randn(4, 6)
    with torch.enable_grad():  # torch's fused kernel is another computation
        expected, _ = dense(x, x, x, **options)
        got, found = thin(x, x, x, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (found is not None) == weights


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": False}], ids=str)
def test_every_way_to_call_it(options):
    """Other keys than queries, without a batch, weights of each head, other layouts."""
    dense, thin = pair((0, 1, 2, 3), **options)
    x, y = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    if options.get("batch_first") is False:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    for arguments in [(x, y, y), (x, y, 2 * y), (x[0], y[0], y[0]), (x, x, x)]:
        for average in (True, False):
            pairs = zip(
                dense(*arguments, average_attn_weights=average),
                thin(*arguments, average_attn_weights=average),
                strict=True,
            )
            for expected, got in pairs:
                torch.testing.assert_close(got, expected)
    if options.get("batch_first", True):
        mask = torch.randn(2 * HEADS, 5, 7)
        torch.testing.assert_close(thin(x, y, y, attn_mask=mask), dense(x, y, y, attn_mask=mask))
        alone = padding(1, 7)[0]
        torch.testing.assert_close(
            thin(x[0], y[0], y[0], key_padding_mask=alone),
            dense(x[0], y[0], y[0], key_padding_mask=alone),
        )


def test_dropout_only_in_training():
    _, thin = pair((0, 1), dropout=0.5)
    x = torch.randn(2, 5, WIDTH)
    for weights in (True, False):
        assert torch.equal(
            thin(x, x, x, need_weights=weights)[0], thin(x, x, x, need_weights=weights)[0]
        )
        thin.train()
        assert not torch.equal(
            thin(x, x, x, need_weights=weights)[0], thin(x, x, x, need_weights=weights)[0]
        )
        thin.eval()


def test_it_trains_copies_and_pickles():
    _, thin = pair((0, 3))
    x = torch.randn(2, 5, WIDTH)
    for other in (copy.deepcopy(thin), pickle.loads(pickle.dumps(thin))):
        assert isinstance(other, NarrowAttention)
        assert torch.equal(other(x, x, x)[0], thin(x, x, x)[0])
    thin(x, x, x)[0].square().sum().backward()
    assert all(bool(p.grad.any()) for p in thin.parameters())
    assert narrow(thin) is thin


@pytest.mark.parametrize("kept", [(0, 2), ()], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_inside_a_layer(kept, norm_first, grad):
    """Torch's fused layer stands back."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 20, batch_first=True, norm_first=norm_first
    ).eval()
    other = copy.deepcopy(layer)
    layer.self_attn, other.self_attn = pair(kept)
    x, hidden = torch.randn(4, 6, WIDTH), padding(4, 6)
    with torch.set_grad_enabled(grad):
        expected = layer(x, src_key_padding_mask=hidden)
        got = other(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(got[~hidden], expected[~hidden], rtol=1e-5, atol=1e-5)


def test_errors():
    _, thin = pair((0, 2))
    x = torch.randn(2, 5, WIDTH)
    with pytest.raises(
        ValueError, match="has 8 masks for 2 sequences and 2 heads: some heads were"
    ):
        thin(x, x, x, attn_mask=torch.zeros(2 * HEADS, 5, 5))
    with pytest.raises(ValueError, match="`is_causal` is only a hint"):
        thin(x, x, x, is_causal=True)
    for options in ({"kdim": 2}, {"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="with one size for queries, keys and values"):
            narrow(nn.MultiheadAttention(4, 2, **options))
