"""Peers: what a user would pick instead of `compress`, in one run: other runtimes, and int8.

``python -m tests.benchmarks peers --json docs/results/peers.json --page docs/results/peers.md``
measures, and writes the page. Times are medians over rounds in which all take
turns.
"""

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

import mtprune
from mtprune import patterns
from mtprune.model.layers import find_layers
from tests.benchmarks import runtimes
from tests.benchmarks.compress import Blocks, halve_units_, mask_, scenenet
from tests.benchmarks.harness import Row, Settings, main, threads

FP32, INT8, OURS = "fp32", "int8", "ours"

DENSE: dict[str, tuple[str, runtimes.Runtime]] = {
    "torch, eager": ("", runtimes.eager),
    "torch.compile, freezing": (FP32, runtimes.inductor),
    "ONNX Runtime": (FP32, runtimes.onnxruntime),
    "OpenVINO": (FP32, runtimes.openvino),
    "ONNX Runtime, dynamic int8": (INT8, runtimes.onnxruntime_dynamic_int8),
    "ONNX Runtime, static int8": (INT8, runtimes.onnxruntime_static_int8),
    "torchao, dynamic int8": (INT8, runtimes.torchao_int8),
}
"""How the dense model can be run: the kind of peer, and the runtime."""

_QUIET = 0.02
"""Seconds in which threads of a runtime go to sleep."""

_LONG, _LEAST = 60.0, 7
"""Seconds after which there are no further rounds, and how many there are at least."""

SMALLER = ("torch, eager", "torch.compile, freezing", "ONNX Runtime", "OpenVINO")
SMALLER_INT8 = "ONNX Runtime, dynamic int8"


