"""What tests of other people's trainers share: a net of two tasks, its data and two methods."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import Cubic, MultitaskPruner, Vote

STEPS = 12

GRADUAL = Vote(0.75, schedule=Cubic(1, 9, 2))
SCORING = Vote(0.0, schedule=Cubic(1, 9, 1))
"""Scores at every step and prunes nothing: training must be what it is without."""


class Net(nn.Module):
    """What is random or has a memory, between two layers and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 8)
        )
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in "ab"})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(x).tanh()
        return {task: head(hidden) for task, head in self.heads.items()}


def losses(outputs: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Both tasks want the same, one of them twice as much of it."""
    target = x.sum(1, keepdim=True)
    return {
        task: (outputs[task] - scale * target).square().mean() for scale, task in enumerate("ab", 1)
    }


def functions() -> dict[str, Any]:
    """The same as functions of outputs and batch."""
    return {task: lambda outputs, x, task=task: losses(outputs, x)[task] for task in "ab"}


def batches(number: int = STEPS, size: int = 8) -> list[Tensor]:
    """The same ones each time."""
    return list(torch.randn(number, size, 6, generator=torch.Generator().manual_seed(7)))


def cycle(number: int) -> Iterator[Tensor]:
    """As many batches as are wanted."""
    for index in range(number):
        yield batches()[index % STEPS]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers that a model without a pruner has."""
    names = {n: p for n, p in model.state_dict().items() if not n.endswith("_mask")}
    return {n.removesuffix("_orig"): p.detach().clone() for n, p in names.items()}


def pruner_of(
    model: Net, optimizer: Any, method: Vote = GRADUAL, **options: Any
) -> MultitaskPruner:
    """A pruner of both tasks."""
    return MultitaskPruner(
        model, ["a", "b"], model.trunk, method=method, optimizer=optimizer, **options
    )
