"""Components spreading apart: the sparsity of trunk and heads while thresholds are learned.

In AdapMTL (Xiang et al., ACM MM 2024) every component has a threshold, and trunk and heads end at
very different sparsities. Here the offsets of the thresholds are learned, or fixed (uniform); the
overall sparsity is the same.
"""

import argparse
import statistics

from matplotlib.figure import Figure

from analyses.bench import Bench, Found, Study, change, share_of_zeros
from analyses.drawing import COLORS, Row, names, picture
from mtprune import recipes
from mtprune.report import Report

KINDS = ("uniform", "learned")


def add(parser: argparse.ArgumentParser) -> None:
    """How sparse it gets."""
    parser.add_argument(
        "--target", type=share_of_zeros, default=0.9, help="share of zeros in the end"
    )


def history(report: Report) -> list[Row]:
    """About fifty moments of a run."""
    every = max(1, len(report.history) // 50)
    chosen = [*report.history[::every], report.history[-1]]
    return [
        {
            "step": moment.step,
            "overall": moment.sparsity,
            **{name: numbers["sparsity"] for name, numbers in moment.components.items()},
        }
        for moment in chosen
    ]


def measure(bench: Bench) -> Found:
    """A row for each kind of threshold and seed; trained from scratch."""
    rows, base = [], []
    for seed in bench.seeds:
        _, dense = bench.dense(seed)
        base.append({"seed": seed, "test": dense["test"]})
        for kind in KINDS:
            method = recipes.adapmtl(bench.options.target, bench.trainer.steps, allocation=kind)
            run = bench.run(seed, method)
            bench.train(run)
            run.pruner.finalize()
            report = run.pruner.report()
            rows.append(
                {
                    "kind": kind,
                    "seed": seed,
                    "sparsity": report.sparsity,
                    "components": {row.name: row.sparsity for row in report.components},
                    "weights": {row.name: row.parameters for row in report.components},
                    "spread": _spread([row.sparsity for row in report.components]),
                    **change(bench.test(run), dense),
                    "history": history(report),
                }
            )
    return {"rows": rows, "dense": base}


def _spread(values: list[float]) -> float:
    return max(values) - min(values)


def table(found: Found) -> str:
    """Where each component ended, mean over seeds."""
    rows = found["rows"]
    weights = rows[0]["weights"]
    total = sum(weights.values())
    head = ["thresholds", *(f"{name} ({n / total:.0%} of weights)" for name, n in weights.items())]
    head += ["spread, points", "Delta_T, %", "worst task, %"]
    told = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for kind in names(rows, "kind"):
        mine = [row for row in rows if row["kind"] == kind]
        ends = [statistics.fmean(row["components"][name] for row in mine) for name in weights]
        cells = [kind, *(f"{end:.1%}" for end in ends)]
        cells.append(f"{100 * statistics.fmean(row['spread'] for row in mine):.1f}")
        cells += [f"{statistics.fmean(row[x] for row in mine):.2f}" for x in ("delta", "worst")]
        told.append("| " + " | ".join(cells) + " |")
    return "\n".join(told)


def draw(found: Found) -> Figure:
    """Sparsity of each component over steps; every seed a line."""
    rows = found["rows"]
    figure, axes = picture(len(KINDS))
    parts = [*rows[0]["components"], "overall"]
    colors = {**dict(zip(parts, ("black", *COLORS), strict=False)), "overall": "0.6"}
    for one, kind in zip(axes, KINDS, strict=True):
        for name in parts:
            for row in (row for row in rows if row["kind"] == kind):
                steps = [moment["step"] for moment in row["history"]]
                curve = [100 * moment[name] for moment in row["history"]]
                style = "--" if name == "overall" else "-"
                one.plot(steps, curve, style, color=colors[name], lw=1.2, label=name)
        one.set(xlabel="step", ylim=(-2, 102), title=f"{kind} thresholds")
    axes[0].set_ylabel("zeros, %")
    handles, labels = axes[0].get_legend_handles_labels()
    single = dict(zip(labels, handles, strict=True))
    figure.legend(
        single.values(), single, loc="outside lower center", frameon=False, ncols=len(parts)
    )
    return figure


STUDY = Study(
    "components", "sparsity of trunk and heads while thresholds rise", add, measure, table, draw
)
