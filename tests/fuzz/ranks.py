"""Ranks: several processes with other batches, other tasks, or a call that one of them misses."""

import os
import random
import tempfile
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtprune import Cubic, LowRank, MultitaskPruner, OneShot, SoftThreshold, Vote, recipes, saliency
from tests.fuzz.engine import Case, Outcome
from tests.fuzz.random_nets import Loss, RandomNet, draw_net, inputs, simpler_nets

METHODS = {
    "vote": lambda: Vote(0.6, schedule=OneShot(2)),
    "gradual": lambda: Vote(0.6, schedule=Cubic(begin=1, end=5, every=2), observations=2),
    "joint": lambda: Vote(0.6, schedule=OneShot(2), disentangled=False),
    "voters": lambda: Vote(0.6, schedule=OneShot(2), voters=(saliency.magnitude,)),
    "soft": lambda: SoftThreshold(0.6, schedule=Cubic(begin=2, end=6, every=2)),
    "rank": lambda: LowRank(0.6, schedule=OneShot(2)),
    "movement": lambda: recipes.movement(0.6, 6),
}
STEPS = 6
PATIENCE = 4.0
PLAIN = ("linear", "relu", "residual", "twice", "tied", "norm", "attention", "conv", "single")


class Ranks:
    """Two to four processes."""

    def draw(self, dice: random.Random) -> Case:
        """A net, a method, and who has what."""
        net = draw_net(dice)
        net["pieces"] = [dice.choice(PLAIN) for _ in net["pieces"]]
        return {
            "net": net,
            "world": dice.choice((2, 2, 3, 4)),
            "method": dice.choice(list(METHODS)),
            "backend": dice.choice(("prune", "inplace")),
            "shares": dice.choice(("all", "all", "some")),
            "missed": dice.choice((None, None, None, "observe", "step")),
            "seed": dice.randint(0, 10**6),
        }

    def run(self, case: Case) -> Outcome:
        """Run all ranks, and compare them with one another and with one process."""
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(case["world"]):
                child = os.fork()
                if not child:
                    _live(case, rank, Path(folder))
                children.append(child)
            for child in children:
                os.waitpid(child, 0)
            said = [torch.load(f"{folder}/{rank}.pt") for rank in range(case["world"])]
        errors = [one["error"] for one in said]
        if case["missed"] is not None:
            return _missed(case, errors)
        if any(errors):
            text = next(error for error in errors if error)
            ours = all(error.startswith(("RuntimeError: ", "ValueError: ")) for error in errors)
            # What one process is told, all ranks must be told.
            alone = train(case, None)["error"]
            same = ours and alone.split(":")[0] == text.split(":")[0]
            return Outcome("refused" if same else "raw", f"{errors}; alone: {alone}"[:800])
        first = said[0]["masks"]
        for one in said[1:]:
            if any(not torch.equal(one["masks"][name], mask) for name, mask in first.items()):
                return Outcome("wrong", "ranks have other masks")
        alone = train(case, None)
        if alone["error"]:
            return Outcome("wrong", f"alone: {alone['error']}")
        off = sum(int((alone["masks"][name] != mask).sum()) for name, mask in first.items())
        if off:
            return Outcome("wrong", f"{off} bits are not those of one process")
        return Outcome("passed")

    def simpler(self, case: Case) -> Iterable[Case]:
        """Smaller nets, fewer ranks."""
        for net in simpler_nets(case["net"]):
            yield {**case, "net": net}
        if case["world"] > 2:
            yield {**case, "world": 2}


def _missed(case: Case, errors: list[str]) -> Outcome:
    """Where the last rank misses a call: others are told within the time-out, in our words."""
    words = ("Ranks are in different calls", "and not every rank did within", "is due but")
    others = errors[:-1]
    if all(any(word in error for word in words) for error in others):
        return Outcome("refused", others[0])
    if len(set(errors)) == 1 and errors[0].startswith("RuntimeError: "):
        return Outcome("refused", errors[0])  # before it came to that
    return Outcome("wrong", f"a call was missed, and ranks were told {errors}"[:800])


def having(case: Case, task: int, rank: int, at: int) -> bool:
    """Whether a rank's batch of a step has a task; some rank always does."""
    if case["shares"] == "all":
        return True
    dice = random.Random(f"{case['seed']} {task} {at}")
    ranks = dice.sample(range(case["world"]), dice.randint(1, case["world"]))
    return rank in ranks


def train(case: Case, rank: int | None) -> dict[str, Any]:
    """The masks of a rank, or of one process that has all batches, or what it was told."""
    torch.manual_seed(0)
    model = RandomNet(case["net"]).double()
    tasks = {task: Loss(task) for task in model.places}
    try:
        pruner = MultitaskPruner(
            model, tasks, method=METHODS[case["method"]](), backend=case["backend"]
        )
        for at in range(STEPS):
            ranks = range(case["world"]) if rank is None else [rank]
            losses = {}
            for number, task in enumerate(tasks):
                mine = [
                    Loss(task).of(model(inputs(97 * at + r, 4).double())[task])
                    for r in ranks
                    if having(case, number, r, at)
                ]
                if mine:
                    losses[task] = torch.stack(mine).mean()
            # An update is due after this step, or is being observed for, whatever the method.
            late = at == 1 and rank == case["world"] - 1
            if not (late and case["missed"] == "observe"):
                pruner.observe_losses(losses)
            if late and case["missed"] == "step":
                time.sleep(PATIENCE + 2.0)
                return {"error": "", "masks": {}}
            pruner.step()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "masks": {}}
    return {"error": "", "masks": pruner.masks}


def _live(case: Case, rank: int, folder: Path) -> None:
    """The life of a rank."""
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meet",
            rank=rank,
            world_size=case["world"],
            timeout=timedelta(seconds=PATIENCE if case["missed"] else 50.0),
        )
        found = train(case, rank)
    except Exception:
        found = {"error": traceback.format_exc(), "masks": {}}
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)
