"""One encoder for all tasks against ensembles of single-task ones: rows, tables, pictures.

A result of a run has its ``job``, ``{task: {metric: value}}`` for ``val`` and ``test`` (the first
metric is the task's score, in percent), and its ``size`` by every rule of `mtprune.budget`.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtprune import budget
from mtprune.files import write_text

Results = Mapping[str, Any]
Row = dict[str, Any]

LINEAR = "encoder_linear"


def score(result: Results, task: str, split: str = "test") -> float:
    """The first metric of a task."""
    return float(next(iter(result[split][task].values())))


# An ensemble of single-task runs.


def size(result: Results, rule: str) -> int:
    """What a model keeps, without what is frozen: that is there once however many models use it."""
    kept = int(result["size"][rule]["kept"])
    return kept if rule == LINEAR else kept - int(result["frozen"])


def ensembles(
    model: Results, singles: Sequence[Results], tasks: Sequence[str], rule: str
) -> dict[str, budget.Ensemble | None]:
    """Single-task models that together keep no more than a multitask model, chosen on ``val``.

    None where even the smallest that were measured are too large together. Parts of the budget are
    rounded to whole weights, so the budget is a weight per task larger.
    """
    room = size(model, rule) + len(tasks)
    curves: dict[str, dict[int, float]] = {task: {} for task in tasks}
    for one in singles:
        (task,) = one["job"]["tasks"]
        curves[task][size(one, rule)] = score(one, task, "val")
    found: dict[str, budget.Ensemble | None] = {}
    for name, choose in (("equal", budget.equal_split), ("best", budget.best_ensemble)):
        try:
            found[name] = choose(curves, room)
        except ValueError:
            found[name] = None
    return found


def rows(results: Results, tasks: Sequence[str]) -> list[Row]:
    """A row for each model or ensemble, sparsity and seed: test scores, and sizes both ways.

    ``total_own`` is what an ensemble takes if its members share no embeddings.
    """
    found: list[Row] = []
    for model in results["multitask"]:
        dense = model["job"]["method"] == "dense"
        found.append(
            {
                "name": "dense" if dense else f"multitask, {model['job']['vote']}",
                **_where(model),
                "scores": {task: score(model, task) for task in tasks},
                "linear": model["size"][LINEAR]["kept"],
                "total": model["size"]["total"]["kept"],
                "total_own": model["size"]["total"]["kept"],
            }
        )
    for rule, words in ((LINEAR, ""), ("total", ", by total")):
        for model in results["multitask"]:
            if model["job"]["method"] == "dense" or model["job"]["vote"] != "unanimous":
                continue
            singles = [
                one for one in results["single"] if one["job"]["seed"] == model["job"]["seed"]
            ]
            for name, chosen in ensembles(model, singles, tasks, rule).items():
                row = {"name": f"{name} ensemble{words}", **_where(model)}
                found.append({**row, **_members(chosen, singles, tasks, rule)})
    return found


def _where(model: Results) -> Row:
    return {key: model["job"][key] for key in ("sparsity", "seed")}


def _members(
    chosen: budget.Ensemble | None, singles: Sequence[Results], tasks: Sequence[str], rule: str
) -> Row:
    """Test scores and sizes of an ensemble's members together."""
    if chosen is None:
        return {"scores": None}
    members = {
        task: next(
            one
            for one in singles
            if one["job"]["tasks"] == [task] and size(one, rule) == chosen.sizes[task]
        )
        for task in tasks
    }
    frozen = next(iter(members.values()))["frozen"]
    own = sum(one["size"]["total"]["kept"] for one in members.values())
    return {
        "scores": {task: score(one, task) for task, one in members.items()},
        "kept": {task: round(1 - one["job"]["sparsity"], 6) for task, one in members.items()},
        "linear": sum(one["size"][LINEAR]["kept"] for one in members.values()),
        "total": own - (len(members) - 1) * frozen,
        "total_own": own,
    }


# Tables.


