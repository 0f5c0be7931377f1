r"""Splitting: where a trunk may branch, what that costs, and what sharing it gives up.

A split at a layer leaves what runs before it to all tasks, and gives each group of tasks a copy of
its own from there on. What is lost is that a weight serves two tasks. Whether it does is asked of
the draws of the null: outputs beside other samples' targets are far off, and the gradient of such a
loss leads through all that the net has learnt for the task. It tells which weights carry the task's
outputs, and which way they would have to move to make those smaller. Two tasks that live on the
same features agree in both. Their *agreement* counts that,

.. math:: a = \frac{|\{\text{both keep},\ g_j g_k > 0\}| - |\{\text{both keep},\ g_j g_k < 0\}|}
                   {|\{\text{either keeps}\}|},

at most the overlap of masks, and near 0 for tasks that have nothing to do with each other. Beside
their own targets trained tasks do not show it: gradients there are what is left of the errors.
A split gains, as a share of all :math:`U` weights that pairs of tasks would keep,

.. math:: \frac{1}{U} \sum_{l \ge s} \sum_{(j, k)\ \mathrm{apart}} u_{ljk}\,(c - a_{ljk})

with the weights :math:`u` that one of both would keep, and the agreement :math:`c` at which sharing
is worth as much as being apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import combinations
from math import prod
from statistics import fmean

from torch import Tensor

from mtprune import checks
from mtprune.affinity.contrasts import mean_within
from mtprune.affinity.likeness import Likeness
from mtprune.affinity.null import Draw, Null
from mtprune.facts import Subject
from mtprune.text import columns

__all__ = ["Split", "Splits", "suggest_split"]

Groups = tuple[tuple[str, ...], ...]

_MANY = 5
"""Of more tasks not every way to group them is tried."""
_SHOWN = 5
"""So many suggestions are printed."""


@dataclass(frozen=True)
class Split:
    """A trunk that branches at a layer.

    Attributes:
        at: The first layer that each group has for its own.
        before: How many layers all tasks still share.
        groups: The tasks that stay together.
        agreement: Of tasks in different groups, from there on: the mean over draws.
        interval: Where that mean lies with a confidence of 95 %.
        cosine: The cosine of their gradients there beside their own targets, the mean over pairs:
            below 0 they pull apart as they are trained now.
        gain: What the split gains, by the agreement, and by the upper end of its interval.
        parameters: Weights that a dense model has more, without biases and norms.
        macs: Multiply-adds of a sample that it has more; None where they were not seen.
        keeps: For each task, the share of the weights it wants in the trunk that it still keeps, if
            as many weights are kept as without the split.
    """

    at: str
    before: int
    groups: Groups
    agreement: float
    interval: tuple[float, float]
    cosine: float
    gain: tuple[float, float]
    parameters: int
    macs: float | None
    keeps: Mapping[str, float]


@dataclass(frozen=True)
class Splits:
    """All splits of a trunk, those first that surely gain most. It prints as a table.

    Attributes:
        tasks: The tasks.
        layers: The layers that tasks share, in order of execution.
        ranked: The splits.
        worth: The agreement at which sharing is worth as much as being apart.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    ranked: tuple[Split, ...]
    worth: float

    @property
    def best(self) -> Split | None:
        """The first of them, if it gains at either end of the interval; None: share everything."""
        return self.ranked[0] if self.ranked[0].gain[1] > 0 else None

    def __str__(self) -> str:
        """The first few, and what to do."""
        head = ["split at", "groups", "shared", "agreement", "95 % interval", "cosine", "gain"]
        head += ["weights", "multiply-adds", *(f"{task} keeps" for task in self.tasks)]
        rows = [self._cells(split) for split in self.ranked[:_SHOWN]]
        told = "Share everything: no split surely gains."
        if self.best is not None:
            told = f"Split at {self.best.at} into {_words(self.best.groups)}."
        return "\n".join([*columns([head, *rows], left=2), told])

    def _cells(self, split: Split) -> list[str]:
        low, high = split.interval
        return [
            split.at,
            _words(split.groups),
            f"{split.before} of {len(self.layers)}",
            f"{split.agreement:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            f"{split.cosine:+.3f}",
            f"{split.gain[0]:+.3f}",
            f"+{split.parameters:,}",
            "unknown" if split.macs is None else f"+{split.macs:,.0f}",
            *(f"{split.keeps[task]:.0%}" for task in self.tasks),
        ]


def suggest_split(null: Null, *, worth: float = 0.2) -> Splits:
    """Where tasks may part: all splits of what they share, those first that surely gain most.

    Ask it of a model that was trained on its tasks. Before training heads are random, and so is
    which way two tasks pull, however related they are. It is advice: whether branching helps is for
    training to show.

    Args:
        null: What `permuted` found of the model, in several draws.
        worth: The agreement at which sharing is worth as much as being apart. On planted problems,
            small and trained for hundreds of steps, unrelated tasks agree by 0.04 to 0.13 in a
            layer, tasks with half of their variance in common by 0.2 to 0.3, and two copies of one
            task by 0.4 to 0.6.

    Returns:
        Every layer as a place to split, and every way to group up to five tasks; of more tasks, all
        apart and each one off.

    Raises:
        ValueError: If no two of the tasks share a layer.
    """
    checks.inside("worth", worth, "(0, 1)")
    trunk = _Trunk(null)
    if not trunk.layers:
        raise ValueError(f"No two of the tasks {list(null.tasks)} share a layer to split.")
    splits = [
        trunk.split(place, groups, worth)
        for groups in _groupings(null.tasks)
        for place in range(len(trunk.layers))
        if trunk.apart(place, groups)
    ]
    # Of equals the one that costs less.
    splits.sort(key=lambda split: (-round(split.gain[1], 9), split.parameters, len(split.groups)))
    return Splits(null.tasks, tuple(x.name for x in trunk.layers), tuple(splits), worth)


