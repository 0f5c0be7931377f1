"""Prune a network of three tasks in a loop of accelerate, on one process or on many.

    pip install "mtprune[transformers,examples]"
    python with_accelerate.py
    accelerate launch --cpu --num_processes 2 with_accelerate.py

What ``prepare`` returns is handed to the pruner as it is, and the pruner to
``register_for_checkpointing``. It takes less than a minute.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common.small import TASKS, Digits, Net, accuracies, losses_of
from torch.utils.data import DataLoader

from mtprune import MultitaskPruner


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train; returns what was printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    options = parser.parse_args(arguments)
    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.accumulate)
    net = Net()
    model, optimizer, loader = accelerator.prepare(
        net,
        torch.optim.AdamW(net.parameters(), lr=3e-3),
        DataLoader(Digits(train=True), batch_size=32, shuffle=True),
    )
    pruner = MultitaskPruner(  # mtprune
        model,
        list(TASKS),
        net.trunk,
        sparsity=options.sparsity,
        steps=options.epochs * (len(loader) // options.accumulate),
        optimizer=optimizer,
    )
    accelerator.register_for_checkpointing(pruner)  # mtprune
    for epoch in range(options.epochs):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                losses = losses_of(model(batch["image"]), batch)
                pruner.observe_losses(losses)  # mtprune
                accelerator.backward(torch.stack(list(losses.values())).sum())
                optimizer.step()
                optimizer.zero_grad()
                pruner.step()  # mtprune
        if epoch + 1 == options.epochs // 2:
            accelerator.save_state(str(options.out / "state"))
    pruner.finalize()  # mtprune
    results = {"sparsity": pruner.sparsity, "accuracy": accuracies(accelerator.unwrap_model(model))}
    accelerator.print(pruner.report().table())
    accelerator.print(results)
    return results


if __name__ == "__main__":
    main()
