r"""Choosing: which method is right for a model, by short trials on validation data.

It depends on where the weights come from: they were trained on these tasks, on others, or not at
all, and nothing in a checkpoint says so. `choose` prunes and trains copies of the model with each
candidate and halves the field: in every round the better half goes on, from the start again and
with more steps, until two have met. Methods that prune before training and methods that prune in
the loop are halved apart, because short trials flatter the former, and meet in the last round.

The score of a candidate is the mean over tasks of the relative change of what `evaluate` measures
(`mtprune.metrics.delta_t`), against a copy that was trained as long as the longest trial and not
pruned. It is the price of the zeros. The task that loses most stands beside it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from operator import mul
from statistics import stdev
from typing import Any

from torch import nn

from mtprune import checks, recipes, saliency
from mtprune.methods import Method, Vote
from mtprune.methods.base import describe
from mtprune.model.selectors import Spec
from mtprune.observing.losses import LossFunction, parse
from mtprune.progress import bar
from mtprune.pruner import MultitaskPruner
from mtprune.results import directions, read_dense
from mtprune.schedule import OneShot
from mtprune.text import columns
from mtprune.trials import (
    Bench,
    Candidate,
    Judge,
    Trial,
    in_loop,
    inner,
    made,
    random_state_kept,
)

__all__ = ["Candidate", "Choice", "Trial", "choose", "halving", "usual"]

_USUAL = 100
"""Steps of a run, if nobody says how many."""
_RUNS = 6
"""How many such runs all trials may take together."""
_ROUNDING = 1e-9
"""Means that are closer, in points, are equal."""


@dataclass(frozen=True)
class Choice:
    """Which method to use, and why. It prints as a table.

    Attributes:
        name: The candidate that was chosen.
        method: Its method, made for the run to come.
        trials: All trials, round by round.
        given: The model as it was given, neither trained nor pruned, as if it were a trial.
        why: What decided.
    """

    name: str
    method: Method[Any]
    trials: tuple[Trial, ...]
    given: Trial
    why: str

    @property
    def in_loop(self) -> bool:
        """Whether masks change while the model trains, not by ``pruner.prune(batches)`` before."""
        return in_loop(self.method)

    def __str__(self) -> str:
        """The last trial of each candidate, the chosen one first, and what decided."""
        last = {trial.name: trial for trial in self.trials}
        ranked = sorted(last.values(), key=lambda t: (t.name != self.name, -t.steps, -t.mean))
        rows = [["candidate", "steps", "mean", "worst", "task"]]
        rows += [_cells(trial) for trial in [*ranked, self.given] if not trial.error]
        outs = [f"{trial.name}: out. {_line(trial.error)}" for trial in ranked if trial.error]
        steps = max(trial.steps for trial in self.trials)
        how = "observe(), step() in your loop" if self.in_loop else "prune(batches), then train"
        return "\n".join(
            [
                *columns(rows),
                *outs,
                f"Change in percent against the model after {steps} steps without pruning.",
                self.why,
                f"{describe(self.method, defaults=False)}: {how}.",
            ]
        )


def usual(sparsity: float) -> dict[str, Candidate]:
    """The candidates that are tried unless you name others; add to them, or leave some out.

    They are `recipes.best` for weights that were trained on these tasks, and for weights trained
    elsewhere; joint saliency; and magnitude. Each prunes once before training and once gradually in
    the loop, and all have the same floors.

    For weights that nothing has trained, add thresholds; then `train` must go by
    ``pruner.weigh(losses)``::

        {**usual(0.9), "thresholds": lambda steps: recipes.best(0.9, steps, trained=False)}

    Args:
        sparsity: Share of zeros in the end.

    Example:
        >>> [name for name in usual(0.9) if "rounds" in name]
        ['trained here, rounds', 'trained elsewhere, rounds', 'joint, rounds']
    """
    checks.sparsity("sparsity", sparsity)

    def here(steps: int | None = None) -> Method[Any]:
        return recipes.best(sparsity, steps)

    def elsewhere(steps: int | None = None, **others: Any) -> Method[Any]:
        vote = recipes.best(sparsity, steps, trained="elsewhere")
        assert isinstance(vote, Vote)
        return replace(vote, **others)

    def joint(steps: int | None = None) -> Method[Any]:
        return elsewhere(steps, disentangled=False)

    def magnitude(steps: int | None = None, **others: Any) -> Method[Any]:
        return elsewhere(steps, disentangled=False, saliency=saliency.magnitude, **others)

    return {
        "trained here, rounds": here(),
        "trained here, gradual": here,
        "trained elsewhere, rounds": elsewhere(),
        "trained elsewhere, gradual": elsewhere,
        "joint, rounds": joint(),
        "joint, gradual": joint,
        "magnitude, at once": magnitude(schedule=OneShot()),
        "magnitude, gradual": magnitude,
    }


def halving(candidates: int, trials: int, steps: int, seeds: int = 1) -> list[tuple[int, int]]:
    """How many candidates train for how many steps, round by round.

    The field is halved until there are two. Each round is two, three or four times as long as the
    one before, whichever makes the last round longest: short trials flatter methods that prune
    before they train, and the last round should be as long as the run to come.

    Args:
        candidates: How many there are.
        trials: The steps of all trials together, at most. The model that is not pruned, which
            trains as long as the last round, is among them.
        steps: Length of the run to come.
        seeds: How often each trial is made.

    Raises:
        ValueError: If there are too few steps.

    Example:
        >>> halving(8, trials=900, steps=150)
        [(8, 16), (4, 50), (2, 150)]
        >>> halving(8, trials=1_050, steps=150)
        [(8, 37), (4, 75), (2, 150)]
        >>> halving(8, trials=450, steps=150)
        [(8, 6), (4, 25), (2, 100)]
    """
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    ladders = [[times**number for number in range(len(sizes))] for times in (2, 3, 4)]
    plans = [_plan(sizes, ladder, trials // seeds, steps) for ladder in ladders]
    best = max(plans, key=lambda lengths: lengths[-1] if lengths[0] else 0)
    if not best[0]:
        shortest = ladders[0]
        least = seeds * (sum(map(mul, sizes, shortest)) + shortest[-1])
        raise ValueError(
            f"For {candidates} candidates and {seeds} seed{'s' * (seeds > 1)} `trials` must be at "
            f"least {least} and `steps` at least {shortest[-1]}: they meet in {len(sizes)} rounds, "
            f"each at least twice as long as the one before. Got {trials} and {steps}."
        )
    return list(zip(sizes, best, strict=True))


def _plan(sizes: Sequence[int], ladder: Sequence[int], trials: int, steps: int) -> list[int]:
    """The steps of each round, which grow as the ladder does; 0 where there are too few."""
    cost = sum(map(mul, sizes, ladder)) + ladder[-1]
    last = min(steps, trials * ladder[-1] // cost)
    return [last * rung // ladder[-1] for rung in ladder]


def choose(
    model: nn.Module,
    task_losses: Mapping[str, LossFunction] | Sequence[str],
    batches: Iterable[Any],
    shared_modules: Spec = "auto",
    *,
    sparsity: float,
    steps: int | None = None,
    train: Callable[[nn.Module, MultitaskPruner, int], object],
    evaluate: Callable[[nn.Module], Mapping[str, Any]],
    lower_is_better: bool | Mapping[str, Iterable[str]] | None = None,
    candidates: Mapping[str, Candidate] | None = None,
    trials: int | None = None,
    seeds: int = 1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Choice:
    """Try candidate methods on copies of a model, and say which one to use.

    Each trial prunes and trains a copy of the model as it is, from the same random state (of torch,
    numpy and Python). The model and the random state are left as they were. What else `train` and
    `evaluate` hold, such as an iterator, a generator or a module of learned weights, is theirs to
    begin anew.

    In each round the better half by the mean goes on: of the methods that prune before training,
    and of those that prune in the loop. Of the last two the one with the better mean is chosen. If
    they are within one standard error of each other, of their paired differences over seeds, it is
    the one whose worst task loses less. With one seed that error is unknown, and the mean decides.

    A candidate whose trial fails is out, and the table says why. What no candidate can help is
    raised: a `train` that does not step, an `evaluate` that returns other tasks.

    Args:
        model: The model.
        task_losses: As for `MultitaskPruner`.
        batches: As for `pruner.prune`. A list or a loader, because they are begun again.
        shared_modules: As for `MultitaskPruner`.
        sparsity: Share of zeros in the end.
        steps: Length of the run to come, in optimizer steps. The chosen method is made for it. A
            sixth of ``trials`` unless given.
        train: ``train(model, pruner, steps)``: your loop, on the model that it is given. It makes
            that many optimizer steps, calls `pruner.observe` in each and ``pruner.step()`` after
            each, and leaves `pruner.finalize` to `choose`. A learning rate that decays should do so
            within ``steps``. For the model that is not pruned, the pruner prunes nothing.
        evaluate: ``evaluate(model)`` -> ``{task: value}`` or ``{task: {metric: value}}``, on
            validation data.
        lower_is_better: True if all these values are losses or errors, False if all are scores, or
            which are errors: ``{task: {metric, ...}}``. May be left out if the metrics have names
            that are used in `mtprune.metrics`, or are called ``"loss"``.
        candidates: ``{name: method}``; where the schedule spans the run,
            ``{name: function of steps -> method}``. `usual` unless given. Methods that prune at
            once or in `Rounds` do so by ``pruner.prune(batches)``, before they train.
        trials: How many optimizer steps all trials may take together; `halving` shares them out.
            Six times ``steps`` unless given; without both, 600.
        seeds: How often each trial is made, each time from another random state.
        forward: As for `pruner.prune`.
        progress: Show a progress bar, if tqdm is installed.
        **options: For each `MultitaskPruner`, such as ``exclude`` and ``backend``.

    Raises:
        ValueError: If an argument is wrong, or `evaluate` returns something other than numbers
            for these tasks, finite where nothing is pruned.
        RuntimeError: If `train` does not step as it must, all candidates are out, or there are
            several processes.
    """
    if trials is not None:
        checks.whole("trials", trials, least=1)
    if steps is None:
        steps = _USUAL if trials is None else max(1, trials // _RUNS)
    _check(sparsity, steps, seeds, batches, options)
    trials = _RUNS * steps if trials is None else trials
    for name, function in (("train", train), ("evaluate", evaluate)):
        checks.function(name, function)
    found = usual(sparsity) if candidates is None else _checked(candidates)
    plan = halving(len(found), trials, steps, seeds)
    tasks = tuple(parse(task_losses))
    bench = Bench(
        (inner(model, "choose"), shared_modules, options),
        task_losses,
        batches,
        sparsity,
        train,
        evaluate,
        forward,
    )
    with random_state_kept():
        given = read_dense(bench.untrained(), tasks, "as it was given")
        lower = directions(given, lower_is_better)
        dense = [
            read_dense(bench.dense(plan[-1][1], seed), tasks, "trained and not pruned")
            for seed in range(seeds)
        ]
        judge = Judge(tasks, lower, dense)
        before = judge.trial("not pruned, as given", 0, 0, [given] * seeds)
        rounds = _play(bench, judge, found, plan, progress)
    winner, why = _decide(rounds[-1])
    method = made(found[winner.name], steps)
    trials_made = tuple(trial for tried in rounds for trial in tried)
    return Choice(winner.name, method, trials_made, before, why)


def _play(
    bench: Bench,
    judge: Judge,
    candidates: Mapping[str, Candidate],
    plan: Sequence[tuple[int, int]],
    progress: bool,
) -> list[list[Trial]]:
    """The trials of each round."""
    rounds: list[list[Trial]] = []
    for number, (size, steps) in enumerate(plan, start=1):
        going = _better(rounds[-1], size, candidates) if rounds else list(candidates)
        tried = []
        for name in bar(going, progress, f"choosing, round {number} of {len(plan)}"):
            results = (bench.pruned(candidates[name], steps, seed) for seed in judge.seeds)
            tried.append(judge.trial(name, number, steps, results))
        rounds.append(tried)
        if all(trial.error for trial in tried):
            outs = [f"{t.name}: {t.error}" for played in rounds for t in played if t.error]
            raise RuntimeError("All candidates are out:\n" + "\n".join(outs))
    return rounds


def _better(trials: Sequence[Trial], count: int, candidates: Mapping[str, Candidate]) -> list[str]:
    """The candidates that go on, the best first: the better half of either kind.

    Args:
        trials: Those of the round before.
        count: How many may go on; as long as there are two, both kinds do.
        candidates: The candidates.
    """
    kinds: dict[bool, list[Trial]] = {False: [], True: []}
    for trial in _ranked(trials):
        kinds[in_loop(made(candidates[trial.name], trial.steps))].append(trial)
    first = [kind[0] for kind in kinds.values() if kind][:count]
    halves = [trial for kind in kinds.values() for trial in kind[: (len(kind) + 1) // 2]]
    order = [*first, *_ranked(halves), *_ranked(trials)]
    names = list(dict.fromkeys(trial.name for trial in order))[:count]
    return [trial.name for trial in _ranked(trials) if trial.name in names]


def _ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Those that are not out, the best mean first."""
    passed = [trial for trial in trials if not trial.error]
    return sorted(passed, key=lambda trial: (-trial.mean, -trial.worst))


