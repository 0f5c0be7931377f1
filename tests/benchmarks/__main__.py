"""All benchmarks: ``python -m tests.benchmarks``, with ``--quick`` for a first look.

``python -m tests.benchmarks NAME ...`` runs some of them, or `peers`, which needs ``[peers]``.

A new row is a module here with ``run(settings) -> list[Row]``, and its name below.
"""

import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from tests.benchmarks.harness import Row, Settings, arguments, machine, report

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
    "latency",
    "architectures",
    "mixtures",
)


def run(settings: Settings, names: Sequence[str] = NAMES) -> list[Row]:
    rows = []
    for name in names:
        start = time.perf_counter()
        rows += import_module(f"tests.benchmarks.{name}").run(settings)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return rows


if __name__ == "__main__":
    given = arguments()
    rows = run(given.settings, given.names or NAMES)
    report(rows, given.settings, given.to)
    if given.page:
        import_module("tests.benchmarks.peers").write(Path(given.page), rows, machine())
