"""Fuzz: ``python -m tests.fuzz --cases 2000 --seed 0 train``.

Targets are ``train``, ``compress``, ``ranks`` and ``files-KIND`` for states, models, plans,
trainers and pretrained models. With ``--out`` every outcome is a line of a file, and a run that was
stopped goes on. A failure is printed as the simplest case that still fails; ``--case`` runs it.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
import torch._dynamo  # optimizers load it at their first step: once is enough for all cases

from tests.fuzz.engine import GOOD, KINDS, Target, fuzz, judged

TARGETS = {
    "train": "train:Train",
    "compress": "compress:Compress",
    "pruned": "pruned:Pruned",
    "ranks": "ranks:Ranks",
    "files-states": "files:States",
    "files-models": "files:Models",
    "files-plans": "files:Plans",
    "files-trainers": "files:Trainers",
    "files-pretrained": "files:Pretrained",
}


def target_of(name: str) -> Target:
    """A target, ready to run cases in processes that are forked from this one."""
    module, _, kind = TARGETS[name].partition(":")
    target: Target = getattr(import_module(f"tests.fuzz.{module}"), kind)()
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 if something was not as it must be."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--cases", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a case may take")
    parser.add_argument("--out", type=Path, help="a file of outcomes, to go on from")
    parser.add_argument("--case", type=json.loads, help="run this one, in this process")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target = target_of(options.target)
    if options.case is not None:
        try:
            outcome = target.run(options.case)
        except Exception as error:
            outcome = judged(error)
            raise
        finally:
            print(outcome)
        return int(outcome.kind not in GOOD)
    counts = fuzz(
        target, cases=options.cases, seed=options.seed, out=options.out, limit=options.limit
    )
    told = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
    print(f"{options.target}: {options.cases} cases: {told}")
    return int(any(counts[kind] for kind in KINDS if kind not in GOOD))


if __name__ == "__main__":
    sys.exit(main())
