"""Sweeping: what each sparsity costs each task, from one scoring pass.

Scores are gathered once. From them come the masks of every sparsity, each the same as those of a
pruner that prunes once to it, and each is tried on a copy of the model: nothing is trained. That
shows where a task begins to suffer, and which layers it suffers by; a method that prunes while it
trains, or fine-tuning, comes further than these curves.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import checks
from mtprune.bits import zeroed
from mtprune.curves import Alone, Point, Sweep
from mtprune.holding import Masks
from mtprune.holding.refitted import Refitted, move
from mtprune.intervals import changes
from mtprune.methods.base import Ballot, describe
from mtprune.methods.survey import Survey
from mtprune.methods.vote import Vote
from mtprune.model.layers import Layer, find_layers
from mtprune.model.selectors import Spec
from mtprune.observing.losses import LossFunction, compute, parse
from mtprune.progress import bar
from mtprune.pruner import MultitaskPruner
from mtprune.refitting import Refit
from mtprune.results import Results, directions, read, read_dense
from mtprune.schedule import OneShot
from mtprune.trials import Subject, copied, inner, random_state_kept, seed_all

__all__ = ["sweep"]

_DENSE = -1  # in place of a vote


def sweep(
    model: nn.Module,
    task_losses: Mapping[str, LossFunction] | Sequence[str],
    batches: Iterable[Any],
    shared_modules: Spec = "auto",
    *,
    sparsities: Sequence[float],
    evaluate: Callable[[nn.Module], Any] | Iterable[Any],
    method: Vote | None = None,
    sensitivity: Sequence[float] | None = None,
    refit: Refit | None = None,
    lower_is_better: bool | Mapping[str, Iterable[str]] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Sweep:
    """Prune copies of a model to many sparsities, and measure what each task loses.

    One scoring pass serves all: the masks of a sparsity are those that ``pruner.prune(batches)``
    makes with the same vote, in a fresh pruner. Every copy is evaluated from the same random state.
    The model and the random state are left as they were.

    Args:
        model: The model.
        task_losses: As for `MultitaskPruner`.
        batches: As for ``pruner.prune``: as many as the method's ``observations`` are scored, one
            unless it says more.
        shared_modules: As for `MultitaskPruner`.
        sparsities: The shares of zeros to try.
        evaluate: ``evaluate(model)`` -> ``{task: value}`` or ``{task: {metric: value}}``, or a list
            of these, one for each batch of validation data: then every change has its interval. Or
            the batches themselves: then the tasks' losses are measured on each, in eval mode.
        method: The vote, of which everything but ``sparsity`` counts. `Vote` as it is unless given.
        sensitivity: The sparsities at which each layer, and each component, is pruned alone, all
            layers to the same; the middle one of ``sparsities`` unless given, and none with ``()``.
        refit: Let the weights that stay make up for the others, straight after pruning.
        lower_is_better: As for `mtprune.choose`; not needed if ``evaluate`` is batches.
        forward: As for ``pruner.prune``.
        progress: Show a progress bar, if tqdm is installed.
        **options: For the pruner, such as ``exclude`` and ``seed``.

    Raises:
        ValueError: If an argument is wrong, or ``evaluate`` returns something other than numbers
            for these tasks, finite where nothing is pruned.
        RuntimeError: If there are several processes.

    Example:
        >>> model = nn.ModuleDict({"trunk": nn.Linear(4, 8), "a": nn.Linear(8, 1),
        ...                        "b": nn.Linear(8, 1)})
        >>> losses = {t: lambda out, x, t=t: (out[t] - x[:, :1]).square().mean() for t in "ab"}
        >>> forward = lambda model, x: {t: model[t](model["trunk"](x).relu()) for t in "ab"}
        >>> found = sweep(model, losses, [torch.randn(32, 4)], [model["trunk"]], forward=forward,
        ...               sparsities=[0.25, 0.75], evaluate=[torch.randn(32, 4) for _ in range(4)],
        ...               progress=False)
        >>> [point.sparsity for point in found.points]
        [0.25, 0.75]
        >>> found.within(loss=0.5) in (0.0, 0.25, 0.75)
        True
    """
    tasks = tuple(parse(task_losses))
    asked = _sparsities("sparsities", sparsities, least=1)
    middle = asked[(len(asked) - 1) // 2 :][:1]
    apart = middle if sensitivity is None else _sparsities("sensitivity", sensitivity, least=0)
    base = _base(method, refit)
    votes = [replace(base, sparsity=s) for s in asked]
    votes += [replace(base, sparsity=s, allocation="uniform") for s in apart]
    if not callable(evaluate):
        evaluate = _losses(task_losses, evaluate, forward)
    subject = (inner(model, "sweep"), shared_modules, _options(options))
    with random_state_kept():
        ballot = _poll(subject, task_losses, votes, batches, forward, progress)
        bench = _Bench(subject, ballot, votes, evaluate)
        jobs = _jobs(ballot, asked, apart)
        trials = list(bench.trials(bar(jobs, progress, "sweeping")))
        return _gathered(trials, tasks, lower_is_better, _told(base))


@dataclass(frozen=True)
class _Job:
    """Layers to prune by a vote.

    Attributes:
        vote: Which one; `_DENSE` for none.
        sparsity: What it was asked for.
        places: The layers.
        name: What is pruned alone; empty if everything is.
        is_component: Whether that is a component.
    """

    vote: int
    sparsity: float
    places: Sequence[int]
    name: str = ""
    is_component: bool = False


@dataclass(frozen=True)
class _Trial:
    """What came of a job.

    Attributes:
        job: The job.
        size: How many weights its layers have.
        kept: How many of them are kept.
        found: What `evaluate` returned.
    """

    job: _Job
    size: int
    kept: int
    found: Any


@dataclass(frozen=True)
class _Bench:
    """Where copies of the model are pruned and evaluated.

    Attributes:
        subject: The model, what its tasks share, and the options of pruners.
        ballot: On what votes decide.
        votes: The votes.
        evaluate: See `sweep`.
    """

    subject: Subject
    ballot: Ballot
    votes: Sequence[Vote]
    evaluate: Callable[[nn.Module], Any]

    def trials(self, jobs: Iterable[_Job]) -> Iterator[_Trial]:
        """What comes of each job; those of one vote follow each other, so it decides once."""
        decided, decision = _DENSE, None
        for job in jobs:
            if job.vote not in (_DENSE, decided):
                decided, decision = job.vote, self.votes[job.vote].decide(self.ballot, 0)
            yield self._trial(job, None if job.vote == _DENSE else decision)

    def _trial(self, job: _Job, decision: Masks | None) -> _Trial:
        model, _, options = copied(self.subject)
        size = kept = sum(self.ballot.masks[place].numel() for place in job.places)
        if decision is not None:
            known = _layers(model, options)
            put([known[name] for name in self.ballot.names], decision, job.places)
            kept = sum(int(decision.masks[place].count_nonzero()) for place in job.places)
        seed_all(0)
        return _Trial(job, size, kept, _listed(self.evaluate(model)))


@torch.no_grad()
def put(layers: Sequence[Layer], decision: Masks, places: Sequence[int]) -> None:
    """Put a part of a decision into plain modules: zeros, and what the other weights gain.

    Args:
        layers: The layers that the decision is about.
        decision: The decision.
        places: Which of them take part.
    """
    for place in places:
        layer = layers[place]
        weight = layer.parameter.detach()
        mask = decision.masks[place].view(layer.shape).to(weight.device)
        gained: tuple[Tensor, Tensor] | None = None
        if isinstance(decision, Refitted):
            gained = decision.change(place, layer.shape)
        zeroed(weight, mask, out=weight)
        if gained is not None:
            move(layer, *gained)


def _layers(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Layer]:
    found = find_layers(model, options.get("include", ()), options.get("exclude", ()))
    return {layer.name: layer for layer in found}


def _poll(
    subject: Subject,
    task_losses: Mapping[str, LossFunction] | Sequence[str],
    votes: Sequence[Vote],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None,
    progress: bool,
) -> Ballot:
    """On what each of the votes decides."""
    model, shared, options = copied(subject)
    ballots: list[Ballot] = []
    survey = Survey(tuple(votes), ballots.append)
    pruner = MultitaskPruner(model, task_losses, shared, method=survey, **options)
    pruner.prune(batches, forward=forward, progress=progress)
    return ballots[-1]


def _jobs(ballot: Ballot, asked: Sequence[float], apart: Sequence[float]) -> list[_Job]:
    """The dense model, every sparsity, and every component and layer alone."""
    every, components = range(len(ballot.subjects)), ballot.components
    jobs = [_Job(_DENSE, 0.0, ())]
    jobs += [_Job(i, s, every) for i, s in enumerate(asked)]
    for i, s in enumerate(apart, start=len(asked)):
        for name in dict.fromkeys(components):
            places = [place for place in every if components[place] == name]
            jobs.append(_Job(i, s, places, name, is_component=True))
        jobs += [_Job(i, s, (place,), ballot.names[place]) for place in every]
    return jobs


def _gathered(
    trials: Sequence[_Trial],
    tasks: Sequence[str],
    lower_is_better: bool | Mapping[str, Iterable[str]] | None,
    method: str,
) -> Sweep:
    """What all trials tell."""
    dense = [read_dense(found, tasks, "as it was given") for found in trials[0].found]
    lower = directions(dense[0], lower_is_better)
    points: list[Point] = []
    alone: dict[bool, list[Alone]] = {True: [], False: []}
    for trial in trials[1:]:
        job, pruned = trial.job, (trial.size - trial.kept) / trial.size
        told = changes(_alike(trial.found, dense, tasks), dense, lower)
        if job.name:
            row = Alone(job.sparsity, pruned, told, job.name, trial.size)
            alone[job.is_component].append(row)
        else:
            points.append(Point(job.sparsity, pruned, told))
    layers, components = tuple(alone[False]), tuple(alone[True])
    return Sweep(tuple(tasks), tuple(points), layers, components, len(dense), method)


# What `evaluate` is, and what it returns.


def _losses(
    task_losses: Mapping[str, LossFunction] | Sequence[str],
    batches: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> Callable[[nn.Module], Any]:
    """The function that measures the tasks' losses on batches."""
    must = "must be a function of the model, or a list or loader of validation batches"
    if isinstance(batches, (Mapping, str)):
        raise TypeError(checks.message("evaluate", batches, must))
    if isinstance(batches, Iterator):
        raise TypeError(
            "`evaluate` is an iterator, which the first trial would use up. Pass a list or a "
            "loader."
        )
    if not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise TypeError(checks.message("evaluate", batches, must))
    if not isinstance(task_losses, Mapping):
        raise TypeError(
            "`evaluate` is batches, and `task_losses` has names only: pass functions, or a "
            "function for `evaluate`."
        )
    run = forward if forward is not None else nn.Module.__call__

    @torch.no_grad()
    def measure(model: nn.Module) -> list[dict[str, dict[str, float]]]:
        model.eval()
        found = []
        for batch in batches:
            losses = compute(parse(task_losses), run(model, batch), batch, None)
            found.append({task: {"loss": _number(loss)} for task, loss in losses.items()})
        return found

    return measure


