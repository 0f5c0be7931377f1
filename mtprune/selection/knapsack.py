"""Knapsack: one option for each of many, of least damage together, that fit into a budget."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["knapsack"]

_MOST = 1024
"""So many partial solutions go on; with fewer the result is exact."""

_ROUNDING = 1e-9


def knapsack(
    costs: Sequence[Sequence[float]], damages: Sequence[Sequence[float]], room: float
) -> list[int]:
    r"""The options of least damage that fit.

    Solves :math:`\min \sum_i d_i(o_i)` over one option :math:`o_i` of each with
    :math:`\sum_i c_i(o_i) \le B`, by dynamic programming over the undominated pairs of cost and
    damage. Where there are more of these than 1024, neighbours in cost are thinned out to the
    better one; what is returned fits in any case.

    Args:
        costs: For each, the cost of its options.
        damages: For each, the damage of the same options.
        room: B, the most that all may cost together.

    Returns:
        For each the number of its option.

    Raises:
        ValueError: If the cheapest options do not fit.

    Example:
        >>> knapsack([[4.0, 1.0], [4.0, 3.0]], [[0.0, 5.0], [0.0, 2.0]], room=7.0)
        [0, 1]
    """
    options = [np.asarray(cost, dtype=np.float64) for cost in costs]
    reserve = float(sum(cost.min() for cost in options))
    room += _ROUNDING * abs(room)
    if reserve > room:
        raise ValueError(f"The cheapest cost {reserve:g} together, and there is room for {room:g}.")
    spent, lost = np.zeros(1), np.zeros(1)
    trail = []
    for cost, damage in zip(options, damages, strict=True):
        reserve -= float(cost.min())
        every = np.add.outer(spent, cost).ravel()
        harm = np.add.outer(lost, np.asarray(damage, dtype=np.float64)).ravel()
        left = np.flatnonzero(every + reserve <= room + _ROUNDING * abs(room))
        left = left[np.lexsort((harm[left], every[left]))]
        left = left[_falling(harm[left])]
        left = left[_thinned(every[left])]
        spent, lost = every[left], harm[left]
        trail.append(np.divmod(left, len(cost)))
    chosen, place = [], len(spent) - 1
    for parents, numbers in reversed(trail):
        chosen.append(int(numbers[place]))
        place = int(parents[place])
    return chosen[::-1]


def _falling(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Which are less than all before them."""
    before = np.minimum.accumulate(np.concatenate([[np.inf], values[:-1]]))
    return np.asarray(values < before)


def _thinned(rising: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The places of the last value in each of many equal intervals."""
    if len(rising) <= _MOST:
        return np.arange(len(rising))
    interval = ((rising - rising[0]) / (rising[-1] - rising[0]) * _MOST).astype(np.int64)
    return np.flatnonzero(np.append(interval[1:] != interval[:-1], True))
