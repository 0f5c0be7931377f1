"""What the pictures and the tables have in common."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtprune.paired import spread

COLORS = ("#08519c", "#d94801", "#238b45", "#7a0177", "#b8860b", "#525252", "#e7298a", "#17a2b8")
GREY = "0.82"

Row = dict[str, Any]


def picture(panels: int, width: float = 5.0, height: float = 3.8) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def pick(rows: Sequence[Row], **values: Any) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def names(rows: Sequence[Row], key: str) -> list[Any]:
    """The values of a key, as they first come."""
    return list(dict.fromkeys(row[key] for row in rows))


def lines(
    axes: Axes, rows: Sequence[Row], value: str, *, line: str = "line", x: str = "sparsity"
) -> None:
    """The mean over seeds for each line, and every seed as a dot."""
    for color, name in zip(COLORS, names(rows, line), strict=False):
        mine = pick(rows, **{line: name})
        places = sorted(names(mine, x))
        means = [statistics.fmean(r[value] for r in pick(mine, **{x: at})) for at in places]
        axes.plot([100 * at for at in places], means, "o-", color=color, ms=3, lw=1.4, label=name)
        dots = [100 * row[x] for row in mine], [row[value] for row in mine]
        axes.plot(*dots, ".", color=color, ms=4, alpha=0.45)


def percents(axes: Axes, values: Sequence[float]) -> None:
    """Sparsities as ticks of the x axis."""
    axes.set_xticks([100 * value for value in values], [f"{100 * value:g}" for value in values])


def symmetric(axes: Axes, along: str = "y", linear: float = 10.0) -> None:
    """An axis that is logarithmic both ways outside of what is near 0, if it goes far."""
    low, high = getattr(axes, f"get_{along}lim")()
    if max(-low, high) <= 4 * linear:
        return
    getattr(axes, f"set_{along}scale")("symlog", linthresh=linear)
    ticks = (-1000, -300, -100, -30, -10, -5, 0, 5, 10, 30, 100)
    chosen = [tick for tick in ticks if low <= tick <= high]
    getattr(axes, f"set_{along}ticks")(chosen, [str(tick) for tick in chosen])
    axes.minorticks_off()


def changes(rows: Sequence[Row], *values: str, line: str = "line", x: str = "sparsity") -> str:
    """Markdown: mean and standard deviation over seeds."""
    called = {"delta": "Delta_T, %", "worst": "worst task, %"}
    head = ["zeros", "", "seeds", *(called[value] for value in values), *rows[0]["tasks"]]
    told = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for at in sorted(names(rows, x)):
        for name in names(rows, line):
            if not (mine := pick(rows, **{x: at, line: name})):
                continue
            cells = [f"{at:.1%}", str(name), str(len(mine))]
            cells += [spread([row[value] for row in mine]) for value in values]
            cells += [
                f"{statistics.fmean(row['tasks'][task] for row in mine):.1f}"
                for task in rows[0]["tasks"]
            ]
            told.append("| " + " | ".join(cells) + " |")
    return "\n".join(told)
