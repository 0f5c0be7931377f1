"""Sparse training, `disparse_dynamic` with an update every 100 steps, against dense training.

A period of 100 steps is measured in its parts, one ordinary step, the step that observes and
updates, and one dense step, and put together.
"""

from collections.abc import Callable

import torch

from mtprune import MultitaskPruner, recipes
from tests.benchmarks.harness import Row, Settings, interleaved, main, threads
from tests.benchmarks.nets import subject
from tests.benchmarks.step import dense

PERIOD = 100


def run(settings: Settings) -> list[Row]:
    rows = []
    for net in ("deeplab", "encoder"):
        for count in settings.threads:
            with threads(count):
                without = dense(net, settings)
                usual = interleaved(without, sparse(net, settings, PERIOD), settings.repeats)
                update = interleaved(without, sparse(net, settings, 1), settings.repeats)
            ratio = ((PERIOD - 1) * usual["cpu"]["ratio"] + update["cpu"]["ratio"]) / PERIOD
            rows.append(
                Row(
                    f"`disparse_dynamic`, every {PERIOD} steps, {net}, K = 3, {count} thread(s)",
                    "dense training",
                    ratio,
                    1.06,
                    detail={"between": usual, "update": update},
                )
            )
    return rows


def sparse(net: str, settings: Settings, every: int) -> Callable[[], None]:
    made = subject(net, settings.size, 3)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-5)
    pruner = MultitaskPruner(
        made.model,
        made.losses,
        made.shared,
        method=recipes.disparse_dynamic(0.9, every=every, end=10**6),
        optimizer=optimizer,
        backend="inplace",
    )

    def step() -> None:
        optimizer.zero_grad()
        losses = pruner.observe(made.model(made.inputs), None)
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()

    while pruner.report().step is None:  # random masks have not been drawn
        step()
    return step


if __name__ == "__main__":
    main(run)
