"""All benchmarks: ``python -m tests.benchmarks``, with ``--quick`` for a first look.

A new row is a module here with ``run(settings) -> list[Row]``, and its name below.
"""

import sys
import time
from importlib import import_module

from tests.benchmarks.harness import Row, Settings, arguments, report

NAMES = (
    "imports",
    "observe",
    "observe_memory",
    "selection",
    "step",
    "sharded",
    "dynamic",
    "memory",
    "growth",
    "options",
    "refit",
    "compress",
    "architectures",
)


def run(settings: Settings) -> list[Row]:
    rows = []
    for name in NAMES:
        start = time.perf_counter()
        rows += import_module(f"tests.benchmarks.{name}").run(settings)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return rows


if __name__ == "__main__":
    settings, to = arguments()
    report(run(settings), settings, to)
