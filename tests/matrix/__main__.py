"""``python -m tests.matrix``: try all models and write docs/support.md."""

import argparse
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mtprune.files import write_text
from tests.matrix.checks import COLUMNS, NO
from tests.matrix.models import ENTRIES, LIBRARIES
from tests.matrix.page import page

ROOT = Path(__file__).parents[2]
WORKER = (sys.executable, "-m", "tests.matrix.worker")
_START = 120.0  # seconds for imports


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("names", nargs="*", help="families to try; all unless given")
    parser.add_argument("--columns", default="|".join(COLUMNS), help="columns, with | between")
    parser.add_argument(
        "--state", type=Path, default=Path(".matrix"), help="where results are kept"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "support.md")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one family")
    parser.add_argument("--fresh", action="store_true", help="try again what has a result")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args(arguments)
    names = given.names or list(ENTRIES)
    if unknown := [name for name in names if name not in ENTRIES]:
        parser.error(f"no families {unknown}; there are {list(ENTRIES)}")
    given.state.mkdir(parents=True, exist_ok=True)
    columns = given.columns.split("|")
    if not given.page:
        todo = [n for n in names if given.fresh or not _is_done(given.state, n, columns)]
        while todo:
            todo = _run(todo, given.state, columns, given.timeout)
    rows = [json.loads(path.read_text()) for path in sorted(given.state.glob("*.json"))]
    write_text(given.out, page(rows, dict(_versions())))
    print(f"{len(rows)} families in {given.out}")


def _run(
    names: list[str],
    state: Path,
    columns: list[str],
    timeout: float,
    worker_command: Sequence[str] = WORKER,
) -> list[str]:
    """Try families in one process until one takes too long, or ends it; those that are left."""
    command = [*worker_command, str(state), "|".join(columns), *names]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, bufsize=0) as worker:
        assert worker.stdout is not None
        current, why, pending = "", "", b""
        while True:
            patience = timeout if current else max(timeout, _START)
            ready, _, _ = select.select([worker.stdout], [], [], patience)
            if not ready:
                why = f"not within {timeout:.0f} s"
                break
            chunk = os.read(worker.stdout.fileno(), 4096)
            if not chunk:
                why = "" if worker.wait() == 0 else f"the process ended with {worker.returncode}"
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                word, _, name = line.decode().partition(" ")
                if word == "begin":
                    current = name
                print(line.decode(), flush=True)
        worker.kill()
    if not why:
        return []
    if not current:
        raise RuntimeError(f"No family was tried: {why}.")
    _note_failure(state, current, columns, why)
    return names[names.index(current) + 1 :]


def _path(state: Path, name: str) -> Path:
    return state / f"{name.replace(': ', ' ').replace(' ', '_')}.json"


def _read(state: Path, name: str) -> dict[str, Any]:
    path = _path(state, name)
    entry = ENTRIES[name]
    empty: dict[str, Any] = {"name": entry.name, "library": entry.library, "cells": {}}
    return {**empty, **json.loads(path.read_text())} if path.exists() else empty


def _is_done(state: Path, name: str, columns: list[str]) -> bool:
    row = _read(state, name)
    return "broken" in row or set(columns) <= set(row["cells"])


def _note_failure(state: Path, name: str, columns: list[str], why: str) -> None:
    """Say of the cell that was being tried why it has no result; those after it were not tried."""
    row = _read(state, name)
    for column in columns:
        row["cells"].setdefault(column, {"state": NO, "why": why})
    write_text(_path(state, name), json.dumps(row, indent=1))


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in ("torch", *LIBRARIES):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
