"""Timing: functions take turns, so that what else the machine does hits all alike."""

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

__all__ = ["Measure", "interleaved", "sampled"]

Measure = Callable[[Sequence[Callable[[], object]]], Sequence[float]]
"""From functions to the milliseconds that each takes."""


def interleaved(functions: Sequence[Callable[[], object]]) -> list[float]:
    """The median milliseconds of each function, over rounds in which all take turns.

    Functions of microseconds are called many times a round, those of seconds in fewer rounds.

    Example:
        >>> short, long = interleaved([lambda: None, lambda: time.sleep(0.002)])
        >>> short < long
        True
    """
    return [median(times) for times in sampled(functions)]


def sampled(
    functions: Sequence[Callable[[], object]], most: int = 11, least: int = 3
) -> list[list[float]]:
    """The milliseconds of each function, one number for each round in which all take turns.

    Args:
        functions: The functions.
        most: How many rounds; fewer if one takes seconds.
        least: No fewer than these.

    Example:
        >>> [len(times) for times in sampled([lambda: None, lambda: None], most=20, least=20)]
        [20, 20]
    """
    loops, rounds = [], most
    for function in functions:
        function()  # the first call allocates
        once = _seconds(function, 1)
        loops.append(max(1, min(200, int(1e-3 / max(once, 1e-9)))))
        rounds = min(rounds, max(least, int(2 / max(once, 1e-9))))
    samples: list[list[float]] = [[] for _ in functions]
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for i in range(len(functions)):
                i = (i + turn) % len(functions)
                samples[i].append(_seconds(functions[i], loops[i]) / loops[i])
    finally:
        if enabled:
            gc.enable()
    return [[1e3 * seconds for seconds in times] for times in samples]


def _seconds(function: Callable[[], object], times: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
