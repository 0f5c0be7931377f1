"""Labels handed out anew: tasks with nothing to learn, on the same samples."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from common import data


def shuffled(source: data.Source, tasks: Iterable[str], seed: int) -> data.Source:
    """The same pictures with each task's training labels handed out anew, task by task.

    What is left in common between tasks is the net, the pictures, and how labels look in general.
    """
    split = source.splits["train"]
    orders = {
        task: np.random.default_rng([seed, i]).permutation(len(split)).tolist()
        for i, task in enumerate(tasks)
    }
    if isinstance(split, data.Table):
        moved: data.Split = data.Table(
            {name: x[orders[name]] if name in orders else x for name, x in split.tensors.items()}
        )
    else:
        moved = _Shuffled(split, orders)
    return replace(source, splits={**source.splits, "train": moved})


@dataclass(frozen=True)
class _Shuffled:
    """A split whose labels come from other samples.

    Attributes:
        split: The samples.
        orders: For each task which sample gives the label.
    """

    split: data.Split
    orders: Mapping[str, Sequence[int]]

    def __len__(self) -> int:
        """How many samples."""
        return len(self.split)

    def __getitem__(self, number: int) -> data.Sample:
        """The picture of one, with labels of others."""
        labels = {task: self.split[order[number]][task] for task, order in self.orders.items()}
        return {**self.split[number], **labels}
