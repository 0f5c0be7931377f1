r"""Units: from the worth of units larger than a weight to those that fit into a budget.

Units differ in size, and a weight may belong to two of them, so there is no fixed number of units
to keep. Instead units are put in an order, and one after the other stays if it still fits into the
budget. The rest of the budget is less than any other unit would take.

The order is a matter of allocation. In one ranking units come by worth. A layerwise allocation
gives each group a density, so that a unit u comes when the rising density of its group reaches
:math:`c_u / (C_g\, r_g)`. Here :math:`c_u` is the cost of the units of its group that are worth as
much as u or more, :math:`C_g` the cost of the group, and :math:`r_g` its raw density.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtprune.model.units import Units

__all__ = [
    "Marks",
    "Queue",
    "Shape",
    "fitting_units",
    "least_cost",
    "least_units",
    "select_units",
]

Shape = Sequence[int]

Marks = npt.NDArray[np.bool_]
"""A mark on some units of a queue, ``[units]``."""


def select_units(
    worth: Sequence[Tensor],
    units: Units,
    budget: Fraction | int,
    spread: "Spread",
    *,
    eligible: Sequence[Tensor],
    min_keep: int = 1,
) -> list[Tensor]:
    """Keep the units of highest worth that fit into a budget.

    Args:
        worth: The worth of the units, for each group float64 ``[n]``.
        units: The units and their costs.
        budget: The cost that may stay.
        spread: How the budget is spread over groups: `Allocation.units`.
        eligible: The units that may stay, for each group bool ``[n]``.
        min_keep: How many units each group is sure of, as far as the budget goes; some groups are
            of more, because as many must stay.

    Returns:
        For each group a bool tensor ``[n]``, True = keep.
    """
    queue = Queue(worth, units, eligible, budget)
    return queue.masks(spread(queue, queue.best([max(min_keep, n) for n in units.least])))


def least_cost(units: Units, min_keep: int) -> Fraction:
    """The least cost of the units that each group is sure of."""
    return units.weigh(least_units(units, min_keep))


def least_units(units: Units, min_keep: int) -> list[Tensor]:
    """The cheapest units of each group, as many as it is sure of: for each group bool ``[n]``."""
    masks = []
    for cost, least in zip(units.costs, units.least, strict=True):
        mask = torch.zeros(len(cost), dtype=torch.bool)
        mask[cost.argsort(stable=True)[: max(min_keep, least)]] = True
        masks.append(mask)
    return masks


def fitting_units(
    worth: Mapping[int, Tensor],
    units: Units,
    keep: Callable[[Fraction], Fraction | int],
    places: Sequence[int],
) -> dict[int, Tensor]:
    """The units of highest worth of some groups that fit into a share of some layers.

    Units of the other groups count as kept.

    Args:
        worth: ``{group: [n]}``.
        units: The units and their costs.
        keep: From the cost of all these layers to the cost that may stay.
        places: The layers.

    Returns:
        For each of these groups a bool tensor ``[n]``, True = keep.
    """
    everything = units.everything()
    values = [worth.get(group, torch.zeros(len(mask))) for group, mask in enumerate(everything)]
    eligible = [mask & (group in worth) for group, mask in enumerate(everything)]
    others = [mask & (group not in worth) for group, mask in enumerate(everything)]
    budget = keep(units.weigh(everything, places))
    queue = Queue(values, units, eligible, budget, others=others, places=places)
    masks = queue.masks(queue.by_worth(queue.best(units.least)))
    return {group: masks[group] for group in worth}


class Queue:
    """Eligible units of all groups, one after the other, in order of position.

    Args:
        worth: The worth of the units, for each group float64 ``[n]``.
        units: The units and their costs.
        eligible: The units that may stay, for each group bool ``[n]``.
        budget: The cost that may stay.
        others: The units that stay besides, for each group bool ``[n]``; none unless given.
        places: The layers whose weights cost something; all of them unless given.
    """

    def __init__(
        self,
        worth: Sequence[Tensor],
        units: Units,
        eligible: Sequence[Tensor],
        budget: Fraction | int,
        *,
        others: Sequence[Tensor] | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self._sizes = [len(values) for values in worth]
        self._given = worth
        self._units = units
        self._budget = budget
        self._others = others
        self._places = places
        groups = np.repeat(np.arange(len(worth)), self._sizes)
        self._eligible = torch.cat(list(eligible)).cpu().numpy().nonzero()[0]
        self._worth = torch.cat(list(worth)).double().cpu().numpy()[self._eligible]
        self._cost = torch.cat(units.costs).numpy()[self._eligible]
        self._group = groups[self._eligible]
        # Group by group, the best first, earlier ones first among equals.
        self._best = np.lexsort((-self._worth, self._group))
        self._starts = np.searchsorted(self._group, np.arange(len(worth)))
        self._rank = np.empty(len(self._best), dtype=np.int64)
        self._rank[self._best] = np.arange(len(self._best)) - self._starts[self._group[self._best]]

    def fresh(self) -> "Queue":
        """The same with all units eligible: as it would be if none had been pruned yet."""
        return Queue(self._given, self._units, self._units.everything(), self._budget)

    def best(self, counts: Sequence[int]) -> Marks:
        """The best units of each group, as many as its count says."""
        return np.asarray(self._rank < np.asarray(counts)[self._group])

    def count(self, marks: Marks) -> list[int]:
        """How many units of each group are marked."""
        counts: list[int] = np.bincount(self._group[marks], minlength=len(self._sizes)).tolist()
        return counts

    def by_worth(self, sure: Marks) -> Marks:
        """The units that fit if the sure ones come first, then those of highest worth."""
        return self._fitting(np.lexsort((-self._worth, ~sure)))

    def by_density(self, raw: Callable[[Shape], float], sure: Marks) -> Marks:
        """The units that fit if the sure ones come first, then each group's best in proportion.

        Args:
            raw: The density of a layer of a given shape, up to a factor common to all.
            sure: The units that come first.
        """
        costs = [float(cost.sum()) for cost in self._units.costs]
        before = np.concatenate([[0.0], np.cumsum(self._cost[self._best])])
        cumulative = np.empty_like(self._cost)
        cumulative[self._best] = before[1:] - before[self._starts][self._group[self._best]]
        rates = [self._raw(group, raw) for group in range(len(costs))]
        scale = np.array([max(c, 1e-300) * r for c, r in zip(costs, rates, strict=True)])
        return self._fitting(np.lexsort((cumulative / scale[self._group], ~sure)))

    def masks(self, marks: Marks) -> list[Tensor]:
        """The marked units, for each group bool ``[n]``."""
        mask = torch.zeros(sum(self._sizes), dtype=torch.bool)
        mask[torch.from_numpy(self._eligible[marks])] = True
        return list(mask.split(self._sizes))

    def _raw(self, group: int, raw: Callable[[Shape], float]) -> float:
        """The mean over the weights of a group's layers of the raw density of each layer."""
        layers = [self._units.layers[place] for place in self._units.holding(group)]
        sizes = [prod(layer.shape) for layer in layers]
        shapes = [layer.layout.shape(layer.shape) for layer in layers]
        parts = [n * raw(shape) for n, shape in zip(sizes, shapes, strict=True)]
        return float(sum(parts) / sum(sizes))

    def _fitting(self, order: npt.NDArray[np.int64]) -> Marks:
        """The units of an order that are kept if each is that still fits into the budget."""
        marks = np.zeros(len(order), dtype=np.bool_)
        while len(order):
            fits, fails = 0, len(order) + 1
            while fails - fits > 1:
                middle = (fits + fails) // 2
                if self._weigh(_with(marks, order[:middle])) <= self._budget:
                    fits = middle
                else:
                    fails = middle
            marks = _with(marks, order[:fits])
            # The more units stay the more another one takes, so what does not fit now never will.
            order = order[fits + 1 :]
            room = float(self._budget - self._weigh(marks))
            least = torch.cat(self._units.added(self._all(marks), self._places)).numpy()
            order = order[least[self._eligible][order] <= room * (1 + 1e-9)]
        return marks

    def _weigh(self, marks: Marks) -> Fraction:
        return self._units.weigh(self._all(marks), self._places)

    def _all(self, marks: Marks) -> list[Tensor]:
        """All units that stay if these do."""
        masks = self.masks(marks)
        if self._others is None:
            return masks
        return [mask | other for mask, other in zip(masks, self._others, strict=True)]


Spread = Callable[[Queue, Marks], Marks]
"""From a queue, and the units that come first in it, to the units that stay."""


def _with(marks: Marks, places: npt.NDArray[np.int64]) -> Marks:
    more = marks.copy()
    more[places] = True
    return more
