"""Labels handed out anew, or nothing but noise: tasks with nothing to learn."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

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


def noise(source: data.Source, tasks: Iterable[str]) -> data.Source:
    """Random pictures with random labels in the training split, for each task apart.

    Classes are drawn at random; of other labels it is their places in a picture, and the picture.
    """
    classes = {task: source.outputs[task] for task in tasks}
    split = _Noise(source.splits["train"], classes)
    return replace(source, splits={**source.splits, "train": split})


@dataclass(frozen=True)
class _Noise:
    """A split of which nothing is left but shapes, and values of labels that are no classes.

    Attributes:
        split: The samples.
        classes: How many a task has, if it has any.
    """

    split: data.Split
    classes: Mapping[str, int]

    def __len__(self) -> int:
        """How many samples."""
        return len(self.split)

    def __getitem__(self, number: int) -> data.Sample:
        """A random picture with labels, the same each time."""
        random = torch.Generator().manual_seed(number)
        picture = self.split[number]["input"]
        found = {"input": torch.randn(picture.shape, generator=random)}
        for task, count in self.classes.items():
            other = int(torch.randint(len(self), (), generator=random))
            label = self.split[other][task]
            if label.dtype == torch.int64:
                found[task] = torch.randint(count, label.shape, generator=random)
            else:
                flat = label.flatten(-2) if label.dim() > 1 else label
                order = torch.randperm(flat.shape[-1], generator=random)
                found[task] = flat[..., order].view(label.shape)
        return found
