"""Methods: how masks come about. A method is a frozen value; the pruner holds all state.

A method says what it needs to be shown (`Needs`), gets it as a `Ballot` when an update is due, and
returns a decision. Which kind of decision is up to the method, together with the hold that puts
such decisions into the model (`mtprune.holding`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from mtprune.census import HERE, Census
from mtprune.facts import Subject
from mtprune.granularity import Element, Granularity
from mtprune.holding import Decision, Hold, MaskHold, Masking
from mtprune.latency import Latency, Pace
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.model.parts import Part
from mtprune.model.units import Units
from mtprune.reading import Entry
from mtprune.schedule import Schedule
from mtprune.selection import Quota
from mtprune.statistics import JOINT, Statistic

__all__ = ["Ballot", "Method", "Needs", "check_method", "describe"]


@dataclass(frozen=True)
class Needs:
    """What a method must be shown before it decides.

    Attributes:
        statistics: Statistics by name (`mtprune.statistics`).
        apart: Whether each task's loss is scored on its own; False scores their sum.
        observations: How many observations of every task an update needs, or ``"auto"``: at least
            4, until masks no longer change.
        by_graph: Whether the graphs of the losses alone tell which task uses which layer, so that
            no backward is run for it. They mislead where losses are taken from one stack.
        over_the_run: Whether statistics add up over all updates instead of starting anew.
        macs: Whether the multiply-adds of every layer are asked for.
        example_inputs: What the model is called with to measure them.
        latency: The budget in time that is asked for; None if times do not matter.
    """

    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    apart: bool = True
    observations: int | Literal["auto"] = 1
    by_graph: bool = False
    over_the_run: bool = False
    macs: bool = False
    example_inputs: Any = None
    latency: Latency | None = None

    @property
    def looks_at_data(self) -> bool:
        """Whether some statistic is gathered while the model trains."""
        return any(s.when != "update" for s in self.statistics.values())


@dataclass(frozen=True)
class Ballot:
    """All that a decision depends on, layer by layer in order of position.

    Attributes:
        subjects: The layers: name, component, shape, tasks and cost.
        statistics: For each statistic by name and each layer, its sums ``{voter: tensor}``.
        masks: The weights that are kept now, flat bool ``[n]``.
        weights: The weights as they are trained, zero where pruned for good, flat ``[n]``.
        generator: The pruner's own source of randomness.
        units: What is kept or pruned as one; None for every weight on its own.
        losses: The sum of the observed losses of each task.
        noted: The number that the hold noted of each layer since the last update.
        memory: What the last decision left to remember; empty at first.
        total_macs: The multiply-adds of all prunable layers, those left dense too; 0 unless
            measured.
        pace: What is known of the model's time, if it was asked for.
        parts: What of each layer is here, if other ranks have the rest. All that is flat above is
            of that part.
        census: Counts over the parts of all ranks.
    """

    subjects: Sequence[Subject]
    statistics: Mapping[str, Sequence[Mapping[str, Tensor]]]
    masks: Sequence[Tensor]
    weights: Sequence[Tensor]
    generator: torch.Generator
    units: Units | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    noted: Sequence[float] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)
    total_macs: Fraction = Fraction(0)
    pace: Pace | None = None
    parts: Sequence[Part] = ()
    census: Census = HERE

    def __post_init__(self) -> None:
        """All of every layer is here unless somebody says otherwise."""
        if not self.parts:
            object.__setattr__(self, "parts", [Part(subject.shape) for subject in self.subjects])

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The layers' shapes."""
        return [subject.shape for subject in self.subjects]

    @property
    def matrices(self) -> list[int]:
        """How many matrices each layer holds."""
        return [subject.matrices for subject in self.subjects]

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return [subject.name for subject in self.subjects]

    @property
    def components(self) -> list[str]:
        """The component of each layer."""
        return [subject.component for subject in self.subjects]

    @property
    def costs(self) -> list[Fraction]:
        """The multiply-adds of a weight of each layer; empty unless measured."""
        costs = [subject.cost for subject in self.subjects]
        return [cost for cost in costs if cost is not None]

    @property
    def scores(self) -> Sequence[Mapping[str, Tensor]]:
        """The statistic called ``"saliency"``: for each layer ``{voter: [n]}``."""
        return self.statistics.get("saliency", [{} for _ in self.subjects])

    @property
    def total(self) -> int:
        """How many weights there are."""
        here = sum(mask.numel() for mask in self.masks)
        return int(self.census.number(here, self.masks[0]))

    @property
    def kept(self) -> list[int]:
        """How many weights of each layer are kept now."""
        return self.census.count(self.masks)

    def whole_masks(self) -> Iterator[Tensor]:
        """The weights of each layer that are kept now, on all ranks, one layer after the other."""
        for part, mask in zip(self.parts, self.masks, strict=True):
            yield part.whole(mask)

    def shared(self, name: str) -> list[Tensor]:
        """A statistic that is the same for all tasks, for each layer."""
        return [sums[JOINT] for sums in self.statistics[name]]


D = TypeVar("D", bound=Decision)


