"""Slow, obvious restatements of what the library must compute, and samples to compare on.

Nothing here imports mtprune. Percentiles and worths are exact fractions, so ties are ties.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shares = tuple[Fraction, ...]
Worth = Callable[[Shares], Fraction]


# --- Percentiles, votes, selection ---------------------------------------------------------------


def percentiles(
    scores: Sequence[Mapping[str, Tensor]], priority: Mapping[str, float] | None = None
) -> list[list[Shares]]:
    """For each layer and weight its voters' percentiles: the share of strictly smaller scores."""
    columns: list[dict[str, list[Fraction]]] = [{} for _ in scores]
    for task in dict.fromkeys(task for layer in scores for task in layer):
        mine = [i for i, layer in enumerate(scores) if task in layer]
        flat = np.concatenate([scores[i][task].cpu().numpy() for i in mine])
        below = (flat[None, :] < flat[:, None]).sum(axis=1)
        factor = Fraction((priority or {}).get(task, 1))
        share = [1 - (1 - Fraction(int(b), len(flat))) / factor for b in below]
        for i in mine:
            size = scores[i][task].numel()
            columns[i][task], share = share[:size], share[size:]
    return [
        list(zip(*(column[task] for task in layer), strict=True))
        for layer, column in zip(scores, columns, strict=True)
    ]


def pruned_if(voters_needed: Callable[[int], int]) -> Worth:
    """The highest cut a weight survives if it falls when so many of its voters lie below."""

    def worth(shares: Shares) -> Fraction:
        need = voters_needed(len(shares))
        return max(cut for cut in shares if sum(share < cut for share in shares) < need)

    return worth


def average(shares: Shares) -> Fraction:
    return sum(shares, Fraction(0)) / len(shares)


