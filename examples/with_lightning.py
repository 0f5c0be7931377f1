"""Prune a network of three tasks with Lightning's Trainer, and stop and resume on the way.

    pip install "mtprune[lightning,examples]"
    python with_lightning.py

Half of the epochs are run, a new module and a new callback go on from Lightning's checkpoint, and
the result is saved without a trace of the pruner. It takes less than a minute. Curves for each task
are in ``OUT/lightning_logs`` (``tensorboard --logdir OUT``, if TensorBoard is installed).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from common.small import TASKS, Digits, Net, accuracies, losses_of
from torch import Tensor
from torch.utils.data import DataLoader

from mtprune import MultitaskPruner
from mtprune.integrations.lightning import PruningCallback


class Module(lightning.LightningModule):
    """As it would be without pruning, but for the tasks' losses, which the callback looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """The sum of the losses; each of them is left for the callback."""
        self.task_losses = losses_of(self.net(batch["image"]), batch)  # mtprune
        return torch.stack(list(self.task_losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One for all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, stop, resume; returns what was printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args(arguments)
    loader = DataLoader(Digits(train=True), batch_size=64, shuffle=True)

    def pruner_of(module: Any) -> MultitaskPruner:  # mtprune
        return MultitaskPruner(
            module,
            list(TASKS),
            module.net.trunk,
            sparsity=options.sparsity,
            steps=options.epochs * len(loader),
            optimizer=module.optimizers(),
        )

    lightning.seed_everything(0)
    checkpoint = None
    for epochs in (options.epochs // 2, options.epochs):
        module, callback = Module(), PruningCallback(pruner_of)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callback],
            default_root_dir=options.out,
            enable_progress_bar=False,
            log_every_n_steps=10,
        )
        trainer.fit(module, loader, ckpt_path=checkpoint)
        checkpoint = options.out / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
    callback.pruner.finalize()  # mtprune
    print(callback.pruner.report().table())
    results = {"sparsity": callback.pruner.sparsity, "accuracy": accuracies(module.net)}
    print(results)
    torch.save(module.net.state_dict(), options.out / "model.pt")
    return results


if __name__ == "__main__":
    main()
