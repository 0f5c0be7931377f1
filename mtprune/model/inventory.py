"""The inventory: all that a pruner may prune of a model, and what is known of it beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch import nn

from mtprune.census import HERE, Census
from mtprune.latency import Latency, Pace
from mtprune.model.components import SHARED, UNDECLARED, Declared
from mtprune.model.coverage import Coverage
from mtprune.model.layers import Layer
from mtprune.model.units import Units

__all__ = ["Inventory"]


@dataclass(frozen=True)
class Inventory:
    """What a model has to prune.

    Attributes:
        tasks: The tasks, in their declared order.
        layers: The layers that take part, in order of position.
        declared: The modules that the user declared shared, with the layers in them.
        units: What is kept or pruned as one; None for every weight on its own.
        left_dense: Layers that the granularity leaves dense, and why.
        unfit: Layers that the method cannot prune, and why.
        coverage: How much of the model's matrices could take part.
        costs: For each layer's name the multiply-adds of one of its weights; empty unless measured.
        total_macs: The multiply-adds of all prunable layers, those left dense too; 0 unless
            measured.
        pace: What is known of the model's time, if it was asked for.
    """

    tasks: tuple[str, ...]
    layers: Sequence[Layer]
    declared: Sequence[Declared] = ()
    units: Units | None = None
    left_dense: Mapping[str, str] = field(default_factory=dict)
    unfit: Mapping[str, str] = field(default_factory=dict)
    coverage: Coverage = field(default_factory=Coverage)
    costs: Mapping[str, Fraction] = field(default_factory=dict)
    total_macs: Fraction = Fraction(0)
    pace: Pace | None = None

    @property
    def census(self) -> Census:
        """Counts over the parts of layers on all ranks."""
        return self.layers[0].part.census if self.layers else HERE

    @property
    def components(self) -> list[str]:
        """The names that a component can have."""
        declared = list(dict.fromkeys(d.component for d in self.declared))
        return [*(declared or [SHARED]), *self.tasks, UNDECLARED]

    @property
    def prices(self) -> list[Fraction]:
        """The multiply-adds of a weight of each layer; empty unless measured."""
        return [self.costs[layer.name] for layer in self.layers] if self.costs else []

    def sizes(self) -> tuple[dict[str, int], int]:
        """How many weights each declared component has, and how many there are elsewhere."""
        owner = {name: d.component for d in self.declared for name in d.names}
        known: dict[str, int] = {}
        others = 0
        for layer in self.layers:
            if layer.name in owner:
                component = owner[layer.name]
                known[component] = known.get(component, 0) + layer.parameter.numel()
            else:
                others += layer.parameter.numel()
        return known, others

    def measured(self, model: nn.Module, prunable: Sequence[Layer], inputs: Any) -> "Inventory":
        """The same with multiply-adds.

        Args:
            model: The model.
            prunable: All prunable layers, those left dense too.
            inputs: What the model is called with.
        """
        from mtprune.model.macs import macs_per_weight  # most runs do without

        prices = macs_per_weight(model, prunable, inputs)
        costs = {layer.name: price for layer, price in zip(prunable, prices, strict=True)}
        every = (costs[layer.name] * layer.parameter.numel() for layer in prunable)
        return replace(self, costs=costs, total_macs=sum(every, Fraction(0)))

    def timed(self, model: nn.Module, latency: Latency, inputs: Any) -> "Inventory":
        """The same with times: those of a timetable, or else measured.

        Args:
            model: The model.
            latency: The budget that asks for them.
            inputs: What the model is called with.
        """
        if latency.times is not None:
            return replace(self, pace=Pace(latency.times))
        from mtprune.compression.pricing import paced  # most runs do without

        names = [layer.name for layer in self.layers]
        groups = () if self.units is None else self.units.groups
        return replace(self, pace=paced(model, inputs, names, groups, latency.measure))

    def check_names(self, argument: str, given: object, known: Sequence[str]) -> None:
        """Refuse a mapping that names a task or component that does not exist.

        Raises:
            ValueError: If it does.
        """
        unknown = [n for n in given if n not in known] if isinstance(given, Mapping) else []
        if unknown:
            raise ValueError(f"`{argument}` names {unknown}. Known here: {list(known)}.")
