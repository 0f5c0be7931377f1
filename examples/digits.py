"""Train and prune on scikit-learn's handwritten digits: what a digit is, and how it is written.

1,797 digits of 8 x 8 pixels come with scikit-learn, so there is no data to download. Tasks:

* ``digit``, which of ten; ``odd`` and ``large`` (5 or more), which follow from it;
* ``ink``, how much of the picture is written on, and ``center``, in which column its middle lies:
  numbers that do not follow from the digit, with mean 0 and deviation 1 in training.

    python digits.py --method vote --sparsity 0.9
"""

import numpy as np
import torch
from common import data, losses
from common.loop import main
from common.options import Problem
from sklearn.datasets import load_digits
from torch import Tensor

OUTPUTS = {"digit": 10, "odd": 2, "large": 2, "ink": 1, "center": 1}
CLASSES = ("digit", "odd", "large")
ENDS = {"train": 1077, "val": 1437, "test": 1797}  # 60, 20 and 20 %


def read_digits() -> data.Source:
    """The three splits: every digit in one of them, always the same."""
    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    images = torch.from_numpy(loaded.images[order]).float() / 16
    every = {"input": images.flatten(1), **labels(images, torch.from_numpy(loaded.target[order]))}
    for task in set(OUTPUTS) - set(CLASSES):
        known = every[task][: ENDS["train"]]
        every[task] = (every[task] - known.mean()) / known.std()
    splits, start = {}, 0
    for split, end in ENDS.items():
        splits[split] = data.Table({name: values[start:end] for name, values in every.items()})
        start = end
    return data.Source("scikit-learn's digits", splits, OUTPUTS, features=images[0].numel())


def labels(images: Tensor, digits: Tensor) -> dict[str, Tensor]:
    """What each task asks about pictures ``[N, H, W]`` of these digits ``[N]``."""
    columns = images.sum(1)
    ink = columns.sum(1)
    return {
        "digit": digits,
        "odd": digits % 2,
        "large": (digits >= 5).long(),
        "ink": ink / images[0].numel(),
        "center": columns @ torch.arange(images.shape[2]).float() / ink,
    }


PROBLEM = Problem(
    name="digits",
    tasks=tuple(OUTPUTS),
    make_tasks=lambda source: {
        task: losses.row_classes(judged="accuracy") if task in CLASSES else losses.row_numbers()
        for task in OUTPUTS
    },
    packaged=read_digits,
    defaults={
        "batch": 64,
        "decay": 0.0,
        "lr_every": 500,
        "lr_trained": 1e-3,
        "lr_tuned": 3e-4,
        "steps": 2000,
        "workers": 0,
    },
    nets=("mlp", "mmoe"),
    augment=False,
)
if __name__ == "__main__":
    main(PROBLEM)
