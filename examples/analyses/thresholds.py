"""Hard against soft: what is below the threshold goes, with or without what is above shrinking.

AdapMTL (Xiang et al., ACM MM 2024) shrinks weights by a threshold while they train, instead of
setting the small ones to zero at once. All lines train from scratch for as many steps and end at
the same number of zeros; rising ones rise by the same schedule.
"""

import argparse
from typing import Any

from matplotlib.figure import Figure

from analyses.bench import Bench, Found, Study, change, share_of_zeros
from analyses.drawing import changes, lines, percents, picture, symmetric
from mtprune import OneShot, Vote, recipes, saliency
from mtprune.methods import Method


def add(parser: argparse.ArgumentParser) -> None:
    """How much is pruned."""
    add = parser.add_argument
    add("--sparsities", type=share_of_zeros, nargs="+", default=[0.8, 0.9, 0.95], help="of all")


def methods(sparsity: float, steps: int) -> dict[str, Method[Any]]:
    """What is compared."""
    uniform = recipes.adapmtl(sparsity, steps, allocation="uniform")
    options: dict[str, Any] = {"saliency": saliency.magnitude, "allocation": "global"}
    options |= {"disentangled": False}
    return {
        "hard, at half time": Vote(sparsity, schedule=OneShot(steps // 2), **options),
        "hard, rising": Vote(sparsity, schedule=uniform.schedule, **options),
        "soft, uniform": uniform,
        "soft, learned": recipes.adapmtl(sparsity, steps, allocation="learned"),
    }


def measure(bench: Bench) -> Found:
    """A row for each line, sparsity and seed."""
    rows, base = [], []
    for seed in bench.seeds:
        _, dense = bench.dense(seed)
        base.append({"seed": seed, "test": dense["test"]})
        for sparsity in bench.options.sparsities:
            for name, method in methods(sparsity, bench.trainer.steps).items():
                run = bench.run(seed, method)
                bench.train(run)
                run.pruner.finalize()
                about = {"line": name, "sparsity": sparsity, "seed": seed}
                zeros = {"zeros": run.pruner.sparsity}
                rows.append({**about, **zeros, **change(bench.test(run), dense)})
    return {"rows": rows, "dense": base}


def table(found: Found) -> str:
    """Against the dense net of as many steps."""
    return changes(found["rows"], "delta", "worst")


def draw(found: Found) -> Figure:
    """Delta_T and the worst task over sparsity."""
    figure, axes = picture(2)
    for one, value, title in zip(
        axes, ("delta", "worst"), ("mean of tasks", "worst task"), strict=True
    ):
        one.axhline(0, color="0.6", lw=0.8)
        lines(one, found["rows"], value)
        percents(one, sorted({row["sparsity"] for row in found["rows"]}))
        symmetric(one)
        one.set(xlabel="zeros, %", title=title)
    axes[0].set_ylabel("change from dense, %")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", frameon=False, ncols=4)
    return figure


STUDY = Study(
    "thresholds", "hard against soft thresholds at equal sparsity", add, measure, table, draw
)
