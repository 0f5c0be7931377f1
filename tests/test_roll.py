"""Ranks that have other tasks, come late, or are in another call; models spread over ranks."""

import time
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mtprune
from mtprune import OneShot, Vote
from mtprune.model.parallel import check_parallel, check_replicas
from mtprune.observing.roll import call_roll
from tests import checkpoints
from tests.ranks import on_ranks

TASKS = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in TASKS})
        self.double()

    def losses(self, x, tasks):
        hidden = self.trunk(x).tanh()
        return {task: self.heads[task](hidden).square().mean() for task in tasks}


def batch(task, rank):
    generator = torch.Generator().manual_seed(10 * TASKS.index(task) + rank)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64)


# Which ranks have which tasks.
SHARES = {
    "one each": (("a",), ("b",), ("c",)),
    "overlapping": (("a", "b"), ("b", "c"), ("a", "b", "c")),
    "none": ((), ("a", "b"), ("c",)),
    "all": (TASKS, TASKS, TASKS),
}


def seen_by(model, pruner, share, ranks):
    """Observe batches of some tasks and ranks: those of one rank, or of all in one process."""
    losses = {
        task: torch.stack(
            [model.losses(batch(task, r), [task])[task] for r in ranks if task in share[r]]
        ).mean()
        for task in TASKS
        if any(task in share[r] for r in ranks)
    }
    pruner.observe_losses(losses)


def scores(share, ranks, disentangled):
    model = Net()
    method = Vote(0.5, schedule=OneShot(2), disentangled=disentangled)
    pruner = mtprune.MultitaskPruner(model, TASKS, model.trunk, method=method)
    pruner.step()
    seen_by(model, pruner, share, ranks)
    found = checkpoints.scores(pruner)
    counts = checkpoints.observed(pruner)
    pruner.step()
    return {"scores": found, "counts": counts, "masks": pruner.masks}


def with_other_tasks(rank, world):
    return {
        f"{name} {disentangled}": scores(share, [rank], disentangled)
        for name, share in SHARES.items()
        for disentangled in (True, False)
    }


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return on_ranks(__name__, "with_other_tasks", tmp_path_factory.mktemp("three"), world=3)


@pytest.mark.slow
@pytest.mark.parametrize("disentangled", [True, False])
@pytest.mark.parametrize("name", SHARES)
def test_scores_are_those_of_one_process_with_all_batches(three, name, disentangled):
    alone = scores(SHARES[name], range(3), disentangled)
    for found in (result[f"{name} {disentangled}"] for result in three):
        assert found["counts"] == alone["counts"]
        assert found["scores"].keys() == alone["scores"].keys()
        for voter, layers in alone["scores"].items():
            for layer, score in layers.items():
                torch.testing.assert_close(found["scores"][voter][layer], score)
        assert all(torch.equal(found["masks"][n], mask) for n, mask in alone["masks"].items())


def wrong(rank, world):
    """What each rank is told, where one of them is elsewhere."""
    told = {}

    def attempt(name, calls):
        model = Net()
        method = Vote(0.5, schedule=OneShot(0))
        pruner = mtprune.MultitaskPruner(model, TASKS, model.trunk, method=method)
        began = time.monotonic()
        try:
            for call in calls:
                if call == "observe":
                    seen_by(model, pruner, SHARES["all"], [rank])
                elif call == "step":
                    pruner.step()
            told[name] = ""
        except RuntimeError as error:
            told[name] = str(error)
        told[f"{name}, in time"] = time.monotonic() - began < 30

    attempt("in step", ["observe", "step"] if rank else ["step"])
    attempt("inputs", [])
    model = Net()

    def wanda(weight, grad=None, *, inputs):
        return weight.abs() * inputs.norm(dim=0)

    method = Vote(0.5, saliency=wanda, schedule=OneShot(0))
    pruner = mtprune.MultitaskPruner(model, TASKS, model.trunk, method=method)
    try:
        seen_by(model, pruner, SHARES["one each"][:world], [rank])
    except RuntimeError as error:
        told["inputs"] = str(error)
    # The last, because who waits in vain is left with a broken group.
    attempt("nowhere", ["observe"] if rank else [])
    return told