def _decide(finalists: Sequence[Trial]) -> tuple[Trial, str]:
    """The one to choose, and why."""
    first, *others = _ranked(finalists)
    if not others:
        return first, f"{first.name} is the only one that came so far."
    second = others[0]
    lead, seeds = first.mean - second.mean, len(first.means)
    error, said = 0.0, f"{lead:.2f} points in one trial each"
    if seeds > 1:
        error = _standard_error([a - b for a, b in zip(first.means, second.means, strict=True)])
        said = f"{lead:.2f} points, with a standard error of {error:.2f} over {seeds} seeds"
    if lead > error + _ROUNDING:
        why = f"{first.name} is chosen: it is ahead of {second.name} by {said}."
        hint = " With seeds=3 you would see how much of that is chance." if seeds == 1 else ""
        return first, why + hint
    best, other = sorted((first, second), key=lambda t: -t.worst)
    return best, (
        f"{best.name} is chosen by its worst task: {first.name} and {second.name} are apart by "
        f"only {said}, and the worst task of {best.name} loses "
        f"{best.worst - other.worst:.2f} points less."
    )


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / sqrt(len(values))


# Checks and words.


def _checked(candidates: Mapping[str, Candidate]) -> dict[str, Candidate]:
    form = "name -> method or function of steps"
    checks.mapping("candidates", candidates, form, filled=True)
    for name, candidate in candidates.items():
        if isinstance(candidate, type) or not (hasattr(candidate, "decide") or callable(candidate)):
            must = "must be a method, or a function of steps -> method"
            raise TypeError(checks.message("candidates", candidate, must, f" '{name}'"))
    return dict(candidates)


def _check(sparsity: Any, steps: Any, seeds: Any, batches: Any, options: Mapping[str, Any]) -> None:
    checks.sparsity("sparsity", sparsity)
    checks.whole("steps", steps, least=1)
    checks.whole("seeds", seeds, least=1)
    if not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise TypeError(checks.message("batches", batches, "must be a list or a loader"))
    if isinstance(batches, Iterator):
        raise TypeError(
            "`batches` is an iterator, which the first trial would use up. Pass a list or a loader."
        )
    own = {"method": "candidates", "seed": "seeds", "optimizer": "train"}
    for name in own.keys() & options.keys():
        raise TypeError(f"`{name}` is not an argument of choose(): it comes from `{own[name]}`.")


def _cells(trial: Trial) -> list[str]:
    numbers = [f"{trial.steps:,}", f"{trial.mean:+.2f}", f"{trial.worst:+.2f}"]
    return [trial.name, *numbers, trial.worst_task]


def _line(error: str) -> str:
    first = error.split("\n")[0]
    return first if len(first) <= 160 else f"{first[:157]}..."
