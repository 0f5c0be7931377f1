"""A net that `fully_shard` spreads over ranks, and the same net on one process.

The back-end follows `MTPRUNE_TEST_DEVICE`: NCCL where that is cuda and there are devices enough.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtprune
from tests.ranks import device_of

TASKS = ("a", "b")
SCATTER = next(
    name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)
)


class Net(nn.Module):
    """A trunk, whose layers have rows that no number of ranks shares out evenly, and two heads."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = (6, 7, 11, 5)
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 1)})
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.trunk:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            x = x.tanh()
        return {task: head(x) for task, head in self.heads.items()}


class Encoder(nn.Module):
    """Two heads of attention, a few neurons, and two heads of tasks."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.ModuleList(
            [nn.TransformerEncoderLayer(6, 2, 9, dropout=0.0, batch_first=True)]
        )
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 1)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.unflatten(0, (-1, 2))  # two examples are a sequence
        for layer in self.trunk:
            x = layer(x)
        return {task: head(x) for task, head in self.heads.items()}


def batch(step: int, rank: int, world: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A rank's part of a batch of 12."""
    generator = torch.Generator().manual_seed(step)
    whole = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return whole.chunk(world)[rank].to(device_of(rank), dtype)


def losses(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "a": (outputs["a"].double() - 0.3).square().mean(),
        "b": (outputs["b"].double() + 1).pow(4).mean(),
    }


def shard(net: Any, blocks: bool = True, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in net.trunk if blocks else ():
        fully_shard(layer, **options)
    fully_shard(net, **options)
    return net


def whole(tensor: Any) -> Tensor:
    """All of a tensor of which a rank has a part."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone().cpu()


class Loop:
    """A training loop on this rank's part of every batch."""

    def __init__(
        self,
        method: Any,
        rank: int,
        world: int,
        *,
        spread: Callable[[Any], Any] | None = shard,
        kind: Callable[[bool], Any] = Net,
        dtype: torch.dtype = torch.float64,
        inputs: torch.dtype | None = None,
        late: bool = False,
        checkpointed: bool = False,
        optimizer: bool = True,
        tasks: Any = TASKS,
        **options: Any,
    ) -> None:
        self.rank, self.world = rank, world
        self.net = kind(checkpointed).to(device_of(rank), dtype)
        self.inputs = inputs or dtype
        options = {"backend": "inplace", "method": method, **options}
        make = lambda more: mtprune.MultitaskPruner(self.net, tasks, "trunk", **more)  # noqa: E731
        if late:
            self.pruner = make(options)
        self.model = self.net if spread is None else spread(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.02)
        if not late:
            self.pruner = make({**options, "optimizer": self.optimizer} if optimizer else options)
        self.steps = 0

    def step(self, micro: int = 1) -> None:
        for part in range(micro):
            x = batch(10 * self.steps + part, self.rank, self.world, self.inputs)
            found = losses(self.model(x))
            self.pruner.observe_losses(found)
            self.pruner.weigh(found).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pruner.step()
        self.steps += 1

    def train(self, steps: int) -> "Loop":
        for _ in range(steps):
            self.step()
        return self

    def masks(self) -> dict[str, Tensor]:
        return {name: whole(mask) for name, mask in self.pruner.masks.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(p) for name, p in self.net.named_parameters()}


def quiet() -> None:
    """Torch has something to say of its own modules."""
    warnings.filterwarnings("ignore", module="torch")


@contextmanager
def watched() -> Any:
    """How many bytes every collective sends from this rank, by its name."""
    names = ("all_reduce", "all_gather", SCATTER, "broadcast", "all_gather_object")
    sent: list[tuple[str, int]] = []
    before = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not args:  # the training's own, by `fully_shard`
                return before[name](**options)
            tensor = args[1] if name in ("all_gather", SCATTER) else args[0]
            size = tensor.nbytes if isinstance(tensor, torch.Tensor) else 0
            sent.append((name, size))
            return before[name](*args, **options)

        return call

    try:
        for name in names:
            setattr(dist, name, counting(name))
        yield sent
    finally:
        for name, call in before.items():
            setattr(dist, name, call)