VOTES: dict[str, Worth] = {
    "unanimous": pruned_if(lambda voters: voters),
    "majority": pruned_if(lambda voters: voters // 2 + 1),
    "at_least(1)": pruned_if(lambda voters: 1),
    "at_least(2)": pruned_if(lambda voters: min(2, voters)),
    "at_least(3)": pruned_if(lambda voters: min(3, voters)),
    "at_least(4)": pruned_if(lambda voters: min(4, voters)),
    "mean": average,
    "intersection": pruned_if(lambda voters: 1),
}

Place = tuple[int, int]


def ranking(
    scores: Sequence[Mapping[str, Tensor]],
    worth: Worth,
    priority: Mapping[str, float] | None = None,
) -> list[Place]:
    """All (layer, index), best worth first and earlier position first among equals."""
    table = percentiles(scores, priority)
    worths = {(i, j): worth(w) for i, layer in enumerate(table) for j, w in enumerate(layer)}
    return sorted(worths, key=lambda place: (-worths[place], place))


def keep_best(
    order: Iterable[Place], layers: Iterable[int], keep: int, floors: Sequence[int]
) -> set[Place]:
    """The best of each layer up to its floor, then the best of the rest up to ``keep``."""
    floor = dict(zip(layers, floors, strict=True))
    order = [place for place in order if place[0] in floor]
    kept: set[Place] = set()
    for layer, least in floor.items():
        kept.update([place for place in order if place[0] == layer][:least])
    for place in order:
        if len(kept) < keep:
            kept.add(place)
    return kept


def top(values: Sequence[float], count: int) -> set[int]:
    """Indices of the largest values, earlier ones first among equals."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def as_masks(kept: set[Place], sizes: Sequence[int]) -> list[list[bool]]:
    return [[(i, j) in kept for j in range(size)] for i, size in enumerate(sizes)]


# --- Allocation ----------------------------------------------------------------------------------


def erk(shapes: Sequence[Sequence[int]], density: float, power: float) -> list[float]:
    """Erdos-Renyi-kernel densities, one layer at a time.

    While the densest free layer would exceed 1 it is made dense and the scale solved for again.
    """
    sizes = [prod(shape) for shape in shapes]
    raw = [(sum(shape) / prod(shape)) ** power for shape in shapes]
    dense: list[int] = []
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        ones_to_place = sum(density * sizes[i] for i in free)
        ones_already_extra = sum((1 - density) * sizes[i] for i in dense)
        scale = (ones_to_place - ones_already_extra) / sum(raw[i] * sizes[i] for i in free)
        densest = max(free, key=lambda i: raw[i])
        if scale * raw[densest] <= 1:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense.append(densest)


# --- Samples -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """Layers as the pure part sees them: shapes, components and who uses what."""

    shapes: tuple[tuple[int, ...], ...]
    components: tuple[str, ...]
    tasks: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        return [prod(shape) for shape in self.shapes]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def used_by(self, task: str) -> int:
        return sum(n for n, users in zip(self.sizes, self.tasks, strict=True) if task in users)

    def scores(self, sample: Callable[[int], Tensor]) -> list[dict[str, Tensor]]:
        return [
            {task: sample(n) for task in users}
            for n, users in zip(self.sizes, self.tasks, strict=True)
        ]


# Each task uses a power of two of weights (2048, 1024, 1024), so that even the mean of percentiles
# is exact in floating point and ties in fractions are ties in floats. Task c has no head, "neck"
# has two users, one layer has a single weight.
EXACT = Net(
    shapes=((32, 12), (16, 4, 2, 4), (8, 16), (32, 32), (127, 1), (1, 1)),
    components=("trunk", "trunk", "neck", "a", "b", "b"),
    tasks=("abc", "abc", "ac", "a", "b", "b"),
)

# The same with sizes that share few divisors.
ODD = Net(
    shapes=((11, 5), (7, 3, 3), (5, 7), (13, 3), (9, 1), (1, 1)),
    components=("trunk", "trunk", "neck", "a", "b", "b"),
    tasks=("abc", "abc", "ac", "a", "b", "b"),
)


def sampler(kind: str, device: torch.device, seed: int = 0) -> Callable[[int], Tensor]:
    """A source of flat float32 scores of one kind, the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(n: int) -> Tensor:
        return torch.rand(n, generator=generator)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator)

    kinds: dict[str, Callable[[int], Tensor]] = {
        "random": uniform,
        "all equal": lambda n: torch.full((n,), 0.3),
        "80 % zero": lambda n: uniform(n) * (uniform(n) < 0.2),
        "bfloat16": lambda n: uniform(n).bfloat16().float(),
        "signed": lambda n: normal(n) * (uniform(n) < 0.9),  # with zeros of both signs
        "tiny": lambda n: uniform(n) * 1e-38,
        "huge": lambda n: (uniform(n) + 1.0) * 1e38,
        # Equal in their leading 16 bits, many equal in all.
        "crowded": lambda n: 1.0 + (uniform(n) * 500).floor() * 2.0**-20,
    }
    return lambda n: kinds[kind](n).to(device)


KINDS = ["random", "all equal", "80 % zero", "bfloat16", "signed", "tiny", "huge", "crowded"]


def resnet_like() -> list[tuple[int, ...]]:
    """Shapes of a small residual trunk with three heads, some of them 1x1 or tiny."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    wide = 64
    for width in (64, 128, 256, 512):
        shapes += [(width, wide, 3, 3), (width, width, 3, 3), (width, wide, 1, 1)]
        wide = width
    return [*shapes, (40, 512, 1, 1), (3, 512, 1, 1), (1, 512, 3, 3), (10, 512), (1, 10), (1, 1)]


# --- Units: groups like those of `mtprune.structure` ----------------------------------------------


def unit_sums(group: Any, values: Mapping[str, Tensor]) -> Tensor:
    """The sum of the values of each unit, entry by entry, ``[size]``."""
    sums = torch.zeros(group.size)
    for member in group.members:
        for index, unit in enumerate(member.units):
            if unit >= 0 and member.tensor in values:
                sums[unit] += values[member.tensor].select(member.dim, index).sum()
    return sums


def unit_masks(
    groups: Sequence[Any], masks: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The entries of tensors all of whose units stay: ``masks`` has those that do, by group."""
    found: dict[str, Tensor] = {}
    for group, mask in zip(groups, masks, strict=True):
        for member in group.members:
            if member.tensor not in shapes:
                continue
            stays = found.setdefault(
                member.tensor, torch.ones(shapes[member.tensor], dtype=torch.bool)
            )
            for index, unit in enumerate(member.units):
                if unit >= 0 and not mask[unit]:
                    stays.select(member.dim, index)[...] = False
    return found