def table(found: Sequence[Row], tasks: Sequence[str]) -> str:
    """Mean over seeds, by sparsity; and how far the multitask model is ahead, seed by seed."""
    header = ["sparsity", "model", *tasks, "mean", "linear weights", "total", "no sharing"]
    lines = [header, ["---"] * len(header)]
    for (sparsity, name), same in _grouped(found, "sparsity", "name"):
        cells = [f"{sparsity:.0%}", name]
        if any(row["scores"] is None for row in same):
            lines.append([*cells, *["does not fit"] * (len(header) - 2)])
            continue
        means = [statistics.fmean(row["scores"][task] for row in same) for task in tasks]
        averages = [average(row) for row in same]
        cells += [f"{value:.1f}" for value in means]
        spread = f" ± {statistics.stdev(averages):.1f}" if len(averages) > 1 else ""
        cells.append(f"{statistics.fmean(averages):.1f}{spread}")
        for key in ("linear", "total", "total_own"):
            cells.append(f"{statistics.fmean(row[key] for row in same) / 1e6:.2f} M")
        lines.append(cells)
    parts = ["\n".join(f"| {' | '.join(cells)} |" for cells in lines)]
    ahead = list(differences(found, tasks))
    if ahead:
        names = ["sparsity", "ahead of", *tasks, "mean", "mean, seed by seed"]
        told = [names, ["---"] * len(names), *ahead]
        parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in told))
    return "\n\n".join(parts) + "\n"


def differences(found: Sequence[Row], tasks: Sequence[str]) -> Iterable[list[str]]:
    """Points by which the multitask model that votes unanimously is ahead, paired by seed."""
    ours = {
        (row["sparsity"], row["seed"]): row
        for row in found
        if row["name"] == "multitask, unanimous"
    }
    for (sparsity, name), same in _grouped(found, "sparsity", "name"):
        if name in ("dense", "multitask, unanimous") or any(r["scores"] is None for r in same):
            continue
        pairs = [(ours[sparsity, row["seed"]], row) for row in same]
        cells = [f"{sparsity:.0%}", name]
        for task in tasks:
            gain = statistics.fmean(a["scores"][task] - b["scores"][task] for a, b in pairs)
            cells.append(f"{gain:+.1f}")
        gains = [average(a) - average(b) for a, b in pairs]
        yield [
            *cells,
            f"{statistics.fmean(gains):+.1f}",
            ", ".join(f"{gain:+.1f}" for gain in gains),
        ]


def average(row: Row) -> float:
    """Over tasks."""
    return statistics.fmean(row["scores"].values())


def _grouped(found: Iterable[Row], *keys: str) -> Iterable[tuple[tuple[Any, ...], list[Row]]]:
    """Rows by these keys: the first in order of its value, the others as they first come."""
    rows = list(found)
    seen = {key: list(dict.fromkeys(row[key] for row in rows)) for key in keys}
    seen[keys[0]].sort()

    def place(row: Row) -> tuple[int, ...]:
        return tuple(seen[key].index(row[key]) for key in keys)

    for _, same in groupby(sorted(rows, key=place), key=place):
        group = list(same)
        yield tuple(group[0][key] for key in keys), group


def run_table(found: Results) -> str:
    """Every task's metrics, of a single run."""
    lines = [f"{'task':12}{'metric':12}{'val':>8}{'test':>8}"]
    for task, metrics in found["test"].items():
        for i, (name, value) in enumerate(metrics.items()):
            val = found["val"][task][name]
            lines.append(f"{'' if i else task:12}{name:12}{val:8.1f}{value:8.1f}")
    return "\n".join(lines)


# A task with few examples.


def low_resource_rows(runs: Sequence[Results]) -> list[Row]:
    """A row for each run: the test score of the task that was cut."""
    found = []
    for run in runs:
        job = run["job"]
        ((task, n),) = job["cut"]
        alone = len(job["tasks"]) == 1
        found.append(
            {
                "task": task,
                "examples": n,
                "sparsity": job["sparsity"],
                "name": "alone" if alone else "with the others",
                "seed": job["seed"],
                "score": score(run, task),
                "linear": run["size"][LINEAR]["kept"],
            }
        )
    return found


def low_resource_table(found: Sequence[Row]) -> str:
    """Scores of the task that was cut: pruned alone, and with the others."""
    header = ["task", "examples", "sparsity", "pruned alone", "with the others", "gain by seed"]
    lines = [header, ["---"] * len(header)]
    for (task, n, sparsity), same in _grouped(found, "task", "examples", "sparsity"):
        scores = {
            name: {row["seed"]: row["score"] for row in same if row["name"] == name}
            for name in ("alone", "with the others")
        }
        alone, others = scores.values()
        gains = ", ".join(f"{others[seed] - alone[seed]:+.1f}" for seed in alone)
        means = [f"{statistics.fmean(values.values()):.1f}" for values in (alone, others)]
        lines.append([task, str(n), f"{sparsity:.0%}", *means, gains])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


# Pictures.


