"""Selection: the exact budgets, of weights, of units, of weights by a level, of directions."""

from mtprune.selection.directions import select_directions
from mtprune.selection.groups import Groups, select_in_groups, settled
from mtprune.selection.knapsack import knapsack
from mtprune.selection.ranking import Best, Ranking, rank, worths
from mtprune.selection.units import (
    Marks,
    Queue,
    fitting_units,
    least_cost,
    least_units,
    select_units,
)
from mtprune.selection.waterline import waterline
from mtprune.selection.weights import Quota, select

__all__ = [
    "Best",
    "Groups",
    "Marks",
    "Queue",
    "Quota",
    "Ranking",
    "fitting_units",
    "knapsack",
    "least_cost",
    "least_units",
    "rank",
    "select",
    "select_directions",
    "select_in_groups",
    "select_units",
    "settled",
    "waterline",
    "worths",
]
