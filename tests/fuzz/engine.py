"""The engine: draws cases, runs each in a process of its own, and makes failures small.

A case is a dict that JSON can hold, and all that happens follows from it. What came of it is one
line of a file, so that a run that was stopped goes on where it was.
"""

import json
import linecache
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.fuzz.outcomes import OutcomeError

Case = dict[str, Any]

KINDS = ("passed", "refused", "wrong", "raw", "changed", "crash", "hang")
"""What can come of a case: it passed; a message of ours refused it; something was wrong; an error
of somebody else's came out; something had changed that must not; the process died; it never
ended."""

GOOD = ("passed", "refused")


class Target(Protocol):
    """What is fuzzed."""

    def draw(self, dice: random.Random) -> Case:
        """A random case."""
        ...

    def run(self, case: Case) -> "Outcome":
        """What comes of a case. An exception is an outcome too: see `judged`."""
        ...

    def simpler(self, case: Case) -> Iterable[Case]:
        """Cases that are a little simpler, the simplest first."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        kind: One of `KINDS`.
        detail: In words.
    """

    kind: str
    detail: str = ""

    def like(self, other: "Outcome") -> bool:
        """Whether it is the same but for names and numbers."""
        return self.kind == other.kind and _words(self.detail) == _words(other.detail)


def judged(error: BaseException) -> Outcome:
    """The outcome that an exception is: ours if a ``raise`` of this package raised it."""
    if isinstance(error, OutcomeError):
        return Outcome(error.kind, str(error))
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    text = f"{type(error).__name__}: {error}"
    if last is not None and f"{os.sep}mtprune{os.sep}" in last.filename:
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        # A statement may span lines: the frame is at its first or its last.
        if "raise" in line or (isinstance(error, (ValueError, TypeError)) and "Error(" in line):
            return Outcome("refused", text)
    where = f"{Path(last.filename).name}:{last.lineno}" if last is not None else "nowhere"
    return Outcome("raw", f"{text} (at {where})")


def alone(target: Target, case: Case, limit: float) -> Outcome:
    """What comes of a case in a process of its own.

    Args:
        target: The target.
        case: The case.
        limit: Seconds after which it hangs.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _live(target, case, writing)
    os.close(writing)
    ends = time.monotonic() + limit
    with os.fdopen(reading, "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        said, status = b"", 0
        while True:
            said += pipe.read() or b""
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                said += pipe.read() or b""
                break
            if time.monotonic() > ends:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return Outcome("hang", f"more than {limit:g} s")
            time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return Outcome("crash", signal.Signals(os.WTERMSIG(status)).name)
    if not said:
        return Outcome("crash", f"it ended with {os.waitstatus_to_exitcode(status)}")
    return Outcome(**json.loads(said))


def _live(target: Target, case: Case, writing: int) -> None:
    """The life of the process of a case."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        try:
            outcome = target.run(case)
        except BaseException as error:
            outcome = judged(error)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(vars(outcome)).encode())
    finally:
        os._exit(0)


def smallest(target: Target, case: Case, outcome: Outcome, limit: float) -> Case:
    """The simplest case that still comes to the same, going down step by step.

    The same is an outcome of the same kind, in the same words but for names and numbers.
    """
    smaller = True
    while smaller:
        smaller = False
        for candidate in target.simpler(case):
            if candidate != case and alone(target, candidate, limit).like(outcome):
                case, smaller = candidate, True
                break
    return case


def fuzz(
    target: Target,
    *,
    cases: int,
    seed: int,
    out: Path | None,
    limit: float = 300.0,
    first: int = 0,
) -> Counter[str]:
    """Run cases, those that ``out`` has not seen, and tell what came of all of them.

    Args:
        target: The target.
        cases: How many.
        seed: Of the first; others count from there.
        out: A file of outcomes, one line for each; None for none.
        limit: Seconds after which a case hangs.
        first: The number of the first case.
    """
    known = {row["seed"]: row for row in rows(out)} if out is not None else {}
    counts: Counter[str] = Counter()
    for number in range(seed + first, seed + first + cases):
        if number in known:
            counts[known[number]["kind"]] += 1
            continue
        case = target.draw(random.Random(number))
        began = time.perf_counter()
        outcome = alone(target, case, limit)
        row = {"seed": number, **vars(outcome), "seconds": round(time.perf_counter() - began, 3)}
        counts[outcome.kind] += 1
        if outcome.kind not in GOOD:
            if outcome.kind != "hang":  # each try would take as long
                case = smallest(target, case, outcome, limit)
            row["case"] = case
            print(f"seed {number}: {outcome.kind}: {outcome.detail[:500]}", file=sys.stderr)
            print(f"  again: --case '{json.dumps(case)}'", file=sys.stderr, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return counts


def rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of a file of outcomes; a last one that was cut short is none."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _words(text: str) -> str:
    return re.sub(r"'[^']*'|\[[^]]*\]|[\d.]+(e[+-]?\d+)?", "_", text)
