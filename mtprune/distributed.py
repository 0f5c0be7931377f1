"""Many processes: the reductions that make every rank decide alike. Identities on one process.

R ranks that each see a part of a batch must give the masks of one process that sees all of it, so
the gradient of each task is averaged over ranks before any saliency is computed from it.
"""

import hashlib
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["any_rank", "check_equal", "first_", "gather", "mean_", "rank", "rows", "sum_", "world"]

T = TypeVar("T")


def world() -> int:
    """How many ranks take part; 1 when nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which rank this is; 0 when nothing is distributed."""
    return dist.get_rank() if world() > 1 else 0


def mean_(tensor: Tensor) -> Tensor:
    """The mean over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
        tensor /= world()
    return tensor


def sum_(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def rows(tensor: Tensor) -> Tensor:
    """The rows of all ranks, one rank after the other; each may have another number of them."""
    if world() == 1:
        return tensor
    counts = torch.zeros(world(), dtype=torch.int64, device=tensor.device)
    counts[rank()] = len(tensor)
    numbers = sum_(counts).tolist()
    mine = tensor.new_zeros(max(numbers), *tensor.shape[1:])
    mine[: len(tensor)] = tensor
    all_of = [torch.empty_like(mine) for _ in numbers]
    dist.all_gather(all_of, mine)
    return torch.cat([part[:number] for part, number in zip(all_of, numbers, strict=True)])


def first_(tensor: Tensor) -> Tensor:
    """What the first rank has, in place."""
    if world() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def any_rank(flags: Tensor) -> Tensor:
    """For each bool flag, whether any rank has it set."""
    if world() == 1:
        return flags
    counts = flags.to(torch.int32)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return counts.bool()


def gather(mine: T) -> list[T]:
    """What every rank has, in the order of ranks."""
    if world() == 1:
        return [mine]
    everyones: list[T | None] = [None] * world()
    dist.all_gather_object(everyones, mine)
    return [theirs for theirs in everyones if theirs is not None]


def check_equal(masks: Iterable[Tensor]) -> None:
    """Refuse to go on with masks that differ between ranks.

    Raises:
        RuntimeError: If they do.
    """
    if world() == 1:
        return
    digest, device = hashlib.sha256(), torch.device("cpu")
    for mask in masks:
        device = mask.device
        digest.update(mask.cpu().numpy().tobytes())
    mine = torch.tensor(list(digest.digest()), dtype=torch.int32, device=device)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError(
            "Masks differ between ranks. Every rank must build the same pruner on the same "
            "weights and call observe() and step() equally often."
        )
