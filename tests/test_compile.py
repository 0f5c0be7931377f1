from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from mtprune import MultitaskPruner, recipes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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


def train(
    backend: str, device: torch.device, compiler: str | None
) -> tuple[dict[str, torch.Tensor], int]:
    """Masks after a run of sparse training, and how often the model was compiled."""
    torch.manual_seed(0)
    net = Net().to(device, torch.float64)  # compilers may round otherwise
    compiled = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        compiled.append(graph)
        return lookup_backend(compiler)(graph, inputs)

    model = torch.compile(net, backend=count, fullgraph=True) if compiler else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = MultitaskPruner(
        model,
        LOSSES,
        "trunk",
        # Two observations, because one from a compiled graph does not tell who uses what.
        method=replace(recipes.disparse_dynamic(0.5, every=2, end=10), observations=2),
        optimizer=optimizer,
        backend=backend,
    )
    for _ in range(12):
        optimizer.zero_grad()
        losses = pruner.observe(model(torch.randn(8, 8, device=device, dtype=torch.float64)), None)
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()
    return pruner.masks, len(compiled)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_sparse_training_takes_the_same_path_as_plain(
    backend: str, device: torch.device, compiler: str
) -> None:
    import torch._functorch.config as functorch

    torch._dynamo.reset()
    plain, _ = train(backend, device, None)
    with functorch.patch(donated_buffer=False):
        compiled, graphs = train(backend, device, compiler)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)
    # Once at first; under "prune" once more when the hooks are installed; never for a new mask.
    assert graphs == (2 if backend == "prune" else 1)
