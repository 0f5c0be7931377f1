"""Budgets in time: what was asked for against what the compressed model takes.

Nets are pruned by a vote of their tasks on random data, and compressed. All is timed with one
thread, by the CPU's clock, so that what else the machine does counts little; rows tell the clock on
the wall too.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import mtprune
from mtprune import Channel, Element, Head, MultitaskPruner, Neuron, Vote
from mtprune.compression.timing import Measure, interleaved
from mtprune.latency import Latency
from tests.benchmarks.compress import scenenet
from tests.benchmarks.harness import Row, Settings, device, main, threads
from tests.benchmarks.nets import subject

ASKED = (0.5, 0.35)
"""Shares of the dense model's time."""

OFF = 0.1
"""The measured time may be off by this share of the asked one."""

_ROUNDS = 11


def run(settings: Settings) -> list[Row]:
    rows = []
    for asked in ASKED if settings.size != "toy" else (1.0,):
        for what in ("weights", "heads and neurons"):
            rows.append(_encoder(settings, what, asked))
        for what in ("weights", "channels"):
            rows.append(_scenenet(settings, what, asked))
    return rows


def _encoder(settings: Settings, what: str, asked: float) -> Row:
    net = subject("encoder", settings.size)
    x = torch.randint(0, 1000, (1, 4 if settings.size == "toy" else 32)).to(device())
    granularity = Element() if what == "weights" else (Head(), Neuron())
    label = f"torch's encoder, {what}, 1 x {x.shape[1]} tokens"
    return measure(settings, label, net.model, net.losses, x, granularity, asked)


def _scenenet(settings: Settings, what: str, asked: float) -> Row:
    model, x = scenenet("toy" if settings.size == "toy" else "quick")
    x = x.to(device())
    losses = {task: partial(_loss, task) for task in ("seg", "depth", "normals")}
    granularity = Element() if what == "weights" else Channel(x)
    label = f"SceneNet of half width, {what}, 1 x {x.shape[2]} x {x.shape[3]} pixels"
    return measure(settings, label, model, losses, x, granularity, asked)


def _loss(task: str, outputs: Mapping[str, Tensor], batch: object) -> Tensor:
    return (outputs[task] - 0.1).square().mean()


def measure(
    settings: Settings,
    what: str,
    model: nn.Module,
    losses: Any,
    x: Tensor,
    granularity: Any,
    asked: float,
) -> Row:
    with threads(1):
        model.eval()
        latency = Latency(asked, measure=by_cpu)
        method = Vote(latency=latency, granularity=granularity, example_inputs=x)
        start = time.process_time()
        pruner = MultitaskPruner(model, losses, method=method)
        built = time.process_time()
        report = pruner.prune([x], progress=False)
        pruned = time.process_time()
        pruner.finalize()
        groups = "auto" if isinstance(granularity, Element) else granularity
        fast = mtprune.compress(model, x, groups=groups, measure=by_cpu)
        shares = {
            clock: _share(timed, fast, model, x, settings.repeats)
            for clock, timed in (("cpu", by_cpu), ("wall", interleaved))
        }
    timing = report.timing
    assert timing is not None
    assert timing.measured_ms is not None
    share = median(shares["cpu"])
    return Row(
        f"{what}: asked for {asked:g} of the time, off by",
        f"{share:.3f} measured",
        abs(share / asked - 1),
        OFF,
        "x",
        {
            "asked": asked,
            "shares": shares,
            "share": share,
            "share by the wall": median(shares["wall"]),
            "share in the trial": timing.measured_ms / timing.dense_ms,
            "share by the timetable": timing.predicted_ms / timing.dense_ms,
            "correction": timing.correction,
            "sparsity": report.sparsity,
            "seconds for the timetable": built - start,
            "seconds for the choice": pruned - built,
            "densities": {row.name: 1 - row.sparsity for row in report.layers},
            "blocks": len(mtprune.plan_of(fast).blocks),
        },
    )


@torch.no_grad()
def _share(
    timed: Measure, fast: nn.Module, dense: nn.Module, x: Tensor, repeats: int
) -> list[float]:
    """The time of a compressed model as a share of the dense one's, several times."""
    pairs = (timed([partial(fast, x), partial(dense, x)]) for _ in range(repeats))
    return [mine / other for mine, other in pairs]


def by_cpu(functions: Sequence[Callable[[], object]]) -> list[float]:
    """The median milliseconds of CPU time of each function, over rounds in which all take turns."""
    loops, rounds = [], _ROUNDS
    for function in functions:
        function()
        seconds = max(_seconds(function, 1), 1e-6)
        loops.append(max(1, min(200, int(2e-3 / seconds))))
        rounds = min(rounds, max(3, int(0.5 / seconds)))
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds):
        for i in range(len(functions)):
            i = (i + turn) % len(functions)
            times[i].append(_seconds(functions[i], loops[i]) / loops[i])
    return [1e3 * median(own) for own in times]


def _seconds(function: Callable[[], object], times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        function()
    return time.process_time() - start


if __name__ == "__main__":
    main(run)
