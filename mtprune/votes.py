"""Votes: how the tasks' percentiles become one worth per weight.

A vote is a reduction over the task axis: ``[voters, weights]`` percentiles in, ``[weights]`` worth
out. The budget then keeps the weights of highest worth. Two rules make a function a vote:

* it is non-decreasing in every percentile (a task that wants a weight more never makes it worth
  less), and
* it does not depend on the order of the rows, which is the order of the tasks that use the weight.

Reducing percentiles and then keeping the best is the same as letting every task mark the weights
it would prune and counting marks: with a cut ``c``, "at least m tasks would prune it" means that
the m-th smallest percentile lies below ``c``. So ``unanimous`` (prune only if all agree) is the
largest percentile, ``intersection`` (keep only if all agree) the smallest.

Not only tasks vote. A saliency that looks at no data can be one more voter on every weight
(``Vote(voters=(saliency.magnitude,))``): one more row, like any other. So `majority` counts it as a
voter, `mean` gives it an equal say, and on a weight that one task uses there are two voters.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mtprune import checks

__all__ = ["Vote", "at_least", "intersection", "majority", "mean", "unanimous"]

Vote = Callable[[Tensor], Tensor]
"""A function of percentiles `[voters, weights]` to worths `[weights]`."""


def unanimous(percentiles: Tensor) -> Tensor:
    """Prune a weight only if every task that uses it would: the highest percentile.

    Sun et al., "DiSparse: disentangled sparsification for multitask model compression", CVPR 2022.

    Args:
        percentiles: Shape ``[voters, weights]``.

    Returns:
        The worth, shape ``[weights]``.

    Example:
        >>> import torch
        >>> unanimous(torch.tensor([[0.75, 0.5, 0.0], [0.0, 0.5, 0.75]]))
        tensor([0.7500, 0.5000, 0.7500])
    """
    return percentiles.amax(dim=0)


def intersection(percentiles: Tensor) -> Tensor:
    """Keep a weight only if every task that uses it would: the lowest percentile."""
    return percentiles.amin(dim=0)


def majority(percentiles: Tensor) -> Tensor:
    """Prune a weight if more than half of its voters would: the upper median."""
    return pick(percentiles.unbind(), len(percentiles) // 2 + 1)


def at_least(m: int) -> Vote:
    """Prune a weight if at least ``m`` of its voters would: the m-th smallest percentile.

    A weight with fewer than ``m`` voters needs all of them.

    Example:
        >>> import torch
        >>> at_least(1)(torch.tensor([[0.75, 0.5, 0.0], [0.0, 0.5, 0.75]]))
        tensor([0.0000, 0.5000, 0.0000])
    """
    checks.whole("m", m, least=1, must="must be a whole number of tasks, at least 1")
    return _AtLeast(mth_smallest, m=m)


class _AtLeast(partial[Tensor]):
    """A partial that equals another with the same number, so that methods with it are equal."""

    def __eq__(self, other: object) -> bool:
        """Whether as many voters are meant."""
        return isinstance(other, _AtLeast) and self.keywords == other.keywords

    def __hash__(self) -> int:
        """The same for equal ones."""
        return hash(tuple(self.keywords.items()))


def mean(percentiles: Tensor) -> Tensor:
    """The average percentile: every task has an equal say in every weight."""
    # Sorted and summed row by row, so that rounding is the same in whatever order tasks come; then
    # rounded once more, so that 0.1 + 0.8 and 0.2 + 0.7 are a tie.
    rows = _ascending(percentiles.unbind(), len(percentiles))
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return (total / len(rows) * 2**44).round() / 2**44 if len(rows) > 1 else total


def mth_smallest(percentiles: Tensor, m: int) -> Tensor:
    """The vote behind `at_least`."""
    return pick(percentiles.unbind(), min(m, len(percentiles)))


def pick(rows: Sequence[Tensor], m: int) -> Tensor:
    """The m-th smallest of some rows, each ``[n]``, element by element."""
    if m <= (len(rows) + 1) // 2:
        return _ascending(rows, m)[m - 1]
    return _ascending(rows, len(rows) + 1 - m, torch.maximum, torch.minimum)[len(rows) - m]


def check(vote: object) -> None:
    """Refuse an object that is no vote.

    Raises:
        TypeError: If it is no function, or `at_least` without its number.
    """
    checks.function("vote", vote)
    if vote is at_least:
        raise TypeError("`vote` must be at_least(m), with a number of tasks, not at_least.")


def order_statistic(vote: Vote) -> Callable[[int], int] | None:
    """For a vote known to be the m-th smallest percentile: m for a number of voters.

    Example:
        >>> m = order_statistic(majority)
        >>> m(3), m(4), order_statistic(mean)
        (2, 3, None)
    """
    if isinstance(vote, partial) and vote.func is mth_smallest:
        most = vote.keywords["m"]
        return lambda voters: min(most, voters)
    if vote is unanimous:
        return lambda voters: voters
    if vote is majority:
        return lambda voters: voters // 2 + 1
    return (lambda voters: 1) if vote is intersection else None


def tally(vote: Vote, percentiles: Tensor) -> Tensor:
    """The worth ``[n]`` that a vote makes of percentiles ``[voters, n]``.

    Raises:
        ValueError: If it is not one worth for each weight.
    """
    worth: object = vote(percentiles)
    if not isinstance(worth, Tensor) or worth.shape != percentiles.shape[1:]:
        got = tuple(worth.shape) if isinstance(worth, Tensor) else type(worth).__name__
        raise ValueError(
            "A vote must turn percentiles [voters, weights] into worth [weights]. Got "
            f"{got} for percentiles of shape {tuple(percentiles.shape)}."
        )
    return worth


def _ascending(
    rows: Sequence[Tensor],
    upto: int,
    first: Callable[[Tensor, Tensor], Tensor] = torch.minimum,
    second: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
) -> list[Tensor]:
    """Rows sorted element by element, the first ``upto`` of them at least.

    There are few rows and many elements, so exchanging whole rows is faster than a sort.
    """
    rows = list(rows)
    for place in range(min(upto, len(rows) - 1)):
        for i in range(len(rows) - 1, place, -1):
            before, after = rows[i - 1], rows[i]
            rows[i - 1], rows[i] = first(before, after), second(before, after)
    return rows
