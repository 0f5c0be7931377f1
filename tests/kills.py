"""Kills: trainers that are killed while they write, again and again, and end as if they were not.

``python -m tests.kills --kills 25 --seed 0`` trains small nets on made-up data, kills each process
with SIGKILL in the midst of writing a file, resumes, and compares the end with a run that was never
killed, to the bit.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.tampering import alike

ROOT = Path(__file__).parents[1]

RUNS = {
    "vote": ["--method", "vote"],
    "adapmtl": ["--method", "adapmtl"],
    "disparse_dynamic": ["--method", "disparse_dynamic", "--backend", "inplace"],
    "best": ["--method", "best"],
}
"""Arguments of the census trainer."""

FEW = ["--steps", "12", "--width", "0.05", "--batch", "8", "--save-every", "2", "--device", "cpu"]

CODE = """
import os, signal, sys, warnings

warnings.simplefilter("ignore")
sys.path.insert(0, "examples")
from mtprune import files

left = int(sys.argv[1])
real_write, real_sync, real_replace = files._Remembering.write, os.fsync, os.replace

def dying(real):
    def call(*arguments):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    return call

if left:
    files._Remembering.write = dying(real_write)
    os.fsync, os.replace = dying(real_sync), dying(real_replace)

import census
from common import loop, results
from matplotlib.figure import Figure

results.draw = lambda found: Figure()
loop.main(census.PROBLEM, sys.argv[2:])
"""


def train(out: Path, data: Path, arguments: Sequence[str], dies_at: int) -> bool:
    """Train, or go on; whether the process was killed.

    Args:
        out: Where the run is.
        data: Where the data are.
        arguments: Of the trainer.
        dies_at: The call that writes at which it is killed; 0 for never.
    """
    where = ["--data", str(data), "--out", str(out), "--resume"]
    command = [sys.executable, "-c", CODE, str(dies_at), *where, *FEW, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"It ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.returncode == -signal.SIGKILL


def kill(name: str, kills: int, dice: random.Random, folder: Path) -> tuple[int, int]:
    """Kill a run so often; how often that happened, and how many runs ended otherwise for it."""
    data = folder / "data"
    whole = folder / name / "whole"
    train(whole, data, RUNS[name], 0)
    expected = torch.load(whole / "model.pt", weights_only=True)
    done, wrong, number = 0, 0, 0
    while done < kills:
        number += 1
        out = folder / name / f"killed{number}"
        killed = True
        while killed:
            killed = train(out, data, RUNS[name], dice.randint(1, 400) if done < kills else 0)
            done += killed
        found = torch.load(out / "model.pt", weights_only=True)
        tested = [json.loads((one / "results.json").read_text())["test"] for one in (whole, out)]
        wrong += not alike(expected, found) or tested[0] != tested[1]
        left = [path.name for path in out.iterdir() if path.name.endswith(".part")]
        print(f"{name}: {done} kills so far, {len(left)} drafts left", flush=True)
    return done, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill; 1 if some run ended otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills")
    parser.add_argument("--kills", type=int, default=25, help="how many, at least")
    parser.add_argument("--seed", type=int, default=0, help="of when")
    options = parser.parse_args(arguments)
    dice = random.Random(options.seed)
    sys.path.insert(0, str(ROOT / "examples"))
    from common import fixture

    names = list(RUNS)[: max(1, min(len(RUNS), options.kills))]
    kills = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        fixture.write("census", Path(folder) / "data")
        for name in names:
            done, bad = kill(name, -(-options.kills // len(names)), dice, Path(folder))
            kills, wrong = kills + done, wrong + bad
    print(f"{kills} kills while writing: {wrong} runs ended otherwise than without")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
