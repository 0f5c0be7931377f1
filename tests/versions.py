"""The fast tests with other versions of what mtprune stands on: ``python -m tests.versions``.

One axis at a time, each in an environment of its own: every torch of ``TORCHES``, every Python of
``PYTHONS`` that this machine has, and all dependencies and extras at their lower bounds in
``setup.cfg``. What came of it is kept beside the environments, so that a run that was stopped goes
on, and written to ``docs/versions.md``. ``--update`` writes ``constraints.txt`` anew, with the
newest versions of everything.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

from mtprune.files import write_text

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.6", "2.9", "2.13")
_TORCH = TORCHES[-1]
_HERE = ".".join(platform.python_version_tuple()[:2])
_SUMMARY = re.compile(r"(\d+) (passed|failed|errors?|skipped)")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
_VERSIONS = "import torch, platform; print(platform.python_version(), torch.__version__)"
_CUDA = ("nvidia-", "cuda-", "triton")
"""What only torch's builds for CUDA bring."""

_HEAD = """\
# Which versions work

`python -m tests.versions` makes an environment for each row, installs `mtprune[test]` with what
the row says, and runs the tests that are not slow. All else is the newest that fits. This page is
what it wrote.

"""


class Combination(NamedTuple):
    """What one environment has that others have not."""

    name: str
    python: str = _HERE
    pins: tuple[str, ...] = (f"torch=={_TORCH}.*",)


class Outcome(NamedTuple):
    """What came of the tests in one environment; ``reason`` if they could not be run."""

    combination: str
    python: str = ""
    torch: str = ""
    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    reason: str = ""


def combinations(here: str = _HERE) -> list[Combination]:
    """All that are claimed, one axis at a time.

    Args:
        here: The Python of rows about something else.

    Example:
        >>> [each.name for each in combinations()][:2]
        ['torch 2.6', 'torch 2.9']
    """
    return [
        *(Combination(f"torch {torch}", here, (f"torch=={torch}.*",)) for torch in TORCHES),
        *(Combination(f"Python {python}", python) for python in PYTHONS if python != here),
        Combination("lower bounds", here, (f"torch=={_TORCH}.*", *lower_bounds())),
    ]


def lower_bounds(setup: str | None = None) -> tuple[str, ...]:
    """Each dependency and extra at the oldest version that ``setup.cfg`` allows, without torch.

    Args:
        setup: The text of ``setup.cfg``; by default the one here.

    Example:
        >>> lower_bounds("[options]\\ninstall_requires =\\n  torch>=2.6\\n  numpy>=1.26")
        ('numpy==1.26.*',)
    """
    config = ConfigParser()
    config.read_string((ROOT / "setup.cfg").read_text() if setup is None else setup)
    wanted = config["options"]["install_requires"].split()
    if config.has_section("options.extras_require"):
        wanted += config["options.extras_require"].get("all", "").split()
    pairs = sorted({tuple(each.split(">=")) for each in wanted})
    return tuple(f"{name}=={version}.*" for name, version in pairs if name != "torch")