class Method(ABC, Generic[D]):
    """How masks come about. Subclasses are frozen dataclasses.

    Only `sparsity`, `schedule`, `needs` and `decide` must be given; the rest has a default.

    Attributes:
        sparsity: Share of zeros in the end.
        schedule: When masks change.
        granularity: What is kept or pruned as one.
        weighting: How the pruner weighs the tasks' losses (`mtprune.weighting`).
    """

    sparsity: Any
    schedule: Schedule
    granularity: Granularity = Element()
    weighting: Any = "uniform"

    @property
    def regrows(self) -> bool:
        """Whether the first update opens sparse training, in which pruned weights come back."""
        return False

    @property
    def wants_training(self) -> bool:
        """Whether its scores rest on what training has made of the weights."""
        return False

    @abstractmethod
    def needs(self, inventory: Inventory) -> Needs:
        """What the method must be shown.

        Args:
            inventory: What the model has to prune.
        """

    @abstractmethod
    def decide(self, ballot: Ballot, step: int) -> D:
        """The decision of the update of ``step``."""

    def worths(self, ballot: Ballot) -> Sequence[Tensor]:
        """What each weight is worth to the decision, ``[n]`` for each layer, for those who watch.

        Empty if there is no such number.
        """
        return ()

    def fits(self, layer: Layer) -> str:
        """Why a layer is left dense; empty if it is not."""
        return ""

    def check(self, inventory: Inventory) -> None:
        """Refuse a model, or names, with which the method cannot work.

        Raises:
            ValueError: With what is wrong, what was found and what to do.
        """

    def needs_whole(self, inventory: Inventory) -> str:
        """Why every rank must have whole layers; empty if each may have a part of their rows.

        Where it may, the ballot's `parts` and `census` say what is where.
        """
        return f"{type(self).__name__} decides about whole layers"

    def promised(self, subjects: Sequence[Subject], step: int) -> Sequence[Quota]:
        """The exact numbers of weights that stay at the update of ``step``; often none are known.

        A checkpoint whose masks keep other numbers is refused.

        Args:
            subjects: The layers.
            step: The step of the update.
        """
        return ()

    def recall(self, memory: Entry, layers: Sequence[Layer]) -> Mapping[str, Any]:
        """The `memory` of the last decision, from a checkpoint that may hold anything.

        Args:
            memory: What stands there: that of the decision, or something else.
            layers: The layers that are pruned.

        Raises:
            ValueError: If `decide` could not go on from it, as `Entry` says it.
        """
        return {name: part.plain() for name, part in memory.mapping().items()}

    def hold(self, masks: Masking, optimizer: Optimizer | None) -> Hold[D]:
        """How decisions take hold: masks, unless the method says otherwise.

        Args:
            masks: The back-end.
            optimizer: The user's optimizer, if the pruner was given it.
        """
        hold: Any = MaskHold(masks)
        return hold  # type: ignore[no-any-return]

    def to_dict(self, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The method as plain data that JSON can hold; `mtprune.method_from` reads it.

        Args:
            own: Functions, classes and values that are not of this package, by name: a saliency,
                a schedule.

        Raises:
            ValueError: If it has parts of your own that ``own`` does not name.

        Example:
            >>> from mtprune import Vote, votes
            >>> Vote(0.9, vote=votes.at_least(2)).to_dict()["vote"]
            {'function': 'votes.at_least', 'm': 2}
        """
        from mtprune.notation import noted  # most runs do without

        return noted(self, own)


_OWN = ("sparsity", "schedule", "needs", "decide")
_BROUGHT = (
    "granularity",
    "weighting",
    "regrows",
    "wants_training",
    "worths",
    "fits",
    "check",
    "needs_whole",
    "promised",
    "recall",
    "hold",
)


def check_method(method: object) -> None:
    """Refuse an object that is no method.

    Raises:
        TypeError: If it is a class, or lacks members.
    """
    lacking = [name for name in (*_OWN, *_BROUGHT) if not hasattr(method, name)]
    if isinstance(method, type) or "decide" in lacking:
        raise TypeError(
            f"`method` must be a method such as Vote(sparsity=0.9), or a recipe that has been "
            f"called. Got {method!r}."
        )
    if lacking:
        raise TypeError(
            f"`method` {type(method).__name__} lacks {', '.join(lacking)}. Subclass "
            f"mtprune.methods.Method, which brings all but {', '.join(_OWN)}."
        )


def describe(value: object, *, defaults: bool = True) -> str:
    """A method, or a part of one, as a string that is the same in every process.

    Args:
        value: What to describe.
        defaults: Also say what is as it would be if nobody had said anything.
    """
    say = partial(describe, defaults=defaults)
    if isinstance(value, partial):
        inner = [say(value.func), *map(say, value.args)]
        inner += [f"{key}={say(v)}" for key, v in sorted(value.keywords.items())]
        return f"partial({', '.join(inner)})"
    if is_dataclass(value) and not isinstance(value, type):
        given: Any = value
        if not given.__dataclass_params__.repr:  # it says itself what it is
            return repr(value)
        # Fields that came later are silent while they are as before: older checkpoints lack them.
        shown = [
            f
            for f in fields(value)
            if f.repr and not (f.metadata.get("later") and getattr(value, f.name) == f.default)
        ]
        values = {f.name: getattr(value, f.name) for f in shown}
        if not defaults:
            usual = {
                f.name: f.default if f.default_factory is MISSING else f.default_factory()
                for f in shown
            }
            values = {name: v for name, v in values.items() if v != usual[name]}
        return f"{type(value).__name__}({', '.join(f'{k}={say(v)}' for k, v in values.items())})"
    if isinstance(value, tuple):
        return f"({', '.join(map(say, value))}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {say(v)}" for key, v in sorted(value.items())) + "}"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    # An object that does not say what it is would say where it is.
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)
