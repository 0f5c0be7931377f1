"""Mask IoU of tasks before training, beside that of unrelated tasks and beside chance.

Every task scores the net at its initialisation by ``|w * dL/dw|`` and keeps the best weights of all
that it uses. How much of the trunk do two tasks both keep? Sun et al., "DiSparse", CVPR 2022, read
a high overlap as similar subnets. The null: the same pictures, each task's outputs beside the
targets of other samples (`mtprune.affinity.permuted`).
"""

import argparse
import statistics
from itertools import combinations

from common.options import positive
from common.shuffling import noise
from matplotlib.figure import Figure
from torch import Tensor

from analyses.bench import Bench, Found, Study
from analyses.drawing import GREY, Row, names, picture
from mtprune import PerTaskKeep, Vote, saliency
from mtprune.affinity import Affinity, Contrasts, compare

Masks = dict[str, dict[str, Tensor]]


def add(parser: argparse.ArgumentParser) -> None:
    """How much every task keeps, how many draws the null has, and whether data are noise."""
    add = parser.add_argument
    add("--keep", type=float, default=0.078, help="share of weights a task keeps")
    add("--draws", type=positive, default=8, help="of the null, for each seed")
    add("--noise", action="store_true", help="random pictures and labels in the data's place")


def task_masks(bench: Bench, seed: int) -> Masks:
    """What each task alone would keep of the net at its initialisation."""
    few = bench.trainer.observations
    method = Vote(PerTaskKeep(bench.options.keep), saliency=saliency.snip, observations=few)
    run = bench.run(seed, method)
    bench.prune(run)
    return run.pruner.task_masks


def row(seed: int, tasks: tuple[str, ...], found: Affinity, beside: Contrasts) -> Row:
    """The overlap of some tasks in numbers.

    Args:
        seed: Of the net and the batches.
        tasks: The tasks.
        found: Their overlap.
        beside: The same beside its nulls.
    """
    low, high = beside.overall.interval
    return {
        "tasks": "-".join(tasks),
        "seed": seed,
        "iou": found.iou,
        "chance": found.chance,
        "null": list(beside.overall.null),
        "excess": beside.overall.excess,
        "low": low,
        "high": high,
        "p": beside.overall.p,
        "layers": [
            {
                "name": layer.name,
                "iou": layer.iou,
                "chance": layer.chance,
                "null": list(beside.layers[layer.name].null),
            }
            for layer in found.layers
        ],
    }


def measure(bench: Bench) -> Found:
    """A row for every pair of tasks, and for all together, seed by seed."""
    if bench.options.noise:
        bench = bench.of(noise(bench.source, bench.tasks))
    rows = []
    for seed in bench.seeds:
        null = bench.null(seed, PerTaskKeep(bench.options.keep), bench.options.draws)
        masks = null.task_masks
        groups = list(combinations(bench.tasks, 2))
        groups += [tuple(bench.tasks)] if len(bench.tasks) > 2 else []
        for tasks in groups:
            found = compare({task: masks[task] for task in tasks}, null)
            beside = Contrasts(found.contrast, {x.name: x.contrast for x in found.layers})
            rows.append(row(seed, tasks, found, beside))
    return {"rows": rows}


def table(found: Found) -> str:
    """Means over seeds; the excess of each seed with its 95 % interval."""
    lines = [f"{'tasks':24}{'IoU':>7}{'unrelated':>22}{'chance':>8}{'excess':>9}  each seed"]
    for name in names(found["rows"], "tasks"):
        mine = [row for row in found["rows"] if row["tasks"] == name]
        null = [value for row in mine for value in row["null"]]
        band = f"{statistics.fmean(null):.3f} ({min(null):.3f}-{max(null):.3f})"
        each = ", ".join(
            f"{row['excess']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})" for row in mine
        )
        means = {key: statistics.fmean(r[key] for r in mine) for key in ("iou", "chance", "excess")}
        lines.append(
            f"{name:24}{means['iou']:7.3f}{band:>22}{means['chance']:8.3f}"
            f"{means['excess']:+9.3f}  {each}"
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
        overall.barh(place, most - least, high, least, color=GREY, label="others' targets, range")
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
    layers.set(xlabel="layer of the trunk, by depth", title="IoU beyond others' targets")
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
