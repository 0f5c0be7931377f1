from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mtprune import Cubic, MultitaskPruner, SoftThreshold, recipes
from tests.long import few

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.a, self.b = nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.trunk(x)
        return self.a(hidden), self.b(hidden)


LOSSES: dict[str, Any] = {
    "a": lambda outputs, batch: outputs[0].square().mean(),
    "b": lambda outputs, batch: (outputs[1] - 1).square().mean(),
}


# Two observations, because one from a compiled graph does not tell who uses what.
METHODS = {
    "dynamic": replace(recipes.disparse_dynamic(0.5, every=2, end=10), observations=2),
    "movement": replace(recipes.movement(0.5, 10), observations=2),
    "soft": SoftThreshold(
        0.5,
        schedule=Cubic(begin=2, end=8, every=2),
        observations=2,
        grad_mode="anneal",
        allocation="learned",
        weighting="pruning_sensitivity",
    ),
}


def train(
    method: str, backend: str, device: torch.device, compiler: str | None
) -> tuple[dict[str, torch.Tensor], set[int]]:
    """Masks after a run of sparse training, and the steps at which the model was compiled."""
    torch.manual_seed(0)
    net = Net().to(device, torch.float64)  # compilers may round otherwise
    compiled: set[int] = set()
    steps: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        compiled.add(len(steps))
        return lookup_backend(compiler)(graph, inputs)

    model = torch.compile(net, backend=count, fullgraph=True) if compiler else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = MultitaskPruner(
        model,
        LOSSES,
        "trunk",
        method=METHODS[method],
        optimizer=optimizer,
        backend=backend,
    )
    for step in range(12):
        steps.append(step)
        optimizer.zero_grad()
        losses = pruner.observe(model(torch.randn(8, 8, device=device, dtype=torch.float64)), None)
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()
    return pruner.masks, compiled


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compiler", few(["eager", "aot_eager"], "aot_eager"))
def test_compiled_training_takes_the_same_path_as_plain(
    method: str, backend: str, device: torch.device, compiler: str
) -> None:
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    plain, _ = train(method, backend, device, None)
    with functorch.patch(donated_buffer=False):
        compiled, when = train(method, backend, device, compiler)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
    # At first, and when hooks come or go; never for a new mask or threshold.
    hooks = {"dynamic": {3} if backend == "prune" else set(), "soft": {3, 9}, "movement": {3, 11}}
    assert {1} <= when <= {1} | hooks[method]
