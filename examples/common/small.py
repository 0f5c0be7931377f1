"""Digits in three tasks, for the scripts that show other people's trainers."""

from collections.abc import Mapping

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

__all__ = ["TASKS", "Digits", "Net", "accuracies", "losses_of"]

TASKS = {"digit": 10, "odd": 2, "large": 2}
"""Each task, and how many classes it has."""


class Digits(Dataset[dict[str, Tensor]]):
    """Pictures of 8 x 8 pixels: which digit, whether it is odd, whether it is at least 5.

    Args:
        train: The first 1,437 of 1,797, or the rest.
    """

    def __init__(self, train: bool) -> None:
        found = load_digits()
        half = slice(0, 1437) if train else slice(1437, None)
        self.images = torch.tensor(found.data[half] / 16, dtype=torch.float32)
        self.digits = torch.tensor(found.target[half], dtype=torch.int64)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.digits)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """One picture, and its label in each task."""
        digit = self.digits[place]
        return {
            "image": self.images[place],
            "digit": digit,
            "odd": digit % 2,
            "large": (digit >= 5).long(),
        }


class Net(nn.Module):
    """A trunk that all tasks share, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(64, n) for task, n in TASKS.items()})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """The outputs of all tasks."""
        hidden = self.trunk(image)
        return {task: head(hidden) for task, head in self.heads.items()}


def losses_of(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss of each task."""
    return {task: cross_entropy(outputs[task], batch[task]) for task in TASKS}


@torch.no_grad()
def accuracies(model: nn.Module) -> dict[str, float]:
    """The share of test pictures that each task gets right."""
    test = Digits(train=False)
    batch = torch.utils.data.default_collate([test[place] for place in range(len(test))])
    model.eval()
    outputs = model(batch["image"])
    return {task: float((outputs[task].argmax(1) == batch[task]).float().mean()) for task in TASKS}
