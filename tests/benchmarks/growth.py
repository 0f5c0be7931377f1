"""How the sweeps and the scoring of `observe` grow with tasks and with weights."""

import torch
from torch import nn

from mtprune import MultitaskPruner, Vote
from tests.benchmarks.harness import Row, Settings, device, interleaved, main, threads
from tests.benchmarks.nets import subject

TASKS = (1, 2, 4, 8, 12)
WEIGHTS = {"full": (1, 4, 16, 64, 91), "quick": (1, 4, 16), "toy": (0.01, 0.02)}


class Wide(nn.Module):
    """One square layer after another, and a head for each task."""

    def __init__(self, millions: float) -> None:
        super().__init__()
        width = 500 if millions >= 1 else 50
        layers = max(1, round(millions * 1e6 / width**2))
        self.trunk = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        with torch.no_grad():
            for layer in self.trunk:  # as large after hundreds of layers as before: no subnormals
                layer.weight *= 3**0.5
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in "abc"})

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


def run(settings: Settings) -> list[Row]:
    with threads(1):
        tasks = {k: timed_tasks(settings, k) for k in TASKS}
        weights = {m: timed_weights(settings, m) for m in WEIGHTS[settings.size]}
    return [
        Row(
            f"`observe`, K = {TASKS[0]} to {TASKS[-1]}: largest time per task",
            "the median of the times per task",
            _spread({k: t / k for k, t in tasks.items()}),
            None,
            detail={"seconds": tasks},
        ),
        Row(
            f"`observe`, N = {min(weights):g} M to {max(weights):g} M: largest time per weight",
            "the median of the times per weight",
            _spread({m: t / m for m, t in weights.items()}),
            None,
            detail={"seconds": weights},
        ),
    ]


def timed_tasks(settings: Settings, tasks: int) -> float:
    made = subject("encoder", settings.size, tasks)
    pruner = MultitaskPruner(
        made.model, made.losses, made.shared, method=Vote(0.9, observations=10**6)
    )
    outputs = made.model(made.inputs)
    return _seconds(lambda: pruner.observe(outputs, None), settings)


def timed_weights(settings: Settings, millions: float) -> float:
    torch.manual_seed(0)
    model = Wide(millions).to(device())
    losses = {task: (lambda out, _, task=task: out[task].square().mean()) for task in "abc"}
    pruner = MultitaskPruner(model, losses, "trunk", method=Vote(0.9, observations=10**6))
    outputs = model(torch.randn(16, model.trunk[0].in_features).to(device()))
    return _seconds(lambda: pruner.observe(outputs, None), settings)


def _seconds(function, settings: Settings) -> float:
    return float(interleaved(lambda: None, function, settings.repeats)["cpu"]["second_s"])


def _spread(each: dict[float, float]) -> float:
    values = sorted(each.values())
    return values[-1] / values[len(values) // 2]


if __name__ == "__main__":
    main(run)
