"""What is gained and lost by folding, and by scores in half precision."""

from collections.abc import Callable

import torch

from mtprune import MultitaskPruner, Vote
from tests.benchmarks.harness import Row, Settings, device, interleaved, main, threads
from tests.benchmarks.nets import subject


def run(settings: Settings) -> list[Row]:
    rows = []
    with threads(1):
        for net in ("deeplab", "encoder"):
            times = interleaved(
                step(net, settings, False), step(net, settings, True), settings.repeats
            )
            rows.append(
                Row(
                    f"observed step with `fold=True`, {net}",
                    "the same without",
                    times["cpu"]["ratio"],
                    detail=times,
                )
            )
            for observations in (1, 8):
                rows.append(
                    Row(
                        f"masks from bfloat16 scores, {net}, {observations} observation(s)",
                        "those from float32",
                        overlap(net, settings, observations),
                        unit="IoU",
                    )
                )
    return rows


def step(net: str, settings: Settings, fold: bool) -> Callable[[], None]:
    made = subject(net, settings.size)
    pruner = MultitaskPruner(
        made.model, made.losses, made.shared, method=Vote(0.9, observations=10**6)
    )

    def step() -> None:
        made.model.zero_grad()
        losses = pruner.observe(made.model(made.inputs), None, fold=fold)
        if not fold:
            pruner.weigh(losses).backward()

    return step


def overlap(net: str, settings: Settings, observations: int) -> float:
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        made = subject(net, settings.size)
        method = Vote(0.9, observations=observations)
        pruner = MultitaskPruner(
            made.model, made.losses, made.shared, method=method, score_dtype=dtype
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(observations):
            inputs = made.inputs[torch.randperm(len(made.inputs), generator=generator)]
            if inputs.is_floating_point():
                inputs = torch.randn(inputs.shape, generator=generator)
            else:
                inputs = torch.randint(0, 1000, inputs.shape, generator=generator)
            pruner.observe(made.model(inputs.to(device())), None)
        pruner.step()
        masks.append(torch.cat([mask.reshape(-1) for mask in pruner.masks.values()]))
    one, other = masks
    return float((one & other).sum() / (one | other).sum())


if __name__ == "__main__":
    main(run)
