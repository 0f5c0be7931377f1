"""Bits: exact zeros whatever stood there, and masks packed and unpacked."""

import pytest
import torch
from torch import nn

from mtprune.bits import pack_bits, unpack_bits, zeroed
from tests.elsewhere import elsewhere

# Zeros without a look at what stood there.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last, "mask elsewhere", "a slice"]
)
def test_zeros_are_exact_whatever_stood_there(dtype, layout, device):
    weight = torch.randn(12, 8, 3, 3, device=device, dtype=dtype)
    mask = torch.rand(weight.shape, device=device) < 0.5
    weight[0], weight[1], weight[2] = torch.nan, torch.inf, -0.0
    if layout == "mask elsewhere":
        weight = weight.to(memory_format=torch.channels_last)
    elif layout == "a slice":
        weight, mask = weight[:, ::2], mask[:, ::2]
    else:
        weight, mask = (x.contiguous(memory_format=layout) for x in (weight, mask))
    expected = torch.where(mask, weight, 0.0)
    result = zeroed(weight, mask)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert not bool(result[~mask].signbit().any())
    if not isinstance(layout, str):
        assert result.stride() == weight.stride()
    parameter = nn.Parameter(weight)
    version = parameter._version
    held = parameter.detach()
    assert zeroed(held, mask, out=held) is held
    torch.testing.assert_close(parameter.data, expected, rtol=0, atol=0, equal_nan=True)
    assert parameter._version > version


def test_zeros_are_the_same_in_one_piece_and_in_many(device):
    """A weight that is larger than a core's cache is zeroed piece by piece."""
    weight = torch.randn(613, 701, device=device)
    mask = torch.rand(weight.shape, device=device) < 0.5
    assert torch.equal(zeroed(weight, mask), torch.where(mask, weight, 0.0))


@pytest.mark.parametrize("shape", [(3, 7), (16,), (1,), (0,)])
def test_bits_packed_without_numpy_are_the_same(shape):
    mask = torch.rand(shape) < 0.5
    packed = pack_bits(mask)
    assert torch.equal(unpack_bits(packed, mask.shape), mask)
    assert torch.equal(pack_bits(elsewhere(mask)), packed)
    assert torch.equal(unpack_bits(elsewhere(packed), mask.shape), mask)
