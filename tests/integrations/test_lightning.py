"""Lightning: the module is restored before ``configure_optimizers``, and the pruner must be there.

The first test walks through the order of its hooks without it, the second runs it.
"""

import pytest
import torch
from torch import nn

from mtprune import Cubic, MultitaskPruner, Vote
from tests.nets import same

STEPS = 24


class Hooks:
    """A module's hooks as `docs/your-trainer.md` has them."""

    def __init__(self, backend):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in "ab"})
        self.backend = backend
        self.pruner = None

    def configure_model(self):
        if self.pruner is not None:
            return
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        self.pruner = MultitaskPruner(
            self,
            ["a", "b"],
            self.trunk,
            method=Vote(0.8, schedule=Cubic(1, 12, 2)),
            optimizer=self.optimizer,
            backend=self.backend,
        )

    def configure_optimizers(self):
        return self.optimizer

    def training_step(self, batch, _):
        hidden = self.trunk(batch)
        target = batch.sum(1, keepdim=True)
        losses = {
            task: (head(hidden) - scale * target).square().mean()
            for scale, (task, head) in enumerate(self.heads.items(), 1)
        }
        self.pruner.observe_losses(losses)
        return sum(losses.values())

    def on_train_batch_end(self, *_):
        self.pruner.step()

    def on_save_checkpoint(self, checkpoint):
        checkpoint["pruner"] = self.pruner.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.pruner.load_state_dict(checkpoint["pruner"])


class Module(Hooks, nn.Module):
    pass


def data():
    return list(torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(0)))


def fit(backend, batches, path=None):
    """What Lightning does with these hooks, in its order."""
    torch.manual_seed(1 if path else 0)
    module = Module(backend)
    module.configure_model()
    checkpoint = torch.load(path, weights_only=True) if path else None
    if checkpoint:
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
    optimizer = module.configure_optimizers()
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
    for index, batch in enumerate(batches):
        optimizer.zero_grad()
        module.training_step(batch, index).backward()
        optimizer.step()
        module.on_train_batch_end()
    return module


def test_a_module_goes_on_where_it_was_saved(backend, tmp_path):
    whole = fit(backend, data())
    first = fit(backend, data()[:7])
    checkpoint = {
        "state_dict": first.state_dict(),
        "optimizer": first.configure_optimizers().state_dict(),
    }
    first.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    second = fit(backend, data()[7:], tmp_path / "last.ckpt")
    assert same(whole.state_dict(), second.state_dict())
    assert same(whole.pruner.masks, second.pruner.masks)
    assert round(second.pruner.sparsity, 2) == 0.8


@pytest.mark.filterwarnings("ignore")  # its own, of workers and folders
def test_lightning_itself(backend, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Trained(Hooks, lightning.LightningModule):
        pass

    def run(epochs, seed, path=None):
        torch.manual_seed(seed)
        module = Trained(backend)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=None), ckpt_path=path)
        return trainer, module

    _, whole = run(3, seed=0)
    trainer, _ = run(1, seed=0)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, second = run(3, seed=1, path=tmp_path / "last.ckpt")
    assert same(whole.state_dict(), second.state_dict())
    assert round(second.pruner.sparsity, 2) == 0.8
