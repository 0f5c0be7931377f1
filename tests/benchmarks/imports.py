"""What `import mtprune` costs when torch is there already, and the first pruner after it."""

import subprocess
import sys
from statistics import median

from tests.benchmarks.harness import ROOT, Row, Settings, main

CODE = """
import time, numpy, torch
before = time.process_time()
import mtprune
print(time.process_time() - before)
before = time.process_time()
mtprune.MultitaskPruner, mtprune.Vote
print(time.process_time() - before)
"""


def run(settings: Settings) -> list[Row]:
    pairs = [
        subprocess.run(
            [sys.executable, "-c", CODE], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(settings.repeats)
    ]
    rows = []
    for i, (what, target) in enumerate(
        (("`import mtprune`", 30), ("`mtprune.MultitaskPruner` for the first time", None))
    ):
        times = [float(pair[i]) for pair in pairs]
        spent = median(times) * 1000
        rows.append(Row(what, "torch imported", spent, target, "ms", {"cpu seconds": times}))
    return rows


if __name__ == "__main__":
    main(run)
