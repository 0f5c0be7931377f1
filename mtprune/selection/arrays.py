"""Arrays: operations on many weights at once, by NumPy on a CPU and by torch elsewhere.

On a CPU NumPy is several times as fast as torch in these, and gives the same results.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mtprune.census import HERE, Census

__all__ = ["ascending", "chunk_size", "count_true", "highest", "number_of", "positions", "reaches"]

CHUNK = 1 << 17  # weights looked at together: bounds all temporaries, and fits a core's cache


def chunk_size(like: Tensor) -> int:
    """How many weights are looked at together, on the device of a tensor."""
    return CHUNK if like.device.type == "cpu" else 64 * CHUNK


def uses_numpy(values: Tensor) -> bool:
    """Whether a tensor is where NumPy can work on it."""
    return values.device.type == "cpu"


def reaches(values: Tensor, edge: int) -> Tensor:
    """Whether each value is at least the one with these bits, bool."""
    if values.dtype == torch.bfloat16:
        values = values.to(torch.float32)
    if not uses_numpy(values):
        return values >= number_of(edge)
    if edge > 0:  # larger numbers have larger bits
        return torch.from_numpy(values.view(torch.int32).numpy() >= np.int32(edge))
    return torch.from_numpy(values.numpy() >= np.int32(edge).view(np.float32))


def number_of(bits: int) -> float:
    """The number with these bits."""
    return float(np.int32(bits).view(np.float32))


def positions(mask: Tensor) -> Tensor:
    """The positions of the entries that are True, int64."""
    if not uses_numpy(mask):
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def count_true(mask: Tensor) -> int:
    """How many entries are True."""
    if not uses_numpy(mask):
        return int(mask.sum())
    return int(np.count_nonzero(mask.numpy()))


def ascending(values: Tensor) -> Tensor:
    """Values in ascending order, float32."""
    if not uses_numpy(values):
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))


def highest(layers: Sequence[Tensor], keep: int, census: Census = HERE) -> list[Tensor]:
    """The ``keep`` highest values of some layers, earlier ones first among equals, as bool tensors.

    Args:
        layers: The values of each layer here, in order of position.
        keep: How many, of all ranks together.
        census: Counts over all ranks.
    """
    values = torch.cat(list(layers))
    if keep <= 0 or keep >= census.number(values.numel(), values):
        return [torch.full_like(own, keep > 0, dtype=torch.bool) for own in layers]
    least, equal, left = census.kth(values, keep)
    if left == equal:
        return [own >= least for own in layers]
    best = [own > least for own in layers]
    ties = [positions(own == least) for own in layers]
    taken = census.shares([len(own) for own in ties], left)
    for mask, own, number in zip(best, ties, taken, strict=True):
        mask[own[:number]] = True
    return best
