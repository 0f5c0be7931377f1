"""Options of `DistributedDataParallel`, under which masks are those of one process."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mtprune
from mtprune import Cubic, Vote
from tests.ranks import device_of, on_ranks
from tests.sharded import TASKS, Net, batch, losses

pytestmark = pytest.mark.slow

STEPS = 6


class Unused(Net):
    """A layer that no output needs."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Linear(6, 6)


WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no_sync": {"micro": 2},
    "find_unused_parameters": {"find_unused_parameters": True, "kind": Unused},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "comm hook, float16": {"hook": "float16"},
    "comm hook, bfloat16": {"hook": "bfloat16"},
    "comm hook, nothing trained": {"hook": "bfloat16", "rate": 0.0},
    "uneven batches": {"uneven": True},
    "compiled": {"compiled": True},
}
TRAINED_OTHERWISE = ("comm hook, float16", "comm hook, bfloat16", "uneven batches")


def narrow(wide: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What `bf16_compress_hook` does, which torch lets NCCL alone have."""
    sent = bucket.buffer().to(torch.bfloat16).div_(dist.get_world_size())
    future = dist.all_reduce(sent, async_op=True).get_future()
    return future.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def hook_of(name: str, device: torch.device) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    if name == "float16":
        return default_hooks.fp16_compress_hook
    return default_hooks.bf16_compress_hook if device.type == "cuda" else narrow


def train(
    rank: int,
    world: int,
    *,
    micro: int = 1,
    kind: Any = Net,
    hook: str = "",
    uneven: bool = False,
    rate: float = 0.05,
    compiled: bool = False,
    sparsity: float | None = 0.7,
    **options: Any,
) -> dict[str, Any]:
    net = kind().double().to(device_of(rank))
    model: Any = net
    if world > 1:
        model = DistributedDataParallel(net, **options)
        if hook:
            model.register_comm_hook(None, hook_of(hook, device_of(rank)))
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    # One observation of a compiled graph does not tell who uses what.
    pruner = None
    if sparsity is not None:
        rise = Cubic(begin=1, end=5, every=2)
        method = Vote(sparsity, schedule=rise, observations=1 + compiled)
        options = {"optimizer": optimizer, "backend": "inplace"}
        pruner = mtprune.MultitaskPruner(net, TASKS, "trunk", method=method, **options)
    for step in range(STEPS):
        for part in range(micro):
            x = batch(10 * step + part, rank, world)
            if uneven and step == STEPS - 1 and world > 1:
                x = x[: len(x) - rank]
            wait = part + 1 < micro and world > 1
            with model.no_sync() if wait else nullcontext():
                found = losses(model(x))
                if pruner is not None:
                    pruner.observe_losses(found)
                sum(found.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if pruner is not None:
            pruner.step()
    return {
        "masks": {} if pruner is None else pruner.masks,
        "weights": {name: p.detach().cpu().clone() for name, p in net.named_parameters()},
    }


def join(rank: int, world: int) -> str:
    """The last rank has a batch less."""
    net = Net().double().to(device_of(rank))
    model = DistributedDataParallel(net)
    method = Vote(0.7, schedule=Cubic(begin=1, end=5, every=2))
    pruner = mtprune.MultitaskPruner(net, TASKS, "trunk", method=method)
    try:
        with model.join():
            for step in range(3 - rank):
                found = losses(model(batch(step, rank, world)))
                pruner.observe_losses(found)
                sum(found.values()).backward()
                pruner.step()
    except RuntimeError as error:
        return str(error)
    return ""


def every_way(rank: int, world: int) -> dict[str, Any]:
    found = {way: train(rank, world, **options) for way, options in WAYS.items()}
    for name, sparsity in (("scored", 0.0), ("plain", None)):
        found[name] = train(rank, world, micro=2, sparsity=sparsity)
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> list[Any]:
    return on_ranks(__name__, "every_way", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("way", WAYS)
def test_masks_are_those_of_one_process(way: str, two: list[Any]) -> None:
    first, second = (result[way] for result in two)
    for name, mask in first["masks"].items():
        assert torch.equal(second["masks"][name], mask)
        assert torch.equal(second["weights"][name], first["weights"][name])
    if way in TRAINED_OTHERWISE:  # weights are trained by other gradients
        sizes = sum(mask.numel() for mask in first["masks"].values())
        assert sum(int((~mask).sum()) for mask in first["masks"].values()) == round(0.7 * sizes)
        return
    options = {k: v for k, v in WAYS[way].items() if k in ("micro", "kind", "rate", "compiled")}
    alone = train(0, 1, **options)
    for name, mask in alone["masks"].items():
        assert torch.equal(first["masks"][name], mask)


def test_scoring_leaves_training_as_it_is(two: list[Any]) -> None:
    for result in two:
        for name, weight in result["plain"]["weights"].items():
            assert torch.equal(result["scored"]["weights"][name], weight)


@pytest.mark.long
@pytest.mark.parametrize("late", [5])
def test_a_rank_that_joins_early_is_missed_by_name(late: int, tmp_path: Any) -> None:
    first, _ = on_ranks(__name__, "join", tmp_path, timeout=late)
    assert "Every rank must build the same pruner and call observe() and step() equally" in first
