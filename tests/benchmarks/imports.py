"""How long `import mtprune` takes when torch is there already."""

import subprocess
import sys
from statistics import median

from tests.benchmarks.harness import ROOT, Row, Settings, main

CODE = """
import time, numpy, torch
before = time.perf_counter()
import mtprune
print(time.perf_counter() - before)
"""


def run(settings: Settings) -> list[Row]:
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", CODE], cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(settings.repeats)
    ]
    spent = median(times) * 1000
    return [Row("`import mtprune`", "torch imported", spent, 50, "ms", {"seconds": times})]


if __name__ == "__main__":
    main(run)
