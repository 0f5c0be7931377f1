"""Trainers that spread a model over two processes: accelerate's and Lightning's own DDP."""

import os
import warnings
from importlib.util import find_spec

import pytest
import torch

from mtprune import Cubic, MultitaskPruner, Vote
from tests.nets import same, zeros
from tests.ranks import on_ranks
from tests.sharded import TASKS, Net, batch, losses

pytestmark = pytest.mark.slow

EPOCH, STEPS = 4, 8
METHODS = {
    "pruned": Vote(0.7, schedule=Cubic(begin=1, end=7, every=2)),
    "scored": Vote(0.0, schedule=Cubic(begin=1, end=7, every=1)),
    "plain": None,
}
TRAINERS = [name for name in ("accelerate", "lightning") if find_spec(name)]
FOLDER = "MTPRUNE_TEST_FOLDER"


def start():
    net = Net().double()
    return net, torch.optim.AdamW(net.parameters(), lr=0.02)


def told(net, pruner):
    masks = {} if pruner is None else pruner.masks
    if pruner is not None:
        pruner.finalize()
    return {
        "masks": masks,
        "weights": {name: p.detach().clone() for name, p in net.named_parameters()},
    }


def alone(method):
    """One process, which has the whole of every batch."""
    net, optimizer = start()
    pruner = MultitaskPruner(net, TASKS, net.trunk, method=method, optimizer=optimizer)
    for step in range(STEPS):
        found = losses(net(batch(step % EPOCH, 0, 1)))
        pruner.observe_losses(found)
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        pruner.step()
    return told(net, pruner)


def by_accelerate(rank, world, method, stop=None):
    """What `prepare` returns goes to the pruner, and the pruner to `register_for_checkpointing`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, optimizer = start()
    model, optimizer = accelerator.prepare(net, optimizer)
    assert isinstance(model, torch.nn.parallel.DistributedDataParallel)
    pruner, folder = None, f"{os.environ[FOLDER]}/accelerate"
    if method is not None:
        pruner = MultitaskPruner(model, TASKS, net.trunk, method=method, optimizer=optimizer)
        accelerator.register_for_checkpointing(pruner)
    first = 0
    if stop == "resumed":
        accelerator.load_state(folder)
        first = EPOCH
    for step in range(first, EPOCH if stop == "saved" else STEPS):
        found = losses(model(batch(step % EPOCH, rank, world)))
        if pruner is not None:
            pruner.observe_losses(found)
        optimizer.zero_grad()
        accelerator.backward(sum(found.values()))
        optimizer.step()
        if pruner is not None:
            pruner.step()
    if stop == "saved":
        accelerator.save_state(folder)
    return told(net, pruner)


def by_lightning(rank, world, method, stop=None):
    """A pruner that the callback builds, on the optimizer of a module under DDP."""
    import lightning

    from mtprune.integrations.lightning import PruningCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().double()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.02)

        def training_step(self, x, _):
            spread = self.trainer.strategy.model
            assert isinstance(spread, torch.nn.parallel.DistributedDataParallel)
            self.task_losses = losses(self.net(x))
            return sum(self.task_losses.values())

    def build(module):
        return MultitaskPruner(
            module.net, TASKS, module.net.trunk, method=method, optimizer=module.optimizers()
        )

    module, callback = Module(), PruningCallback(build)
    trainer = lightning.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=world,
        max_epochs=1 if stop == "saved" else 2,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[] if method is None else [callback],
    )
    path = f"{os.environ[FOLDER]}/lightning.ckpt"
    parts = torch.utils.data.DataLoader(
        [batch(i, rank, world) for i in range(EPOCH)], batch_size=None
    )
    trainer.fit(module, parts, ckpt_path=path if stop == "resumed" else None)
    if stop == "saved":
        trainer.save_checkpoint(path)
    return told(module.net, None if method is None else callback.pruner)


def every_trainer(rank, world):
    warnings.simplefilter("ignore")  # their own
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # of a group that is there already
    }
    found = {}
    for trainer in TRAINERS:
        train = globals()[f"by_{trainer}"]
        found[trainer] = {name: train(rank, world, method) for name, method in METHODS.items()}
        train(rank, world, METHODS["pruned"], "saved")
        found[trainer]["resumed"] = train(rank, world, METHODS["pruned"], "resumed")
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER, str(tmp_path_factory.mktemp("states")))
        yield on_ranks(__name__, "every_trainer", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("trainer", ["accelerate", "lightning"])
def test_two_ranks_decide_as_one_process_and_resume(trainer, two):
    pytest.importorskip(trainer)
    expected = alone(METHODS["pruned"])
    assert zeros(expected["masks"]) > 0
    for found in (rank[trainer] for rank in two):
        assert same(found["pruned"]["masks"], expected["masks"])
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(found["pruned"]["weights"][name], weight)
        assert same(found["pruned"]["weights"], two[0][trainer]["pruned"]["weights"])
        for part in ("masks", "weights"):
            assert same(found["resumed"][part], found["pruned"][part])


@pytest.mark.parametrize("trainer", ["accelerate", "lightning"])
def test_scoring_leaves_training_as_it_is(trainer, two):
    pytest.importorskip(trainer)
    for found in (rank[trainer] for rank in two):
        assert same(found["scored"]["weights"], found["plain"]["weights"])
