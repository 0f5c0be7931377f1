"""Many processes: the reductions that make every rank decide alike. Identities on one process.

R ranks that each see a part of a batch must give the masks of one process that sees all of it, so
the gradient of each task is averaged over ranks before any saliency is computed from it.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "any_rank",
    "check_equal",
    "first_",
    "from_first",
    "gather",
    "is_on",
    "mean_",
    "meet",
    "rank",
    "rows",
    "sum_",
    "world",
]

T = TypeVar("T")


def world() -> int:
    """How many ranks take part; 1 when nothing is distributed."""
    return dist.get_world_size() if is_on() else 1


def is_on() -> bool:
    """Whether there are processes that know of each other, be it one."""
    return dist.is_available() and dist.is_initialized()


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


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on all ranks; the others wait for it.

    Raises:
        RuntimeError: If the first rank fails, on all ranks.
    """
    if world() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = make()
        except Exception as error:  # the others would wait for ever
            told[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise RuntimeError(f"The first rank could not measure. {told[1]}")
    made: T = told[0]
    return made


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


_CALLS = ("observe", "step", "prune")
_WORDS = 8  # of 32 flags each

_groups: dict[int, Any] = {}


def meet(call: str, step: int, tasks: Sequence[str], flags: Sequence[bool]) -> list[list[bool]]:
    """Wait for all ranks at the same call; the flags of each, in the order of ranks.

    Ranks meet in a group of their own, so that who comes late, or is in another call, is not taken
    for somebody with gradients.

    Args:
        call: The call of ours that this rank is in.
        step: The step it is at.
        tasks: All tasks.
        flags: One for each of them.

    Raises:
        RuntimeError: If a rank does not come within the time-out of the default group, or is in
            another call, at another step or has other tasks.
    """
    if len(flags) > 32 * _WORDS:
        raise ValueError(f"Several processes can have {32 * _WORDS} tasks. Got {len(flags)}.")
    words = [0] * _WORDS
    for place, flag in enumerate(flags):
        words[place // 32] |= int(flag) << place % 32
    known = int.from_bytes(hashlib.sha256("\0".join(tasks).encode()).digest()[:7], "big")
    mine = torch.tensor([_CALLS.index(call), step, known, *words])
    theirs = [torch.empty_like(mine) for _ in range(world())]
    timeout = _timeout()
    try:
        group = _own_group(timeout)
        dist.monitored_barrier(group, timeout=timeout, wait_all_ranks=True)
        dist.all_gather(theirs, mine, group=group)
    except RuntimeError as error:
        said = next((line for line in str(error).splitlines() if line.strip()), "")
        raise RuntimeError(
            f"Rank {dist.get_rank()} called {call}() at step {step}, and not every rank did within "
            f"{timeout}: {said} {_EQUALLY}"
        ) from error
    heads = [tuple(other[:3].tolist()) for other in theirs]
    if len(set(heads)) > 1:
        places = [
            f"rank {rank} in {_CALLS[head[0]]}() at step {head[1]}"
            + ("" if head[2] == heads[0][2] else " with other tasks")
            for rank, head in enumerate(heads)
        ]
        raise RuntimeError(f"Ranks are in different calls: {', '.join(places)}. {_EQUALLY}")
    return [
        [bool(int(other[3 + i // 32]) >> i % 32 & 1) for i in range(len(flags))] for other in theirs
    ]


_EQUALLY = (
    "Every rank must build the same pruner and call observe() and step() equally often, also for a "
    "batch that lacks some tasks."
)


def _timeout() -> timedelta:
    """How long ranks wait for each other: as the default group was told."""
    default: Any = dist.group.WORLD
    for kind in ("cpu", "cuda"):
        try:
            found = default._get_backend(torch.device(kind)).options._timeout
        except (RuntimeError, AttributeError):  # no such back-end
            continue
        if isinstance(found, timedelta):
            return found
    return timedelta(minutes=30)


def _own_group(timeout: timedelta) -> Any:
    """A group of all ranks, on the CPU, that nobody else uses."""
    default = id(dist.group.WORLD)
    if default not in _groups:
        _groups.clear()  # those of groups that are gone
        _groups[default] = dist.new_group(backend="gloo", timeout=timeout)
    return _groups[default]


def check_equal(masks: Iterable[Tensor], group: Any = None) -> None:
    """Refuse to go on with masks that differ between ranks.

    Args:
        masks: The masks.
        group: The ranks that have the same; all of them unless given.

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
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    if not torch.equal(low, high):
        raise RuntimeError(
            "Masks differ between ranks. Every rank must build the same pruner on the same "
            "weights and call observe() and step() equally often."
        )
