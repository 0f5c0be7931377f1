"""Plots: the figures of a report and of a sweep as matplotlib axes, one function each.

Every function draws into the axes it is given, or into new ones, and returns them. They need the
extra ``mtprune[plots]``, which is imported when the first plot is drawn.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mtprune.affinity import Affinity, watershed
from mtprune.curves import Sweep
from mtprune.report import PARTS, Moment, Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

__all__ = [
    "affinity",
    "curves",
    "depth",
    "kept",
    "mask",
    "sensitivity",
    "sparsity",
    "thresholds",
    "unanimity",
    "wanted",
    "weights",
]

_COLOURS = {
    "all its tasks": "#0b3c6f",
    "several": "#2f7fc1",
    "one of several": "#e08a1e",
    "no task alone": "#8b93a0",
    "kept": "#0b3c6f",
    "pruned": "#e9edf2",
}


def kept(report: Report, *, components: bool = False, axes: "Axes | None" = None) -> "Axes":
    """How much each layer keeps, by how many of its tasks would keep it alone.

    Args:
        report: The report.
        components: Draw components, not layers.
        axes: Where to draw.

    Example:
        >>> from mtprune.report import Row
        >>> row = Row("trunk", 10, 4, 0.6, ("a", "b"), {"a": 1.0, "b": 0.5}, 0.5, 0.5, 0.0)
        >>> {name: round(part, 2) for name, part in row.parts.items() if part}
        {'all its tasks': 0.2, 'one of several': 0.2, 'pruned': 0.6}
    """
    rows = _some(report.components if components else report.layers)
    axes, names = _rows(axes, [row.name for row in rows]), _names(rows)
    ends = [0.0] * len(rows)
    for name in names:
        shares = [row.parts.get(name, 0.0) for row in rows]
        axes.barh(range(len(rows)), shares, left=ends, color=_COLOURS[name], label=name)
        ends = [end + share for end, share in zip(ends, shares, strict=True)]
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the weights")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return axes


def unanimity(report: Report, *, axes: "Axes | None" = None) -> "Axes":
    """Of each layer that several tasks use, the share of the kept weights that all of them want.

    Args:
        report: The report.
        axes: Where to draw.

    Raises:
        ValueError: If no layer has several tasks that have a say.
    """
    rows = _some([row for row in report.layers if len(row.tasks) > 1 and row.want])
    axes = _rows(axes, [row.name for row in rows])
    axes.barh(range(len(rows)), [row.unanimity for row in rows], color=_COLOURS["all its tasks"])
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the kept weights that every task wants")
    return axes


def wanted(report: Report, *, axes: "Axes | None" = None) -> "Axes":
    """Of each layer, the share of the kept weights that each voter alone would keep, as a heat map.

    Args:
        report: The report.
        axes: Where to draw.

    Raises:
        ValueError: If nobody has a say.
    """
    rows = _some([row for row in report.layers if row.want])
    voters = list(dict.fromkeys(voter for row in rows for voter in row.want))
    cells = [[row.want.get(voter, float("nan")) for voter in voters] for row in rows]
    return _heat(axes, [row.name for row in rows], voters, cells, "wanted share of what is kept")


def affinity(found: "Affinity | Mapping[str, Affinity]", *, axes: "Axes | None" = None) -> "Axes":
    """The overlap of the tasks' masks beside that of unrelated tasks, layer by layer.

    Args:
        found: What `mtprune.affinity.compare` found; several of these by what they compare.
        axes: Where to draw.

    Raises:
        ValueError: If there is no layer.
    """
    named = found if isinstance(found, Mapping) else {"overlap": found}
    names = _some(list(dict.fromkeys(x.name for a in named.values() for x in a.layers)))
    places = {what: {x.name: x for x in a.layers} for what, a in named.items()}
    cells = []
    for name in names:
        row = []
        for what in named:
            layer = places[what].get(name)
            nan = float("nan")
            row += [nan, nan] if layer is None else [layer.iou, layer.expected]
        cells.append(row)
    head = [f"{what}{column}" for what in named for column in ("", ", unrelated")]
    return _heat(axes, names, head, cells, "intersection over union")


def depth(found: Affinity, *, axes: "Axes | None" = None) -> "Axes":
    """The overlap from layer to layer, the band of unrelated tasks, and the watershed.

    Args:
        found: What `mtprune.affinity.compare` found.
        axes: Where to draw.

    Raises:
        ValueError: If there is no layer.
    """
    layers = _some([layer for layer in found.layers if not isnan(layer.iou)])
    axes, across = _axes(axes), range(len(layers))
    chance = [layer.expected for layer in layers]
    reach = [layer.reach or 0.0 for layer in layers]
    axes.plot(across, [layer.iou for layer in layers], marker="o", label="overlap")
    axes.plot(across, chance, linestyle="--", color=_COLOURS["no task alone"], label="unrelated")
    low = [value - r for value, r in zip(chance, reach, strict=True)]
    high = [value + r for value, r in zip(chance, reach, strict=True)]
    axes.fill_between(across, low, high, color=_COLOURS["no task alone"], alpha=0.3)
    split = watershed([layer.iou for layer in layers], chance)
    if split is not None:
        end = split.before + 1
        axes.axvspan(split.before, end, color=_COLOURS["one of several"], alpha=0.25)
    axes.set_xticks(list(across), [layer.name for layer in layers], rotation=90)
    axes.set_ylim(0, 1)
    axes.set_ylabel("intersection over union")
    axes.legend(frameon=False)
    return axes


def sparsity(report: Report, *, axes: "Axes | None" = None) -> "Axes":
    """The pruned share of each component over training.

    Args:
        report: The report.
        axes: Where to draw.

    Raises:
        ValueError: If no update is remembered.
    """
    return _over_training(report, _of_components("sparsity"), "share pruned", axes)


def thresholds(report: Report, *, axes: "Axes | None" = None) -> "Axes":
    """The threshold of each component over training.

    Args:
        report: The report.
        axes: Where to draw.

    Raises:
        ValueError: If there are none.
    """
    return _over_training(report, _of_components("threshold"), "threshold", axes)


def weights(report: Report, *, axes: "Axes | None" = None) -> "Axes":
    """What each task's loss counts, over training.

    Args:
        report: The report.
        axes: Where to draw.

    Raises:
        ValueError: If no update is remembered.
    """
    return _over_training(report, lambda moment: moment.weights, "factor on the loss", axes)


def mask(kept: Tensor, *, axes: "Axes | None" = None) -> "Axes":
    """The mask of a layer: rows are outputs, dark is kept.

    Args:
        kept: The mask, any shape; all but the first dimension lie across.
        axes: Where to draw.
    """
    axes = _axes(axes)
    flat = kept.detach().cpu().reshape(len(kept) if kept.dim() > 1 else 1, -1)
    axes.imshow(flat.float().numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axes.set_xlabel("inputs")
    axes.set_ylabel("outputs")
    axes.set_title(f"{int(kept.sum()):,} of {kept.numel():,} kept")
    return axes


def curves(sweep: Sweep, *, axes: "Axes | None" = None) -> "Axes":
    """What each sparsity costs each task, with intervals if there are any.

    Args:
        sweep: What `mtprune.sweep` measured.
        axes: Where to draw.

    Raises:
        ValueError: If nothing was measured.
    """
    points, axes = _some(sweep.points), _axes(axes)
    for task in sweep.tasks:
        told = [(p.sparsity, p.tasks[task]) for p in points if isfinite(p.tasks[task].mean)]
        across, means = [s for s, _ in told], [change.mean for _, change in told]
        [line] = axes.plot(across, means, marker="o", label=task)
        if sweep.batches > 1:
            low, high = [c.low for _, c in told], [c.high for _, c in told]
            axes.fill_between(across, low, high, alpha=0.2, color=line.get_color())
    axes.axhline(0.0, color=_COLOURS["no task alone"], linewidth=1)
    axes.set_xlabel("share pruned")
    axes.set_ylabel("change in percent, below 0 is worse")
    axes.legend(frameon=False)
    return axes


def sensitivity(sweep: Sweep, *, components: bool = False, axes: "Axes | None" = None) -> "Axes":
    """What each layer costs the task that loses most, if nothing else is pruned.

    Args:
        sweep: What `mtprune.sweep` measured.
        components: Draw components, not layers.
        axes: Where to draw.

    Raises:
        ValueError: If that was not measured.
    """
    rows = _some(sweep.components if components else sweep.layers)
    names = list(dict.fromkeys(row.name for row in rows))
    asked = list(dict.fromkeys(row.sparsity for row in rows))
    axes, high = _rows(axes, names), 0.8 / len(asked)
    for i, share in enumerate(asked):
        own = {row.name: row.worst for row in rows if row.sparsity == share}
        known = [j for j, name in enumerate(names) if name in own and isfinite(own[name].mean)]
        axes.barh(
            [j - 0.4 + (i + 0.5) * high for j in known],
            [own[names[j]].mean for j in known],
            height=high,
            xerr=[own[names[j]].error or 0.0 for j in known] if sweep.batches > 1 else None,
            label=f"{share:g} pruned",
        )
    axes.axvline(0.0, color=_COLOURS["no task alone"], linewidth=1)
    axes.set_xlabel("change in percent of the task that loses most")
    axes.legend(frameon=False)
    return axes


# What they have in common.


def _axes(axes: "Axes | None", height: float = 4.0) -> "Axes":
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib. Install the extra: pip install 'mtprune[plots]'."
        ) from error
    return pyplot.subplots(figsize=(7, height), layout="constrained")[1]


def _rows(axes: "Axes | None", names: Sequence[str]) -> "Axes":
    """Axes with a row for each name, from the top down."""
    axes = _axes(axes, 1.5 + 0.25 * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    return axes


def _heat(
    axes: "Axes | None",
    names: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[float]],
    says: str,
) -> "Axes":
    axes = _rows(axes, names)
    picture = axes.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    for i, row in enumerate(cells):
        for j, value in enumerate(row):
            if not isnan(value):
                tone = "white" if value > 0.55 else "black"
                axes.text(j, i, f"{value:.0%}", ha="center", va="center", color=tone, fontsize=8)
    figure = axes.get_figure()
    assert figure is not None
    figure.colorbar(picture, ax=axes, label=says)
    return axes


def _of_components(key: str) -> Callable[[Moment], Mapping[str, float]]:
    def read(moment: Moment) -> Mapping[str, float]:
        found = moment.components.items()
        return {name: numbers[key] for name, numbers in found if key in numbers}

    return read


def _over_training(
    report: Report,
    read: Callable[[Moment], Mapping[str, float]],
    says: str,
    axes: "Axes | None",
) -> "Axes":
    lines: dict[str, list[tuple[int, float]]] = {}
    for moment in report.history:
        for name, value in read(moment).items():
            lines.setdefault(name, []).append((moment.step, value))
    _some(list(lines))
    axes = _axes(axes)
    for name, points in lines.items():
        axes.plot([step for step, _ in points], [v for _, v in points], marker=".", label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(says)
    axes.legend(frameon=False)
    return axes


def _names(rows: Sequence[Row]) -> list[str]:
    known = {name for row in rows for name in row.parts}
    return [name for name in PARTS if name in known]


def _some(rows: Any) -> Any:
    """What is to be drawn, if it is anything.

    Raises:
        ValueError: If it is not.
    """
    if not rows:
        raise ValueError(
            "There is nothing to draw: this was not measured, or nothing has been pruned yet."
        )
    return rows
