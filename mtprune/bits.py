"""Bits: masks packed to one bit for each weight, and zeros written through the bits of numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["pack_bits", "unpack_bits", "zeroed"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17


def zeroed(weight: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """A weight with exact zeros where its mask is False, whatever stood there.

    A product will not do: inf * 0 is NaN. But the bits of a number, taken as a whole number, times
    0 or 1 are those of 0 or of the number itself; that is as fast as a product with a mask of the
    weight's type, and several times as fast as choosing.

    Args:
        weight: Any shape.
        mask: Same shape, bool.
        out: Where to write it; ``weight`` itself is allowed.
    """
    flat = None if torch.compiler.is_compiling() else _flat(weight, mask)
    bits = _BITS.get(weight.element_size()) if flat is not None else None
    if flat is None or bits is None:
        result = torch.where(mask, weight, 0.0)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty_like(weight)
    target = out.as_strided((out.numel(),), (1,))
    size = _CHUNK if weight.device.type == "cpu" else max(weight.numel(), 1)
    for numbers, kept, to in zip(*(t.split(size) for t in (*flat, target)), strict=True):
        torch.mul(numbers.view(bits), kept, out=to.view(bits))
    return out


def _flat(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both in the order of memory; None if they differ in that, or have no memory to speak of."""
    if weight.stride() != mask.stride() or weight.is_complex() or type(mask) is not Tensor:
        return None
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.dim())
    if not weight.is_contiguous() and not (last and weight.is_contiguous(memory_format=last)):
        return None
    try:
        weight.untyped_storage(), mask.untyped_storage()
    except (NotImplementedError, RuntimeError):  # seen through a transform of torch.func
        return None
    size = (weight.numel(),)
    return weight.detach().as_strided(size, (1,)), mask.as_strided(size, (1,))


def _uses_numpy(bits: Tensor) -> bool:
    """On a CPU NumPy packs thirty times as fast as torch."""
    return bits.device.type == "cpu"


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bits, uint8 ``[ceil(n / 8)]``, row-major, lowest bit first.

    Example:
        >>> pack_bits(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    flat = mask.reshape(-1)
    if _uses_numpy(mask):
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    bits = torch.zeros(len(padded), dtype=torch.uint8, device=mask.device)
    for i in range(8):
        bits |= padded[:, i] << i
    return bits


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of that shape whose `pack_bits` is ``bits``.

    Example:
        >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), (3,))
        tensor([ True, False,  True])
    """
    if _uses_numpy(bits):
        ones = np.unpackbits(bits.numpy(), count=torch.Size(shape).numel(), bitorder="little")
        return torch.from_numpy(ones).view(torch.bool).view(shape)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits.unsqueeze(1) >> shifts) & 1).bool().view(-1)
    return flat[: torch.Size(shape).numel()].view(shape).clone()
