"""Mask IoU of tasks before training, beside shuffled labels and beside chance.

Every task scores the net at its initialisation by ``|w * dL/dw|`` and keeps the best weights of all
that it uses. How much of the trunk do two tasks both keep? Sun et al., "DiSparse", CVPR 2022, read
a high overlap as similar subnets. The null: the same pictures, each task's labels shuffled.
"""

import argparse
import statistics
from itertools import combinations

from common.options import positive
from common.shuffling import shuffled
from matplotlib.figure import Figure
from torch import Tensor

from analyses.bench import Bench, Found, Study
from analyses.drawing import GREY, Row, names, picture
from mtprune import PerTaskKeep, Vote, saliency
from mtprune.affinity import Affinity, compare, contrast

Masks = dict[str, dict[str, Tensor]]


def add(parser: argparse.ArgumentParser) -> None:
    """How much every task keeps, and how often labels are shuffled."""
    parser.add_argument("--keep", type=float, default=0.078, help="share of weights a task keeps")
    parser.add_argument("--shuffles", type=positive, default=8, help="null draws for each seed")


def task_masks(bench: Bench, seed: int) -> Masks:
    """What each task alone would keep of the net at its initialisation."""
    few = bench.trainer.observations
    method = Vote(PerTaskKeep(bench.options.keep), saliency=saliency.snip, observations=few)
    run = bench.run(seed, method)
    bench.prune(run)
    return run.pruner.task_masks


def nulls(bench: Bench, seed: int) -> list[Masks]:
    """The same, under labels shuffled in several ways."""
    return [
        task_masks(bench.of(shuffled(bench.source, bench.tasks, 1000 * seed + draw)), seed)
        for draw in range(bench.options.shuffles)
    ]


def row(seed: int, tasks: tuple[str, ...], masks: Masks, null: list[Masks]) -> Row:
    """The overlap of some tasks in numbers."""

    def of(masks: Masks) -> Affinity:
        return compare({task: masks[task] for task in tasks})

    found = of(masks)
    contrasts = contrast(found, [of(one) for one in null])
    return {
        "tasks": "-".join(tasks),
        "seed": seed,
        "iou": found.iou,
        "chance": found.chance,
        "null": list(contrasts.overall.null),
        "excess": contrasts.overall.excess,
        "p": contrasts.overall.p,
        "layers": [
            {
                "name": layer.name,
                "iou": layer.iou,
                "chance": layer.chance,
                "null": list(contrasts.layers[layer.name].null),
            }
            for layer in found.layers
        ],
    }


def measure(bench: Bench) -> Found:
    """A row for every pair of tasks, and for all together, seed by seed."""
    rows = []
    for seed in bench.seeds:
        masks, null = task_masks(bench, seed), nulls(bench, seed)
        groups = list(combinations(bench.tasks, 2))
        groups += [tuple(bench.tasks)] if len(bench.tasks) > 2 else []
        rows += [row(seed, tasks, masks, null) for tasks in groups]
    return {"rows": rows}


def table(found: Found) -> str:
    """Means over seeds."""
    lines = [
        f"{'tasks':30}{'IoU':>8}{'shuffled labels':>24}{'chance':>8}{'excess':>9}  {'p, each seed'}"
    ]
    for name in names(found["rows"], "tasks"):
        mine = [row for row in found["rows"] if row["tasks"] == name]
        null = [value for row in mine for value in row["null"]]
        band = f"{statistics.fmean(null):.3f} ({min(null):.3f}-{max(null):.3f})"
        p = ", ".join(f"{row['p']:.2f}" for row in mine)
        means = {key: statistics.fmean(r[key] for r in mine) for key in ("iou", "chance", "excess")}
        lines.append(
            f"{name:30}{means['iou']:8.3f}{band:>24}{means['chance']:8.3f}"
            f"{means['excess']:+9.3f}  {p}"
        )
    return "\n".join(lines)


def draw(found: Found) -> Figure:
    """Overlap of each pair with its null and chance; and layer by layer, what exceeds the null."""
    rows = found["rows"]
    figure, (overall, layers) = picture(2, width=5.5, height=0.42 * len(names(rows, "tasks")) + 2.2)
    order, seeds = names(rows, "tasks"), names(rows, "seed")
    for row in rows:
        aside = 0.6 * ((seeds.index(row["seed"]) + 0.5) / len(seeds) - 0.5)
        place, high = order.index(row["tasks"]) + aside, 0.55 / len(seeds)
        least, most = min(row["null"]), max(row["null"])
        overall.barh(place, most - least, high, least, color=GREY, label="labels shuffled, range")
        overall.plot(row["iou"], place, "o", color="#08519c", ms=3, label="tasks")
        overall.plot(
            row["chance"], place, "|", color="#d94801", ms=6, mew=2, label="independent masks"
        )
    overall.set_yticks(range(len(order)), order)
    overall.invert_yaxis()
    overall.set(xlabel="IoU of what the tasks keep of the trunk")
    handles, labels = overall.get_legend_handles_labels()
    one = dict(zip(labels, handles, strict=True))
    figure.legend(one.values(), one, loc="outside upper left", frameon=False, fontsize=8, ncols=3)
    excess = [_excess([row for row in rows if row["tasks"] == name]) for name in order]
    most = max(0.05, max(abs(x) for line in excess for x in line if x == x))
    image = layers.imshow(excess, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    layers.set_yticks(range(len(order)), [""] * len(order))
    layers.set(xlabel="layer of the trunk, by depth", title="IoU beyond shuffled labels")
    figure.colorbar(image, ax=layers)
    return figure


def _excess(rows: list[Row]) -> list[float]:
    """Of each layer, what the overlap exceeds the mean of the nulls by; mean over seeds."""
    return [
        statistics.fmean(
            row["layers"][i]["iou"] - statistics.fmean(row["layers"][i]["null"]) for row in rows
        )
        for i in range(len(rows[0]["layers"]))
    ]


STUDY = Study("iou", "mask IoU of tasks before training", add, measure, table, draw)
