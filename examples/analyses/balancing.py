"""Balancing: pruned nets against dense ones that multitask methods train, at equal steps.

DiSparse (Sun et al., CVPR 2022) sets pruned nets beside dedicated multitask methods. Here the
balances of `common.balancing` train a dense net and one that a gradual vote prunes, all from
scratch; thresholds that rise are beside them, and where the problem has pictures an attention net.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from common import balancing
from common.balancing import Balance
from common.loop import Run
from matplotlib.figure import Figure

from analyses.bench import Bench, Found, Study, change, share_of_zeros
from analyses.drawing import COLORS, Row, changes, names, picture, symmetric
from mtprune import Cubic, Vote, recipes
from mtprune.methods import Method

BALANCES: dict[str, Callable[[Run], Balance]] = {
    "equal": lambda run: balancing.Equal(),
    "uncertainty": lambda run: balancing.Uncertainty(len(run.tasks)),
    "PCGrad": lambda run: balancing.PCGrad(_weights(run), run.options.seed),
    "FAMO": lambda run: balancing.Famo(len(run.tasks)),
}
ATTENTION = "mtan_segnet"


def _weights(run: Run) -> list[Any]:
    return [parameter for group in run.optimizer.param_groups for parameter in group["params"]]


def add(parser: argparse.ArgumentParser) -> None:
    """How much is pruned."""
    parser.add_argument(
        "--target", type=share_of_zeros, default=0.9, help="share of zeros of pruned nets"
    )


def vote(bench: Bench) -> Vote:
    """A gradual vote from half of the steps on."""
    steps = bench.trainer.steps
    begin, end = steps // 2, max(steps // 2 + 1, 3 * steps // 4)
    every = max(1, (end - begin) // 10)
    schedule = Cubic(begin=begin, end=end, every=every)
    return Vote(bench.options.target, schedule=schedule, observations=min(4, every))


def one(
    bench: Bench, seed: int, method: Method[Any] | None, make: Callable[[Run], Balance] | None
) -> Found:
    """A net trained from scratch, and what it keeps."""
    run = bench.run(seed, method)
    bench.train(run, make(run) if make else None)
    zeros = run.pruner.sparsity
    found = bench.test(run)
    weights = sum(mask.numel() for mask in run.pruner.masks.values())
    return {"sparsity": zeros, "weights": weights, **found}


def measure(bench: Bench) -> Found:
    """A row for each net, balance and seed; dense with equal weights is what counts as 0."""
    rows: list[Row] = []
    for seed in bench.seeds:
        nets: dict[tuple[str, str], Found] = {}
        for name, make in BALANCES.items():
            nets["dense", name] = one(bench, seed, None, make)
            nets["vote", name] = one(bench, seed, vote(bench), make)
        rising = recipes.adapmtl(bench.options.target, bench.trainer.steps, allocation="learned")
        nets["thresholds", "by pruning sensitivity"] = one(bench, seed, rising, None)
        if ATTENTION in bench.problem.nets:
            trainer = copy.copy(bench.trainer)
            trainer.net = ATTENTION
            attentive = replace(bench, trainer=trainer)
            nets["dense", "attention (MTAN)"] = one(attentive, seed, None, BALANCES["equal"])
        for (net, name), found in nets.items():
            about = {"net": net, "balance": name, "line": f"{net}, {name}", "seed": seed}
            about |= {"sparsity": found["sparsity"], "weights": found["weights"]}
            rows.append({**about, **change(found, nets["dense", "equal"])})
    return {"rows": rows}


def table(found: Found) -> str:
    """Against the dense net whose losses are summed."""
    return changes(found["rows"], "delta", "worst")


def draw(found: Found) -> Figure:
    """Mean and worst task of each net; a dot for each seed, a bar at their mean."""
    rows = found["rows"]
    order, nets = names(rows, "balance"), names(rows, "net")
    figure, axes = picture(2, width=5.5, height=0.42 * len(order) + 1.6)
    for panel, value, title in zip(
        axes, ("delta", "worst"), ("mean of tasks", "worst task"), strict=True
    ):
        panel.axvline(0, color="0.6", lw=0.8)
        for color, net in zip(COLORS, nets, strict=False):
            mine = [row for row in rows if row["net"] == net]
            aside = {"dense": -0.16, "vote": 0.16}.get(net, 0.0)
            places = [order.index(row["balance"]) + aside for row in mine]
            values = [row[value] for row in mine]
            panel.plot(values, places, "o", color=color, ms=4, alpha=0.6, label=net)
            for name in names(mine, "balance"):
                means = [row[value] for row in mine if row["balance"] == name]
                at = order.index(name) + aside
                panel.plot(sum(means) / len(means), at, "|", color=color, ms=14, mew=2)
        panel.set_yticks(range(len(order)), order if panel is axes[0] else [""] * len(order))
        panel.invert_yaxis()
        symmetric(panel, "x")
        panel.set(xlabel="change from dense with equal weights, %", title=title)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", frameon=False, ncols=3)
    return figure


STUDY = Study(
    "balancing", "pruned nets against dense multitask training", add, measure, table, draw
)
