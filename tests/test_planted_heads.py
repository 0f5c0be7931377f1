"""Heads that are far wider than their tasks need: thresholds learn to prune them, not the trunk.

``python -m tests.test_planted_heads`` prints the errors that the documentation shows.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mtprune import MultitaskPruner, OneShot, SoftThreshold, Vote, recipes

TASKS = ("t0", "t1", "t2")
STEPS = 900
RATE = 3e-3


class Net(nn.Module):
    """A trunk of 1,344 weights, and heads of any width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 28), nn.ReLU(), nn.Linear(28, 32), nn.ReLU())
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 8))
                for task in TASKS
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


def error(outputs: dict[str, Tensor], targets: dict[str, Tensor], task: str) -> Tensor:
    return (outputs[task] - targets[task]).square().mean()


def train(method: SoftThreshold | None, seed: int, steps: int) -> tuple[float, dict[str, float]]:
    """Learn from scratch; the error on new inputs, and the sparsity of trunk and heads."""
    torch.manual_seed(seed)
    teacher, model = Net(4), Net(90)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() > 1:
            parameter.mul_(2.0)
    inputs, fresh = torch.randn(4096, 16), torch.randn(2048, 16)
    raw, new = teacher(inputs), teacher(fresh)
    units = {task: (raw[task].mean(0), raw[task].std()) for task in TASKS}
    known, asked = (
        {task: (values[task] - units[task][0]) / units[task][1] for task in TASKS}
        for values in (raw, new)
    )
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    pruner = MultitaskPruner(
        model,
        {task: lambda outputs, batch, task=task: error(outputs, batch, task) for task in TASKS},
        [model.trunk],
        method=method or Vote(0.0, schedule=OneShot(steps)),
        optimizer=optimizer,
    )
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        chosen = torch.randint(0, len(inputs), (128,), generator=generator)
        batch = {task: known[task][chosen] for task in TASKS}
        optimizer.zero_grad()
        losses = pruner.observe(model(inputs[chosen]), batch)
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    with torch.no_grad():
        outputs = model(fresh)
    errors = [float(error(outputs, asked, task)) for task in TASKS]
    return sum(errors) / len(TASKS), {
        part: zeros(weights) for part, weights in (("trunk", model.trunk), ("heads", model.heads))
    }


def zeros(module: nn.Module) -> float:
    weights = [p for p in module.parameters() if p.dim() > 1]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


def runs(steps: int) -> Iterator[tuple[str, SoftThreshold | None]]:
    recipe = recipes.adapmtl(0.9, steps)
    yield "dense", None
    yield "adapmtl", recipe
    yield "adapmtl, uniform", replace(recipe, allocation="uniform")
    yield "adapmtl, uniform, plain", replace(recipe, allocation="uniform", scale="none")


@pytest.mark.long
@pytest.mark.slow
def test_learned_thresholds_prune_the_heads_and_keep_the_trunk():
    recipe = recipes.adapmtl(0.9, 400)
    learned, where = train(recipe, seed=0, steps=400)
    uniform, level = train(replace(recipe, allocation="uniform"), seed=0, steps=400)
    assert uniform > 1.2 * learned
    assert where["trunk"] < 0.75 < 0.9 < where["heads"]
    assert abs(level["trunk"] - level["heads"]) < 0.05


if __name__ == "__main__":
    for name, method in runs(STEPS):
        print(name, *(train(method, seed, STEPS) for seed in (0, 1)))
