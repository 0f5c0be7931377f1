"""What runs of a comparison say: changes against the dense net, paired by seed.

A run is what `results.json` holds; runs of one method stand under their seeds.
"""

import statistics
from collections.abc import Mapping
from typing import Any

from mtprune.metrics import DeltaT, delta_t, lower_is_better

Found = Mapping[str, Any]
Seeds = Mapping[int, Found]


def judged(found: Found, split: str = "test") -> dict[str, dict[str, float]]:
    """The metrics of a split that count."""
    return {
        task: {name: found[split][task][name] for name in names}
        for task, names in found["judged"].items()
    }


def change(found: Found, dense: Found, split: str = "test") -> DeltaT:
    """What became of the metrics that count, in percent of the dense net's."""
    before = judged(dense, split)
    return delta_t(judged(found, split), before, lower_is_better(before))


def loss_change(found: Found, dense: Found) -> DeltaT:
    """What became of the test losses, in percent of the dense net's; better is above 0."""
    now, before = (
        {task: {"loss": metrics["loss"]} for task, metrics in one["test"].items()}
        for one in (found, dense)
    )
    return delta_t(now, before, {task: {"loss"} for task in before})


def row(runs: Seeds, dense: Seeds, reference: Seeds | None = None) -> dict[str, Any]:
    """The numbers of one method, a value for each seed.

    Args:
        runs: Its runs.
        dense: The dense runs of the same seeds, and maybe more.
        reference: The method that it is held against, if it is not that itself.

    Returns:
        ``"delta"``, the mean change over tasks; ``"worst"``, that of the task which lost most;
        ``"loss"``, the mean change of the losses; ``"tasks"``, by task. ``"behind"`` has the
        differences to the reference for the first three, over the seeds that both have.
    """
    found = _changes(runs, dense)
    first = next(iter(runs.values()))
    told = {
        "weights": first["weights"],
        "zeros": sorted({one["zeros"] for one in runs.values()}),
        "seeds": list(runs),
        **{name: list(values.values()) for name, values in found.items()},
        "tasks": {
            task: [change(one, dense[seed]).tasks[task] for seed, one in runs.items()]
            for task in first["judged"]
        },
    }
    if reference is not None:
        theirs = _changes(reference, dense)
        told["behind"] = {
            name: [
                value - theirs[name][seed] for seed, value in values.items() if seed in reference
            ]
            for name, values in found.items()
        }
    return told


def _changes(runs: Seeds, dense: Seeds) -> dict[str, dict[int, float]]:
    deltas = {seed: change(one, dense[seed]) for seed, one in runs.items()}
    return {
        "delta": {seed: delta.overall for seed, delta in deltas.items()},
        "worst": {seed: min(delta.tasks.values()) for seed, delta in deltas.items()},
        "loss": {seed: loss_change(one, dense[seed]).overall for seed, one in runs.items()},
    }


def best_rate(tries: Mapping[float, Seeds], dense: Seeds) -> float:
    """The learning rate with the best mean change on the validation split, the lower of equals."""
    means = {
        rate: statistics.fmean(
            change(one, dense[seed], "val").overall for seed, one in runs.items()
        )
        for rate, runs in sorted(tries.items())
    }
    return max(means, key=lambda rate: means[rate])
