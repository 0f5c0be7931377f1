"""The watershed: overlap of the tasks' masks over depth, beside shuffled labels.

DiSparse (Sun et al., CVPR 2022) sees the overlap of masks fall at a layer, and asks whether sharing
should end there. Two kinds of masks: of one net at its initialisation, and of nets trained each
for one task from the same initial trunk. A drop counts where it exceeds that of the null.
"""

import argparse
import statistics
from dataclasses import asdict
from typing import Any

from common.options import positive
from common.shuffling import shuffled
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses import overlap
from analyses.bench import Bench, Found, Study
from analyses.drawing import GREY, Row, names, picture
from mtprune import PerTaskKeep, Vote, saliency
from mtprune.affinity import compare, contrast, watershed

SHORTCUT = ".downsample."
KINDS = {"init": "one net, before training", "alone": "a net for each task, trained"}


def add(parser: argparse.ArgumentParser) -> None:
    """How much every task keeps, how long nets train alone, how often labels are shuffled."""
    add = parser.add_argument
    add("--keep", type=float, default=0.078, help="share of weights a task keeps")
    add("--alone", type=positive, default=30, help="steps of each net of a single task")
    add("--shuffles", type=positive, default=2, help="null draws for each seed")


def trained_masks(bench: Bench, seed: int) -> overlap.Masks:
    """What each task keeps of a net that was trained for it alone."""
    few, masks = bench.trainer.observations, {}
    method = Vote(PerTaskKeep(bench.options.keep), saliency=saliency.taylor, observations=few)
    for task in bench.tasks:
        alone = bench.alone(task)
        run = alone.run(seed)
        run.options.steps = bench.options.alone
        alone.train(run)
        scored = alone.run(seed, method, start=run.model.state_dict())
        alone.prune(scored)
        masks[task] = scored.pruner.task_masks[task]
    return masks


def measure(bench: Bench) -> Found:
    """A row for each kind of masks and seed."""
    rows = []
    for seed in bench.seeds:
        draws = [
            bench.of(shuffled(bench.source, bench.tasks, 1000 * seed + draw))
            for draw in range(bench.options.shuffles)
        ]
        for kind, masks in (("init", overlap.task_masks), ("alone", trained_masks)):
            found = compare(masks(bench, seed))
            beside = contrast(found, [compare(masks(one, seed)) for one in draws])
            row = overlap.row(seed, tuple(bench.tasks), found, beside)
            rows.append({"kind": kind, **row})
    curves = {kind: curve([row for row in rows if row["kind"] == kind]) for kind in KINDS}
    return {"rows": rows, "curves": curves}


def curve(rows: list[Row]) -> dict[str, Any]:
    """Means over seeds, layer by layer, and where they drop; ways around a block have no depth."""
    names = [layer["name"] for layer in rows[0]["layers"]]
    places = [i for i, name in enumerate(names) if SHORTCUT not in name]
    seen = [[row["layers"][i] for row in rows] for i in places]
    null = [statistics.fmean(x for layer in at for x in layer["null"]) for at in seen]
    found = [statistics.fmean(layer["iou"] for layer in at) for at in seen]
    drops = {"raw": watershed(found), "beyond": watershed(found, null)}
    return {
        "layers": [at[0]["name"] for at in seen],
        "iou": found,
        "null": null,
        "low": [min(x for layer in at for x in layer["null"]) for at in seen],
        "high": [max(x for layer in at for x in layer["null"]) for at in seen],
        "chance": [statistics.fmean(layer["chance"] for layer in at) for at in seen],
        "drops": {name: drop and asdict(drop) for name, drop in drops.items()},
    }


def table(found: Found) -> str:
    """Overlaps of all layers together, and where the curves drop."""
    lines = [f"{'masks of':32}{'IoU':>7}{'shuffled':>10}{'chance':>8}   largest drop"]
    for kind, words in KINDS.items():
        rows = [row for row in found["rows"] if row["kind"] == kind]
        null = [value for row in rows for value in row["null"]]
        lines.append(
            f"{words:32}{statistics.fmean(row['iou'] for row in rows):7.3f}"
            f"{statistics.fmean(null):10.3f}{statistics.fmean(r['chance'] for r in rows):8.3f}"
            f"   {_told(found['curves'][kind], 'raw')}; beyond the null: "
            f"{_told(found['curves'][kind], 'beyond')}"
        )
    return "\n".join(lines)


def _told(curve: dict[str, Any], which: str) -> str:
    drop = curve["drops"][which]
    return f"{drop['drop']:.2f} after {curve['layers'][drop['before']]}" if drop else "none of 0.1"


def draw(found: Found) -> Figure:
    """Overlap over depth, and the range of the nulls behind it.

    A vertical line is at the largest drop: dotted of the overlap, solid of what exceeds the null.
    """
    figure, axes = picture(len(KINDS))
    for one, kind in zip(axes, names(found["rows"], "kind"), strict=True):
        _draw(one, found["curves"][kind])
        one.set(title=KINDS[kind], xlabel="layer of the trunk, by depth", ylim=(-0.03, 1.03))
    axes[0].set_ylabel("IoU of all tasks' masks")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", frameon=False, ncols=4)
    return figure


def _draw(one: Axes, curve: dict[str, Any]) -> None:
    places = range(len(curve["iou"]))
    one.fill_between(places, curve["low"], curve["high"], color=GREY, label="shuffled, range")
    one.plot(places, curve["null"], color="0.45", lw=1.2, label="labels shuffled, mean")
    one.plot(places, curve["chance"], ":", color="#d94801", lw=1.4, label="independent masks")
    one.plot(places, curve["iou"], ".-", color="#08519c", lw=1, ms=5, label="tasks")
    for which, style in (("raw", ":"), ("beyond", "-")):
        if drop := curve["drops"][which]:
            one.axvline(drop["before"] + 0.5, color="black", lw=0.9, ls=style)


STUDY = Study("watershed", "mask IoU of all tasks over depth", add, measure, table, draw)