HEADS = patterns.Attention(
    "block",
    "query.weight",
    "key.weight",
    "value.weight",
    "out.weight",
    "",
    ("heads",),
    number="heads",
)
NEURONS = patterns.FeedForward("block", ("up.weight",), "down.weight")
"""Where the encoder's units are."""


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: What it is.
        dense: The model.
        x: Its inputs.
        half: What there is half as much of in the copy that other runtimes take.
        groups: From a model to its units.
        without: Ways to run it that are left out.
    """

    name: str
    dense: nn.Module
    x: Tensor
    half: str
    groups: Callable[[nn.Module], Sequence[Any]]
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """How long one contestant took, in milliseconds, or why it did not run."""

    ms: Sequence[float] = ()
    problem: str = ""


AIMS: Mapping[str, Sequence[tuple[str, str, float]]] = {
    "encoder, 1 x 32": (
        ("ours, 90 %", FP32, 2.2),
        ("ours, 90 %", INT8, 1.3),
        ("ours, 95 %", "torch, eager", 4.5),
        ("ours, half", "torch, eager", 2.0),
        (f"half, {SMALLER_INT8}", SMALLER_INT8, 1.7),
    ),
    "encoder, 16 x 32": (
        ("ours, 90 %", FP32, 3.0),
        ("ours, 90 %", INT8, 1.8),
        ("ours, 95 %", "torch, eager", 4.0),
        ("ours, half", "torch, eager", 2.0),
        (f"half, {SMALLER_INT8}", SMALLER_INT8, 1.7),
    ),
    "SceneNet": (("ours, 95 %", FP32, 4.5),),
}
"""How many times as fast a contestant is to be as another, or as the best of a kind."""

WITH_TWO: Mapping[str, Sequence[tuple[str, str, float]]] = {
    "encoder, 1 x 32": (
        ("ours, 90 %", "torch, eager", 2.5),
        ("ours, 95 %", "torch, eager", 3.5),
    ),
    "encoder, 16 x 32": (
        ("ours, 90 %", "torch, eager", 2.5),
        ("ours, 95 %", "torch, eager", 3.5),
    ),
}


def subjects(settings: Settings) -> list[Subject]:
    torch.manual_seed(0)
    layers, width = {"full": (6, 384), "quick": (2, 128), "toy": (1, 64)}[settings.size]
    tokens = 4 if settings.size == "toy" else 32
    encoder = Blocks(layers, width).eval()

    def units(model: nn.Module) -> Sequence[Any]:
        return [*patterns.heads(model, (HEADS,)), *patterns.neurons(model, (NEURONS,))]

    slow = ("torch.compile, freezing", "torchao, dynamic int8") if settings.size == "toy" else ()
    found = [
        Subject(
            f"encoder, {rows} x {tokens}",
            encoder,
            torch.randint(0, 1000, (rows, tokens)),
            "heads and neurons",
            units,
            slow,
        )
        for rows in (1, 16)
    ]
    net, image = scenenet(settings.size)

    def channels(model: nn.Module) -> Sequence[Any]:
        return mtprune.Channel(image).groups(model, find_layers(model))

    without = (*slow, "torchao, dynamic int8", SMALLER_INT8)  # int8 for convolutions is static
    return [*found, Subject("SceneNet", net.eval(), image, "channels", channels, without)]


def calls(subject: Subject, count: int) -> dict[str, runtimes.Call | str]:
    """All contestants by name: ready to run, or why they do not."""
    found: dict[str, runtimes.Call | str] = {}
    for name, (_, runtime) in DENSE.items():
        if name not in subject.without:
            found[name] = _ready(runtime, subject.dense, subject.x, count)
    for sparsity in (0.75, 0.9, 0.95):
        model = copy.deepcopy(subject.dense)
        torch.manual_seed(1)
        mask_(model, sparsity)
        fast = mtprune.compress(model, subject.x, groups=())
        found[f"ours, {sparsity:.0%}".replace("%", " %")] = _ready(
            runtimes.eager, fast, subject.x, count
        )
    model = copy.deepcopy(subject.dense)
    torch.manual_seed(1)
    groups = subject.groups(model)
    halve_units_(model, groups)
    fast = mtprune.compress(model, subject.x, groups=groups)
    found["ours, half"] = _ready(runtimes.eager, fast, subject.x, count)
    small = mtprune.compress(model, subject.x, groups=groups, portable=True)
    ways = [*SMALLER, SMALLER_INT8, "ONNX Runtime, static int8"]
    for name in (way for way in ways if way in DENSE and way not in subject.without):
        found[f"half, {name}"] = _ready(DENSE[name][1], small, subject.x, count)
    return found


def _ready(
    runtime: runtimes.Runtime, model: nn.Module, x: Tensor, count: int
) -> runtimes.Call | str:
    try:
        with torch.no_grad():
            call = runtime(model, x, count)
            call()
    except ImportError as error:
        return f"not here: {error}"
    except Exception as error:  # of its own kinds, which is a result too
        return f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return call


def compared(subject: Subject, count: int, settings: Settings) -> dict[str, Found]:
    """The times of all contestants."""
    with threads(count):
        ready = calls(subject, count)
        runnable = {name: call for name, call in ready.items() if not isinstance(call, str)}
        with torch.no_grad():
            times = in_turns(runnable, 3 * settings.repeats)
    found = {name: Found(ms) for name, ms in times.items()}
    return {
        name: found.get(name, Found(problem=call if isinstance(call, str) else ""))
        for name, call in ready.items()
    }


def in_turns(ready: Mapping[str, runtimes.Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of calls that take turns, each as if it ran all the time.

    Threads of other runtimes look for work a while after a call, so they are waited for, and a
    model's first call, which is not timed, brings its own weights into the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in ready}
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= _LEAST and time.perf_counter() - start > _LONG:
            break
        for name, call in ready.items():
            time.sleep(_QUIET)
            call()
            before = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - before))
    return times


def faster(mine: Sequence[float], other: Sequence[float]) -> float:
    """How many times as fast, as the median over rounds."""
    return median(b / a for a, b in zip(mine, other, strict=True))


def _best(found: Mapping[str, Found], against: str) -> str:
    """A contestant by name, or the fastest of a kind."""
    if against in found:
        return against
    kind = [name for name, (own, _) in DENSE.items() if own == against and name in found]
    return min(
        (n for n in kind if found[n].ms), key=lambda name: median(found[name].ms), default=""
    )


def run(settings: Settings) -> list[Row]:
    return [row for subject in subjects(settings) for row in rows_of(subject, settings)]


def rows_of(subject: Subject, settings: Settings) -> list[Row]:
    """The rows of one model, for all numbers of threads."""
    rows = []
    for count in settings.threads:
        start = time.perf_counter()
        rows += _rows(subject.name, count, compared(subject, count, settings))
        took = f"{time.perf_counter() - start:.0f} s"
        print(f"{subject.name}, threads: {count}: {took}", file=sys.stderr)
    return rows


def _rows(name: str, count: int, found: Mapping[str, Found]) -> list[Row]:
    eager = found["torch, eager"].ms
    column = f"{name}, threads: {count}"
    rows = []
    for contestant, result in found.items():
        detail: dict[str, Any] = {"contestant": contestant, "column": column}
        if not result.ms:
            rows.append(Row(f"{column}: {contestant}", result.problem, 0.0, detail=detail))
            continue
        low, _, high = quantiles(result.ms, n=4) if len(result.ms) > 1 else (result.ms[0],) * 3
        detail |= {
            "ms": median(result.ms),
            "quartiles": [low, high],
            "faster": faster(result.ms, eager),
        }
        value = 1 / detail["faster"]
        rows.append(Row(f"{column}: {contestant}", "torch, eager", value, detail=detail))
    aims = (AIMS if count == 1 else WITH_TWO).get(name, ())
    for mine, against, aim in aims:
        best = _best(found, against)
        if best and found.get(mine, Found()).ms:
            ratio = faster(found[mine].ms, found[best].ms)
            told = best if best == against else f"best {against} ({best})"
            detail = {"contestant": mine, "column": column, "faster": ratio, "aim": aim}
            rows.append(Row(f"{column}: {mine}", told, 1 / ratio, 1 / aim, "x", detail))
    return rows


def page(rows: Sequence[Row]) -> str:
    """Two tables: all contestants, and what was aimed at."""
    plain = [row for row in rows if row.target is None]
    columns = list(dict.fromkeys(row.detail["column"] for row in plain))
    cells = {(row.detail["contestant"], row.detail["column"]): row for row in plain}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in dict.fromkeys(contestant for contestant, _ in cells):
        told = " | ".join(_cell(cells.get((name, column))) for column in columns)
        lines.append(f"| {name} | {told} |")
    problems = {row.detail["contestant"]: row.against for row in plain if "ms" not in row.detail}
    lines += ["", *(f"* {name} {why}." for name, why in problems.items()), ""]
    lines += ["| | against | measured | aim | |", "|---|---|---|---|---|"]
    for row in rows:
        if row.target is not None:
            verdict = "met" if row.met else "**missed**"
            measured, aim = f"{row.detail['faster']:.2f}x", f">= {row.detail['aim']:g}x"
            lines.append(f"| {row.what} | {row.against} | {measured} | {aim} | {verdict} |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or "ms" not in row.detail:
        return "" if row is None else "-"
    return f"{row.detail['faster']:.2f}x ({row.detail['ms']:.1f} ms)"


PAGE = """# Against other runtimes and int8

