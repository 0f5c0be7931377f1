"""Prune a network of three tasks with transformers' Trainer.

    pip install "mtprune[transformers,examples]"
    python with_transformers.py

The model returns the loss that it is trained on, and beside it those of its tasks. Trainer's log
tells what each task loses. It takes less than a minute.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common.small import TASKS, Digits, Net, accuracies, losses_of
from torch import Tensor
from transformers import Trainer, TrainingArguments

from mtprune import MultitaskPruner
from mtprune.integrations.transformers import PruningCallback


class Model(Net):
    """The net, with its losses in its output."""

    def forward(self, image: Tensor, **labels: Tensor) -> dict[str, Any]:
        """Outputs, or losses where there are labels."""
        outputs: dict[str, Any] = super().forward(image)
        if labels:
            losses = losses_of(outputs, labels)
            outputs = {"loss": torch.stack(list(losses.values())).sum(), "losses": losses}
        return outputs


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; returns what was printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Model()
    pruner = MultitaskPruner(  # mtprune
        model, list(TASKS), model.trunk, sparsity=options.sparsity, steps=options.steps
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out),
            max_steps=options.steps,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            logging_steps=max(1, options.steps // 6),
            save_steps=max(1, options.steps // 2),
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Digits(train=True),
        callbacks=[PruningCallback(pruner)],  # mtprune
    )
    trainer.train()
    pruner.finalize()  # mtprune
    print(pruner.report().table())
    logs = [log for log in trainer.state.log_history if "mtprune/loss/odd" in log]
    results = {
        "sparsity": pruner.sparsity,
        "accuracy": accuracies(model),
        "losses": {task: [log[f"mtprune/loss/{task}"] for log in logs] for task in TASKS},
    }
    print(results)
    return results


if __name__ == "__main__":
    main()
