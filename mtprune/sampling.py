r"""Sampling: the task whose batch comes next when every task has a loader of its own.

The share of task k with n_k examples is

* ``"proportional"``: :math:`n_k / \sum_j n_j`, so that every example counts the same;
* ``"temperature"``: :math:`n_k^{1/T} / \sum_j n_j^{1/T}`, between proportional (T = 1) and uniform
  (T to infinity);
* ``"uniform"``: the same for all tasks, at random;
* ``"round_robin"``: the same for all tasks, in turn.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate, cycle, islice

import torch

from mtprune import checks

__all__ = ["HOW", "sample_tasks", "shares"]

HOW = ("proportional", "temperature", "uniform", "round_robin")
"""The ways to choose."""


def shares(
    sizes: Mapping[str, int], how: str = "proportional", *, temperature: float = 2.0
) -> dict[str, float]:
    """The share of steps that each task gets in the long run.

    Args:
        sizes: How many examples each task has.
        how: See the module.
        temperature: T, for ``"temperature"``; more than 1 helps the small.

    Returns:
        ``{task: share}``, which add up to 1.

    Example:
        >>> shares({"sst2": 6400, "trec": 400, "cola": 100}, "temperature")
        {'sst2': 0.7272727272727273, 'trec': 0.18181818181818182, 'cola': 0.09090909090909091}
    """
    checks.mapping("sizes", sizes, "task -> number of examples", filled=True)
    for task, size in sizes.items():
        must = "must be a whole number of examples, at least 1"
        checks.whole("sizes", size, least=1, of=f" of task '{task}'", must=must)
    checks.one_of("how", how, HOW)
    checks.inside("temperature", temperature, "(0, inf)", must="must be a positive number")
    power = {"proportional": 1.0, "temperature": 1.0 / temperature}.get(how, 0.0)
    most = max(sizes.values())
    worth = {task: (size / most) ** power for task, size in sizes.items()}
    total = sum(worth.values())
    return {task: x / total for task, x in worth.items()}


def sample_tasks(
    sizes: Mapping[str, int],
    how: str = "proportional",
    *,
    temperature: float = 2.0,
    generator: torch.Generator | None = None,
    start: int = 0,
) -> Iterator[str]:
    """The task of every step, without end.

    The tasks depend on the arguments alone: a run that stopped after n steps goes on with
    ``start=n`` and a generator seeded as at first. The global generator is not touched.

    Args:
        sizes: How many examples each task has.
        how: See the module.
        temperature: See `shares`.
        generator: On the CPU; one seeded with 0 unless given. A draw is taken from it at each step.
        start: How many steps to leave out.

    Example:
        >>> tasks = sample_tasks({"sst2": 64, "trec": 4}, "round_robin")
        >>> [next(tasks) for _ in range(5)]
        ['sst2', 'trec', 'sst2', 'trec', 'sst2']
    """
    probabilities = shares(sizes, how, temperature=temperature)
    checks.whole("start", start, least=0, must="must be a whole number of steps, at least 0")
    if how == "round_robin":
        return islice(cycle(probabilities), start % len(probabilities), None)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    return islice(_draws(probabilities, generator), start, None)


def _draws(probabilities: Mapping[str, float], generator: torch.Generator) -> Iterator[str]:
    """Tasks at random, one draw of the generator for each."""
    tasks, bounds = list(probabilities), list(accumulate(probabilities.values()))[:-1]
    while True:
        number = torch.rand((), generator=generator, dtype=torch.float64).item()
        yield tasks[bisect_right(bounds, number)]