def _number(loss: Any) -> float:
    parts = loss if isinstance(loss, (list, tuple)) else [loss]
    return sum(float(part) for part in parts)


def _listed(found: Any) -> list[Any]:
    """What `evaluate` returned, batch by batch."""
    if isinstance(found, Mapping):
        return [found]
    if isinstance(found, str) or not isinstance(found, Iterable):
        must = "must return a mapping task -> value or task -> {metric: value}, or a list of these"
        raise TypeError(checks.message("evaluate", found, must))
    batches = list(found)
    if not batches:
        raise ValueError("`evaluate` returned no result: there must be at least one batch.")
    return batches


def _alike(found: Sequence[Any], dense: Sequence[Results], tasks: Sequence[str]) -> list[Results]:
    """The results of a pruned model, if they are of the same batches and metrics.

    Raises:
        ValueError: If they are not.
    """
    results = [read(batch, tasks) for batch in found]
    if len(results) != len(dense):
        raise ValueError(
            f"`evaluate` returned {len(results)} results for a pruned model, and {len(dense)} "
            "for the model as it is. Both must be of the same batches."
        )
    for batch in (*results, *dense):
        for task in tasks:
            if batch[task].keys() != dense[0][task].keys():
                raise ValueError(
                    f"`evaluate` returned {list(batch[task])} for task '{task}' once, and "
                    f"{list(dense[0][task])} before. It must return the same metrics each time."
                )
    return results


