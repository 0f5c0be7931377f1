"""Stability: when more observations would no longer change the masks."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtprune.bits import pack_bits
from mtprune.reading import Entry

__all__ = ["Stability", "iou"]

_LEAST = 4
_MOST = 64
_ALIKE = 0.99


class Stability:
    """Compares the masks from all observations with those from half as many.

    Masks are kept at 2, 3, 4, 6, 8, 12, 16, 24, ... observations, so that there is always one from
    half as many to compare with, and looked at there alone.

    Attributes:
        stable: Whether the last comparison found them alike; None before the first.
    """

    def __init__(self) -> None:
        self.stable: bool | None = None
        self._snapshots: dict[int, list[Tensor]] = {}

    def state_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return {"stable": self.stable, "snapshots": dict(self._snapshots)}

    @classmethod
    def read(cls, entry: Entry) -> "Stability":
        """The inverse of `state_dict`.

        Raises:
            ValueError: If it is not that.
        """
        parts = entry.fields(["stable", "snapshots"])
        new = cls()
        new.stable = parts["stable"].optional(Entry.flag)
        new._snapshots = {
            observations: [
                part.tensor((part.size(),), torch.uint8).clone() for part in masks.items()
            ]
            for observations, masks in parts["snapshots"].numbered().items()
        }
        return new

    def enough(self, observations: int, masks: Callable[[], Sequence[Tensor]]) -> bool:
        """Whether ``observations`` are enough; ``masks()`` gives those from all of them."""
        if self.stable or observations >= _MOST:
            return True
        if observations in self._snapshots or not _is_milestone(observations):
            return False
        now = [pack_bits(mask) for mask in masks()]
        half = self._snapshots.get(observations // 2)
        if observations >= _LEAST and half is not None:
            # More layers may be in use than were seen to be, half as many observations ago.
            alike = [mask.shape for mask in now] == [mask.shape for mask in half]
            self.stable = alike and iou(now, half) > _ALIKE
        self._snapshots[observations] = now
        self._snapshots = {n: m for n, m in self._snapshots.items() if 2 * n > observations}
        return bool(self.stable)


def iou(masks: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Intersection over union of packed masks, 1 if both are empty."""
    both = either = 0
    for mask, other in zip(masks, others, strict=True):
        both += _ones(mask & other)
        either += _ones(mask | other)
    return both / either if either else 1.0


def _is_milestone(n: int) -> bool:
    """2, 3, 4, 6, 8, 12, ...: powers of two, and three halves of them."""
    return n >= 2 and (n & (n - 1) == 0 or (n % 3 == 0 and (n // 3) & (n // 3 - 1) == 0))


def _ones(bits: Tensor) -> int:
    return sum(int(((bits >> i) & 1).sum()) for i in range(8))
