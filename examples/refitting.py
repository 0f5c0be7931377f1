"""What refitting is worth straight after pruning, without any fine-tuning.

A net is trained, then pruned at once in rounds that each score anew, with and without
`mtprune.Refit`. Printed is the mean over tasks of the relative change of the test loss, in per
cent of the dense net's, and that of the worst task; less than zero is worse. On nets with batch
norm its statistics are measured anew before each evaluation.

    python refitting.py census --data DIR
    python refitting.py camvid --data DIR --steps 360
"""

import argparse
import copy
import importlib
import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import data, loop
from common.options import Problem, parse
from torch import Tensor, nn

import mtprune
from mtprune import MultitaskPruner, Refit, Vote, recalibrate_bn
from mtprune.files import write_text
from mtprune.metrics import delta_t, lower_is_better

Results = dict[str, dict[str, float]]


class Rounds:
    """Updates at steps 1 to ``rounds``, each of which leaves the same share of what is left."""

    def __init__(self, rounds: int, sparsity: float) -> None:
        self.rounds = rounds
        self.sparsity = sparsity

    def next_update(self, after: int) -> int | None:
        """The first update after a step."""
        return max(after, 0) + 1 if after < self.rounds else None

    def progress(self, step: int) -> float:
        """The share of the sparsity that is due at a step."""
        return float(1 - (1 - self.sparsity) ** (step / self.rounds)) / self.sparsity


def energy(weight: Tensor, grad: Tensor) -> Tensor:
    """A score that follows the size of a weight more than its gradient."""
    return weight.square() * grad.abs()


def prune(
    model: nn.Module, run: loop.Run, batches: Iterator[data.Sample], o: Namespace, refit: Any
) -> None:
    """Prune in rounds. Beside the tasks votes one whose saliency is the size of the weights."""
    tasks = [*run.tasks, "size"]
    schedule = Rounds(o.rounds, o.sparsity)
    method = Vote(
        o.sparsity, saliency=energy, schedule=schedule, observations=o.observations, refit=refit
    )
    pruner = MultitaskPruner(model, tasks, model.shared_modules(), method=method)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    for _ in range(o.rounds):
        for batch in islice(batches, o.observations):
            outputs = loop.forward(model, batch)
            losses = {t: loop.losses.task_loss(t, f)(outputs, batch) for t, f in run.tasks.items()}
            losses["size"] = torch.stack([p.abs().sum() for p in matrices]).sum()
            pruner.observe_losses(losses)
        pruner.step()
    assert abs(pruner.sparsity - o.sparsity) < 1e-4
    pruner.finalize()


def measure(problem: Problem, o: Namespace, seed: int) -> dict[str, Any]:
    """Train, prune in each way, and compare on the test split."""
    arguments = ["--data", str(o.data), "--method", "dense", "--steps", str(o.steps)]
    arguments += ["--seed", str(seed), "--lr", str(o.lr), "--workers", "0", *o.rest]
    options = parse(problem, arguments)
    source = loop.open_data(problem, options)
    run = loop.build(problem, options, source)
    run.pruner.finalize()
    extra = o.observations * o.rounds + o.fit
    batches = loop.batches_from(problem, run, 0, o.steps + extra)
    for batch in islice(batches, o.steps):
        run.optimizer.zero_grad()
        outputs = loop.forward(run.model, batch)
        parts = [
            task.weight * loop.losses.task_loss(t, task)(outputs, batch)
            for t, task in run.tasks.items()
        ]
        torch.stack(parts).sum().backward()
        run.optimizer.step()
    later = list(batches)
    norm, fit = later[: o.fit], later[-o.fit :]

    def tested(model: nn.Module) -> dict[str, dict[str, float]]:
        recalibrate_bn(model, norm, forward=loop.forward)
        run.model.load_state_dict(model.state_dict())
        return loop.evaluate(run, "test")

    before = copy.deepcopy(run.model)
    dense, result = tested(copy.deepcopy(before)), {}
    pruned: dict[str, nn.Module] = {}
    for name, how in {"without": None, "in rounds": Refit(o.samples, o.damping)}.items():
        pruned[name] = copy.deepcopy(before)
        prune(pruned[name], run, iter(later), o, how)
    for begun in ("without", "in rounds"):
        for name, sequential in (("together", False), ("in turn", True)):
            again = pruned[f"{begun}, then {name}"] = copy.deepcopy(pruned[begun])
            mtprune.refit(
                again,
                fit,
                before,
                how=Refit(o.samples, o.damping),
                sequential=sequential,
                forward=loop.forward,
            )
    for name, model in pruned.items():
        found = tested(model)
        loss = change(only_loss(found), only_loss(dense))
        metrics = change(
            *({t: f.judge(r[t]) for t, f in run.tasks.items()} for r in (found, dense))
        )
        result[name] = {
            "loss": loss.overall,
            "worst task": min(loss.tasks.values()),
            "metrics": metrics.overall,
        }
        print(f"seed {seed}, {name}: {result[name]}", flush=True)
    return result


def change(found: Results, dense: Results) -> Any:
    """The mean relative change, in per cent."""
    return delta_t(found, dense, lower_is_better(dense))


def only_loss(results: Results) -> Results:
    """The losses alone."""
    return {task: {"loss": values["loss"]} for task, values in results.items()}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure on each seed; the results, which also go to ``--out`` if given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("problem", choices=["census", "camvid"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800, help="of training the dense net")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--observations", type=int, default=4, help="batches scored in a round")
    parser.add_argument("--fit", type=int, default=8, help="batches to fit on afterwards")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--damping", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path)
    o, o.rest = parser.parse_known_args(arguments)
    problem = importlib.import_module(o.problem).PROBLEM
    results = {str(seed): measure(problem, o, seed) for seed in o.seeds}
    if o.out:
        write_text(o.out, json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
