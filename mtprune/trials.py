"""Trials: copies of a model that are pruned, trained and evaluated, and what is read from them."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from mtprune import checks, distributed
from mtprune.methods import Method
from mtprune.methods.base import check_method
from mtprune.metrics import DeltaT, delta_t
from mtprune.model.names import unwrap
from mtprune.model.owner import check_free
from mtprune.model.selectors import Spec
from mtprune.named import dense
from mtprune.observing.losses import LossFunction
from mtprune.pruner import MultitaskPruner
from mtprune.results import Results, not_finite, read
from mtprune.schedule import Rounds

__all__ = [
    "Bench",
    "Candidate",
    "Judge",
    "OutError",
    "Subject",
    "Trial",
    "copied",
    "in_loop",
    "inner",
    "made",
    "random_state_kept",
    "seed_all",
]

Candidate = Method[Any] | Callable[[int], Method[Any]]
"""A method, or what makes one for a run of so many steps."""

Subject = tuple[nn.Module, Spec, Mapping[str, Any]]
"""A model, what its tasks share, and the options of pruners."""

_SLACK = 1.1
"""A candidate may keep so many times the weights it should: units are not always divisible."""


@dataclass(frozen=True)
class Trial:
    """What came of one candidate in one round.

    Attributes:
        name: The candidate.
        round: The round, from 1.
        steps: For how many steps it trained.
        mean: The mean change over tasks and seeds, in percent; below 0 is worse than not pruned.
        tasks: Each task's change, the mean over seeds.
        means: The mean change over tasks, for each seed.
        error: Why the candidate is out; empty if it is not. Then there are no changes.
    """

    name: str
    round: int
    steps: int
    mean: float = nan
    tasks: Mapping[str, float] = field(default_factory=dict)
    means: tuple[float, ...] = ()
    error: str = ""

    @property
    def worst_task(self) -> str:
        """The task that loses most; empty if the candidate is out."""
        return min(self.tasks, key=lambda task: self.tasks[task], default="")

    @property
    def worst(self) -> float:
        """The change of the task that loses most."""
        return self.tasks.get(self.worst_task, nan)


class _Counted(MultitaskPruner):
    """A pruner that counts the calls of `step`."""

    stepped = 0

    def step(self) -> bool:
        self.stepped += 1
        return super().step()


class OutError(Exception):
    """Why a candidate is out."""


@dataclass(frozen=True)
class Bench:
    """Where copies of a model are pruned and trained.

    Attributes:
        subject: The model, what its tasks share, and the options of pruners. They are copied
            together, so that modules that are named in the others are those of the copy.
        task_losses: See `choose`, as for all that follow.
    """

    subject: Subject
    task_losses: Mapping[str, LossFunction] | Sequence[str]
    batches: Iterable[Any]
    sparsity: float
    train: Callable[[nn.Module, MultitaskPruner, int], object]
    evaluate: Callable[[nn.Module], Mapping[str, Any]]
    forward: Callable[[nn.Module, Any], Any] | None

    def untrained(self) -> Any:
        """What `evaluate` says of the model as it is."""
        seed_all(0)
        return self.evaluate(copied(self.subject)[0])

    def dense(self, steps: int, seed: int) -> Any:
        """What it says after training without pruning."""
        model, pruner = self._begin(dense(), seed)
        self.train(model, pruner, steps)
        _check_steps(pruner, steps)
        pruner.finalize()
        return self.evaluate(model)

    def pruned(self, candidate: Candidate, steps: int, seed: int) -> Any:
        """What it says after pruning and training.

        Raises:
            OutError: If the candidate cannot be tried, or does not become sparse enough.
        """
        with _told():
            method = made(candidate, steps)
            model, pruner = self._begin(method, seed)
            if not in_loop(method):
                pruner.prune(self.batches, forward=self.forward, progress=False)
            seed_all(seed)
            self.train(model, pruner, steps)
        _check_steps(pruner, steps)
        kept, due = 1 - pruner.sparsity, 1 - self.sparsity
        if kept > _SLACK * due:
            raise OutError(
                f"It keeps {kept:.1%} of the weights after {steps} steps, where {due:.1%} are due. "
                "If its schedule spans the run, name a function of steps -> method."
            )
        with _told():
            pruner.finalize()
            return self.evaluate(model)

    def _begin(self, method: Method[Any], seed: int) -> tuple[nn.Module, _Counted]:
        model, shared, options = copied(self.subject)
        seed_all(seed)
        return model, _Counted(model, self.task_losses, shared, method=method, seed=seed, **options)


def copied(subject: Subject) -> Subject:
    """A copy of all three, in which modules that are named are those of the copy.

    Raises:
        TypeError: If the model cannot be copied.
    """
    try:
        return copy.deepcopy(subject)
    except Exception as error:
        raise TypeError(
            f"`model` cannot be copied, and trials are made on copies: {error}"
        ) from error


def inner(model: Any, call: str) -> nn.Module:
    """The model without wrappers, if trials can be made on copies of it.

    Args:
        model: What somebody says is a model.
        call: What makes the trials.

    Raises:
        TypeError: If it is no module.
        ValueError: If a pruner has it.
        RuntimeError: If there are several processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(checks.message("model", model, "must be a torch.nn.Module"))
    if distributed.world() > 1:
        raise RuntimeError(
            f"{call}() makes its trials in one process, and there are "
            f"{distributed.world()}. Call it before the process group is there."
        )
    bare = unwrap(model)
    check_free(bare)
    return bare


