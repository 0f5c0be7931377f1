"""Sensitivity: a trained net with one component pruned at a time, the others dense.

AdapMTL (Xiang et al., ACM MM 2024) prunes heads harder than the trunk because the trunk, which all
tasks use, bears less. Nothing is tuned: this is what a component loses straight after pruning.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from matplotlib.figure import Figure

from analyses.bench import Bench, Found, State, Study, change, share_of_zeros
from analyses.drawing import Row, changes, lines, names, percents, picture, symmetric
from mtprune import Vote, saliency

SPARSITIES = [0.3, 0.5, 0.7, 0.8, 0.9, 0.95]
SCORES = ("magnitude", "taylor")


def add(parser: argparse.ArgumentParser) -> None:
    """Of what is pruned."""
    add = parser.add_argument
    add(
        "--sparsities",
        type=share_of_zeros,
        nargs="+",
        default=SPARSITIES,
        help="shares of zeros in the component",
    )


@dataclass(frozen=True)
class Cut:
    """One component pruned, the others dense.

    Attributes:
        score: Of a weight.
        component: Which one.
        sparsity: Share of its weights that go.
        sizes: How many weights each component has.
    """

    score: str
    component: str
    sparsity: float
    sizes: Mapping[str, int]

    def method(self, observations: int) -> Vote:
        """What does it."""
        share = round(self.sparsity * self.sizes[self.component]) / sum(self.sizes.values())
        others = {name: 0.0 for name in self.sizes if name != self.component}
        return Vote(
            share,
            saliency=getattr(saliency, self.score),
            allocation=others,
            observations=observations,
        )


def sizes_of(bench: Bench) -> dict[str, int]:
    """How many weights each component has."""
    report = bench.prune(bench.run(0, Vote(0.5)))
    return {row.name: row.parameters for row in report.components}


def prune(bench: Bench, cut: Cut, seed: int, dense: tuple[State, Found]) -> Row:
    """The dense net with a component pruned."""
    run = bench.run(seed, cut.method(bench.trainer.observations), start=dense[0])
    report = bench.prune(run)
    found = {row.name: row.sparsity for row in report.components}
    return {
        "score": cut.score,
        "line": cut.component,
        "sparsity": cut.sparsity,
        "seed": seed,
        "components": found,
        **change(bench.test(run), dense[1]),
    }


def measure(bench: Bench) -> Found:
    """A row for each score, component, sparsity and seed."""
    sizes, rows, base = sizes_of(bench), [], []
    for seed in bench.seeds:
        dense = bench.dense(seed)
        base.append({"seed": seed, "test": dense[1]["test"]})
        for score, component in product(SCORES, sizes):
            for sparsity in bench.options.sparsities:
                rows.append(prune(bench, Cut(score, component, sparsity, sizes), seed, dense))
    return {"rows": rows, "dense": base, "weights": sizes}


def table(found: Found) -> str:
    """For each score."""
    parts = []
    for score in names(found["rows"], "score"):
        rows = [row for row in found["rows"] if row["score"] == score]
        parts.append(f"By {score}:\n\n{changes(rows, 'delta', 'worst')}")
    return "\n\n".join(parts)


def draw(found: Found) -> Figure:
    """Delta_T over the sparsity of one component; a panel for each score."""
    figure, axes = picture(len(SCORES))
    total = sum(found["weights"].values())
    values = [row["delta"] for row in found["rows"]]
    low, high = min(-1.0, *values), max(1.0, *values)
    for one, score in zip(axes, SCORES, strict=True):
        rows = [row for row in found["rows"] if row["score"] == score]
        one.axhline(0, color="0.6", lw=0.8)
        lines(one, rows, "delta")
        percents(one, sorted({row["sparsity"] for row in rows}))
        one.set_ylim(1.1 * low, 1.1 * high)
        symmetric(one)
        one.set(xlabel="zeros in the one component, %", title=f"by {score}, nothing tuned")
    axes[0].set_ylabel("Delta_T, % (0 = dense)")
    handles, labels = axes[0].get_legend_handles_labels()
    told = [f"{name} ({found['weights'][name] / total:.1%} of weights)" for name in labels]
    figure.legend(handles, told, loc="outside lower center", frameon=False, ncols=2)
    return figure


STUDY = Study(
    "sensitivity", "a trained net with one component pruned at a time", add, measure, table, draw
)
