"""Everything that can be read of a pruned network, on the quickstart's three tasks.

The script trains the dense network, sweeps sparsities, prunes to one of them while it trains on,
fine-tunes, compresses and measures, and prints what each step tells: the sweep, the report, the
plan and the sizes. It writes

* ``report.html``: all of it as a page;
* ``sweep.json``: the sweep as data;
* ``early.pt`` and ``pruner.pt``: checkpoints, for ``mtprune inspect`` and ``mtprune compare``.

    pip install "mtprune[examples,safetensors]"
    python report.py

It takes a minute or two. `docs/reading.md` explains what it prints, word by word.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quickstart import CLASSES, Batch, Net, accuracy, draw, make_data, task_loss, train
from torch import nn
from tqdm import tqdm

import mtprune
from mtprune import MultitaskPruner, affinity
from mtprune.files import write_torch

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


def forward(model: nn.Module, batch: Batch) -> Any:
    """What the model says of a batch."""
    return model(batch["image"])


def results(model: nn.Module, data: Batch) -> dict[str, dict[str, float]]:
    """Each task's accuracy, in percent."""
    return {task: {"accuracy": value} for task, value in accuracy(model, data).items()}


def parts(data: Batch, count: int) -> list[Batch]:
    """The data in so many parts of the same size."""
    size = len(data["image"]) // count
    return [
        {name: values[i * size : (i + 1) * size] for name, values in data.items()}
        for i in range(count)
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run it all; the page."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    training, test = make_data(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    losses = {task: task_loss(task) for task in CLASSES}
    dense = Net()
    bar = tqdm(total=options.steps + 3 * options.tune_steps, unit="step", leave=False)
    train(dense, training, options.steps, 3e-3, generator, bar)
    dense.eval()

    swept = mtprune.sweep(
        dense,
        losses,
        [draw(training, 256, generator) for _ in range(8)],
        [dense.trunk],
        sparsities=SPARSITIES,
        evaluate=lambda model: [results(model, part) for part in parts(test, 10)],
        method=mtprune.Vote(0.9, observations=8),
        forward=forward,
        progress=False,
    )
    swept.save(options.out / "sweep.json")

    model = copy.deepcopy(dense)
    pruner = MultitaskPruner(
        model, losses, [model.trunk], sparsity=options.sparsity, steps=2 * options.tune_steps
    )
    half = max(1, options.tune_steps // 2)
    train(model, training, half, 1e-3, generator, bar, pruner)
    early = pruner.masks  # half of the updates are made
    write_torch(options.out / "early.pt", pruner.state_dict())
    train(model, training, 2 * options.tune_steps - half, 1e-3, generator, bar, pruner)
    write_torch(options.out / "pruner.pt", pruner.state_dict())
    train(model, training, options.tune_steps, 1e-3, generator, bar, pruner)
    bar.close()
    pruner.finalize()
    model.eval()

    image = test["image"][:1]
    fast = mtprune.compress(model, image)
    plan, sizes = mtprune.plan_of(fast), mtprune.measure(fast, image, against=dense)
    report, masks = pruner.report(), pruner.task_masks
    pairs = {"left, right": ("left", "right"), "left, parity": ("left", "parity")}
    drawn = options.mask if options.mask in pruner.masks else next(iter(pruner.masks))
    page = report.save(
        options.out / "report.html",
        before=results(dense, test),
        after=results(model, test),
        masks={drawn: (early[drawn], pruner.masks[drawn])},
        affinity={
            name: affinity.compare({task: masks[task] for task in tasks})
            for name, tasks in pairs.items()
        },
        plan=plan,
        sizes=sizes,
    )
    print(f"Sweep, on 10 parts of the test split:\n{swept}\n")
    print(f"Report:\n{report}\n\nPlan:\n{plan}\n\nSizes:\n{sizes}\n\nWrote {page}.")
    return page


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Prune a three-task network, and write all that can be read of it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--sparsity", type=float, default=0.9, help="share of zeros, in [0, 1)")
    add("--mask", default="trunk.6.weight", help="the layer whose mask is drawn")
    add("--steps", type=int, default=400, help="training steps of the dense model")
    add("--tune-steps", type=int, default=100, help="twice so many to prune in, once to tune for")
    add("--seed", type=int, default=0, help="of the data, the model and the batches")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--out", type=Path, default=Path("report_out"), help="folder for results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
