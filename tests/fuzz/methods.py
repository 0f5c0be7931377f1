"""Random methods, with all that they take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from torch import Tensor

import mtprune
from mtprune import allocation, granularity, recipes, saliency, schedule, votes, weighting
from mtprune.methods import LowRank, Method, SigmoidThreshold, SoftThreshold, Vote
from tests.fuzz.nets import NetCase

SPARSITIES = (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.625, 0.7, 0.8, 0.9, 0.95, 0.99)


def by_inputs(weight: Tensor, grad: Tensor | None = None, *, inputs: Tensor) -> Tensor:
    """As large as the weight and what it is multiplied by."""
    return weight.abs() * (1 + inputs.square().mean())


def worst(percentiles: Tensor) -> Tensor:
    """A vote that somebody wrote."""
    return percentiles.amin(0) + percentiles.mean(0)


def by_size(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """A weighting that somebody wrote."""
    return {task: 1.0 + 1.0 / (1.0 + float(loss.detach())) for task, loss in losses.items()}


SALIENCIES: dict[str, Any] = {
    **{
        name: getattr(saliency, name)
        for name in saliency.__all__
        if name not in ("Saliency", "asks")
    },
    "by_inputs": by_inputs,
}
VOTES: dict[str, Any] = {
    "unanimous": votes.unanimous,
    "intersection": votes.intersection,
    "majority": votes.majority,
    "mean": votes.mean,
    "worst": worst,
    **{f"at_least({m})": votes.at_least(m) for m in (1, 2, 3)},
}
SCHEDULES: dict[str, Callable[..., Any]] = {
    "oneshot": schedule.OneShot,
    "linear": schedule.Linear,
    "cubic": schedule.Cubic,
    "regrow": schedule.Regrow,
    "rounds": schedule.Rounds,
    "hold": lambda begin, end, every, until: schedule.Hold(
        schedule.Cubic(begin, end, every), until, every
    ),
}
WEIGHTINGS: dict[str, Any] = {
    "uniform": "uniform",
    "noise": weighting.Noise(begin=1, window=3),
    "pruning_sensitivity": "pruning_sensitivity",
    "worst": weighting.Worst(window=2),
    "by_size": by_size,
}


@dataclass(frozen=True)
class MethodCase:
    """A method.

    Attributes:
        kind: ``"vote"``, ``"soft"``, ``"sigmoid"``, ``"rank"``, or the name of a recipe.
        sparsity: Its sparsity.
        options: Its other arguments; those that are no plain values by their name, or as a name
            and numbers.
    """

    kind: str = "vote"
    sparsity: float = 0.5
    options: Mapping[str, Any] = field(default_factory=dict)


def make(case: MethodCase, example: Any) -> Method[Any]:
    """The method of a case.

    Args:
        case: The case.
        example: Example inputs, for what needs them.
    """
    options = {name: _value(name, given, example) for name, given in case.options.items()}
    kinds = {"vote": Vote, "soft": SoftThreshold, "sigmoid": SigmoidThreshold, "rank": LowRank}
    maker: Any = kinds.get(case.kind) or getattr(recipes, case.kind)
    if options.pop("per_task", False):
        return maker(mtprune.PerTaskKeep(max(0.01, 1 - case.sparsity)), **options)
    fixed = "macs" in options or isinstance(options.get("granularity"), granularity.NM)
    return maker(None if fixed else case.sparsity, **options)


def _value(name: str, given: Any, example: Any) -> Any:
    if name == "example_inputs":
        return example
    if name == "granularity":
        return _granularity(given, example)
    if name == "allocation" and isinstance(given, tuple):
        kind, *numbers = given
        made: dict[str, Any] = {"floor": allocation.Floor, "erk": allocation.Erk}
        return made[kind](*numbers)
    if name == "schedule":
        kind, *numbers = given
        return SCHEDULES[kind](*numbers)
    if name == "weighting":
        return WEIGHTINGS[given]
    if name == "voters":
        return tuple(SALIENCIES[voter] for voter in given)
    if name == "refit":
        return mtprune.Refit(*given)
    tables: dict[str, dict[str, Any]] = {"saliency": SALIENCIES, "vote": VOTES}
    return tables[name][given] if name in tables else given


def _granularity(given: tuple[Any, ...], example: Any) -> Any:
    kind, *numbers = given
    if kind == "channel":
        return granularity.Channel(example)
    return {"block": granularity.Block, "nm": granularity.NM, "neuron": granularity.Neuron}[kind](
        *numbers
    )


def is_exact(case: MethodCase) -> bool:
    """Whether a method prunes exactly ``round(sparsity * N)`` single weights in the end."""
    odd = {"granularity", "macs", "speedup", "per_task", "budget_unit"}
    return not (odd & set(case.options)) and case.kind not in (
        *("sigmoid", "adapmtl_published"),
        *("rank", "flop"),
    )


def slower(case: MethodCase, times: int) -> MethodCase:
    """The method with a schedule that has so many times the steps between updates."""
    if case.options.get("schedule", ("oneshot",))[0] in ("oneshot", "hold", "rounds"):
        return case
    kind, *numbers = case.options["schedule"]
    steps = (n * times if isinstance(n, int) else n for n in numbers)
    return replace(case, options={**case.options, "schedule": (kind, *steps)})


def last_of(method: Method[Any]) -> int:
    """The step of the last update."""
    last, step = 0, method.schedule.next_update(-1)
    while step is not None:
        last, step = step, method.schedule.next_update(step)
    return last


def draw(chance: Random, net: NetCase) -> MethodCase:
    """A random method that may fit the net."""
    sparsity = chance.choice([*SPARSITIES, round(chance.random(), 3)])
    kind = chance.choices(["vote", "soft", "rank", "sigmoid", "recipe"], [60, 20, 7, 3, 10])[0]
    if kind == "recipe":
        return _recipe(chance, sparsity)
    if kind == "soft":
        return MethodCase(kind, sparsity, _soft(chance, net, sparsity))
    options = _vote(chance, net) if kind == "vote" else _rank(chance)
    return MethodCase(kind, sparsity, _sigmoid(chance) if kind == "sigmoid" else options)


def _vote(chance: Random, net: NetCase) -> dict[str, Any]:
    options: dict[str, Any] = _schedule(chance, regrow=0.15)
    regrows = options.get("schedule", ("",))[0] == "regrow"
    for name, table in (("saliency", SALIENCIES), ("vote", VOTES)):
        if chance.random() < 0.7:
            options[name] = chance.choice(list(table))
    if chance.random() < 0.6 or regrows:
        options["allocation"] = chance.choice(_allocations(chance, net, regrows))
    if chance.random() < 0.2:
        options["observations"] = chance.choice([2, 3, "auto"])
    if chance.random() < 0.15:
        options["disentangled"] = False
    elif chance.random() < 0.15:
        options["priority"] = {chance.choice(net.names): chance.choice([0.5, 2.0, 3])}
    elif chance.random() < 0.1:
        options["per_task"] = True
    if chance.random() < 0.15:
        options["min_keep"] = chance.choice([0, 2, 3])
    if chance.random() < 0.2 and not regrows and options.get("observations") != "auto":
        options["straight_through"] = True
    if chance.random() < 0.15 and not regrows:
        options |= _units(chance, options)
    if chance.random() < 0.15 and not regrows:
        options["voters"] = chance.choice([("magnitude",), ("random",), ("magnitude", "random")])
    if chance.random() < 0.15 and not regrows and "straight_through" not in options:
        options["refit"] = (16,)
    return options


def _units(chance: Random, options: Mapping[str, Any]) -> dict[str, Any]:
    """Units larger than a weight, and what goes with them."""
    kinds: list[Any] = [("block", 2, 2), ("block", 1, 4), ("channel",)]
    if not {"per_task", "allocation"} & set(options):
        kinds += [("nm", 2, 4), ("nm", 1, 2)]
    kind = chance.choice(kinds)
    more: dict[str, Any] = {"granularity": kind, "min_keep": chance.choice([0, 0, 1])}
    if isinstance(options.get("allocation"), dict):
        more["allocation"] = "global"
    if kind[0] != "nm" and "per_task" not in options and chance.random() < 0.3:
        more |= {"macs": chance.choice([0.25, 0.5, 0.9]), "example_inputs": True}
    return more


def _allocations(chance: Random, net: NetCase, layerwise: bool) -> list[Any]:
    found: list[Any] = ["erk", "uniform", ("erk", chance.choice([0.5, 0.9, 2.0]))]
    if layerwise:
        return found
    component = "low" if net.shared == "mapping" else chance.choice(["shared", *net.names])
    return [
        *found,
        "global",
        "floor",
        ("floor", chance.choice([0.0, 0.25, 1.0])),
        ("floor", 0.5, "uniform"),
        {component: chance.choice([0.0, 0.3, 0.6])},
    ]


def _soft(chance: Random, net: NetCase, sparsity: float) -> dict[str, Any]:
    options: dict[str, Any] = {"schedule": _steps(chance, ["linear", "cubic", "hold", "oneshot"])}
    choices: dict[str, list[Any]] = {
        "per": ["layer"],
        "allocation": ["learned", {"shared": 0.3}],
        "grad_mode": ["str", "anneal"],
        "control": ["pi"],
        "budget_unit": ["macs", {"shared": sparsity}],
        "max_sparsity": [max(0.95, sparsity), 0.999],
        "weighting": [*WEIGHTINGS],
        "debias": [True],
        "scale": ["none"],
        "rate": [0.2],
        "observations": [2],
    }
    for name, values in choices.items():
        if chance.random() < 0.25:
            options[name] = chance.choice(values)
    if options.get("budget_unit") == "macs":
        options["example_inputs"] = True
    return options


def _rank(chance: Random) -> dict[str, Any]:
    options: dict[str, Any] = _schedule(chance, regrow=0.0)
    choices: dict[str, list[Any]] = {
        "vote": [*VOTES],
        "floor": [0.0, 1.0],
        "min_rank": [0, 2],
        "observations": [2],
        "disentangled": [False],
    }
    if options.get("schedule", ("oneshot",))[0] != "oneshot":
        choices |= {"gates": ["learned"], "rate": [0.5]}
    for name, values in choices.items():
        if chance.random() < 0.3:
            options[name] = chance.choice(values)
    return options


def _sigmoid(chance: Random) -> dict[str, Any]:
    options: dict[str, Any] = {"end": chance.randint(1, 6), "lr": 0.5, "init": -3.0}
    if chance.random() < 0.5:
        options["rule"] = "sgd"
    if chance.random() < 0.5:
        options["weighting"] = chance.choice([*WEIGHTINGS])
    return options


def _recipe(chance: Random, sparsity: float) -> MethodCase:
    every = {"every": 2, "end": 6}
    kinds: dict[str, dict[str, Any]] = {
        "disparse_static": {"observations": 2},
        "disparse_pretrained": {},
        "disparse_dynamic": every,
        "snip": {},
        "rigl": every,
        "set_": every,
        "magnitude": {},
        "lamp": {},
        "gradual_magnitude": {"begin": 1, **every},
        "random": {},
        "movement": {"steps": 10},
        "flop": {"steps": 10},
        "adapmtl": {"steps": 10},
        "adapmtl_published": {"steps": 10},
        "best": {"steps": 12},
    }
    kind = chance.choice(list(kinds))
    return MethodCase(kind, sparsity, kinds[kind])


def _schedule(chance: Random, regrow: float) -> dict[str, Any]:
    if chance.random() < 0.4:
        return {"schedule": ("rounds", 3)} if chance.random() < 0.1 else {}
    if chance.random() < regrow:
        return {"schedule": ("regrow", 2, chance.choice([2, 5]), chance.choice([0.3, 0.5]))}
    return {"schedule": _steps(chance, ["oneshot", "linear", "cubic", "hold"])}


def _steps(chance: Random, kinds: list[str]) -> tuple[Any, ...]:
    begin, every = chance.randint(0, 3), chance.randint(1, 3)
    end = begin + every * chance.randint(1, 3)
    kind = chance.choice(kinds)
    if kind == "oneshot":
        return (kind, begin)
    return (kind, begin, end, every, *([end + every] if kind == "hold" else []))
