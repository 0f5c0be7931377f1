"""Bytes per weight that stay, with AdamW, and bits per weight of a checkpoint of the pruner."""

import io

import torch
from torch import Tensor

from mtprune import MultitaskPruner
from tests.benchmarks.harness import Row, Settings, allocated, isolated, main
from tests.benchmarks.nets import subject
from tests.benchmarks.step import METHOD
from tests.checkpoints import set_random_masks


def run(settings: Settings) -> list[Row]:
    rows = []
    base, count, _ = isolated(settings, measure, settings.size, None)
    for backend, target in (("inplace", 1.1), ("prune", 5.0)):
        held, _, saved = isolated(settings, measure, settings.size, backend)
        rows.append(
            Row(
                f'memory that stays, `"{backend}"`, AdamW',
                "dense",
                (held - base) / count,
                target,
                "bytes per weight",
                {"dense": base, "masked": held, "weights": count},
            )
        )
    rows.append(
        Row(
            "checkpoint of the pruner between updates",
            "",
            8 * saved / count,
            1.0,
            "bits per weight",
            {"bytes": saved, "weights": count},
        )
    )
    return rows


def measure(size: str, backend: str | None) -> tuple[int, int, int]:
    """Bytes held while the graph of a step is alive, the number of weights, and a checkpoint's."""
    torch.set_num_threads(1)
    made = subject("deeplab", size)
    weights = sum(p.numel() for p in made.model.parameters() if p.dim() > 1)
    file = io.BytesIO()

    def train() -> object:
        """Some steps and one more forward; what is returned stays alive, its graph too."""
        optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-5)
        pruner = None
        if backend is not None:
            pruner = MultitaskPruner(
                made.model,
                made.losses,
                made.shared,
                method=METHOD,
                optimizer=optimizer,
                backend=backend,
            )
            set_random_masks(pruner)
            torch.save(pruner.state_dict(), file)
        for _ in range(2):
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()
        return optimizer, pruner, forward()

    def forward() -> Tensor:
        outputs = made.model(made.inputs)
        return torch.stack([f(outputs, None) for f in made.losses.values()]).sum()

    held, _ = allocated(train)
    return held, weights, file.getbuffer().nbytes


if __name__ == "__main__":
    main(run)