class _Trunk:
    """What tasks share, layer by layer in order of execution.

    Args:
        null: The tasks' scores.
    """

    def __init__(self, null: Null) -> None:
        self._null = null
        self._masks = null.task_masks
        self.layers = [layer for layer in null.layers if len(layer.tasks) > 1]
        self._wanted: dict[tuple[int, tuple[str, ...]], int] = {}

    def apart(self, place: int, groups: Groups) -> dict[tuple[str, str], list[str]]:
        """The layers from a place on that every two tasks of different groups share."""
        group = {task: i for i, tasks in enumerate(groups) for task in tasks}
        found: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers[place:]:
            for one, other in combinations(layer.tasks, 2):
                if group[one] != group[other]:
                    found.setdefault((one, other), []).append(layer.name)
        return found

    def split(self, place: int, groups: Groups, worth: float) -> Split:
        """The split at a layer."""
        apart = self.apart(place, groups)
        draws = [_likeness(draw, apart) for draw in self._null.draws]
        found = [draw.agreement if draw.union else 0.0 for draw in draws]
        agreement, interval = fmean(found), mean_within(found)
        part = _likeness(self._null.own, apart).union / (self._union or 1)
        after = range(place, len(self.layers))
        copies = {i: sum(bool(self._users(i, tasks)) for tasks in groups) - 1 for i in after}
        return Split(
            at=self.layers[place].name,
            before=place,
            groups=groups,
            agreement=agreement,
            interval=interval,
            cosine=fmean(self._null.own.cosine(pair, names) for pair, names in apart.items()),
            gain=(part * (worth - agreement), part * (worth - interval[1])),
            parameters=sum(n * prod(self.layers[i].shape) for i, n in copies.items()),
            macs=_macs([(n, self.layers[i]) for i, n in copies.items()]),
            keeps=self._keeps(place, groups),
        )

    @cached_property
    def _union(self) -> int:
        """The weights that one of two tasks would keep, over all pairs and layers."""
        everyone = tuple((task,) for task in self._null.tasks)
        return _likeness(self._null.own, self.apart(0, everyone)).union

    def _keeps(self, place: int, groups: Groups) -> dict[str, float]:
        """The share of its wishes each task keeps, if as many weights are kept in the trunk.

        What all share stays as it is; each branch gets the same share of what its group wants.
        """
        after = range(place, len(self.layers))
        together = sum(self._wishes(i, self._null.tasks) for i in after)
        apart = sum(self._wishes(i, tasks) for i in after for tasks in groups)
        share = min(1.0, together / apart) if apart else 1.0
        keeps = {}
        for task in self._null.tasks:
            wants = [self._wishes(i, (task,)) for i in range(len(self.layers))]
            before, own = sum(wants[:place]), sum(wants[place:])
            keeps[task] = (before + share * own) / (before + own) if before + own else 1.0
        return keeps

    def _wishes(self, i: int, tasks: tuple[str, ...]) -> int:
        """How many weights of a layer one of these tasks wants."""
        if (i, tasks) not in self._wanted:
            masks = [self._masks[task][self.layers[i].name] for task in self._users(i, tasks)]
            self._wanted[i, tasks] = int(reduce(Tensor.__or__, masks).sum()) if masks else 0
        return self._wanted[i, tasks]

    def _users(self, i: int, tasks: Sequence[str]) -> list[str]:
        return [task for task in tasks if task in self.layers[i].tasks]


def _likeness(draw: Draw, layers: Mapping[tuple[str, str], Sequence[str]]) -> Likeness:
    """How alike pairs of tasks are in a draw, each in some layers, all together."""
    return Likeness.sum(
        [draw.likeness[pair][name] for pair, names in layers.items() for name in names]
    )


def _macs(copies: Sequence[tuple[int, Subject]]) -> float | None:
    """The multiply-adds of so many copies of layers; None where they were not seen."""
    total = 0.0
    for count, layer in copies:
        if layer.cost is None:
            return None
        total += count * float(layer.cost) * prod(layer.shape)
    return total


def _groupings(tasks: tuple[str, ...]) -> list[Groups]:
    """The ways to put tasks into groups, more than one."""
    if len(tasks) <= _MANY:
        return [groups for groups in _partitions(tasks) if len(groups) > 1]
    rest = [tuple(other for other in tasks if other != task) for task in tasks]
    return [
        tuple((task,) for task in tasks),
        *(((t,), r) for t, r in zip(tasks, rest, strict=True)),
    ]


def _partitions(tasks: tuple[str, ...]) -> Iterator[Groups]:
    if not tasks:
        yield ()
        return
    for groups in _partitions(tasks[:-1]):
        for i, group in enumerate(groups):
            yield (*groups[:i], (*group, tasks[-1]), *groups[i + 1 :])
        yield (*groups, (tasks[-1],))


def _words(groups: Groups) -> str:
    return " | ".join(" + ".join(tasks) for tasks in groups)
