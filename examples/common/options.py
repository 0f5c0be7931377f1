"""The command line that all trainers share, and what each pruning method makes of it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from common.data import Layout, Source
from common.losses import Task
from common.nets import SCENES
from mtprune import METHODS as NAMED
from mtprune import Cubic, OneShot, Regrow, Rounds, Vote

Options = argparse.Namespace
ROUNDS = 4
"""Of ``--when rounds``."""


@dataclass(frozen=True)
class Problem:
    """A data set and how it is trained on: all that differs between the trainers.

    Attributes:
        name: Of the data set.
        tasks: What its tasks can be called.
        make_tasks: ``f(source) -> {name: task}``, all of them.
        layouts: How it may lie on disk.
        packaged: Makes it from what a package brings; then there is no ``--data``.
        defaults: Of options, as published where there is something published.
        nets: Which nets suit it, the default first.
        augment: Whether pictures are scaled, mirrored and cropped.
    """

    name: str
    tasks: tuple[str, ...]
    make_tasks: Callable[[Source], Mapping[str, Task]]
    layouts: tuple[Layout, ...] = ()
    packaged: Callable[[], Source] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    nets: tuple[str, ...] = SCENES
    augment: bool = True


# Methods: those of the package by name, and when they prune. Without an entry it is when the method
# itself says.

_WHEN = {
    **dict.fromkeys(("best", "best_without_voters", "best_with_refit"), "rounds"),
    **dict.fromkeys(("best_lamp_voter", "best_joint", "best_elsewhere"), "rounds"),
    **dict.fromkeys(("vote", "majority", "mean", "intersection", "joint"), "gradual"),
    "gradual_magnitude": "gradual",
    **dict.fromkeys(("disparse_static", "snip", "random"), "init"),
    **dict.fromkeys(("adapmtl", "adapmtl_uniform", "adapmtl_worst"), "init"),
    **dict.fromkeys(("disparse_pretrained", "magnitude", "lamp", "wanda"), "trained"),
}

METHODS: dict[str, str | None] = {
    name: _WHEN.get(name) for name in NAMED if name != "best_from_scratch"
}
"""When each method prunes.