def draw_run(found: Results) -> Figure:
    """The losses of a run, and the scores it ended with."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, bars = figure.subplots(1, 2, width_ratios=[2, 1])
    for task in found["test"]:
        curve = [(i, loss) for i, (name, loss) in enumerate(found["history"]) if name == task]
        steps, values = zip(*curve, strict=True) if curve else ((), ())
        (line,) = losses.plot(steps, values, lw=0.6, alpha=0.3)
        losses.plot(steps, _smooth(values), color=line.get_color(), label=task)
        bars.bar(task, score(found, task), color=line.get_color())
    job = found["job"]
    what = "dense" if job["method"] == "dense" else f"{job['method']}, {job['sparsity']:.0%} pruned"
    losses.set(title=f"training loss: {what}", xlabel="step")
    losses.legend(frameon=False)
    bars.set(title="test score, %")
    _plain(losses, bars)
    return figure


def draw_comparison(results: Results, tasks: Sequence[str]) -> Figure:
    """Score by what is kept: the mean, and every task."""
    panels = ["mean", *tasks]
    figure = Figure(figsize=(3.3 * len(panels), 4.2), layout="constrained")
    styles = {
        "multitask, unanimous": ("#08519c", "o-"),
        "multitask, joint": ("#6baed6", "s--"),
        "best ensemble": ("#d94801", "^-"),
        "equal ensemble": ("#fdae6b", "v--"),
    }
    rows = [row for row in results["rows"] if row["scores"] is not None]
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for one, panel in zip(axes, panels, strict=True):
        for name, (color, style) in styles.items():
            points = []
            for (sparsity, _), same in _grouped(
                [row for row in rows if row["name"] == name], "sparsity", "name"
            ):
                values = [average(r) if panel == "mean" else r["scores"][panel] for r in same]
                points.append((100 * (1 - sparsity), statistics.fmean(values)))
                one.plot([points[-1][0]] * len(values), values, ".", color=color, ms=4, alpha=0.6)
            if points:
                one.plot(*zip(*points, strict=True), style, color=color, label=name)
        dense = [row for row in rows if row["name"] == "dense"]
        level = [average(row) if panel == "mean" else row["scores"][panel] for row in dense]
        one.axhline(statistics.fmean(level), color="0.4", lw=0.8, ls=":", label="multitask, dense")
        kept = sorted({100 * (1 - row["sparsity"]) for row in rows if row["name"] in styles})
        one.set_xscale("log")
        one.set_xticks(kept, [f"{x:g}" for x in kept])
        one.minorticks_off()
        one.set(title=panel, xlabel="linear weights kept in all, %")
    axes[0].set_ylabel("test score, %")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    _plain(*axes)
    return figure


def draw_low_resource(found: Sequence[Row]) -> Figure:
    """Score by examples: alone, and with the others."""
    tasks = list(dict.fromkeys(row["task"] for row in found))
    figure = Figure(figsize=(4.5 * len(tasks), 4.2), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    colors = {"with the others": "#08519c", "alone": "#d94801"}
    for one, task in zip(axes, tasks, strict=True):
        mine = [row for row in found if row["task"] == task]
        sparsities = sorted({row["sparsity"] for row in mine})
        for sparsity, style in zip(sparsities, ("o-", "s--", "^:", "v-.") * 9, strict=False):
            for name, color in colors.items():
                points = []
                chosen = [r for r in mine if (r["sparsity"], r["name"]) == (sparsity, name)]
                for (n,), same in _grouped(chosen, "examples"):
                    values = [row["score"] for row in same]
                    points.append((n, statistics.fmean(values)))
                    one.plot([n] * len(values), values, ".", color=color, ms=4, alpha=0.6)
                words = f"{name}, {sparsity:.0%} pruned"
                one.plot(*zip(*points, strict=True), style, color=color, label=words)
        sizes = sorted({row["examples"] for row in mine})
        one.set_xscale("log")
        one.set_xticks(sizes, [str(n) for n in sizes])
        one.minorticks_off()
        one.set(title=task, xlabel="training examples", ylabel="test score, %")
        one.legend(frameon=False)
    _plain(*axes)
    return figure


def _plain(*axes: Axes) -> None:
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean that forgets over a tenth of the run."""
    keep = 1 - 1 / max(1, len(values) // 10)
    smooth, weight, found = 0.0, 0.0, []
    for value in values:
        smooth, weight = keep * smooth + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(smooth / weight)
    return found


def write(results: Results, path: Path) -> None:
    """As JSON, at once or not at all."""
    write_text(path, json.dumps(results, indent=1) + "\n")
