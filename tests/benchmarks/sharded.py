"""`observe` under `fully_shard` against the same sweeps without us, and what an update sends.

Two gloo ranks on this machine, which take the cores from each other: ratios, not times, tell. The
other side runs the same forward, and a backward for each task whose gradients `fully_shard` reduces
by itself; they are dropped, as ours are.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtprune import MultitaskPruner, OneShot, SoftThreshold, Vote
from tests.benchmarks.harness import Row, Settings, interleaved, main
from tests.ranks import device_of, on_ranks
from tests.sharded import TASKS, quiet, shard, watched

SIZES = {"full": (256, 4), "quick": (128, 2), "toy": (16, 1)}  # width, layers
SETTINGS = "MTPRUNE_BENCHMARK"
HERE = "tests.benchmarks.sharded"  # also when it is run by its name


class Encoder(nn.Module):
    """Blocks of a transformer, and two heads."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width, 10) for task in TASKS})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.trunk:
            x = layer(x)
        return {task: head(x).square().mean() for task, head in self.heads.items()}


def run(settings: Settings) -> list[Row]:
    os.environ[SETTINGS] = json.dumps([settings.size, settings.repeats])
    with tempfile.TemporaryDirectory() as folder:
        times = on_ranks(HERE, "pair", Path(folder))[0]
    return [
        Row(
            "`observe` under `fully_shard`, K = 2, 2 ranks",
            "forward and K backwards of `fully_shard`",
            times["cpu"]["ratio"],
            1.10,
            detail=times,
        )
    ]


def pair(rank: int, world: int) -> dict[str, Any]:
    quiet()
    size, repeats = json.loads(os.environ[SETTINGS])
    width, depth = SIZES[size]
    net = shard(Encoder(width, depth).to(device_of(rank)))
    x = torch.randn(4, 32, width, device=device_of(rank))
    # Always near an update, and who uses what stays unsettled, so that reach is looked at as well.
    pruner = MultitaskPruner(
        net, TASKS, "trunk", method=Vote(0.9, observations=10**6), backend="inplace"
    )

    def bare() -> None:
        for loss in net(x).values():
            loss.backward(retain_graph=True)
            net.zero_grad()

    def observed() -> None:
        pruner.observe_losses(net(x))

    return interleaved(bare, observed, repeats)


def messages(rank: int, world: int) -> dict[str, Any]:
    """What one observation, and one update, send from this rank: calls and bytes by collective."""
    quiet()
    net = shard(Encoder(*SIZES[json.loads(os.environ[SETTINGS])[0]]).to(device_of(rank)))
    x = torch.randn(4, 32, net.heads["a"].in_features, device=device_of(rank))
    found: dict[str, Any] = {"weights": sum(p.numel() for p in net.parameters())}
    for name, method in {
        "vote": Vote(0.9),
        "soft": SoftThreshold(0.9, schedule=OneShot(0)),
    }.items():
        pruner = MultitaskPruner(net, TASKS, "trunk", method=method, backend="inplace")
        losses = net(x)
        with watched() as sent:
            pruner.observe_losses(losses)
            found[f"{name}, observe"] = totals(sent)
        with watched() as sent:
            pruner.step()
            found[f"{name}, step"] = totals(sent)
        pruner.finalize()
    return found


def totals(sent: list[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, size in sent:
        calls, bytes_ = found.get(name, [0, 0])
        found[name] = [calls + 1, bytes_ + size]
    return found


def show() -> None:
    """The table of ``docs/distributed.md``."""
    os.environ.setdefault(SETTINGS, '["full", 1]')
    for world in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            print(world, json.dumps(on_ranks(HERE, "messages", Path(folder), world=world)[0]))


if __name__ == "__main__":
    main(run)
