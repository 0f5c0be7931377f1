"""A shelf of awkward nets, each as small as it can be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETS", "Net", "Nets"]

_TASKS = ("a", "b")


@dataclass
class Net:
    """A model and all it takes to train it.

    Attributes:
        model: Called with a batch's ``"x"``; it returns a mapping task -> output.
        task_losses: As for `mtprune.MultitaskPruner`.
        shared_modules: The same, by name.
        make_batch: The batch of a step.
    """

    model: nn.Module
    task_losses: Mapping[str, Callable[[Any, Any], Tensor]]
    shared_modules: Any
    make_batch: Callable[[int], Mapping[str, Tensor]]


Nets = Mapping[str, Callable[[], Any]]
"""Functions by name, each of which makes a `Net`, or anything with its attributes."""


class _Heads(nn.Module):
    """A trunk, and a head for each task: on what the trunk gives, or on what it gives that task."""

    def __init__(self, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in _TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        given = self.trunk(x)
        features = given if isinstance(given, tuple) else (given,) * len(_TASKS)
        return {t: self.heads[t](own) for t, own in zip(_TASKS, features, strict=True)}


class _Skipping(nn.Module):
    """The second task leaves the trunk before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(8, 8)
        self.late = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.early(x).relu()
        return self.late(early).relu(), early


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return mixed.mean(1)


class _Squares:
    """The mean squared error of one task's output."""

    def __init__(self, task: str) -> None:
        self.task = task

    def __call__(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return (outputs[self.task] - batch[self.task]).square().mean()


class _Batches:
    """Random inputs of one shape, and a target for each task."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def __call__(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(self.shape, generator=generator)
        targets = torch.randn(len(_TASKS), self.shape[0], 1, generator=generator)
        return {"x": x, **dict(zip(_TASKS, targets, strict=True))}


def _net(trunk: nn.Module, *shape: int) -> Net:
    losses = {task: _Squares(task) for task in _TASKS}
    return Net(_Heads(trunk, 8), losses, "trunk", _Batches(*shape))


def trunk_with_heads() -> Net:
    """A plain net."""
    return _net(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh()), 16, 8)


def called_twice() -> Net:
    """A layer that is called twice in a forward."""
    layer = nn.Linear(8, 8)
    return _net(nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh()), 16, 8)


def tied() -> Net:
    """Two layers with one weight."""
    first, between, last = (nn.Linear(8, 8) for _ in range(3))
    last.weight = first.weight
    return _net(nn.Sequential(first, nn.Tanh(), between, nn.Tanh(), last, nn.Tanh()), 16, 8)


def skipped_layer() -> Net:
    """A shared layer that one task does not use."""
    return _net(_Skipping(), 16, 8)


def convolutions() -> Net:
    """Convolutions and batch norms."""
    first, second = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3)
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    trunk = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), *pooled)
    return _net(trunk, 8, 4, 6, 6)


def attention() -> Net:
    """Self-attention, some of whose weights another module reads than the one that holds them."""
    return _net(_Attention(), 8, 4, 8)


NETS: Nets = {
    factory.__name__: factory
    for factory in (trunk_with_heads, called_twice, tied, skipped_layer, convolutions, attention)
}
"""The shelf."""
