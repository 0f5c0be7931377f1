"""Exact selection, `unanimous`, K = 3, against one `torch.sort` of as many float32."""

from math import prod

import torch
from torch import Tensor

from mtprune import votes
from mtprune.allocation import Budget, Floor, Global
from mtprune.selection import select
from tests.benchmarks.harness import (
    Row,
    Settings,
    device,
    interleaved,
    isolated,
    main,
    peak,
    threads,
)

SIZES = {"full": 91_000_000, "quick": 9_100_000, "toy": 20_000}
LAYERS = 40


def run(settings: Settings) -> list[Row]:
    rows = []
    for private in (0.75, 0.0):
        what = "3/4 of them in heads" if private else "all shared"
        for count in settings.threads:
            with threads(count):
                times = timed(SIZES[settings.size], private, min(settings.repeats, 3))
            rows.append(
                Row(
                    f"selection, {SIZES[settings.size]:,} weights, {what}, {count} thread(s)",
                    "one `torch.sort` of as many float32",
                    times["cpu"]["ratio"],
                    0.15,
                    detail=times,
                )
            )
        extra, scores = isolated(settings, measure, SIZES[settings.size], private)
        rows.append(
            Row(
                f"its peak of memory beyond the masks, {what}",
                "the scores",
                extra / scores,
                0.1,
                detail={"extra": extra, "scores": scores},
            )
        )
    return rows


def ballots(total: int, private: float) -> list[dict[str, Tensor]]:
    """Scores of LAYERS shared layers and as many of each task's own, like those of a net."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> Tensor:
        one, other = (torch.randn(size, generator=generator) for _ in range(2))
        return one.mul_(other).abs_().to(device())

    shared = int(total * (1 - private)) // LAYERS
    own = int(total * private) // (3 * LAYERS)
    layers = [{task: draw(shared) for task in "abc"} for _ in range(LAYERS)]
    return layers + [{task: draw(own)} for task in "abc" for _ in range(LAYERS) if own]


def plan(scores: list[dict[str, Tensor]]) -> tuple[list[tuple[int, ...]], int]:
    sizes = [next(iter(layer.values())).numel() for layer in scores]
    return [(n // 100, 100) if n % 100 == 0 else (n, 1) for n in sizes], round(0.1 * sum(sizes))


def timed(total: int, private: float, repeats: int) -> dict[str, object]:
    scores = ballots(total, private)
    shapes, keep = plan(scores)
    sizes = [prod(shape) for shape in shapes]
    quota = Floor().quotas(Budget(shapes, ["shared"] * len(shapes), keep, sizes))
    generator = torch.Generator().manual_seed(1)
    mixed = torch.rand(sum(sizes), generator=generator).to(device())
    return interleaved(
        lambda: torch.sort(mixed), lambda: select(scores, votes.unanimous, quota), repeats
    )


def measure(total: int, private: float) -> tuple[int, int]:
    torch.set_num_threads(1)
    scores = ballots(total, private)
    shapes, keep = plan(scores)
    sizes = [prod(shape) for shape in shapes]
    quota = Floor().quotas(Budget(shapes, ["shared"] * len(shapes), keep, sizes))
    small = [{task: values[:1000] for task, values in layer.items()} for layer in scores[:2]]
    few = Budget([(1000, 1)] * 2, ["s"] * 2, 99, [1000] * 2)
    select(small, votes.unanimous, Global().quotas(few))
    used = peak(lambda: select(scores, votes.unanimous, quota))
    return used - sum(sizes), sum(v.nbytes for layer in scores for v in layer.values())


if __name__ == "__main__":
    main(run)
