"""A census over ranks counts as one over all numbers in one place."""

from typing import Any

import pytest
import torch

from mtprune.census import HERE, Scattered
from tests.ranks import on_ranks

PARTS = [  # what each rank has of four layers
    [[3.0, -1.0, 0.0], [], [-0.0, 2.0], [5.0]],
    [[-1.0, -1.0], [7.5], [2.0, 2.0, -3e-40], []],
    [[1e30], [-2.0, 2.0], [], [1e-300]],
]


def parts(rank: int) -> list[torch.Tensor]:
    return [torch.tensor(own, dtype=torch.float64) for own in PARTS[rank]]


def wholes() -> list[torch.Tensor]:
    return [torch.cat(own) for own in zip(*map(parts, range(3)), strict=True)]


def answers(census: Any, mine: list[torch.Tensor]) -> dict[str, Any]:
    flat = torch.cat(mine)
    total = int(census.number(flat.numel(), flat))
    rising = flat.sort().values
    return {
        "total": total,
        "counts": census.count([own > 0 for own in mine]),
        "kth": [
            (float(value), equal, left)
            for value, equal, left in (census.kth(flat, k) for k in range(1, total + 1))
        ],
        "below": census.below(rising, flat).tolist(),
        "least": float(census.least(flat.amin())),
        "most": float(census.most(flat.amax())),
    }


def count(rank: int, world: int) -> dict[str, Any]:
    census, mine = Scattered(None), parts(rank)
    ties = [int((own == 2.0).sum()) for own in mine]
    problem = f"rank {rank} has one" if rank else None
    return {
        **answers(census, mine),
        "shares": [census.shares(ties, left) for left in range(6)],
        "anyone": (census.anyone(None), census.anyone(problem)),
    }


@pytest.mark.slow
def test_ranks_count_together(tmp_path: Any) -> None:
    found = on_ranks(__name__, "count", tmp_path, world=3)
    alone = answers(HERE, wholes())
    for result in found:
        for name in ("total", "counts", "kth", "least", "most"):
            assert result[name] == alone[name], name
        assert tuple(result["anyone"]) == (None, "rank 1 has one")
    below = dict(zip(torch.cat(wholes()).tolist(), alone["below"], strict=True))
    for rank, result in enumerate(found):
        assert result["below"] == [below[value] for value in torch.cat(parts(rank)).tolist()]
    # Four numbers are 2: three in the third layer after one in the second.
    taken = [
        [sum(shares) for shares in zip(*(r["shares"][left] for r in found), strict=True)]
        for left in range(6)
    ]
    assert taken == [
        [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 2, 0], [0, 1, 3, 0], [0, 1, 3, 0],
    ]  # fmt: skip
    assert [result["shares"][2][2] for result in found] == [1, 0, 0]


def test_in_one_place_everything_is_here() -> None:
    assert HERE.places([3, 1]) == [(0, 3), (0, 1)]
    assert HERE.shares([2, 3], 4) == [2, 2]
    assert HERE.anyone("a problem") == "a problem"
