"""Census: counts over all weights, wherever they lie.

What decides about weights of which every rank has a part needs no weight of another rank, only how
many there are of a kind. A census sums such counts, over histograms mostly, and finds numbers of
a given rank among all by them. Where all weights are here it only looks.

The parts of a layer follow each other in the order of ranks, and so do positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

__all__ = ["HERE", "Census", "Scattered"]

_DIGITS = 1 << 8  # numbers are compared 8 bits at a time: little to send, eight times
_QUESTIONS = 1 << 16  # asked together: their answers are as large as a histogram


class Census:
    """All weights are here, and every count is what it is."""

    is_scattered = False

    def sum(self, counts: Tensor) -> Tensor:
        """Counts of all ranks together, in place."""
        return counts

    def count(self, masks: Sequence[Tensor]) -> list[int]:
        """How many are True in each of some masks, on all ranks together."""
        return [total for _, total in self.places([int(mask.count_nonzero()) for mask in masks])]

    def number(self, count: int | float, like: Tensor) -> Any:
        """One count, on all ranks together; its dtype is kept.

        Args:
            count: What is here.
            like: A tensor on the device to count on.
        """
        return count

    def least(self, value: Tensor) -> Tensor:
        """The least of a number on each rank, in place."""
        return value

    def most(self, value: Tensor) -> Tensor:
        """The highest of a number on each rank, in place."""
        return value

    def below(self, rising: Tensor, values: Tensor) -> Tensor:
        """How many of everybody's numbers are less than each of ``values``, int64.

        Args:
            rising: The numbers here, in ascending order.
            values: Those asked about here; other ranks may ask about others.
        """
        return torch.searchsorted(rising, values)

    def kth(self, values: Tensor, k: int) -> tuple[Tensor, int, int]:
        """The k-th highest of everybody's numbers.

        Args:
            values: The numbers here, flat.
            k: At least 1, and no more than there are.

        Returns:
            The number, 0-dim; how many are equal to it; and how many of those are among the k.
        """
        found = torch.kthvalue(values, values.numel() - k + 1).values
        above, equal = int((values > found).sum()), int((values == found).sum())
        return found, equal, k - above

    def shares(self, ties: Sequence[int], left: int) -> list[int]:
        """Of numbers that are equal, how many here are among the first ``left`` by position.

        Args:
            ties: How many there are here in each layer, in order of position.
            left: How many are taken.
        """
        taken = []
        for mine, (ahead, total) in zip(ties, self.places(ties), strict=True):
            share = min(left, total)
            left -= share
            taken.append(min(max(share - ahead, 0), mine))
        return taken

    def places(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """For each count: how many come before those here, and how many there are in all."""
        return [(0, count) for count in counts]

    def anyone(self, problem: str | None) -> str | None:
        """The problem that some rank has; the first one's if several have one."""
        return problem


HERE = Census()
"""The census where all weights are here."""


class Scattered(Census):
    """Every rank of a group has a part of every layer.

    Args:
        group: The process group, in the order of parts.
    """

    is_scattered = True

    def __init__(self, group: Any) -> None:
        self._group = group

    @override
    def sum(self, counts: Tensor) -> Tensor:
        dist.all_reduce(counts, group=self._group)
        return counts

    @override
    def number(self, count: int | float, like: Tensor) -> Any:
        kind = torch.int64 if isinstance(count, int) else torch.float64
        return self.sum(torch.tensor(count, dtype=kind, device=like.device)).item()

    @override
    def least(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, op=dist.ReduceOp.MIN, group=self._group)
        return value

    @override
    def most(self, value: Tensor) -> Tensor:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return value

    @override
    def below(self, rising: Tensor, values: Tensor) -> Tensor:
        # Everybody's questions are put to everybody, a few at a time: never more than a histogram.
        asked, places = values.unique(return_inverse=True)
        ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        size = max(1, _QUESTIONS // ranks)
        longest = int(self.most(torch.tensor(len(asked), device=values.device)))
        answers = [values.new_zeros(0, dtype=torch.int64)]
        for start in range(0, longest, size):
            mine = asked[start : start + size]
            question = values.new_zeros(size)
            question[: len(mine)] = mine
            questions = question.new_empty(ranks * size)
            dist.all_gather(list(questions.chunk(ranks)), question, group=self._group)
            counts = self.sum(torch.searchsorted(rising, questions))
            answers.append(counts.view(ranks, size)[rank, : len(mine)])
        return torch.cat(answers)[places]

    @override
    def kth(self, values: Tensor, k: int) -> tuple[Tensor, int, int]:
        keys = _keys(values)
        found, equal = 0, 0
        for shift in range(56, -1, -8):
            # The leading digit has the sign: negative ones come first.
            lowest = -_DIGITS // 2 if shift == 56 else 0
            digits = (keys >> shift) - lowest if lowest else keys >> shift & _DIGITS - 1
            counts = self.sum(torch.bincount(digits, minlength=_DIGITS))
            from_top = counts.flip(0).cumsum(0).flip(0)
            digit = int((from_top >= k).sum()) - 1
            equal = int(counts[digit])
            k -= int(from_top[digit]) - equal
            keys = keys[digits == digit]
            found |= (digit + lowest) << shift
        return _number(found, values), equal, k

    @override
    def places(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        if not counts:
            return []
        device = _device_of(self._group)
        mine = torch.tensor(counts, dtype=torch.int64, device=device)
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(theirs, mine, group=self._group)
        everyone = torch.stack(theirs)
        ahead = everyone[: dist.get_rank(self._group)].sum(0)
        return list(zip(ahead.tolist(), everyone.sum(0).tolist(), strict=True))

    @override
    def anyone(self, problem: str | None) -> str | None:
        problems: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        return next((found for found in problems if found is not None), None)


def _keys(values: Tensor) -> Tensor:
    """Whole numbers in the order of some floats, int64."""
    bits = (values.to(torch.float64) + 0.0).view(torch.int64)  # -0.0 is 0.0
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _number(key: int, like: Tensor) -> Tensor:
    """The float of a key, 0-dim."""
    bits = key if key >= 0 else key ^ torch.iinfo(torch.int64).max
    number = torch.tensor(bits, dtype=torch.int64).view(torch.float64)
    return number.to(like.device, like.dtype)


def _device_of(group: Any) -> torch.device:
    """Where a group's messages come from."""
    return torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
