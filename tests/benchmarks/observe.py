"""`observe` when an update is due, against the sweeps alone: same forward, results dropped."""

import torch

from mtprune import MultitaskPruner, Vote
from tests import checkpoints
from tests.benchmarks.harness import Row, Settings, interleaved, main, threads
from tests.benchmarks.nets import subject


def run(settings: Settings) -> list[Row]:
    rows = []
    for net in ("deeplab", "encoder"):
        for tasks in (2, 3, 5):
            for count in settings.threads:
                if count > 1 and tasks != 3:
                    continue
                with threads(count):
                    times = pair(net, settings, tasks)
                rows.append(
                    Row(
                        f"`observe`, {net}, K = {tasks}, {count} thread(s)",
                        "forward and K `autograd.grad`",
                        times["cpu"]["ratio"],
                        1.08,
                        detail=times,
                    )
                )
    return rows


def pair(net: str, settings: Settings, tasks: int) -> dict[str, object]:
    made = subject(net, settings.size, tasks)
    # Always near an update, and who uses what stays unsettled, so that reach is looked at as well.
    pruner = MultitaskPruner(
        made.model, made.losses, made.shared, method=Vote(0.9, observations=10**6)
    )
    weights = [made.model.get_parameter(name) for name in checkpoints.shapes(pruner)]

    def bare() -> None:
        outputs = made.model(made.inputs)
        for loss in [f(outputs, None) for f in made.losses.values()]:
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)

    def observed() -> None:
        pruner.observe(made.model(made.inputs), None)

    return interleaved(bare, observed, settings.repeats)


if __name__ == "__main__":
    main(run)
