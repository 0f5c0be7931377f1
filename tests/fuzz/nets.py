"""Random multitask nets, put together from small parts that all keep the width."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_SIDE, _TIMES, _WORDS = 5, 3, 11


@dataclass(frozen=True)
class NetCase:
    """A net.

    Attributes:
        data: What goes in: ``"rows"``, ``"images"``, ``"tokens"`` (sequences), ``"words"``.
        blocks: The trunk, part by part.
        width: Features, or channels.
        tasks: How many.
        exits: After how many blocks each task leaves the trunk; after the last unless given.
        heads: Each task's head, in turn.
        losses: Each task's loss, in turn.
        frozen: Blocks that are not trained.
        detached: Tasks that do not train the trunk.
        shared: How it is said what the tasks share.
        include: Whether embeddings and bare Parameters are pruned too.
        double: Whether weights are in float64.
        returns: What the model gives back: a ``"dict"``, ``"tuple"`` or ``"nested"`` dicts.
        seed: Of the weights and data.
    """

    data: str = "rows"
    blocks: tuple[str, ...] = ("linear",)
    width: int = 4
    tasks: int = 1
    exits: tuple[int, ...] = ()
    heads: tuple[str, ...] = ("linear",)
    losses: tuple[str, ...] = ("squares",)
    frozen: tuple[int, ...] = ()
    detached: tuple[int, ...] = ()
    shared: str = "auto"
    include: bool = False
    double: bool = False
    returns: str = "dict"
    seed: int = 0

    @property
    def names(self) -> list[str]:
        return [f"t{i}" for i in range(self.tasks)]

    def exit_of(self, task: int) -> int:
        """After how many blocks a task leaves the trunk."""
        return self.exits[task] if task < len(self.exits) else len(self.blocks)


# Parts of a trunk: functions of the width. Those of rows work on the last dimension of tokens too.


class Skip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Gate(nn.Module):
    def __init__(self, value: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.value, self.gate = value, gate

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.gate(x).sigmoid()


class Concat(nn.Module):
    """What comes in beside what the first part makes of it, for the second part."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.cat([x, self.first(x).relu()], 1))


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


class Bare(nn.Module):
    """A Parameter that no module of a known kind owns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.mix).tanh()


class Read(nn.Module):
    """A layer whose weight is read, and which is never called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight, self.layer.bias).tanh()


class Unused(nn.Module):
    """A layer that is there and never called, beside one that is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).tanh()


class Dead(nn.Module):
    """A branch whose ReLU never opens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main, self.side = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.constant_(self.side.bias, -1e3)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).tanh() + self.side(x).relu()


