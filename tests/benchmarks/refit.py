"""Refitting a layer: its time against products of the layer's size, its memory against the rows."""

import torch

from mtprune import Refit
from tests.benchmarks.harness import (
    Row,
    Settings,
    allocated,
    device,
    interleaved,
    isolated,
    main,
    threads,
)

SIZES = {"full": (512, 1152), "quick": (256, 576), "toy": (16, 32)}
REFIT = Refit(samples=1024)
# Two in each step, two for what is lost at the start, one for what is left.
PRODUCTS = 2 * REFIT.steps + 3


def run(settings: Settings) -> list[Row]:
    rows, columns = SIZES[settings.size]
    sample, lost, kept = drawn(rows, columns)
    inputs = sample[:, 1:-1].contiguous()

    def products() -> None:
        for _ in range(PRODUCTS // 2):
            (lost @ inputs.T) @ inputs
        lost @ inputs.T

    with threads(1):
        times = interleaved(products, lambda: REFIT.change(sample, lost, kept), settings.repeats)
    peak = isolated(settings, measure, rows, columns)
    numbers = 4 * (REFIT.samples * (columns + rows) + rows * columns)
    return [
        Row(
            f"refitting a layer of {rows} x {columns}",
            f"{PRODUCTS} products of the layer's size with {REFIT.samples} rows",
            times["cpu"]["ratio"],
            1.5,
            detail=times,
        ),
        Row(
            f"memory while a layer of {rows} x {columns} is refitted",
            "its inputs and outputs on the sample, and its weight",
            peak / numbers,
            4.0,
            detail={"peak": peak, "bytes": numbers},
        ),
    ]


def drawn(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A sample of inputs, a weight that has lost 90 %, and what is kept."""
    torch.manual_seed(0)
    sample = torch.randn(REFIT.samples, columns + 2).to(device())
    sample[:, -1] = 0.0
    kept = torch.rand(rows, columns).to(device()) < 0.1
    return sample, torch.randn(rows, columns).to(device()).masked_fill(kept, 0.0), kept


def measure(rows: int, columns: int) -> int:
    """The most bytes that are held at once."""
    torch.set_num_threads(1)
    given = drawn(rows, columns)
    return int(allocated(lambda: REFIT.change(*given))[1])


if __name__ == "__main__":
    main(run)
