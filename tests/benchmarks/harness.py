"""What all benchmarks share: settings, interleaved timing, peaks of memory, and how rows print.

Times are medians of repetitions in which A and B take turns, so that what else the machine does
hits both alike; ratios are medians of the ratios of neighbours, with their quartiles. A row is one
line of the table in ``docs/results/speed.md``.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

import mtprune

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """How much to measure.

    Attributes:
        size: Of the nets: ``"full"``, ``"quick"`` or ``"toy"``.
        repeats: How often everything is timed.
        threads: Numbers of threads to time with.
    """

    size: str = "full"
    repeats: int = 7
    threads: tuple[int, ...] = (1, 2)

    @property
    def alone(self) -> bool:
        """Whether memory is measured in a process of its own; a toy is only tried out."""
        return self.size != "toy"


DEVICE = "MTPRUNE_TEST_DEVICE"
"""The variable that says where nets live, as for the tests; ``--device`` sets it."""


def device() -> torch.device:
    """Where nets and scores are. A process of its own, for memory, finds the same."""
    return torch.device(os.environ.get(DEVICE, "cpu"))


QUICK = Settings("quick", 5, (1,))
TOY = Settings("toy", 1, (1,))


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        what: What was measured.
        against: What it is compared with.
        value: The measured number.
        target: The largest value aimed at, or None where there is none.
        unit: Of both; ``"x"`` for a ratio.
        detail: Everything else, for the JSON file.
    """

    what: str
    against: str
    value: float
    target: float | None = None
    unit: str = "x"
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return None if self.target is None else round(self.value, 4) <= self.target


def interleaved(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> dict[str, Any]:
    """Times of two functions that take turns, and how many times the first's the second's are.

    On an accelerator both clocks are the one on the wall, read when it is done.
    """
    on_cpu = device().type == "cpu"
    first(), second()
    times: dict[str, list[float]] = {"cpu": [], "wall": []}
    for turn in range(repeats):
        pair = {}
        for name, function in (
            (("a", first), ("b", second)) if turn % 2 else (("b", second), ("a", first))
        ):
            gc.collect()
            _wait()
            cpu, wall = time.process_time(), time.perf_counter()
            function()
            _wait()
            passed = time.perf_counter() - wall
            pair[name] = (time.process_time() - cpu if on_cpu else passed, passed)
        for i, clock in enumerate(("cpu", "wall")):
            times[clock].append(pair["a"][i])
            times[clock + " of the other"] = [*times.get(clock + " of the other", []), pair["b"][i]]
    result: dict[str, Any] = {}
    for clock in ("cpu", "wall"):
        mine, other = times[clock], times[clock + " of the other"]
        ratios = [b / max(a, 1e-9) for a, b in zip(mine, other, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        result[clock] = {
            "first_s": median(mine),
            "second_s": median(other),
            "ratio": median(ratios),
            "quartiles": [low, high],
        }
    return result


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak(function: Callable[[], object]) -> int:
    """By how many bytes memory rises, at its highest, while a function runs."""
    gc.collect()
    if device().type == "cuda":
        return _on_device(function)[1]
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest so far is that of now
    except OSError:
        return -1
    function()
    return _status("VmHWM") - before


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch holds more of when a function is done, and at the highest meanwhile."""
    if device().type == "cuda":
        return _on_device(function)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        held = function()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = highest = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        highest = max(highest, level)
    del held
    return level, highest


def _on_device(function: Callable[[], object]) -> tuple[int, int]:
    """`allocated`, as the device's own allocator counts."""
    gc.collect()
    _wait()
    torch.cuda.reset_peak_memory_stats(device())
    before = torch.cuda.memory_allocated(device())
    held = function()
    _wait()
    level = torch.cuda.memory_allocated(device()) - before
    highest = torch.cuda.max_memory_allocated(device()) - before
    del held
    return level, highest


def _wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize(device())


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not known here")


def isolated(settings: Settings, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, as JSON, in a process of its own that gives freed memory back."""
    if not settings.alone:
        return function(*args)
    module = f"{__package__}.{Path(function.__code__.co_filename).stem}"  # not "__main__"
    call = (
        "import json, sys; from importlib import import_module; "
        f"found = import_module({module!r}).{function.__name__}(*json.loads(sys.argv[1])); "
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", call, json.dumps(args)],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


PEERS = ("onnx", "onnxruntime", "openvino", "torchao")


def packages() -> dict[str, str]:
    """The versions of other runtimes, as far as they are there."""
    found = {}
    for name in PEERS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on; no names, no places."""
    info = Path("/proc/cpuinfo")
    models = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "device": str(device()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "mtprune": mtprune.__version__,
        "packages": packages(),
        "load": os.getloadavg()[0],
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = ["| what | against | measured | target | |", "|---|---|---|---|---|"]
    for row in rows:
        unit = "x" if row.unit == "x" else " " + row.unit
        verdict = {True: "met", False: "**missed**", None: ""}[row.met]
        goal = "" if row.target is None else f"<= {row.target:g}{unit}"
        lines.append(f"| {row.what} | {row.against} | {row.value:.4g}{unit} | {goal} | {verdict} |")
    return "\n".join(lines)


def report(rows: Sequence[Row], settings: Settings, to: str | None) -> None:
    """Print rows, and write them as JSON if asked to."""
    print(table(rows))
    print()
    print(json.dumps(machine()), f"size={settings.size} repeats={settings.repeats}")
    if to:
        found = [{**asdict(row), "met": row.met} for row in rows]
        record = {"machine": machine(), "settings": asdict(settings), "rows": found}
        Path(to).write_text(json.dumps(record, indent=1) + "\n")


def main(run: Callable[[Settings], list[Row]]) -> None:
    """The command line of a benchmark."""
    given = arguments()
    report(run(given.settings), given.settings, given.to)


@dataclass(frozen=True)
class Given:
    """What the command line says.

    Attributes:
        settings: How much to measure.
        to: The file for the rows as JSON.
        names: The benchmarks to run; none for the usual ones.
        page: The page whose tables are to be written.
    """

    settings: Settings
    to: str | None
    names: Sequence[str]
    page: str | None


def arguments() -> Given:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="which benchmarks; the usual ones unless given")
    parser.add_argument("--page", help="write the page of `peers` there")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads to time with")
    parser.add_argument("--quick", action="store_true", help="smaller nets, fewer repetitions")
    parser.add_argument("--toy", action="store_true", help="only whether it runs")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--device", help='where nets live, "cuda" for instance')
    given = parser.parse_args()
    if given.device:
        os.environ[DEVICE] = given.device
    settings = TOY if given.toy else QUICK if given.quick else Settings()
    if given.repeats:
        settings = Settings(settings.size, given.repeats, settings.threads)
    if given.threads:
        settings = Settings(settings.size, settings.repeats, tuple(given.threads))
    return Given(settings, given.json, given.names, given.page)