@pytest.mark.slow
def test_a_rank_that_is_elsewhere_is_named(tmp_path):
    first, second = on_ranks(__name__, "wrong", tmp_path, timeout=5)
    for told in (first, second):
        assert told["in step"].startswith(
            "Ranks are in different calls: rank 0 in step() at step 1, rank 1 in observe() at step"
        )
        assert told["in step, in time"]
        assert told["inputs"].startswith("Ranks have batches of different tasks, and this method")
    assert first["nowhere"] == ""
    assert second["nowhere"].startswith("Rank 1 called observe() at step 0, and not every rank did")
    assert second["nowhere, in time"]


def test_one_process_has_nothing_to_agree_on():
    losses = {"a": torch.ones(())}
    roll = call_roll(losses, TASKS, 3, torch.device("cpu"))
    assert roll.losses is losses
    assert not roll.partial


def spread(rank, world):
    """What a model that is spread over ranks is told, before and after the pruner is built."""
    warnings.simplefilter("ignore")  # what torch says of its own modules
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (world,))

    def ddp(model):
        return DistributedDataParallel(model, static_graph=True)

    def fsdp1(model, **options):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)

    ways = {
        "static_graph": ddp,
        "fsdp2": lambda model: fully_shard(model, mesh=mesh) or model,
        "tensor parallel": lambda model: parallelize_module(
            model, mesh, {"trunk": ColwiseParallel()}
        ),
        "fsdp1": fsdp1,
        "fsdp1, original": lambda model: fsdp1(model, use_orig_params=True),
    }
    told = {}
    for name, spread in ways.items():
        for late in (False, True):
            model = Net().float()
            key = f"{name}, {'late' if late else 'early'}"
            pruner = mtprune.MultitaskPruner(model, TASKS, model.trunk) if late else None
            try:
                whole = spread(model)
                if pruner is None:
                    mtprune.MultitaskPruner(whole, TASKS, [whole])
                elif "fsdp1" in name:
                    pruner.observe_losses(
                        {t: torch.ones((), requires_grad=True) * 2 for t in TASKS}
                    )
                else:
                    x = torch.ones(2, 6)
                    hidden = model.trunk(x) if name != "fsdp2" else torch.ones(2, 5)
                    total = hidden.sum() * torch.ones((), requires_grad=True)
                    pruner.observe_losses(dict.fromkeys(TASKS, total))
                told[key] = ""
            except (ValueError, RuntimeError) as error:
                told[key] = f"{type(error).__name__}: {error}"
            del pruner
    model = Net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    try:
        mtprune.MultitaskPruner(model, TASKS, model.trunk, optimizer=optimizer)
    except ValueError as error:
        told["zero"] = str(error)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_models_spread_over_ranks_are_refused_by_name(world, tmp_path):
    words = {
        "static_graph": "DistributedDataParallel(static_graph=True) expects one backward",
        "fsdp2": "sharded by fully_shard (FSDP2)",
        "tensor parallel": "split by tensor parallelism (parallelize_module)",
        "fsdp1": "(FSDP1",
        "fsdp1, original": "(FSDP1",
    }
    for told in on_ranks(__name__, "spread", tmp_path, world=world, timeout=60):
        for name, word in words.items():
            for when in ("early", "late"):
                if (name, when, world) == ("static_graph", "late", 1):
                    continue  # nobody to drift apart from
                assert word in told[f"{name}, {when}"], (name, when, told[f"{name}, {when}"])
        assert "is a ZeroRedundancyOptimizer" in told["zero"]


def test_a_plain_model_is_none_of_these():
    model = Net()
    check_parallel(model)
    check_replicas(model)


def test_an_engine_of_deepspeed_is_known_by_its_package():
    kind = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})
    with pytest.raises(ValueError, match=r"The model \(DeepSpeedEngine\) is an engine of"):
        mtprune.MultitaskPruner(kind(), ["a"])
    zero = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage3"})
    with pytest.raises(ValueError, match=r"is a DeepSpeedZeroOptimizer, which steps a part"):
        mtprune.MultitaskPruner(Net(), TASKS, "trunk", optimizer=zero())
