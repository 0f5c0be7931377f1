"""What a method is: what it wants to see, and how it turns that into masks."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mtprune.granularity import Granularity
from mtprune.saliency import Saliency
from mtprune.schedule import Schedule
from mtprune.softening import Watch
from mtprune.units import Units

__all__ = ["Ballot", "Decision", "Method", "Ranks", "Softly", "describe"]


@dataclass(frozen=True)
class Ballot:
    """All that a decision depends on, layer by layer in order of position.

    Where units are larger than a weight, what is said of weights and layers in `scores`, `masks`,
    `components` and `names` is said of units and their groups.

    Attributes:
        shapes: The layers' shapes.
        components: The component of each layer.
        scores: ``{voter: [n]}`` for each layer: flat float32 saliencies.
        masks: What is kept now, flat bool ``[n]``.
        weights: The weights as they are trained, zero where pruned for good, flat ``[n]``.
        generator: The pruner's own source of randomness.
        names: The layers' names.
        costs: What each weight of a layer costs, in multiply-adds; empty unless that was measured.
        losses: The sum of the observed losses of each task.
        seen: What was noted of each soft layer, summed over the steps since the last update.
        memory: What the last decision left to remember; empty at first.
        units: What is kept or pruned as one; None for every weight on its own.
        used: For each voter, the layers that it uses; given with units.
        whole: What all prunable layers cost, those that are left alone too; 0 unless measured.
    """

    shapes: Sequence[tuple[int, ...]]
    components: Sequence[str]
    scores: Sequence[Mapping[str, Tensor]]
    masks: Sequence[Tensor]
    weights: Sequence[Tensor]
    generator: torch.Generator
    names: Sequence[str] = ()
    costs: Sequence[Fraction] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    seen: Sequence[float] = ()
    memory: Mapping[str, Any] = field(default_factory=dict)
    units: Units | None = None
    used: Mapping[str, Sequence[int]] = field(default_factory=dict)
    whole: Fraction = Fraction(0)

    @property
    def total(self) -> int:
        """How many weights there are."""
        return sum(mask.numel() for mask in self.masks)


@dataclass(frozen=True)
class Decision:
    """What a method decided at an update.

    Attributes:
        masks: What is kept from now on, flat bool ``[n]`` for each layer.
        alone: For each voter and each layer it uses, what that voter alone would keep.
        softly: If weights are to go through soft thresholds instead, these; None for masks.
        memory: What the next decision is to know.
        provisional: Whether these masks may open again: what they hide keeps its value until then.
        units: For each group of units, which of them are kept; empty if there are no groups.
        ranks: If components of matrices are kept instead of weights, which.
    """

    masks: Sequence[Tensor]
    alone: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    softly: "Softly | None" = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    provisional: bool = False
    units: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: "Ranks | None" = None


@dataclass(frozen=True)
class Ranks:
    """Which components of its weight each layer keeps: singular triples, largest first.

    Attributes:
        kept: For each layer, bool ``[m]``.
        alone: For each voter and each layer it uses, what that voter alone would keep.
        gates: What each component is multiplied by, ``[m]`` for each layer, while nothing is
            removed yet; None once it is.
    """

    kept: Sequence[Tensor]
    alone: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    gates: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Softly:
    """Soft thresholds in place of masks.

    Attributes:
        thresholds: For each layer, what its weights are moved towards zero by, 0-dim.
        leak: How much gradient passes to the weights below.
        gains: For each layer, what its weights are multiplied by then, 0-dim; None for nothing.
        settled: Whether that is the end: what is below is pruned for good, what is above stays as
            the model sees it.
    """

    thresholds: Sequence[Tensor]
    leak: float = 0.0
    settled: bool = False
    gains: Sequence[Tensor] | None = None


class Method(Protocol):
    """What the pruner asks of a method."""

    @property
    def sparsity(self) -> Any:
        """Share of zeros in the end."""
        ...

    @property
    def schedule(self) -> Schedule:
        """When masks change."""
        ...

    @property
    def saliency(self) -> Saliency | None:
        """What is accumulated at every observation; None if nothing is."""
        ...

    @property
    def disentangled(self) -> bool:
        """Whether every loss is scored apart from the others."""
        ...

    @property
    def observations(self) -> int | Literal["auto"]:
        """How many observations of every task an update needs."""
        ...

    @property
    def granularity(self) -> Granularity:
        """What is pruned as one."""
        ...

    @property
    def regrows(self) -> bool:
        """Whether a pruned weight can come back."""
        ...

    @property
    def straight_through(self) -> bool:
        """Whether scores add up over the whole run, and masks may open again until the last."""
        ...

    @property
    def softens(self) -> bool:
        """Whether weights go through soft thresholds before masks are fixed."""
        ...

    @property
    def watch(self) -> Watch | None:
        """What to note of soft layers in every backward."""
        ...

    @property
    def needs_costs(self) -> bool:
        """Whether it asks what every weight costs."""
        ...

    def decide(self, ballot: Ballot, step: int) -> Decision:
        """The masks of the update of ``step``."""
        ...


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
        told = [f for f in fields(value) if f.repr]
        held = {f.name: getattr(value, f.name) for f in told}
        if not defaults:
            usual = {
                f.name: f.default if f.default_factory is MISSING else f.default_factory()
                for f in told
            }
            held = {name: v for name, v in held.items() if v != usual[name]}
        return f"{type(value).__name__}({', '.join(f'{k}={say(v)}' for k, v in held.items())})"
    if isinstance(value, tuple):
        return f"({', '.join(map(say, value))}{',' * (len(value) == 1)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {say(v)}" for key, v in sorted(value.items())) + "}"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    # An object that does not say what it is would say where it is.
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)