A model becomes faster on a CPU without any pruning: by a compiler, by another runtime, by weights
of eight bits. Here all of that stands beside `compress`, measured in one run, in turns: how many
times as fast each is as the same dense model in torch, and its median time. In its turn each is
called twice, and the second call counts: its weights are then where they are in a model that runs
all the time, and no other runtime's threads look for work meanwhile.

* **encoder**: six blocks of width 384 made of Linear layers, as the smaller sentence encoders have
  them, for one sentence of 32 tokens and for 16. **SceneNet**: DeepLab on ResNet-34 with three
  heads, one image of 256 x 256. Weights are random, and so is what is pruned: time does not depend
  on which.
* **ours, 75 %**, **90 %** and **95 %**: that share of single weights is zero,
  `mtprune.compress(model, x)`.
* **half**: half of the heads and neurons, or of the channels, are gone. For **ours**,
  `mtprune.compress(model, x)` has taken them out; for the others `portable=True` has made an
  ordinary, smaller dense model, which any runtime takes, with int8 on top.
* What pruning costs in accuracy is on other pages ([encoder](encoder.md), [recipe](recipe.md));
  what int8 costs on top, `python examples/encoder_int8.py` measures on your own tasks.

By, with the extra `[peers]`:

```
python -m tests.benchmarks peers --json docs/results/peers.json --page docs/results/peers.md
```

{tables}

{machine}

Raw numbers, with quartiles: `peers.json`.
"""


def write(path: Path, rows: Sequence[Row], machine: Mapping[str, Any]) -> None:
    """Write the page: what was compared, the tables, and what they were measured on."""
    told = ", ".join(f"{name} {value}" for name, value in machine["packages"].items())
    on = (
        f"{machine['cpu']}, {machine['cores']} cores; torch {machine['torch']}, {told}. The "
        f"load of the machine was {machine['load']:.1f}."
    )
    path.write_text(PAGE.format(tables=page(rows), machine=on))


if __name__ == "__main__":
    main(run)