def run(combination: Combination, folder: Path, select: Sequence[str]) -> Outcome:
    """Make an environment, install, and run the tests."""
    interpreter = shutil.which(f"python{combination.python}")
    if interpreter is None or subprocess.run([interpreter, "-V"], capture_output=True).returncode:
        return Outcome(combination.name, reason=f"there is no python{combination.python} here")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]"]
    done = subprocess.run([*install, *combination.pins], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return Outcome(combination.name, reason=(errors or ["ERROR: pip failed"])[0][7:])
    found = subprocess.run(
        [str(python), "-c", _VERSIONS],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    tests = [
        str(python),
        "-m",
        "pytest",
        "-p",
        "no:anyio",
        "-q",
        "-ra",
        "-m",
        "not slow and not long",
        *select,
    ]
    output = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True).stdout
    (folder / "output.txt").write_text(output)
    return read(output, combination.name, *found)


def read(output: str, combination: str, python: str, torch: str) -> Outcome:
    """The outcome that pytest printed.

    Example:
        >>> output = "FAILED tests/test_x.py::test_y - no\\n1 failed, 2 passed in 3s"
        >>> read(output, "torch 2.6", "3.11.2", "2.6.0")[3:]
        (2, 0, ('tests/test_x.py::test_y',), '')
    """
    last = output.strip().splitlines()[-1] if output.strip() else ""
    counts = {kind: int(number) for number, kind in _SUMMARY.findall(last)}
    failed = tuple(_FAILED.findall(output))
    reason = "" if counts else f"no test ran: {last}"
    numbers = counts.get("passed", 0), counts.get("skipped", 0)
    return Outcome(combination, python, torch, *numbers, failed, reason)


def page(outcomes: Sequence[Outcome]) -> str:
    """The page: a table, and the tests that failed by name.

    Example:
        >>> print(page([Outcome("torch 2.6", "3.11.2", "2.6.0", 7)]).splitlines()[-1])
        | torch 2.6 | 3.11.2 | 2.6.0 | 7 passed |
    """
    lines = ["| | Python | torch | tests |", "|---|---|---|---|"]
    for each in outcomes:
        said = f"not run: {each.reason}" if each.reason else _said(each)
        lines.append(f"| {each.combination} | {each.python} | {each.torch} | {said} |")
    failed = [f"* {each.combination}: `{test}`" for each in outcomes for test in each.failed]
    if failed:
        lines += ["", "Failed:", "", *failed]
    return _HEAD + "\n".join(lines) + "\n"


def _said(outcome: Outcome) -> str:
    parts = [f"{outcome.passed} passed"]
    parts += [f"{outcome.skipped} skipped"] if outcome.skipped else []
    parts += [f"{len(outcome.failed)} failed"] if outcome.failed else []
    return ", ".join(parts)


def update(folder: Path) -> str:
    """The newest versions of everything that tests, docs and linters need, as constraints."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    extras = f"{ROOT}[test,docs,dev,encoder,examples]"
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", extras], check=True)
    frozen = subprocess.run(
        [python, "-m", "pip", "freeze", "--exclude-editable"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    head = (ROOT / "constraints.txt").read_text().splitlines()[0]
    kept = [line.split("+")[0] for line in frozen.splitlines() if not line.startswith(_CUDA)]
    return "\n".join([head, *kept, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run what has no outcome yet, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("names", nargs="*", help="rows to run, as 'torch 2.6'; all unless given")
    parser.add_argument("--state", type=Path, default=Path(".versions"), help="environments")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "versions.md")
    parser.add_argument("--select", nargs="*", default=["tests"], help="tests; all unless given")
    parser.add_argument("--fresh", action="store_true", help="run again what has an outcome")
    parser.add_argument("--strict", action="store_true", help="fail where a test did")
    parser.add_argument("--update", action="store_true", help="write constraints.txt anew")
    given = parser.parse_args(arguments)
    given.state.mkdir(parents=True, exist_ok=True)
    if given.update:
        write_text(ROOT / "constraints.txt", update(given.state / "newest"))
        return
    known = {each.name: each for each in combinations()}
    if unknown := [name for name in given.names if name not in known]:
        parser.error(f"no rows {unknown}; there are {list(known)}")
    store = given.state / "outcomes.json"
    outcomes = _stored(store)
    for name in given.names or known:
        if given.fresh or name not in outcomes:
            folder = (given.state / name.replace(" ", "-")).resolve()
            outcomes[name] = run(known[name], folder, given.select)
            write_text(store, json.dumps([each._asdict() for each in outcomes.values()], indent=1))
            print(f"{name}: {outcomes[name].reason or _said(outcomes[name])}")
    write_text(given.out, page([outcomes[name] for name in known if name in outcomes]))
    print(f"{len(outcomes)} of {len(known)} rows in {given.out}")
    bad = [each for each in outcomes.values() if each.failed or each.reason]
    if given.strict and bad:
        sys.exit("\n".join(f"{each.combination}: {each.reason or _said(each)}" for each in bad))


def _stored(store: Path) -> dict[str, Outcome]:
    rows: list[Mapping[str, Any]] = json.loads(store.read_text()) if store.exists() else []
    return {row["combination"]: Outcome(**{**row, "failed": tuple(row["failed"])}) for row in rows}


if __name__ == "__main__":
    main()
