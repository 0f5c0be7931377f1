"""Random nets: pieces in a row, and a head for each task somewhere along it."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, LENGTH, ROWS = 8, 5, 6

PIECES = (
    *("linear", "linear", "relu", "residual", "twice", "tied", "frozen", "norm", "batchnorm"),
    *("attention", "gru", "conv", "grouped", "bare", "dropout", "encoder", "single"),
)


def draw_net(dice: random.Random) -> dict[str, Any]:
    """A net, as JSON holds it."""
    pieces = [dice.choice(PIECES) for _ in range(dice.randint(1, 5))]
    tasks = [chr(97 + i) for i in range(dice.choice((1, 2, 2, 2, 3, 3, 6)))]
    return {
        "pieces": pieces,
        "tasks": {task: dice.randint(0, len(pieces)) for task in tasks},
        "seed": dice.randint(0, 10**6),
    }


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        again: Tensor = self.inner(self.inner(x).tanh())
        return again


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x, x)[0]
        return found


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)[0]
        return found


class Turned(nn.Module):
    """A module that wants channels first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.mT).mT
        return found


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(WIDTH) + 0.1 * torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Single(nn.Module):
    """A layer of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x[..., :1])


MAKERS: Mapping[str, Any] = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "relu": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
    "residual": Residual,
    "twice": Twice,
    "tied": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "frozen": lambda: nn.Linear(WIDTH, WIDTH).requires_grad_(False),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batchnorm": lambda: Turned(nn.BatchNorm1d(WIDTH)),
    "attention": Attention,
    "gru": Recurrent,
    "conv": lambda: Turned(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "grouped": lambda: Turned(nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=2)),
    "bare": Bare,
    "dropout": lambda: nn.Dropout(0.2),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True),
    "single": Single,
}


class RandomNet(nn.Module):
    """The net that `draw_net` has drawn."""

    def __init__(self, drawn: Mapping[str, Any], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(drawn["seed"] + seed)
        self.pieces = nn.ModuleList(MAKERS[piece]() for piece in drawn["pieces"])
        previous: nn.Linear | None = None
        for name, piece in zip(drawn["pieces"], self.pieces, strict=True):
            if name in ("linear", "relu", "tied") and isinstance(piece, nn.Sequential):
                if name == "tied" and previous is not None:
                    piece[0].weight = previous.weight
                previous = piece[0]
        self.places = dict(drawn["tasks"])
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 2) for task in self.places})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs of all tasks."""
        outputs, hidden = {}, [x]
        for piece in self.pieces:
            hidden.append(piece(hidden[-1]))
        for task, place in self.places.items():
            outputs[task] = self.heads[task](hidden[place])
        return outputs


class Loss:
    """The loss of a task."""

    def __init__(self, task: str) -> None:
        self.task = task

    def __call__(self, outputs: Mapping[str, Tensor], batch: Any) -> Tensor:
        return self.of(outputs[self.task].float())

    def of(self, output: Tensor) -> Tensor:
        """The loss of an output."""
        target = torch.arange(output.numel()).view_as(output).sin()
        return (output - target).square().mean()


def inputs(seed: int, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """A batch."""
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def simpler_nets(drawn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nets with a piece or a task less, or plainer pieces."""
    found = []
    for i in range(len(drawn["pieces"])):
        pieces = [*drawn["pieces"][:i], *drawn["pieces"][i + 1 :]]
        tasks = {task: min(place, len(pieces)) for task, place in drawn["tasks"].items()}
        if pieces:
            found.append({**drawn, "pieces": pieces, "tasks": tasks})
        plain = [*drawn["pieces"][:i], "linear", *drawn["pieces"][i + 1 :]]
        found.append({**drawn, "pieces": plain})
    if len(drawn["tasks"]) > 1:
        for task in drawn["tasks"]:
            tasks = {name: place for name, place in drawn["tasks"].items() if name != task}
            found.append({**drawn, "tasks": tasks})
    return found
