"""Compressed against dense: the text encoder with random element-wise masks, outputs checked.

Two encoders: torch's, whose attention keeps its dense projections, and one whose attention is four
Linear layers, as most pretrained encoders have it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtprune
from tests.benchmarks.harness import Row, Settings, device, interleaved, main, threads
from tests.benchmarks.nets import subject

SPARSITIES = {0.9: 1 / 2.0, 0.95: 1 / 3.0}
"""Sparsity, and the largest share of the dense time that is aimed at."""


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


@torch.no_grad()
def mask_(model: nn.Module, sparsity: float) -> None:
    """Random element-wise zeros in all that is prunable."""
    for layer in mtprune.components.find_layers(model):
        layer.parameter.mul_((torch.rand(layer.shape) >= sparsity).to(device()))


def run(settings: Settings) -> list[Row]:
    rows = []
    for sparsity, target in SPARSITIES.items():
        for name, model in encoders(settings.size).items():
            model.eval()
            mask_(model, sparsity)
            for batch in (1, 16):
                for count in settings.threads:
                    with threads(count):
                        rows.append(measure(settings, name, model, sparsity, batch, target))
    return rows


def measure(
    settings: Settings, name: str, model: nn.Module, sparsity: float, batch: int, target: float
) -> Row:
    x = torch.randint(0, 1000, (batch, 4 if settings.size == "toy" else 32)).to(device())
    fast = mtprune.compress(model, x)
    plan = mtprune.plan_of(fast)
    with torch.no_grad():
        found = interleaved(lambda: fast(x), lambda: model(x), 3 * settings.repeats)
    choices = [row.choice for row in plan.rows]
    return Row(
        f"{name}, {sparsity:.0%}, {batch} x {x.shape[1]} tokens, threads: {plan.threads}",
        "dense",
        1 / found["wall"]["ratio"],
        target,
        "x",
        {
            **found,
            "choices": {choice: choices.count(choice) for choice in sorted(set(choices))},
            "bytes": sum(row.chosen.bytes for row in plan.rows if row.chosen),
            "dense bytes": sum(row.dense.bytes for row in plan.rows),
        },
    )


if __name__ == "__main__":
    main(run)
