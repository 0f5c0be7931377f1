"""Endless: a run of very many steps holds no more memory in the end than near its beginning.

``python -m tests.endless --steps 100000`` trains a tiny net with an update of masks every 20 steps,
a tracker, a checkpoint and a report now and then, and tells what is held on the way.
"""

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtprune import MultitaskPruner, Regrow, SoftThreshold, Vote
from mtprune.methods import Method

EVERY = 20


@dataclass(frozen=True)
class Held:
    """What a process holds at a step.

    Attributes:
        step: The step.
        objects: How many objects Python's collector knows.
        tensors: How many of them are tensors.
        resident: Memory in MiB; 0 where that is not known.
    """

    step: int
    objects: int
    tensors: int
    resident: float


def held(step: int) -> Held:
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(type(x) in (torch.Tensor, nn.Parameter) for x in objects)
    return Held(step, len(objects), tensors, resident())


def resident() -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS:")), 0.0)


class Last:
    """A tracker that keeps what came last."""

    values: Mapping[str, Any] = {}

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.values = values


def methods(steps: int) -> dict[str, Method[Any]]:
    return {
        "regrow": Vote(0.8, allocation="erk", schedule=Regrow(every=EVERY, end=steps)),
        "soft": SoftThreshold(0.8),
    }


def run(name: str, steps: int, marks: int = 5) -> list[Held]:
    """What is held at some steps, evenly spread, the last of them at the end."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    tasks = {
        "a": lambda y, x: (y[:, 0] - x.sum(1)).square().mean(),
        "b": lambda y, x: (y[:, 1] - x.prod(1)).square().mean(),
    }
    method = methods(steps)[name]
    pruner = MultitaskPruner(net, tasks, method=method, optimizer=optimizer)
    pruner.track(Last(), every=EVERY)
    found = []
    for step in range(1, steps + 1):
        x = torch.randn(4, 8)
        optimizer.zero_grad()
        pruner.weigh(pruner.observe(net(x), x)).backward()
        optimizer.step()
        pruner.step()
        if step % (50 * EVERY) == 0:
            pruner.load_state_dict(pruner.state_dict())
            pruner.report()
        if step % (steps // marks) == 0:
            found.append(held(step))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and print what is held."""
    parser = argparse.ArgumentParser(prog="python -m tests.endless")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--method", choices=methods(1), default="regrow")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for one in run(options.method, options.steps):
        print(
            f"{one.step:7,} steps: {one.objects:,} objects, {one.tensors} tensors, "
            f"{one.resident:.1f} MiB",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
