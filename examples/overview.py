r"""One picture and one table of several comparisons: who leads where, and who is not behind.

    python overview.py --of census=DIR/compare.json camvid=DIR/compare.json --out DIR

Each file is what ``compare.py`` or ``encoder_recipes.py`` wrote. ``NAME.md`` has all its methods,
the best first, each with its difference to ``--method``. For every data set and sparsity the table
in ``overview.md`` names the method with the best mean change over tasks, and those that are not
behind it: whose paired difference, mean over tasks, has a 95 % interval that reaches zero, the
interval held wide enough for all differences of the table at once.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from mtprune.files import write_text
from mtprune.paired import Difference, interval, spread

Rows = Sequence[Mapping[str, Any]]


def pairs(one: Mapping[str, Any], other: Mapping[str, Any], what: str) -> list[float]:
    """Differences of two rows over the seeds that both have."""
    theirs = dict(zip(other["seeds"], other[what], strict=True))
    mine = zip(one["seeds"], one[what], strict=True)
    return [value - theirs[seed] for seed, value in mine if seed in theirs]


def at(rows: Rows, sparsity: float) -> list[Mapping[str, Any]]:
    """The rows of a sparsity, without losses that were scaled, best mean first."""
    found = [row for row in rows if row["sparsity"] == sparsity and not row["scaled"]]
    return sorted(found, key=lambda row: -statistics.fmean(row["delta"]))


def sparsities(rows: Rows) -> list[float]:
    """Those that were compared; a dense net is none."""
    return sorted({row["sparsity"] for row in rows if row["sparsity"]})


def table(studies: Mapping[str, Rows], method: str) -> str:
    """Markdown: a line for each data set and sparsity.

    Args:
        studies: Rows of comparisons by the name of the data set.
        method: Whose difference to the leader, and to whom it leads, is told.
    """
    cells = [
        (name, sparsity, found)
        for name, rows in studies.items()
        for sparsity in sparsities(rows)
        if len(found := at(rows, sparsity)) > 1
    ]
    comparisons = sum(len(found) - 1 for *_, found in cells)
    head = ["data", "zeros", "seeds", "leads", "mean", "worst task", "not behind it"]
    head += [f"{method}: mean", "worst task", "minus the next best or the leader"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, sparsity, found in cells:
        leader, *others = found
        level = [
            row["method"] for row in others if not _beyond(pairs(leader, row, "delta"), comparisons)
        ]
        line = [name, f"{sparsity:.0%}", f"{len(leader['seeds'])}", leader["method"]]
        line += [*_means(leader), ", ".join(level) or "none"]
        mine = next((row for row in found if row["method"] == method), None)
        if mine is None:
            line += [""] * 3
        else:
            rival = others[0] if mine is leader else leader
            told = str(Difference(tuple(pairs(mine, rival, "delta")), comparisons))
            line += [*_means(mine), f"{rival['method']}: {told}"]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def details(rows: Rows, method: str) -> str:
    """Markdown: a line for each method and sparsity, the best mean of a sparsity first.

    Args:
        rows: Of one comparison.
        method: Whom the others are held against; the bracketed intervals hold for all of its
            differences in mean at once, and for all of those of the worst task.
    """
    found = [row for sparsity in (0.0, *sparsities(rows)) for row in at(rows, sparsity)]
    references = {row["sparsity"]: row for row in found if row["method"] == method}
    behind = [row for row in found if row["method"] != method and row["sparsity"] in references]
    head = ["zeros", "method", "rate", "seeds", "mean", f"minus `{method}`"]
    head += ["worst task", f"minus `{method}`"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found:
        cells = [f"{row['sparsity']:.0%}", f"`{row['method']}`", f"{row['rate']:g}"]
        cells += [f"{len(row['seeds'])}"]
        for what in ("delta", "worst"):
            values = pairs(row, references[row["sparsity"]], what) if row in behind else []
            told = str(Difference(tuple(values), len(behind))) if values else ""
            cells += [spread(row[what]), told]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _means(row: Mapping[str, Any]) -> list[str]:
    return [f"{statistics.fmean(row[what]):.2f}" for what in ("delta", "worst")]


def _beyond(values: Sequence[float], comparisons: int) -> bool:
    """Whether a mean difference is further from zero than its interval is wide."""
    if len(values) < 2:
        return False
    return abs(statistics.fmean(values)) > interval(values, comparisons)


def draw(studies: Mapping[str, Rows], methods: Sequence[str]) -> Figure:
    """Delta_T over sparsity for each data set, with bands: 95 % intervals of the means."""
    figure = Figure(figsize=(4.2 * len(studies) + 1.6, 4.0), layout="constrained")
    colors = colormaps["tab10"].colors
    panels = figure.subplots(1, len(studies), squeeze=False)[0]
    handles = {}
    for axes, (name, rows) in zip(panels, studies.items(), strict=True):
        places = sparsities(rows)
        for i, method in enumerate(methods):
            mine = {s: r for s in places for r in at(rows, s) if r["method"] == method}
            if not mine:
                continue
            xs = [places.index(sparsity) for sparsity in mine]
            means = [statistics.fmean(row["delta"]) for row in mine.values()]
            widths = [interval(row["delta"]) for row in mine.values()]
            color, thick = colors[i % 10], 2.4 if i == 0 else 1.4
            if len(places) == 1:  # no line to put a band around
                xs = [0.1 * (i - (len(methods) - 1) / 2)]
                axes.errorbar(xs, means, widths, color=color, lw=1.4, capsize=3)
            [handles[method]] = axes.plot(xs, means, color=color, marker="o", ms=4, lw=thick)
            if len(places) == 1:
                continue
            low = [mean - width for mean, width in zip(means, widths, strict=True)]
            high = [mean + width for mean, width in zip(means, widths, strict=True)]
            axes.fill_between(xs, low, high, color=color, alpha=0.12, lw=0)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_yscale("symlog", linthresh=10)
        axes.margins(x=0.15)
        axes.set_xticks(range(len(places)), [f"{100 * sparsity:g}" for sparsity in places])
        ticks = [-300, -100, -30, -10, -5, 0, 5, 10]
        low, high = axes.get_ylim()
        ticks = [tick for tick in ticks if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
        axes.set(title=name, xlabel="zeros, %")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Delta_T, % (0 = dense)")
    known = {method: handles[method] for method in methods if method in handles}
    figure.legend(
        list(known.values()), list(known), loc="outside right center", frameon=False, fontsize=9
    )
    return figure


def study(text: str) -> tuple[str, Path]:
    """``NAME=FILE``."""
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must look like census=compare.json. Got {text}.")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no {path}. compare.py writes one.")
    return name, Path(path)


def main(arguments: Sequence[str] | None = None) -> str:
    """Draw and tell; the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--of", nargs="+", type=study, required=True, metavar="NAME=FILE")
    parser.add_argument("--method", default="best", help="whose differences are told")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="METHOD", help="not in picture and overview.md"
    )
    parser.add_argument("--draw", nargs="+", metavar="METHOD", help="lines; all unless given")
    parser.add_argument("--out", type=Path, default=Path("overview_out"), help="folder")
    options = parser.parse_args(arguments)
    studies: dict[str, Rows] = {
        name: json.loads(path.read_text()) for name, path in dict(options.of).items()
    }
    shown = {
        name: [row for row in rows if row["method"] not in options.without]
        for name, rows in studies.items()
    }
    every = dict.fromkeys(row["method"] for rows in shown.values() for row in rows)
    text = table(shown, options.method)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "overview.md", text + "\n")
    for name, rows in studies.items():
        write_text(options.out / f"{name}.md", details(rows, options.method) + "\n")
    picture = options.out / "overview.png"
    draw(shown, options.draw or list(every)).savefig(picture, dpi=110)
    print(f"\nWrote overview.md, overview.png and a page for each study to {options.out}.")
    return text


if __name__ == "__main__":
    main()
