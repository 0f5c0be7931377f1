"""What the first `observe` adds to the peak of the sweeps alone."""

import torch

from mtprune import MultitaskPruner, Vote
from tests import checkpoints
from tests.benchmarks.harness import Row, Settings, allocated, isolated, main
from tests.benchmarks.nets import subject


def run(settings: Settings) -> list[Row]:
    rows = []
    for net, tasks in (("deeplab", 3), ("encoder", 5)):
        bare, _ = isolated(settings, measure, net, settings.size, tasks, False)
        ours, bound = isolated(settings, measure, net, settings.size, tasks, True)
        rows.append(
            Row(
                f"peak of `observe` beyond bare sweeps, {net}, K = {tasks}",
                "K score buffers + the largest layer",
                (ours - bare) / bound,
                1.10,
                detail={"bare": bare, "observe": ours, "bound": bound},
            )
        )
    return rows


def measure(net: str, size: str, tasks: int, observe: bool) -> tuple[int, int]:
    """Peak bytes of one pass, and those of what cannot be done without."""
    torch.set_num_threads(1)
    made = subject(net, size, tasks)
    pruner = MultitaskPruner(made.model, made.losses, made.shared, method=Vote(0.9))
    weights = [made.model.get_parameter(name) for name in checkpoints.shapes(pruner)]

    def sweep() -> None:
        outputs = made.model(made.inputs)
        for loss in [f(outputs, None) for f in made.losses.values()]:
            torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)

    sweep()  # what libraries allocate once is there already
    if not observe:
        return allocated(sweep)[1], 1
    _, found = allocated(lambda: pruner.observe(made.model(made.inputs), None))
    buffers = sum(
        score.nbytes for scores in checkpoints.scores(pruner).values() for score in scores.values()
    )
    return found, buffers + max(weight.nbytes for weight in weights)


if __name__ == "__main__":
    main(run)
