"""The two nets that are measured, built from torch alone, and small ones like them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.harness import device

SIZES = ("full", "quick", "toy")


@dataclass(frozen=True)
class Subject:
    """A net with its tasks and a batch: what a benchmark trains.

    Attributes:
        model: Returns ``{task: output}``.
        inputs: One batch.
        losses: For each task, ``loss(outputs, batch)``.
        shared: What the tasks share.
    """

    model: nn.Module
    inputs: Tensor
    losses: dict[str, Callable[[Any, Any], Tensor]]
    shared: str

    @property
    def tasks(self) -> list[str]:
        return list(self.losses)


def subject(net: str, size: str = "full", tasks: int | None = None) -> Subject:
    """``"deeplab"`` or ``"encoder"``, by default with 3 and 5 tasks, on the device."""
    torch.manual_seed(0)
    made = {"deeplab": _deeplab, "encoder": _encoder}[net](size, tasks)
    return replace(made, model=made.model.to(device()), inputs=made.inputs.to(device()))


def _losses(names: list[str]) -> dict[str, Callable[[Any, Any], Tensor]]:
    def make(task: str, target: float) -> Callable[[Any, Any], Tensor]:
        return lambda outputs, batch: (outputs[task] - target).square().mean()

    return {name: make(name, 0.1 * i) for i, name in enumerate(names)}


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(before, after, 3, stride, dilation, dilation, bias=False)
        self.two = nn.Conv2d(after, after, 3, 1, dilation, dilation, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for _ in range(2))
        same = before == after and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms[0](self.one(x)).relu()
        return (self.norms[1](self.two(hidden)) + self.short(x)).relu()


class Aspp(nn.Module):
    """A head as DiSparse's nets have them: dilated convolutions side by side, then summed."""

    def __init__(self, before: int, width: int, out: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, width, 3, padding=d, dilation=d),
                nn.ReLU(),
                nn.Conv2d(width, width, 1),
                nn.ReLU(),
                nn.Conv2d(width, out, 1),
            )
            for d in (6, 12, 18, 24)
        )

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = sum(branch(x) for branch in self.branches)
        return total


class DeepLab(nn.Module):
    """ResNet-34 at output stride 8, and an ASPP head per task: 91 M weights with three."""

    def __init__(self, tasks: list[str], width: int, depths: tuple[int, ...], head: int) -> None:
        super().__init__()
        stages, before = [], width
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        for stage, depth in enumerate(depths):
            after = width << stage
            stride, dilation = (2, 1) if stage == 1 else (1, max(1, 2 ** (stage - 1)))
            for i in range(depth):
                stages.append(Block(before, after, stride if i == 0 else 1, dilation))
                before = after
        self.trunk = nn.Sequential(*stages)
        self.heads = nn.ModuleDict({task: Aspp(before, head, 8) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(self.pool(self.stem(x)))
        return {task: head(hidden) for task, head in self.heads.items()}


def _deeplab(size: str, tasks: int | None) -> Subject:
    names = [f"task{i}" for i in range(tasks or 3)]
    width, depths, head = {
        "full": (64, (3, 4, 6, 3), 1024),
        "quick": (32, (2, 2, 2, 2), 256),
        "toy": (8, (1, 1), 8),
    }[size]
    shape = {"full": (2, 3, 128, 160), "quick": (2, 3, 64, 80), "toy": (2, 3, 16, 16)}[size]
    model = DeepLab(names, width, depths, head)
    return Subject(model, torch.randn(shape), _losses(names), "trunk")


class Encoder(nn.Module):
    """A text encoder with a linear head per task."""

    def __init__(self, tasks: list[str], layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 3) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(self.embedding(x)).mean(1)
        return {task: head(hidden) for task, head in self.heads.items()}


def _encoder(size: str, tasks: int | None) -> Subject:
    names = [f"task{i}" for i in range(tasks or 5)]
    layers, width = {"full": (6, 384), "quick": (2, 128), "toy": (1, 32)}[size]
    shape = {"full": (16, 32), "quick": (8, 16), "toy": (2, 4)}[size]
    model = Encoder(names, layers, width)
    return Subject(model, torch.randint(0, 1000, shape), _losses(names), "trunk")
