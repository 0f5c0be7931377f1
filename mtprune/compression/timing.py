"""Timing: functions take turns, so that other load of the machine slows all alike."""

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

__all__ = ["Measure", "interleaved", "sampled"]

_SECONDS = 0.5
"""A function is not timed for much longer than this."""

Measure = Callable[[Sequence[Callable[[], object]]], Sequence[float]]
"""How functions are timed: from functions to the milliseconds of each."""


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
        most: The number of rounds, if no function takes seconds.
        least: The least number of rounds, however slow a function is.

    Example:
        >>> [len(times) for times in sampled([lambda: None, lambda: None], most=20, least=20)]
        [20, 20]
    """
    loops, rounds = [], most
    for function in functions:
        function()  # the first call allocates
        seconds = max(_seconds(function, 1), 1e-9)
        loops.append(max(1, min(200, int(1e-3 / seconds))))
        rounds = min(rounds, max(least, int(_SECONDS / seconds)))
    samples: list[list[float]] = [[] for _ in functions]
    collects = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for i in range(len(functions)):
                i = (i + turn) % len(functions)
                samples[i].append(_seconds(functions[i], loops[i]) / loops[i])
    finally:
        if collects:
            gc.enable()
    return [[1e3 * seconds for seconds in times] for times in samples]


def _seconds(function: Callable[[], object], times: int) -> float:
    """The seconds of so many calls, all work on a GPU included."""
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        function()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
