"""A training step between updates, with 90 % masked, against the same step without the plugin."""

from collections.abc import Callable

import torch
from torch.nn.utils import prune

from mtprune import Cubic, MultitaskPruner, SoftThreshold, Vote
from tests import checkpoints
from tests.benchmarks.harness import Row, Settings, device, interleaved, main, threads
from tests.benchmarks.nets import Subject, subject

# Plain `torch.nn.utils.prune` fails on these: attention reads their weight without calling them.
UNCALLED = "*.out_proj"
METHOD = Vote(0.9, schedule=Cubic(begin=1, end=10**6, every=10**6 - 1))


def run(settings: Settings) -> list[Row]:
    rows = []
    for net in ("deeplab", "encoder"):
        for backend, other, against, target in (
            ("inplace", dense, "the same step without the plugin", 1.05),
            ("prune", plain, "the same step with plain `torch.nn.utils.prune` masks", 1.00),
            ("soft", dense, "the same step with dense weights", 1.15),
        ):
            for count in settings.threads:
                with threads(count):
                    make = rising if backend == "soft" else masked
                    ours, theirs = make(net, settings, backend), other(net, settings)
                    times = interleaved(theirs, ours, settings.repeats)
                name = "`SoftThreshold`" if backend == "soft" else f'`"{backend}"`'
                rows.append(
                    Row(
                        f"step, {name}, {net}, {count} thread(s)",
                        against,
                        times["cpu"]["ratio"],
                        target,
                        detail=times,
                    )
                )
    return rows


def masked(net: str, settings: Settings, backend: str) -> Callable[[], None]:
    made = subject(net, settings.size)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-5)
    pruner = MultitaskPruner(
        made.model,
        made.losses,
        made.shared,
        method=METHOD,
        optimizer=optimizer,
        backend=backend,
        exclude=_uncalled(net),
    )

    def step() -> None:
        optimizer.zero_grad()
        losses = pruner.observe(made.model(made.inputs), None)
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()

    while pruner.report().step is None:  # the update of step 1, which prunes nothing
        step()
    checkpoints.set_random_masks(pruner)
    return step


def rising(net: str, settings: Settings, _: str) -> Callable[[], None]:
    """A step between updates of thresholds below which 90 % of the weights are."""
    made = subject(net, settings.size)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-5)
    pruner = MultitaskPruner(
        made.model,
        made.losses,
        made.shared,
        method=SoftThreshold(0.9, schedule=Cubic(begin=0, end=10**6, every=10**6)),
        optimizer=optimizer,
    )

    def step() -> None:
        optimizer.zero_grad()
        losses = pruner.observe(made.model(made.inputs), None)
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()

    while pruner.report().step is None:  # the update of step 0, at which every threshold is 0
        step()
    weights = {
        name: made.model.get_parameter(name + "_orig").detach()
        for name in checkpoints.thresholds(pruner)
    }
    checkpoints.set_thresholds(
        pruner, lambda name, _: weights[name].abs().reshape(-1)[:100_000].quantile(0.9)
    )
    return step


def _uncalled(net: str) -> tuple[str, ...]:
    return (UNCALLED,) if net == "encoder" else ()


def dense(net: str, settings: Settings) -> Callable[[], None]:
    return training(subject(net, settings.size))


def plain(net: str, settings: Settings) -> Callable[[], None]:
    made = subject(net, settings.size)
    generator = torch.Generator().manual_seed(0)
    pruner = MultitaskPruner(made.model, made.losses, made.shared, exclude=_uncalled(net))
    shapes = checkpoints.shapes(pruner)
    pruner.finalize()
    for name, shape in shapes.items():
        path, _, attribute = name.rpartition(".")
        mask = torch.rand(shape, generator=generator) < 0.1
        prune.custom_from_mask(made.model.get_submodule(path), attribute, mask.to(device()))
    return training(made)


def training(made: Subject) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        outputs = made.model(made.inputs)
        torch.stack([f(outputs, None) for f in made.losses.values()]).sum().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main(run)
