"""Compressed against dense, outputs checked: random weights, random units, or components gone.

Two text encoders: torch's, and one whose attention is four Linear layers, as most pretrained ones
have it. And SceneNet, as DiSparse has it: DeepLab on ResNet-34, with a head for each of 3 tasks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common.nets import build
from torch import Tensor, nn

import mtprune
from mtprune import patterns
from mtprune.compression.anatomy import Anatomy, Call, Family, add_family
from mtprune.model import factors
from mtprune.model.layers import find_layers
from mtprune.structure import Group
from tests.benchmarks.harness import Row, Settings, device, interleaved, main, threads
from tests.benchmarks.nets import subject
from tests.oracles import unit_masks

SPARSITIES = {0.9: 1 / 3.2, 0.95: 1 / 4.0}
"""Sparsity of encoders, and the largest share of the dense time that is aimed at."""

SCENENET = (0.95, 1 / 1.5)
"""The same for SceneNet."""

HALVES = {"rank": 1 / 1.5, "heads and neurons": 1 / 2.0, "channels": 1 / 2.0}
"""The share of the dense time that is aimed at with half of these."""


class Block(nn.Module):
    """A transformer block of Linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.query, self.key, self.value))
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.out(mixed))
        return self.norms[1](x + self.down(F.gelu(self.up(x))))


class OfBlocks(Family):
    """What native code needs to know of them, to run each as one."""

    def has(self, cls: type) -> bool:
        return cls is Block

    def anatomy(self, layer: Any) -> Anatomy:
        return Anatomy(
            (layer.query, layer.key, layer.value),
            layer.out,
            layer.up,
            layer.down,
            (layer.norms[0], layer.norms[1]),
            (layer.heads, layer.query.out_features // layer.heads),
            norm_first=False,
            activation="gelu",
        )

    def call(self, layer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        return Call(args[0], None)

    def settings(self, layer: Any) -> tuple[Any, ...]:
        return (layer.heads, *(norm.eps for norm in layer.norms))


add_family(OfBlocks())


class Blocks(nn.Module):
    """An encoder of such blocks, with a head for each of five tasks."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        self.trunk = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.heads = nn.ModuleDict({f"task{i}": nn.Linear(width, 3) for i in range(5)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(self.embedding(x)).mean(1)
        return {task: head(hidden) for task, head in self.heads.items()}


def encoders(size: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layers, width = {"full": (6, 384), "quick": (2, 128), "toy": (1, 32)}[size]
    return {
        "torch's encoder": subject("encoder", size).model,
        "encoder of Linear layers": Blocks(layers, width).to(device()),
    }


def scenenet(size: str) -> tuple[nn.Module, Tensor]:
    """The net, and one image."""
    torch.manual_seed(0)
    width, side = {"full": (1.0, 256), "quick": (0.5, 128), "toy": (0.1, 64)}[size]
    model = build("deeplab_resnet34", {"seg": 13, "depth": 1, "normals": 3}, width)
    return model.to(device()), torch.randn(1, 3, side, side)


@torch.no_grad()
def mask_(model: nn.Module, sparsity: float) -> None:
    """Random element-wise zeros in all that is prunable."""
    for layer in find_layers(model):
        layer.parameter.mul_((torch.rand(layer.shape) >= sparsity).to(device()))


@torch.no_grad()
def halve_ranks_(model: nn.Module) -> None:
    """Half the parameters of every Linear layer of a trunk, as two factors would have them."""
    for layer in find_layers(model):
        if layer.name.startswith("trunk"):
            rows, columns = layer.shape
            rank = rows * columns // (2 * (rows + columns))
            up, down = factors.factors(layer.parameter, rank)
            layer.parameter.copy_(up @ down)


@torch.no_grad()
def halve_units_(model: nn.Module, groups: Sequence[Group]) -> None:
    """A random half of every group's units at 0, with all that belongs to them."""
    masks = [torch.randperm(group.size) < group.size // 2 for group in groups]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, mask in unit_masks(groups, masks, shapes).items():
        model.get_parameter(name).mul_(mask.to(device()))


def run(settings: Settings) -> list[Row]:
    rows = elementwise(settings)
    tokens = 4 if settings.size == "toy" else 32
    for half in ("rank", "heads and neurons"):
        name, groups = "torch's encoder", ()
        if half == "rank":
            name = "encoder of Linear layers"
        model = encoders(settings.size)[name]
        if half == "rank":
            halve_ranks_(model)
        else:
            groups = [*patterns.heads(model), *patterns.neurons(model)]
            halve_units_(model, groups)
        for batch in (1, 16):
            x = torch.randint(0, 1000, (batch, tokens))
            what = f"{name}, half the {half}, {batch} x {tokens} tokens"
            rows += each(settings, what, model, x, HALVES[half], groups)
    model, x = scenenet(settings.size)
    groups = mtprune.Channel(x.to(device())).groups(model, find_layers(model))
    halve_units_(model, groups)
    what = f"SceneNet, half the channels, 1 x {x.shape[2]} x {x.shape[3]} pixels"
    return rows + each(settings, what, model, x, HALVES["channels"], groups)


def elementwise(settings: Settings) -> list[Row]:
    rows = []
    for sparsity, target in SPARSITIES.items():
        for name, model in encoders(settings.size).items():
            mask_(model, sparsity)
            for batch in (1, 16):
                x = torch.randint(0, 1000, (batch, 4 if settings.size == "toy" else 32))
                what = f"{name}, {sparsity:.0%}, {batch} x {x.shape[1]} tokens"
                rows += each(settings, what, model, x, target)
    sparsity, target = SCENENET
    model, x = scenenet(settings.size)
    mask_(model, sparsity)
    what = f"SceneNet, {sparsity:.0%}, 1 x {x.shape[2]} x {x.shape[3]} pixels"
    return rows + each(settings, what, model, x, target)


def each(settings: Settings, what: str, *args: Any) -> list[Row]:
    """A row for each number of threads."""
    rows = []
    for count in settings.threads:
        with threads(count):
            rows.append(measure(settings, what, *args))
    return rows


def measure(
    settings: Settings,
    what: str,
    model: nn.Module,
    x: Tensor,
    target: float,
    groups: Sequence[Group] = (),
) -> Row:
    model.eval()
    x = x.to(device())
    fast = mtprune.compress(model, x, groups=groups)
    plan = mtprune.plan_of(fast)
    with torch.no_grad():
        found = interleaved(lambda: fast(x), lambda: model(x), 3 * settings.repeats)
    choices = [row.choice for row in plan.rows]
    return Row(
        f"{what}, threads: {plan.threads}",
        "dense",
        1 / found["wall"]["ratio"],
        target,
        "x",
        {
            **found,
            "blocks": len(plan.blocks),
            "choices": {choice: choices.count(choice) for choice in sorted(set(choices))},
            "bytes": sum(row.chosen.bytes for row in plan.rows if row.chosen),
            "dense bytes": sum(row.dense.bytes for row in plan.rows),
            "parameters": sum(p.numel() for p in fast.parameters()),
            "dense parameters": sum(p.numel() for p in model.parameters()),
        },
    )


if __name__ == "__main__":
    main(run)
