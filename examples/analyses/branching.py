"""Branching: does a trunk that branches where its masks say do better after training?

A net is trained, and `mtprune.affinity.suggest_split` says where its tasks part. Nets that branch
there, at the first layer (a net for each task), and in the middle are trained from the same initial
weights for as many steps. Then all, the net that shares everything too, are pruned to the same
number of weights and tuned.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from common import losses
from common.loop import Run
from common.options import positive
from matplotlib.figure import Figure
from torch import Tensor, nn

from analyses.bench import Bench, Found, State, Study, change, share_of_zeros
from analyses.drawing import COLORS, Row, changes, names, picture
from mtprune import MultitaskPruner, OneShot, Vote
from mtprune.affinity import suggest_split

Groups = Sequence[Sequence[str]]
DENSE, PRUNED = "dense", "pruned, tuned"


def add(parser: argparse.ArgumentParser) -> None:
    """Of the suggestion, and of pruning afterwards."""
    add = parser.add_argument
    add("--draws", type=positive, default=8, help="of the null that the suggestion rests on")
    add("--zeros", type=share_of_zeros, default=0.9, help="share, of the net that shares all")


class Branched(nn.Module):
    """A net for each group of tasks; they have the layers before a split in common.

    Args:
        net: A net with a head for each task in ``heads``.
        shared: Modules without children that all groups use.
        groups: The tasks of each branch.
    """

    def __init__(self, net: nn.Module, shared: Sequence[nn.Module], groups: Groups) -> None:
        super().__init__()
        same = {id(module): module for module in shared}
        self.nets = nn.ModuleList(copy.deepcopy(net, dict(same)) for _ in groups)
        for branch, tasks in zip(self.nets, groups, strict=True):
            for task in set(branch.heads) - set(tasks):
                del branch.heads[task]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``{task: output}``."""
        return {task: y for net in self.nets for task, y in net(images).items()}

    def shared_modules(self) -> str:
        """What several tasks are seen to use."""
        return "auto"


@dataclass(frozen=True)
class Cut:
    """Where a trunk branches.

    Attributes:
        line: What the net is called.
        at: The first layer that branches have for themselves; None for no branch.
        groups: The tasks of each branch.
    """

    line: str
    at: str | None
    groups: Groups


def order_of(net: nn.Module, images: Tensor) -> list[nn.Module]:
    """The modules without children, in the order in which they run."""
    ran: dict[nn.Module, None] = {}
    leaves = [module for module in net.modules() if not list(module.children())]
    handles = [m.register_forward_hook(lambda m, *_: ran.setdefault(m, None)) for m in leaves]
    state = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        net(images)
    net.load_state_dict(state)
    for handle in handles:
        handle.remove()
    return list(ran)


def branched(bench: Bench, seed: int, cut: Cut) -> nn.Module:
    """The net of a seed at its initialisation, branched."""
    net: nn.Module = bench.run(seed).model
    if cut.at is None:
        return net
    picture = bench.source.splits["train"][0]["input"].to(bench.trainer.device)
    ran = order_of(net, picture.repeat(2, 1, 1, 1))
    own = net.get_submodule(cut.at.rpartition(".")[0])
    return Branched(net, ran[: ran.index(own)], cut.groups)


def with_net(
    bench: Bench, seed: int, net: nn.Module, method: Vote | None = None, tuned: bool = False
) -> Run:
    """A run of another net."""
    run = bench.run(seed, start=bench.run(seed).model.state_dict() if tuned else None)
    run.pruner.finalize()
    every = {name: losses.task_loss(name, task) for name, task in run.tasks.items()}
    optimizer = torch.optim.Adam(net.parameters(), run.options.lr, weight_decay=run.options.decay)
    pruner = MultitaskPruner(
        net,
        every,
        net.shared_modules(),
        method=method or Vote(0.0, schedule=OneShot(run.options.steps + 1)),  # never due
        optimizer=optimizer,
        seed=seed,
    )
    return replace(run, model=net, optimizer=optimizer, pruner=pruner)


