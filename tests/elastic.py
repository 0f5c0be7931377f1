"""Elastic: runs of two ranks, one of which is killed again and again, end as if none had been.

``python -m tests.elastic --kills 25 --seed 0`` has ``torchrun`` train a small net, once without
trouble and once more with a plan of SIGKILLs: of either rank, in the midst of observing, of the
backward, of an update of masks, or of writing a checkpoint. ``torchrun`` starts all ranks anew,
they go on from the last checkpoint, and the end is compared with that without trouble, to the bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from mtprune import Cubic, Vote, files, saliency
from tests.ranks import ROOT
from tests.sharded import Loop, quiet, shard

PHASES = ("observe", "backward", "update", "save")
SPREAD = {"fsdp": shard, "ddp": DistributedDataParallel}
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    # Else ranks that are started anew find the addresses of those before in torchrun's own store.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Fate:
    """When this rank dies: at the n-th call that counts within a phase, once for each of a plan.

    Args:
        folder: Where deaths are remembered.
        rank: This rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank
        self._phase = ""
        self._calls = 0
        plan = json.loads((folder / "plan.json").read_text())
        died = len(list(folder.glob("died-*")))
        self._number = died
        self._next = plan[died] if died < len(plan) else None

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def call(self) -> None:
        """One more call, after which this rank may be no more."""
        if self._next is None or self._next[:2] != [self._rank, self._phase]:
            return
        self._calls += 1
        if self._calls == self._next[2]:
            (self._folder / f"died-{self._number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def over(self, owner: Any, name: str) -> None:
        """Let calls of a function count."""
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.call()
            return real(*arguments, **options)

        setattr(owner, name, call)


class Run(Loop):
    """A loop that saves after each step, and goes on where it was."""

    def __init__(self, way: str, steps: int, to: Path, fate: Fate | None = None) -> None:
        method = Vote(
            0.7,
            schedule=Cubic(begin=2, end=steps, every=3),
            observations=2,
            saliency=saliency.fisher,
        )
        super().__init__(method, dist.get_rank(), dist.get_world_size(), spread=SPREAD[way])
        self.to, self.fate, self.end = to, fate, steps
        if to.exists():
            state = files.read_torch(to)
            set_state_dict(
                self.net,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=WHOLE,
            )
            self.pruner.load_state_dict(state["pruner"])
            self.steps = state["steps"]

    def go(self) -> dict[str, Any]:
        if self.fate is not None:
            fate = self.fate
            pruner = self.pruner
            for verb, phase in (("observe_losses", "observe"), ("step", "update")):
                setattr(pruner, verb, _during(fate, phase, getattr(pruner, verb)))

            def hook(module: Any, inputs: Any, outputs: Any) -> None:
                outputs["a"].register_hook(lambda _: fate.call())

            self.model.register_forward_hook(hook)
            self.step = _during(fate, "backward", self.step)  # type: ignore[method-assign]
            self.save = _during(fate, "save", self.save)  # type: ignore[method-assign]
        while self.steps < self.end:
            self.step()
            self.save()
        masks, weights = self.masks(), self.weights()
        return {"masks": masks, "weights": weights}

    def save(self) -> None:
        model, optimizer = get_state_dict(self.net, self.optimizer, options=WHOLE)
        pruner = self.pruner.state_dict()
        state = {"model": model, "optimizer": optimizer, "pruner": pruner, "steps": self.steps}
        if self.rank == 0:
            files.write_torch(self.to, state)
        dist.barrier()


def _during(fate: Fate, phase: str, call: Any) -> Any:
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with fate.within(phase):
            fate.call()
            return call(*arguments, **options)

    return wrapped


def live(folder: Path, way: str, steps: int) -> None:
    """The life of a rank: without trouble, if nobody has yet, and then with it."""
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if not (folder / "done").exists():
        files.remove_drafts(folder)
        ends = Run(way, steps, folder / "whole.pt").go()
        torch.save(ends, folder / f"expected-{rank}.pt")
        dist.barrier()
        (folder / "done").touch()
    fate = Fate(folder, rank)
    for name in ("all_reduce", "all_gather", "barrier", "broadcast"):
        fate.over(dist, name)
    fate.over(files._Remembering, "write")
    ends = Run(way, steps, folder / "killed.pt", fate).go()
    torch.save(ends, folder / f"found-{rank}.pt")
    dist.destroy_process_group()


def draw(kills: int, seed: int) -> list[tuple[int, str, int]]:
    """A plan: which rank dies, in which phase, at which call in it; every phase and either rank."""
    dice = random.Random(seed)
    every = [(rank, phase) for phase in PHASES for rank in (0, 1)]
    chosen = [every[i % len(every)] for i in range(kills)]
    dice.shuffle(chosen)
    return [(rank, phase, dice.randint(1, 6)) for rank, phase in chosen]


def run(folder: Path, plan: Sequence[tuple[int, str, int]], way: str) -> tuple[int, bool]:
    """Let ``torchrun`` train; how often it was killed, and whether its end is that without.

    Args:
        folder: An empty one.
        plan: The deaths; see `draw`.
        way: How the model is spread, ``"fsdp"`` or ``"ddp"``.
    """
    (folder / "plan.json").write_text(json.dumps(plan))
    steps = 2 * len(plan) + 8
    agent = ["--standalone", "--nproc-per-node=2", f"--max-restarts={len(plan)}"]
    script = ["-m", "tests.elastic", "--rank-of", str(folder), "--way", way, "--steps", str(steps)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *agent, *script],
        cwd=ROOT,
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"It ended with {done.returncode}: {done.stderr[-4000:]}")
    alike = True
    for rank in (0, 1):
        expected, found = (
            torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
            for name in ("expected", "found")
        )
        for part, tensors in expected.items():
            alike &= tensors.keys() == found[part].keys()
            alike &= all(torch.equal(found[part][name], x) for name, x in tensors.items())
        zeros = sum(int((~mask).sum()) for mask in expected["masks"].values())
        assert zeros, "Nothing was pruned."
    return len(list(folder.glob("died-*"))), alike


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill; 1 if some run ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.elastic")
    parser.add_argument("--kills", type=int, default=25, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of when")
    parser.add_argument("--way", choices=SPREAD, default="fsdp", help="how the model is spread")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of is not None:
        try:
            live(options.rank_of, options.way, options.steps)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # a group that lacks a rank may wait for it at the end of a process
        return 0
    plan = draw(options.kills, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        kills, alike = run(Path(folder), plan, options.way)
    of = {rank: sum(one == rank for one, *_ in plan[:kills]) for rank in (0, 1)}
    within = {phase: sum(one[1] == phase for one in plan[:kills]) for phase in PHASES}
    wrong = 0 if alike and kills == options.kills else 1
    print(
        f"{kills} kills of {options.way} with 2 ranks, {of[0]} and {of[1]} of each, "
        f"{within}: {'the same end' if alike else 'ANOTHER END'} as without"
    )
    return wrong


if __name__ == "__main__":
    sys.exit(main())
