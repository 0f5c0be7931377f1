"""``python -m tests.site.pictures`` draws the pictures of the pages that explain the idea.

Rankings, votes and masks are those of a real pruner on a small network; `main` makes sure of it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

import mtprune

DOCS = Path(__file__).parents[2] / "docs"
INPUTS, HIDDEN, SPARSITY = 20, 12, 0.7
BOTH, LEFT, RIGHT, GONE = "#0b3d70", "#5b8cc0", "#d98a3d", "#e9ecf1"


class Net(nn.Module):
    """A trunk, and a head for each of two tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(INPUTS, HIDDEN)
        self.seg, self.depth = nn.Linear(HIDDEN, 3), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``{task: output}``."""
        hidden = self.trunk(x).relu()
        return {"seg": self.seg(hidden), "depth": self.depth(hidden)}


def percentiles(net: Net, losses: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """How much of what a task uses it finds less salient, for each weight of the trunk."""
    found = {}
    for task, loss in losses.items():
        weights = [net.trunk.weight, net.get_submodule(task).weight]
        grads = torch.autograd.grad(loss(net(batch["x"]), batch), weights)
        scores = [(w * g).abs().detach() for w, g in zip(weights, grads, strict=True)]
        everything = torch.cat([score.flatten() for score in scores]).sort().values
        below = torch.searchsorted(everything, scores[0].flatten())
        found[task] = (below / len(everything)).view_as(scores[0])
    return found


def heat(place: Axes, values: Tensor, title: str) -> None:
    """Percentiles: dark is what a task wants most."""
    place.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    dressed(place, title)


def dressed(place: Axes, title: str) -> None:
    """A matrix without ticks."""
    place.set_title(title, fontsize=10)
    place.set_xticks([])
    place.set_yticks([])


def draw_vote(ranked: dict[str, Tensor], worth: Tensor, mask: Tensor) -> Figure:
    """Two rankings, the vote, the mask."""
    figure = Figure(figsize=(10, 2.2), layout="constrained")
    places = figure.subplots(1, 4)
    heat(places[0], ranked["seg"], "how seg ranks the weights")
    heat(places[1], ranked["depth"], "how depth ranks them")
    heat(places[2], worth, "the vote: the higher of the two")
    places[3].imshow(
        mask.numpy(), cmap=ListedColormap([GONE, BOTH]), vmin=0, vmax=1, aspect="equal"
    )
    dressed(places[3], "the mask: the best of them all")
    return figure


def draw_kept(mask: Tensor, alone: dict[str, Tensor]) -> Figure:
    """For whom each kept weight stays."""
    seg, depth = (alone[task] & mask for task in ("seg", "depth"))
    kinds = torch.zeros(mask.shape, dtype=torch.int64)
    kinds[seg & depth], kinds[seg & ~depth], kinds[depth & ~seg] = 1, 2, 3
    kinds[mask & ~seg & ~depth] = 4
    names = ["pruned", "both tasks", "seg alone", "depth alone", "neither alone"]
    colors = [GONE, BOTH, LEFT, RIGHT, "#8a8f98"]
    figure = Figure(figsize=(7, 3), layout="constrained")
    place = figure.subplots()
    place.imshow(kinds.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=4, aspect="equal")
    dressed(place, "who would keep each weight of the trunk")
    counts = np.bincount(kinds.flatten().numpy(), minlength=5)
    for color, name, count in zip(colors, names, counts, strict=True):
        if count:
            place.scatter([], [], marker="s", color=color, label=f"{name}: {count}")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def draw_loop() -> Figure:
    """Where the calls sit in a step of training."""
    figure = Figure(figsize=(10, 1.9), layout="constrained")
    place = figure.subplots()
    steps = [
        ("forward", "yours", "outputs, with their graph"),
        ("observe", "mtprune", "each loss, as it is; when an\nupdate is near, a sweep per task"),
        ("backward", "yours", "any sum of the losses,\nor gradient surgery"),
        ("optimizer.step", "yours", "pruned weights\nstay zero"),
        ("step", "mtprune", "every so often: rank,\nvote, new masks"),
    ]
    for i, (name, whose, what) in enumerate(steps):
        ours = whose == "mtprune"
        face, ink = (BOTH, "white") if ours else (GONE, "#1d2430")
        box = FancyBboxPatch((2 * i, 0.9), 1.5, 0.7, boxstyle="round,pad=0.06", fc=face, ec="none")
        place.add_patch(box)
        place.text(2 * i + 0.75, 1.25, name, color=ink, ha="center", va="center", fontsize=11)
        place.text(2 * i + 0.75, 0.68, what, ha="center", va="top", fontsize=8.5, color="#4a5160")
        if i:
            place.annotate(
                "", (2 * i - 0.08, 1.25), (2 * i - 0.42, 1.25), arrowprops={"arrowstyle": "->"}
            )
    place.set(xlim=(-0.3, 9.8), ylim=(0.25, 1.75))
    place.axis("off")
    return figure


def main(out: Path = DOCS) -> None:
    """Draw all of them."""
    torch.manual_seed(0)
    net = Net()
    batch = {"x": torch.randn(64, INPUTS), "seg": torch.randint(3, (64,)), "depth": torch.rand(64)}
    losses = {
        "seg": lambda y, b: nn.functional.cross_entropy(y["seg"], b["seg"]),
        "depth": lambda y, b: (y["depth"].squeeze(1) - b["depth"]).square().mean(),
    }
    ranked = percentiles(net, losses, batch)
    worth = mtprune.votes.unanimous(torch.stack(list(ranked.values())))
    method = mtprune.Vote(SPARSITY, allocation="global")
    pruner = mtprune.MultitaskPruner(net, losses, [net.trunk], method=method)
    pruner.prune([batch], forward=lambda model, b: model(b["x"]), progress=False)
    mask = pruner.masks["trunk.weight"]
    assert worth[mask].min() >= worth[~mask].max(), "the pruner ranks otherwise"
    alone = {task: masks["trunk.weight"] for task, masks in pruner.task_masks.items()}
    for name, figure in {
        "vote": draw_vote(ranked, worth, mask),
        "kept": draw_kept(mask, alone),
        "loop": draw_loop(),
    }.items():
        figure.savefig(out / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