def follow(bench: Bench, seed: int, cut: Cut, weights: int | None) -> tuple[list[Row], State]:
    """A net trained densely, then pruned and tuned.

    Args:
        bench: The bench.
        seed: Of weights and batches.
        cut: Where the net branches.
        weights: How many it keeps; the option's share of its own unless given.

    Returns:
        A row of each, and the dense weights.
    """
    net = branched(bench, seed, cut)
    run = with_net(bench, seed, net)
    bench.train(run)
    run.pruner.finalize()
    about: Row = {"line": cut.line, "at": cut.at, "groups": cut.groups, "seed": seed}
    about["parameters"] = sum(parameter.numel() for parameter in net.parameters())
    tested = bench.test(run)
    rows = [{**about, "stage": DENSE, "sparsity": 0.0, "kept": None, "found": tested}]
    state = {name: x.detach().clone() for name, x in net.state_dict().items()}
    total = run.pruner.report().parameters
    zeros = bench.options.zeros if weights is None else 1 - weights / total
    few = bench.trainer.observations
    run = with_net(bench, seed, net, Vote(zeros, observations=few), tuned=True)
    bench.prune(run)
    bench.train(run, start=bench.trainer.steps)
    about |= {"stage": PRUNED, "sparsity": bench.options.zeros, "kept": run.pruner.report().kept}
    return [*rows, {**about, "found": bench.test(run)}], state


def measure(bench: Bench) -> Found:
    """A row for each net, stage and seed, held against the net that shares everything."""
    rows, told = [], []
    for seed in bench.seeds:
        shared, state = follow(bench, seed, Cut("all shared", None, [bench.tasks]), None)
        null = bench.null(seed, bench.options.zeros, bench.options.draws, start=state)
        splits = suggest_split(null)
        best = splits.ranked[0]
        told.append({"seed": seed, "table": str(splits), "gains": splits.best is not None})
        alone = [[task] for task in bench.tasks]
        cuts = [
            Cut("where masks say", best.at, [list(tasks) for tasks in best.groups]),
            Cut("in the middle", splits.layers[len(splits.layers) // 2], alone),
            Cut("at the first layer", splits.layers[0], alone),
        ]
        kept = shared[1]["kept"]
        every = [shared, *(follow(bench, seed, cut, kept)[0] for cut in cuts)]
        base = {row["stage"]: row["found"] for row in shared}
        for row in chain.from_iterable(every):
            rows.append({**row, **change(row.pop("found"), base[row["stage"]])})
    return {"rows": rows, "suggestions": told}


def table(found: Found) -> str:
    """What was suggested, and the change from the net that shares everything."""
    parts = [f"Seed {one['seed']}:\n{one['table']}" for one in found["suggestions"]]
    for stage in (DENSE, PRUNED):
        rows = [row for row in found["rows"] if row["stage"] == stage]
        parts.append(f"{stage}, against the net that shares everything:")
        parts.append(changes(rows, "delta", "worst"))
        for name in names(rows, "line"):
            mine = [row for row in rows if row["line"] == name]
            sizes = ", ".join(f"{row['parameters']:,}" for row in mine)
            parts.append(f"{name}: {sizes} parameters")
    return "\n\n".join(parts)


def draw(found: Found) -> Figure:
    """The change of each net from the one that shares everything, each seed a dot."""
    figure, axes = picture(2, width=4.5)
    for one, stage in zip(axes, (DENSE, PRUNED), strict=True):
        rows: list[dict[str, Any]] = [row for row in found["rows"] if row["stage"] == stage]
        order = names(rows, "line")
        for row in rows:
            place = order.index(row["line"])
            one.plot(place, row["delta"], "o", color=COLORS[row["seed"] % len(COLORS)], ms=5)
        one.axhline(0, color="0.6", lw=0.8)
        one.set_xticks(range(len(order)), [name.replace(" ", "\n", 1) for name in order])
        one.set(title=stage)
    axes[0].set_ylabel("change from all shared, %")
    return figure


STUDY = Study("branching", "a trunk that branches where its masks say", add, measure, table, draw)