@contextmanager
def _told() -> Iterator[None]:
    """Whatever goes wrong inside, it is the candidate that is out."""
    try:
        yield
    except Exception as error:
        raise OutError(f"{type(error).__name__}: {error}") from error


def in_loop(method: Method[Any]) -> bool:
    """Whether masks change while the model trains."""
    schedule = method.schedule
    at_once = schedule.next_update(-1) == 0 and schedule.next_update(0) is None
    return method.regrows or not (at_once or isinstance(schedule, Rounds))


def made(candidate: Candidate, steps: int) -> Method[Any]:
    """The method of a candidate, for a run of so many steps."""
    method: Any = candidate if hasattr(candidate, "decide") else candidate(steps)
    check_method(method)
    return method  # type: ignore[no-any-return]


def _check_steps(pruner: _Counted, steps: int) -> None:
    if pruner.stepped != steps:
        raise RuntimeError(
            f"`train` called pruner.step() {pruner.stepped} times, and should have made {steps} "
            "optimizer steps with a call after each: trials are compared at equal steps."
        )


# Judging.


@dataclass(frozen=True)
class Judge:
    """What results are held against.

    Attributes:
        tasks: The tasks.
        lower: Which metrics are errors.
        dense: The results without pruning, for each seed.
    """

    tasks: tuple[str, ...]
    lower: Mapping[str, set[str]]
    dense: Sequence[Results]

    @property
    def seeds(self) -> range:
        """The seeds of each trial."""
        return range(len(self.dense))

    def trial(self, name: str, number: int, steps: int, results: Iterable[Any]) -> Trial:
        """What came of a candidate, from what came of it with each seed."""
        try:
            changes = [self._change(*pair) for pair in zip(results, self.dense, strict=True)]
        except OutError as error:
            return Trial(name, number, steps, error=str(error))
        means = tuple(change.overall for change in changes)
        tasks = {task: fmean(change.tasks[task] for change in changes) for task in self.tasks}
        return Trial(name, number, steps, fmean(means), tasks, means)

    def _change(self, found: Any, dense: Results) -> DeltaT:
        pruned = read(found, self.tasks)
        if problem := not_finite(pruned):
            raise OutError(f"{problem}.")
        for task in self.tasks:
            if pruned[task].keys() != dense[task].keys():
                raise ValueError(
                    f"`evaluate` returned {list(pruned[task])} for task '{task}' of a pruned "
                    f"model, and {list(dense[task])} without pruning. Both must be the same."
                )
        return delta_t(pruned, dense, self.lower)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random state of torch, numpy and Python as it was."""
    ours = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(ours[0])
        np.random.set_state(ours[1])
        random.setstate(ours[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def seed_all(seed: int) -> None:
    """Seed torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