``best`` is the one from scratch where nothing is pretrained, unless it shall prune gradually.
"""


def build(options: Options) -> Any:
    """The method of that name, with its own schedule."""
    name = options.method
    if name == "best" and options.pretrained is None and options.when != "gradual":
        name = "best_from_scratch"
    method = NAMED[name](options.sparsity, options.steps)
    if isinstance(method.schedule, Regrow):
        times = {"every": options.update_every, "end": options.freeze}
        return replace(method, schedule=replace(method.schedule, **times))
    return _later(method, options) if name.startswith("adapmtl") else method


def make_method(options: Options) -> Any:
    """The method that the options describe."""
    method, when = build(options), options.when or METHODS[options.method]
    if not isinstance(method, Vote):
        return method
    if when == "init":
        method = replace(method, schedule=OneShot(), observations=options.observations)
    elif when == "rounds":
        observations = min(options.observations, 4)
        method = replace(method, schedule=Rounds(ROUNDS), observations=observations)
    elif when == "trained":
        wait = options.dense_steps or options.observations
        observations = min(options.observations, wait)
        schedule = OneShot(options.dense_steps)
        method = replace(method, schedule=schedule, observations=observations)
    elif when == "gradual":
        schedule = _cubic(options)
        observations = min(options.observations, 4, schedule.every)
        method = replace(method, schedule=schedule, observations=observations)
    if options.allocation and options.method != "dense":
        method = replace(method, allocation=options.allocation)
    return method


def scoring_batches(options: Options) -> int:
    """How many batches are scored before the first step, for masks that do not change later."""
    method = make_method(options)
    schedule = getattr(method, "schedule", None)
    if isinstance(schedule, Rounds):
        return schedule.n * int(method.observations)
    return options.observations if isinstance(schedule, OneShot) and schedule.at == 0 else 0


def _later(method: Any, options: Options) -> Any:
    """Thresholds that rise from the first step; or after the dense phase."""
    if options.when in (None, "init"):
        return method
    if options.when in ("trained", "rounds"):
        raise ValueError(
            f"--when {options.when} leaves {options.method} no time in which thresholds could rise."
        )
    rise = _cubic(options)
    every = max(1, (rise.end - rise.begin) // 50)
    return replace(method, schedule=replace(rise, every=every))


def _cubic(options: Options) -> Cubic:
    """From where the dense phase ends, over half of what is left, in about ten updates."""
    begin = max(1, options.dense_steps)
    end = max(begin + 1, begin + (options.steps - begin) // 2)
    return Cubic(begin=begin, end=end, every=max(1, (end - begin) // 10))


# The command line.


def parse(problem: Problem, arguments: Sequence[str] | None = None) -> Options:
    """The options, with what follows from others filled in."""
    parser = argparse.ArgumentParser(
        description=f"Train and prune a multitask net on {problem.name}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser, problem)
    options = parser.parse_args(arguments)
    try:
        return settle(problem, options)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def add_options(parser: argparse.ArgumentParser, problem: Problem) -> None:
    """What a trainer can be told."""
    several: dict[str, Any] = {"nargs": "+", "type": assignment, "metavar": "TASK=X", "default": []}
    group = parser.add_argument_group("data and net").add_argument
    if problem.packaged is None:
        group("--data", type=Path, required=True, metavar="DIR", help="folder of the data set")
    group("--tasks", nargs="+", default=list(problem.tasks), metavar="TASK", help="what to learn")
    group("--net", choices=list(problem.nets), default=problem.nets[0], help="which net")
    group("--width", type=positive_float, default=1.0, help="factor on the net's channels")
    group("--imagenet", type=Path, metavar="FILE", help="torchvision's weights of the backbone")
    group("--noise", nargs="+", metavar="TASK", help="shuffle the training labels of these tasks")
    group("--workers", type=whole, default=2, help="processes that read data")

    group = parser.add_argument_group("pruning").add_argument
    group("--method", choices=list(METHODS), default="vote", help="how to prune, or not")
    group("--sparsity", type=float, default=0.9, help="share of zeros, in [0, 1)")
    group(
        "--when",
        choices=["init", "trained", "gradual", "rounds"],
        help="prune at the start, at once after the dense phase, gradually after it, or in rounds "
        "before the first step, each scored anew; "
        "unless given, as the method has it",
    )
    group(
        "--allocation",
        choices=["floor", "global", "erk", "uniform"],
        help="how the budget is spread over layers; unless given, as the method has it",
    )
    group("--dense-steps", type=whole, help="steps before pruning; half of all unless given")
    group("--pretrained", type=Path, metavar="FILE", help="model.pt of a run; no dense phase then")
    group("--rewind", action="store_true", help="prune --pretrained, then train from the start")
    group("--observations", type=positive, default=50, help="batches to score on, at most")
    group("--update-every", type=positive, help="steps between updates of sparse training")
    group(
        "--loss-scale",
        **several,
        help="multiply a task's loss, in the scoring only",
    )
    group("--backend", choices=["prune", "inplace"], default="prune", help="how masks are held")

    group = parser.add_argument_group("training").add_argument
    group("--steps", type=positive, default=20_000, help="in all")
    group("--batch", type=positive, default=16, help="samples in a batch")
    group("--lr", type=positive_float, help="of Adam at the start")
    group("--lr-shape", choices=["stairs", "line"], default="stairs", help="how it falls")
    group("--lr-every", type=positive, default=4000, help="steps of a stair")
    group("--lr-factor", type=positive_float, default=0.5, help="of a stair")
    group("--decay", type=float, default=5e-4, help="weight decay")
    group(
        "--weight",
        **several,
        help="of a task's loss in the total; unless given, as published",
    )
    group(
        "--distil",
        type=positive_float,
        nargs="?",
        const=1.0,
        metavar="W",
        help="learn from a dense net's outputs, too: W (1 unless given) times that loss",
    )
    group("--teacher", type=Path, metavar="FILE", help="its model.pt; --pretrained unless given")
    group("--temperature", type=positive_float, help="that softens its classes; 2 unless given")
    if problem.augment:
        group("--crop", type=positive, nargs=2, default=[224, 224], metavar=("H", "W"), help="size")
        group("--scales", type=positive_float, nargs=2, default=[0.5, 1.5], help="range of zoom")
    group("--amp", action="store_true", help="mixed precision: float16 on a GPU, else bfloat16")
    group("--compile", action="store_true", help="torch.compile the net")

    group = parser.add_argument_group("running").add_argument
    group("--seed", type=whole, default=0, help="of weights, data order and masks")
    group("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    group("--threads", type=positive, help="CPU threads")
    group("--save-every", type=positive, help="steps between validations, each with a checkpoint")
    group("--resume", action="store_true", help="go on from --out, if there is something")
    group("--out", type=Path, default=Path(f"{problem.name}_out"), help="folder for what comes out")
    parser.set_defaults(**{"lr_tuned": 1e-5, **problem.defaults})


def settle(problem: Problem, options: Options) -> Options:
    """Fill in what follows from other options, and check.

    Raises:
        ValueError: If they contradict each other.
    """
    for task in options.tasks:
        if task not in problem.tasks:
            raise ValueError(
                f"{problem.name} has no task '{task}'. It has {', '.join(problem.tasks)}."
            )
    if len(set(options.tasks)) < len(options.tasks):
        raise ValueError(f"--tasks names a task twice. Got {options.tasks}.")
    if unknown := set(options.noise or ()) - set(options.tasks):
        raise ValueError(f"--noise names {sorted(unknown)}, not in --tasks.")
    for option in ("loss_scale", "weight"):
        given = getattr(options, option)
        setattr(options, option, dict(given.items() if isinstance(given, Mapping) else given))
        if unknown := set(getattr(options, option)) - set(options.tasks):
            raise ValueError(
                f"--{option.replace('_', '-')} names {sorted(unknown)}, not in --tasks."
            )
    if options.rewind and options.pretrained is None:
        raise ValueError("--rewind needs --pretrained: the weights that say what to prune.")
    if options.distil:
        options.teacher = options.teacher or options.pretrained
        options.temperature = options.temperature or 2.0
        if options.teacher is None:
            raise ValueError("--distil needs --pretrained or --teacher: the net to learn from.")
    elif options.teacher or options.temperature:
        raise ValueError("--teacher and --temperature are for --distil. Give it, too.")
    if options.when and METHODS[options.method] is None:
        raise ValueError(f"--when does not apply to --method {options.method}.")
    if options.dense_steps is None:
        options.dense_steps = 0 if options.pretrained else options.steps // 2
    if options.dense_steps >= options.steps:
        raise ValueError(
            f"--dense-steps must be less than --steps {options.steps}. Got {options.dense_steps}."
        )
    if options.lr is None:
        tune = options.pretrained and not options.rewind
        options.lr = options.lr_tuned if tune else options.lr_trained
    if options.update_every is None:  # a 400th, as published; further apart in short runs
        options.update_every = max(1, options.steps // 400, min(25, options.steps // 10))
    options.freeze = max(1, options.steps * 3 // 4)
    options.save_every = options.save_every or max(1, options.steps // 10)
    at_once, when = scoring_batches(options), options.when or METHODS[options.method]
    if at_once and options.pretrained is None and when == "rounds":
        raise ValueError("--when rounds needs --pretrained: a trained net to prune.")
    if not at_once and options.rewind:
        raise ValueError(
            f"--rewind is for what prunes at once. --method {options.method} does not."
        )
    return options


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(int(text), 0)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(int(text), 1)


def _at_least(number: int, least: int) -> int:
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}. Got {number}.")
    return number


def positive_float(text: str) -> float:
    """A number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive. Got {text}.")
    return number


def assignment(text: str) -> tuple[str, float]:
    """``TASK=X``."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must look like seg=30. Got {text}.")
    return name, positive_float(value)