# Checks.


def _sparsities(name: str, given: Any, least: int) -> list[float]:
    must = "must be a list of numbers in [0, 1)"
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(checks.message(name, given, must))
    found = list(given)
    for sparsity in found:
        checks.sparsity(name, sparsity)
    if len(found) < least or len(set(found)) != len(found):
        raise ValueError(
            checks.message(name, found, f"{must}, each once" + ", and not empty" * least)
        )
    return sorted(found)


def _base(method: object, refit: object) -> Vote:
    """The vote of which copies prune to each sparsity."""
    if method is None:
        method = Vote(0.5)
    if not isinstance(method, Vote):
        must = "must be a mtprune.Vote: its masks come from one scoring pass"
        raise TypeError(checks.message("method", method, must))
    if not isinstance(method.schedule, OneShot) or method.straight_through:
        raise ValueError(
            "sweep() scores once, for all sparsities. Leave `schedule` and `straight_through` of "
            f"`method` out. Got {describe(method, defaults=False)}."
        )
    if method.observations == "auto":
        raise ValueError(
            "observations='auto' stops where the masks of one sparsity are stable, and sweep() "
            "has many. Say how many: Vote(..., observations=8)."
        )
    vote = replace(method, schedule=OneShot())
    return vote if refit is None else replace(vote, refit=refit)  # type: ignore[arg-type]


def _told(vote: Vote) -> str:
    """What the vote differs in from the defaults, but for the sparsity, which is swept."""
    told = re.sub(r"\(sparsity=[^,)]+(?:, )?", "(", describe(vote, defaults=False), count=1)
    return "" if told == "Vote()" else told


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    own = {"sparsity": "sparsities", "steps": "sparsities", "optimizer": "batches"}
    for name in own.keys() & options.keys():
        raise TypeError(f"`{name}` is not an argument of sweep(): see `{own[name]}`.")
    return {"backend": "inplace", **options}
