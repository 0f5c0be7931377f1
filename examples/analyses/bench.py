"""The bench: a problem whose nets are built, trained, pruned and tested without files.

Nets are trained for a fixed number of steps, the rate falling to 0, and tested as they are at the
end: nothing is chosen, so the test split decides nothing.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from common import data, judging, losses
from common.balancing import Balance
from common.loop import Run, batches_from, build, evaluate, forward, set_rate
from common.options import Options, Problem
from matplotlib.figure import Figure
from torch import Tensor

from mtprune import PerTaskKeep, affinity, checks
from mtprune.methods import Method
from mtprune.report import Report

State = dict[str, Tensor]
Found = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A figure: what it measures, tells and draws.

    Attributes:
        name: Of the command.
        about: What the figure shows.
        add: Adds its options to a parser.
        measure: From a bench to plain values.
        table: Of these.
        draw: Of these.
    """

    name: str
    about: str
    add: Callable[[argparse.ArgumentParser], None]
    measure: Callable[["Bench"], Found]
    table: Callable[[Found], str]
    draw: Callable[[Found], Figure]


@dataclass(frozen=True)
class Bench:
    """A problem, its data, and how to train on it.

    Attributes:
        problem: The problem.
        source: Its data.
        options: Of the figure.
        trainer: Of the trainer: net, batches, rates.
    """

    problem: Problem
    source: data.Source
    options: argparse.Namespace
    trainer: Options

    @property
    def seeds(self) -> range:
        """Those of the figure."""
        return range(self.options.seeds)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return list(self.trainer.tasks)

    def of(self, source: data.Source) -> "Bench":
        """The same with other data."""
        return replace(self, source=source)

    def alone(self, task: str) -> "Bench":
        """The same for a single task; its net has the same trunk, and no other head."""
        trainer = copy.copy(self.trainer)
        trainer.tasks = [task]
        return replace(self, trainer=trainer)

    def run(
        self, seed: int, method: Method[Any] | None = None, *, start: State | None = None
    ) -> Run:
        """A net with its pruner: the initial weights of a seed, or those of a trained net.

        Args:
            seed: Of weights and batches.
            method: How it is pruned; not at all unless given.
            start: The weights to start from, which are then tuned: fewer steps, another rate.
        """
        options = copy.copy(self.trainer)
        options.seed = seed
        if start is not None:
            options.steps, options.lr = self.options.tune_steps, self.options.tune_lr
        run = build(self.problem, options, self.source, method)
        if start is not None:
            run.model.load_state_dict(start)
        return run

    def prune(self, run: Run) -> Report:
        """Prune at once, scored on the first batches of a seed."""
        few = run.options.observations
        batches = islice(batches_from(self.problem, run, 0, few), few)
        return run.pruner.prune(map(run.to_device, batches), forward=forward, progress=False)

    def null(
        self, seed: int, sparsity: float | PerTaskKeep, draws: int, *, start: State | None = None
    ) -> affinity.Null:
        """What tasks would keep beside others' targets, scored on the first batches of a seed.

        Args:
            seed: Of the run, and of the draws.
            sparsity: Share of zeros in what a task keeps.
            draws: How many.
            start: The weights of a trained net; those at initialisation unless given.
        """
        run = self.run(seed, start=start)
        run.pruner.finalize()
        few = run.options.observations
        batches = map(run.to_device, islice(batches_from(self.problem, run, 0, few), few))
        return affinity.permuted(
            run.model,
            {name: losses.task_loss(name, task) for name, task in run.tasks.items()},
            batches,
            run.model.shared_modules(),
            sparsity=sparsity,
            draws=draws,
            forward=forward,
            seed=seed,
            progress=False,
        )

    def train(self, run: Run, balance: Balance | None = None, *, start: int = 0) -> None:
        """Train to the end of a run.

        Args:
            run: The net.
            balance: What makes one step of the losses; their sum, as the method weighs it, unless
                given.
            start: The number of the first batch.
        """
        weight = {name: run.options.weight.get(name, t.weight) for name, t in run.tasks.items()}
        batches = batches_from(self.problem, run, start, start + run.options.steps)
        for step, batch in enumerate(map(run.to_device, batches)):
            set_rate(run.optimizer, run.options, step)
            run.optimizer.zero_grad()
            parts = run.pruner.observe(forward(run.model, batch), batch)
            weighted = {name: weight[name] * part for name, part in parts.items()}
            if balance is None:
                run.pruner.weigh(weighted).backward()
            else:
                balance.backward(weighted)
            run.optimizer.step()
            if balance is not None:
                balance.after(partial(self._losses, run, batch, weight))
            run.pruner.step()

    def _losses(
        self, run: Run, batch: data.Sample, weight: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch, as the net is now."""
        outputs = forward(run.model, batch)
        return {
            name: weight[name] * losses.task_loss(name, task)(outputs, batch)
            for name, task in run.tasks.items()
        }

    def dense(self, seed: int) -> tuple[State, Found]:
        """The dense net of a seed after its training, and how it does."""
        run = self.run(seed)
        self.train(run)
        state = {name: x.detach().clone() for name, x in run.model.state_dict().items()}
        return state, self.test(run)

    def test(self, run: Run) -> Found:
        """How a net does on the test split, and which metrics count."""
        found = evaluate(run, "test")
        judged = {
            name: ["loss"] if self.options.by == "loss" else sorted(task.judge(found[name]))
            for name, task in run.tasks.items()
        }
        return {"test": found, "judged": judged}


class UntrainedError(ValueError):
    """A dense net that has learnt too little to be compared with."""


def change(found: Found, dense: Found) -> Found:
    """What became of a net against the dense one, in percent: above 0 is better.

    Raises:
        UntrainedError: If a metric of the dense net is 0.
    """
    try:
        delta = judging.change(found, dense)
    except ValueError as error:
        raise UntrainedError(f"{error} Train longer (--steps), or take --by loss.") from None
    return {
        "delta": delta.overall,
        "worst": min(delta.tasks.values()),
        "tasks": dict(delta.tasks),
        "test": found["test"],
    }


def share_of_zeros(text: str) -> float:
    """A share of zeros, from the command line."""
    try:
        checks.sparsity("sparsity", value := float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value
