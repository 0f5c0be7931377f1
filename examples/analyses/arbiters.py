"""Arbiters: how tasks' wishes become one mask, at matched sparsity from a trained net.

DiSparse (Sun et al., CVPR 2022) prunes what all tasks agree to prune. Majority, mean and
intersection are the other ways to settle; the joint loss settles nothing. All keep the same number
of weights, so that none wins by keeping more.
"""

import argparse
from typing import Any

from matplotlib.figure import Figure

from analyses.bench import Bench, Found, State, Study, change, share_of_zeros
from analyses.drawing import Row, changes, lines, percents, picture, symmetric
from mtprune import Vote, saliency, votes

ARBITERS = ("unanimous", "majority", "mean", "intersection", "joint")


def add(parser: argparse.ArgumentParser) -> None:
    """How much is pruned, and by which score."""
    add = parser.add_argument
    add("--sparsities", type=share_of_zeros, nargs="+", default=[0.8, 0.9, 0.95], help="of all")
    add("--score", choices=("taylor", "taylor_magnitude"), default="taylor", help="of a weight")
    add("--spread", choices=("global", "floor"), default="global", help="of the budget over layers")


def method(arbiter: str, sparsity: float, bench: Bench) -> Vote:
    """A vote by an arbiter."""
    options: dict[str, Any] = {
        "saliency": getattr(saliency, bench.options.score),
        "allocation": bench.options.spread,
        "observations": bench.trainer.observations,
    }
    if arbiter == "joint":
        return Vote(sparsity, disentangled=False, **options)
    return Vote(sparsity, vote=getattr(votes, arbiter), **options)


def settle(
    bench: Bench, arbiter: str, sparsity: float, seed: int, dense: tuple[State, Found]
) -> list[Row]:
    """The dense net after an arbiter's pruning, and after tuning."""
    run = bench.run(seed, method(arbiter, sparsity, bench), start=dense[0])
    bench.prune(run)
    about = {"line": arbiter, "sparsity": sparsity, "seed": seed, "zeros": run.pruner.sparsity}
    at_once = change(bench.test(run), dense[1])
    bench.train(run, start=bench.trainer.steps)
    tuned = change(bench.test(run), dense[1])
    return [{**about, "tuned": False, **at_once}, {**about, "tuned": True, **tuned}]


def measure(bench: Bench) -> Found:
    """Rows before and after tuning; the dense net is tuned for as many steps, too."""
    rows, dense_rows = [], []
    for seed in bench.seeds:
        dense = bench.dense(seed)
        run = bench.run(seed, start=dense[0])
        bench.train(run, start=bench.trainer.steps)
        tuned = change(bench.test(run), dense[1])
        dense_rows.append({"seed": seed, "dense": dense[1]["test"], "tuned": tuned})
        for sparsity in bench.options.sparsities:
            for arbiter in ARBITERS:
                rows += settle(bench, arbiter, sparsity, seed, dense)
    return {"rows": rows, "dense": dense_rows}


def table(found: Found) -> str:
    """Straight after pruning, and after tuning."""
    parts = []
    for tuned, words in ((False, "Straight after pruning"), (True, "After tuning")):
        rows = [row for row in found["rows"] if row["tuned"] == tuned]
        parts.append(f"{words}:\n\n{changes(rows, 'delta', 'worst')}")
    gain = sum(row["tuned"]["delta"] for row in found["dense"]) / len(found["dense"])
    parts.append(f"The dense net gains {gain:.2f} by as much tuning.")
    return "\n\n".join(parts)


def draw(found: Found) -> Figure:
    """Delta_T and the worst task, straight after pruning and after tuning."""
    figure, axes = picture(3, width=4.2)
    panels = ((False, "delta", "mean of tasks, straight after pruning"),)
    panels += ((True, "delta", "mean of tasks, tuned"), (True, "worst", "worst task, tuned"))
    for one, (tuned, value, title) in zip(axes, panels, strict=True):
        rows = [row for row in found["rows"] if row["tuned"] == tuned]
        one.axhline(0, color="0.6", lw=0.8)
        lines(one, rows, value)
        percents(one, sorted({row["sparsity"] for row in rows}))
        one.set(xlabel="zeros, %", title=title)
        if not tuned:
            symmetric(one)
    axes[0].set_ylabel("change from dense, %")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=5
    )
    return figure


STUDY = Study("arbiters", "votes and the joint loss at matched sparsity", add, measure, table, draw)
