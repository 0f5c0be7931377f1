"""Bytes per weight that stay, with AdamW, and bits per weight of a checkpoint of the pruner."""

import io

import torch

from mtprune import MultitaskPruner
from tests.benchmarks.harness import Row, Settings, isolated, main, resident
from tests.benchmarks.nets import subject
from tests.benchmarks.step import METHOD, random_masks


def run(settings: Settings) -> list[Row]:
    rows = []
    base, count, _ = isolated(settings, __name__, "measure", settings.size, None)
    for backend, target in (("inplace", 1.1), ("prune", 5.0)):
        held, _, saved = isolated(settings, __name__, "measure", settings.size, backend)
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
    """Resident bytes after some steps, the number of weights, and bytes of a checkpoint."""
    torch.set_num_threads(1)
    made = subject("deeplab", size)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-5)
    pruner = MultitaskPruner(
        made.model,
        made.losses,
        made.shared,
        method=METHOD,
        optimizer=optimizer,
        backend=backend or "inplace",
    )
    count = sum(layer.parameter.numel() for layer in pruner._layers)
    if backend:
        random_masks(pruner)
    else:
        pruner.finalize()

    def backward() -> None:
        outputs = made.model(made.inputs)
        torch.stack([f(outputs, None) for f in made.losses.values()]).sum().backward()

    for _ in range(3):
        optimizer.zero_grad()
        backward()
        optimizer.step()
    losses = [f(made.model(made.inputs), None) for f in made.losses.values()]
    held = resident()  # gradients of the last step, and all that a graph keeps
    del losses
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    return held, count, file.getbuffer().nbytes


if __name__ == "__main__":
    main(run)
