"""Some of all combinations: so few that they run in seconds, so many that every pair occurs.

A fault that shows only where two choices meet is met by some case; one that takes three choices at
once may not be.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any


def pairs(*choices: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases in which each choice of one kind occurs with each of every other, the same each time.

    Every case takes as many pairs that are still missing as any could.

    Example:
        >>> pairs("ab", [0, 1], [False, True])
        [('a', 0, False), ('a', 1, True), ('b', 0, True), ('b', 1, False)]
    """
    kinds = [list(kind) for kind in choices]
    missing = {pair for case in _places(kinds) for pair in _met(case)}
    cases = []
    while missing:
        best = max(_places(kinds), key=lambda case: len(missing.intersection(_met(case))))
        missing.difference_update(_met(best))
        cases.append(best)
    return [tuple(kind[i] for kind, i in zip(kinds, case, strict=True)) for case in sorted(cases)]


def _places(kinds: Sequence[Sequence[Any]]) -> Iterable[tuple[int, ...]]:
    return product(*(range(len(kind)) for kind in kinds))


def _met(case: Sequence[int]) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    """The pairs of choices in a case, each as (kind, choice) twice."""
    return combinations(enumerate(case), 2)