class Again(nn.Module):
    """Its inner part runs again in every backward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.pair = nn.Bilinear(width, width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x, x.tanh()).tanh()


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        heads = 1 if width % 2 else 2
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Cross(nn.Module):
    """Attention of all moments to the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True, kdim=width, vdim=width)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1]
        return x + self.attention(x, first, first, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Along(nn.Module):
    """A convolution along time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2).relu()


def _linear(width: int, act: nn.Module | None = None, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width, **options), act or nn.ReLU())


def _conv(width: int, wide: int = 0, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(wide or width, width, 3, padding=options.pop("padding", 1), **options)


def _conv_bn(width: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(_conv(width, bias=False, **options), nn.BatchNorm2d(width), nn.ReLU())


def _even(width: int) -> int:
    return 1 if width % 2 else 2


Part = Callable[[int], nn.Module]

ANY: dict[str, Part] = {
    "linear": _linear,
    "no bias": lambda w: _linear(w, nn.Tanh(), bias=False),
    "tanh": lambda w: nn.Tanh(),
    "skip": lambda w: Skip(_linear(w, nn.GELU())),
    "mlp": lambda w: Skip(
        nn.Sequential(nn.LayerNorm(w), nn.Linear(w, 3 * w), nn.GELU(), nn.Linear(3 * w, w))
    ),
    "twice": lambda w: Twice(nn.Linear(w, w)),
    "tied": Tied,
    "narrow": lambda w: nn.Sequential(nn.Linear(w, 1), nn.Tanh(), nn.Linear(1, w)),
    "bare": Bare,
    "read": Read,
    "unused": Unused,
    "dead": Dead,
    "gate": lambda w: Gate(nn.Linear(w, w), nn.Linear(w, w)),
    "norm": lambda w: nn.LayerNorm(w),
    "dropout": lambda w: nn.Sequential(nn.Linear(w, w), nn.Dropout(0.3), nn.Tanh()),
    "again": lambda w: Again(nn.Sequential(nn.Linear(w, w), nn.Dropout(0.3), nn.Tanh())),
    "pair": Pair,
}
ROWS: dict[str, Part] = {
    **ANY,
    "bn": lambda w: nn.Sequential(nn.Linear(w, w), nn.BatchNorm1d(w), nn.ReLU()),
    "concat": lambda w: Concat(nn.Linear(w, w), nn.Sequential(nn.Linear(2 * w, w), nn.ReLU())),
}
TOKENS: dict[str, Part] = {
    **ANY,
    "attention": Attention,
    "cross": Cross,
    "encoder": lambda w: nn.TransformerEncoderLayer(
        w, _even(w), 2 * w, dropout=0.1, batch_first=True
    ),
    "lstm": lambda w: Recurrent(nn.LSTM(w, w, batch_first=True)),
    "gru": lambda w: Recurrent(nn.GRU(w, w, num_layers=2, batch_first=True)),
    "rnn": lambda w: Recurrent(
        nn.RNN(w, w // _even(w), bidirectional=_even(w) == 2, batch_first=True)
    ),
    "along": Along,
}
IMAGES: dict[str, Part] = {
    "conv": lambda w: nn.Sequential(_conv(w), nn.ReLU()),
    "conv bn": _conv_bn,
    "circular": lambda w: nn.Sequential(_conv(w, padding_mode="circular"), nn.ReLU()),
    "grouped": lambda w: nn.Sequential(_conv(w, groups=_even(w)), nn.ReLU()),
    "depthwise": lambda w: nn.Sequential(_conv(w, groups=w), nn.Conv2d(w, w, 1), nn.ReLU()),
    "dilated": lambda w: nn.Sequential(_conv(w, padding=2, dilation=2), nn.ReLU()),
    "skip": lambda w: Skip(nn.Sequential(_conv_bn(w), _conv(w))),
    "twice": lambda w: Twice(_conv(w)),
    "concat": lambda w: Concat(_conv(w), nn.Sequential(_conv(w, 2 * w), nn.ReLU())),
    "up": lambda w: nn.Sequential(nn.ConvTranspose2d(w, w, 3, padding=1), nn.ReLU()),
    "gate": lambda w: Gate(_conv(w), nn.Conv2d(w, w, 1)),
    "norm": lambda w: nn.Sequential(_conv(w), nn.GroupNorm(_even(w), w), nn.ReLU()),
    "pool": lambda w: nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(w, w, 1), nn.Tanh()),
    "again": lambda w: Again(_conv_bn(w)),
    "dropout": lambda w: nn.Sequential(_conv(w), nn.Dropout2d(0.3), nn.ReLU()),
}
PARTS: dict[str, dict[str, Part]] = {
    "rows": ROWS,
    "tokens": TOKENS,
    "words": TOKENS,
    "images": IMAGES,
}

HEADS: dict[str, Part] = {
    "linear": lambda w: nn.Linear(w, 1),
    "deep": lambda w: nn.Sequential(nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 1)),
    "wide": lambda w: nn.Sequential(nn.Linear(w, 8 * w), nn.Tanh(), nn.Linear(8 * w, 1)),
    "no bias": lambda w: nn.Linear(w, 1, bias=False),
}

Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Loss] = {
    "squares": lambda out, target: (out - target).square().mean(),
    "absolute": lambda out, target: (out - target).abs().mean(),
    "huge": lambda out, target: (out - target).square().mean() * 1e4,
    "tiny": lambda out, target: (out - target).square().mean() * 1e-5,
    "binary": lambda out, target: F.binary_cross_entropy_with_logits(out, (target > 0).to(out)),
}
UNITS = {"huge": 1e4, "tiny": 1e-5}

SHARED = ("auto", "name", "module", "blocks", "glob", "callable", "mapping", "parameters")
WIDTHS = (1, 2, 3, 4, 6, 8)


class Model(nn.Module):
    """The net of a case: a trunk of blocks, and a head for each task."""

    def __init__(self, case: NetCase) -> None:
        super().__init__()
        self.case = case
        self.embed = nn.Embedding(_WORDS, case.width) if case.data == "words" else nn.Identity()
        self.trunk = nn.ModuleList(PARTS[case.data][name](case.width) for name in case.blocks)
        kinds = [case.heads[i % len(case.heads)] for i in range(case.tasks)]
        self.heads = nn.ModuleDict(
            {name: HEADS[kind](case.width) for name, kind in zip(case.names, kinds, strict=True)}
        )
        for i in case.frozen:
            if i < len(self.trunk):
                self.trunk[i].requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        given = [self.embed(x)]
        for block in self.trunk:
            given.append(block(given[-1]))
        outputs = {}
        for i, (task, head) in enumerate(self.heads.items()):
            features = given[min(self.case.exit_of(i), len(given) - 1)]
            if i in self.case.detached:
                features = features.detach()
            if features.dim() > 2:
                features = features.mean(1 if self.case.data != "images" else (2, 3))
            outputs[task] = head(features)
        if self.case.returns == "tuple":
            return tuple(outputs.values())
        return {"out": outputs, "x": x} if self.case.returns == "nested" else outputs


class TaskLoss:
    """The loss of one task, wherever its output is."""

    def __init__(self, case: NetCase, task: int) -> None:
        self.case, self.task = case, task
        name = case.losses[task % len(case.losses)]
        self.loss, self.unit = LOSSES[name], UNITS.get(name, 1.0)

    def __call__(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return self.loss(output_of(self.case, outputs, self.task), batch["target"][self.task])


def output_of(case: NetCase, outputs: Any, task: int) -> Tensor:
    if case.returns == "tuple":
        return outputs[task]
    return (outputs["out"] if case.returns == "nested" else outputs)[case.names[task]]


def build(case: NetCase, seed: int | None = None) -> Model:
    """The model of a case: the same each time, or another by its weights."""
    torch.manual_seed(case.seed if seed is None else seed)
    return Model(case).to(torch.float64 if case.double else torch.float32)


def losses(case: NetCase) -> dict[str, TaskLoss]:
    return {name: TaskLoss(case, i) for i, name in enumerate(case.names)}


def inputs(case: NetCase, rows: int, seed: int, scale: float = 1.0) -> Tensor:
    """Inputs of a number of rows, the same for the same seed."""
    random = torch.Generator().manual_seed(1_000 * case.seed + seed)
    if case.data == "words":
        return torch.randint(_WORDS, (rows, _TIMES), generator=random)
    inner = {"rows": (), "images": (_SIDE, _SIDE), "tokens": (_TIMES,)}[case.data]
    shape = (rows, *inner, case.width) if case.data != "images" else (rows, case.width, *inner)
    dtype = torch.float64 if case.double else torch.float32
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) * scale


def batch(case: NetCase, rows: int, seed: int) -> dict[str, Tensor]:
    """Inputs, and a target for each task, ``[tasks, rows, 1]``."""
    random = torch.Generator().manual_seed(7_000 * case.seed + seed)
    dtype = torch.float64 if case.double else torch.float32
    target = torch.randn(case.tasks, rows, 1, generator=random, dtype=torch.float64).to(dtype)
    return {"x": inputs(case, rows, seed), "target": target}


def shared(case: NetCase, model: Model) -> Any:
    """What the tasks share, said in the case's way. ``"mapping"`` has a component of one block."""
    embed = [model.embed] if case.data == "words" else []
    blocks = [block for block in model.trunk if _has_weights(block)] or list(model.trunk)
    return {
        "auto": "auto",
        "name": ["trunk", *(["embed"] if embed else [])],
        "module": [model.trunk, *embed],
        "blocks": [*blocks, *embed],
        "glob": ["trunk.*", *(["embed"] if embed else [])],
        "callable": lambda m: [m.trunk, *embed],
        "mapping": {"low": [blocks[0], *embed], **({"high": blocks[1:]} if blocks[1:] else {})},
        "parameters": [*model.trunk.parameters(), *model.embed.parameters()],
    }[case.shared]


def _has_weights(block: nn.Module) -> bool:
    """Whether it has matrices that are trained."""
    return any(p.requires_grad and p.dim() > 1 for p in block.parameters())


def included(case: NetCase, model: Model) -> list[Any]:
    """Embeddings and bare Parameters, if they are pruned too."""
    if not case.include:
        return []
    bare = [block.mix for block in model.trunk if isinstance(block, Bare)]
    return bare + ([model.embed] if case.data == "words" else [])


def draw(chance: Random, *, tasks: int = 6) -> NetCase:
    """A random net: most of them plain in most ways."""

    def some(values: Any, most: int, share: float) -> tuple[Any, ...]:
        values = list(values)
        number = chance.randint(1, most) if chance.random() < share else 0
        return tuple(chance.choice(values) for _ in range(number))

    data = chance.choice(["rows", "rows", "images", "tokens", "words"])
    blocks = tuple(chance.choice(list(PARTS[data])) for _ in range(chance.randint(1, 3)))
    number = chance.choice([1, 2, 2, 2, 3, 3, 4, tasks])
    frozen = some(range(len(blocks)), 1, 0.15)
    shared = chance.choice(SHARED)
    trained = set(blocks) - {blocks[i] for i in frozen} - {"tanh", "norm", "bare"}
    if not trained:  # then nothing in the trunk can be pruned, and whoever names it is told so
        shared = chance.choice(["auto", "auto", shared])
    return NetCase(
        data=data,
        blocks=blocks,
        width=chance.choice(WIDTHS),
        tasks=number,
        exits=some(range(1, len(blocks) + 1), number, 0.3),
        heads=some(HEADS, 2, 0.5) or ("linear",),
        losses=some(LOSSES, 3, 0.5) or ("squares",),
        frozen=frozen,
        detached=some(range(number), 1, 0.05),
        shared=shared,
        include=chance.random() < 0.2,
        double=chance.random() < 0.15,
        returns=chance.choice(["dict", "dict", "dict", "tuple", "nested"]),
        seed=chance.randrange(1_000),
    )
