r"""Allocation: how a budget is spread over layers.

* ``"global"``: one ranking over all layers.
* ``"uniform"``: the same density in every layer.
* ``"erk"`` or ``Erk(power)``: density of layer l proportional to
  :math:`(\sum_i d_i / \prod_i d_i)^{power}` of its shape d, capped at 1.
* a mapping component -> sparsity, with one ranking inside each component.
* ``"floor"`` or ``Floor(fraction, of)``: every layer is sure of that fraction of what ``of`` would
  give it, filled by its own best; the rest goes by one ranking.

Whatever the allocation, the total is exact, and layers that would be emptied keep ``min_keep``
weights as long as the budget has one for each. Units larger than a weight are spread over their
groups in the same way, by what they cost.

Each allocation is a frozen value, an `Allocation`; `parse_allocation` finds it by its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from math import prod

from typing_extensions import override

from mtprune import checks
from mtprune.selection.units import Marks, Queue, Shape
from mtprune.selection.weights import Quota

__all__ = [
    "NAMES",
    "Allocation",
    "AllocationLike",
    "Budget",
    "ByComponent",
    "Erk",
    "Floor",
    "Global",
    "Layerwise",
    "PerOutput",
    "Proportional",
    "Uniform",
    "apportion",
    "guard",
    "parse_allocation",
]


@dataclass(frozen=True)
class Budget:
    """How many weights some layers keep together, and how many each of them can keep.

    Attributes:
        shapes: The layers' shapes, in order of position.
        components: The component of each layer.
        keep: The total, exact.
        upper: The most each layer can keep, that is, the weights not yet pruned for good.
        min_keep: The least each layer keeps, as far as the total allows.
        matrices: How many matrices each layer holds, along its first dimension; one unless given.
    """

    shapes: Sequence[Shape]
    components: Sequence[str]
    keep: int
    upper: Sequence[int]
    min_keep: int = 1
    matrices: Sequence[int] = ()

    @property
    def sizes(self) -> list[int]:
        """How many weights each layer has."""
        return [prod(shape) for shape in self.shapes]

    @property
    def floors(self) -> list[int]:
        """The least each layer keeps."""
        return guard(self.keep, self.upper, self.min_keep)

    def part(self, layers: Sequence[int], keep: int) -> "Budget":
        """A budget of some of the layers."""
        return replace(
            self,
            shapes=[self.shapes[i] for i in layers],
            components=[self.components[i] for i in layers],
            keep=keep,
            upper=[self.upper[i] for i in layers],
            matrices=[self.matrices[i] for i in layers] if self.matrices else (),
        )


class Allocation(ABC):
    """How a budget is spread over layers."""

    @property
    def layerwise(self) -> "Layerwise | None":
        """The allocation that says how many weights each layer keeps; None if layers compete."""
        return None

    @property
    def by_output(self) -> bool:
        """Whether the weights of each output compete with each other alone."""
        return False

    def at(self, progress: float) -> "Allocation":
        """The allocation when that share of the final sparsity is due."""
        return self

    @abstractmethod
    def quotas(self, budget: Budget) -> list[Quota]:
        """The quotas by which a budget is spread over its layers.

        Raises:
            ValueError: If the allocation contradicts the budget.
        """

    @abstractmethod
    def units(self, queue: Queue, sure: Marks) -> Marks:
        """The units that stay.

        Args:
            queue: All units.
            sure: The units that come first, whatever they are worth.
        """


@dataclass(frozen=True)
class Global(Allocation):
    """One ranking over all layers."""

    @override
    def quotas(self, budget: Budget) -> list[Quota]:
        """See `Allocation`."""
        return [Quota(tuple(range(len(budget.shapes))), budget.keep, tuple(budget.floors))]

    @override
    def units(self, queue: Queue, sure: Marks) -> Marks:
        """See `Allocation`."""
        return queue.by_worth(sure)


class Layerwise(Allocation):
    """An allocation that says how many weights each layer keeps."""

    @property
    @override
    def layerwise(self) -> "Layerwise":
        """See `Allocation`."""
        return self

    @abstractmethod
    def counts(self, budget: Budget) -> list[int]:
        """How many weights each layer keeps."""


class Proportional(Layerwise):
    """The density of a layer is proportional to a number that depends on its shape."""

    @abstractmethod
    def raw(self, shape: Shape) -> float:
        """The density of a layer, up to a factor common to all layers."""

    def densities(self, shapes: Sequence[Shape], density: float) -> list[float]:
        r"""Densities :math:`d_l = \min(1, \epsilon\, r_l)` with :math:`\sum d_l n_l = d \cdot N`.

        Args:
            shapes: The layers' shapes: r is `raw`, and n the number of weights.
            density: d, the overall share of weights kept, in [0, 1].

        Returns:
            One density per layer, in [0, 1].

        Example:
            >>> [round(d, 4) for d in Erk().densities([(10, 10), (100, 100)], density=0.1)]
            [0.9182, 0.0918]
        """
        sizes, raw = [prod(shape) for shape in shapes], [self.raw(shape) for shape in shapes]
        dense: set[int] = set()
        while len(dense) < len(shapes):
            free = [i for i in range(len(shapes)) if i not in dense]
            room = density * sum(sizes) - sum(sizes[i] for i in dense)
            scale = room / sum(raw[i] * sizes[i] for i in free)
            full = {i for i in free if scale * raw[i] > 1.0}
            if not full:
                return [1.0 if i in dense else max(0.0, scale * raw[i]) for i in range(len(shapes))]
            dense |= full
        return [1.0] * len(shapes)

    @override
    def counts(self, budget: Budget) -> list[int]:
        """See `Layerwise`."""
        return apportion(self._ideal(budget), budget.keep, budget.floors, budget.upper)

    def promised(self, budget: Budget) -> list[int]:
        """How many weights each layer would keep if none had been pruned yet."""
        return apportion(self._ideal(budget), budget.keep, budget.floors, budget.sizes)

    def _ideal(self, budget: Budget) -> list[float]:
        sizes, counts = budget.sizes, budget.matrices or [1] * len(budget.shapes)
        # A stack is as many layers as it has matrices; these are alike, and so are their densities.
        single = [s[1:] if n > 1 else s for s, n in zip(budget.shapes, counts, strict=True)]
        every = [shape for shape, n in zip(single, counts, strict=True) for _ in range(n)]
        densities = self.densities(every, budget.keep / max(sum(sizes), 1))
        firsts = accumulate(counts[:-1], initial=0)
        return [densities[i] * n for i, n in zip(firsts, sizes, strict=True)]

    @override
    def quotas(self, budget: Budget) -> list[Quota]:
        """See `Allocation`."""
        counts = enumerate(self.counts(budget))
        return [Quota((layer,), count, (count,)) for layer, count in counts]

    @override
    def units(self, queue: Queue, sure: Marks) -> Marks:
        """See `Allocation`."""
        return queue.by_density(self.raw, sure)


@dataclass(frozen=True)
class Uniform(Proportional):
    """The same density in every layer."""

    @override
    def raw(self, shape: Shape) -> float:
        """See `Proportional`."""
        return 1.0

    @override
    def densities(self, shapes: Sequence[Shape], density: float) -> list[float]:
        """See `Proportional`."""
        return [density] * len(shapes)


@dataclass(frozen=True)
class Erk(Proportional):
    """Erdős-Rényi-kernel densities: small layers stay denser than large ones.

    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity", 2018; Evci et al., ICML 2020 (power 1).

    Attributes:
        power: Exponent on the layer's raw density; 0 is uniform.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        """Validate."""
        checks.inside("power", self.power, "[0, inf)", must="must be at least 0")

    @override
    def raw(self, shape: Shape) -> float:
        """See `Proportional`."""
        return float((sum(shape) / prod(shape)) ** self.power)


@dataclass(frozen=True)
class Floor(Allocation):
    """A guaranteed share for every layer; the rest goes to the best wherever they are.

    Attributes:
        fraction: Share of the layerwise allocation that is guaranteed, in [0, 1].
        of: The layerwise allocation: ``"erk"``, ``"uniform"`` or ``Erk(power)``.
    """

    fraction: float = 0.5
    of: str | Proportional = "erk"

    def __post_init__(self) -> None:
        """Validate."""
        checks.inside("fraction", self.fraction, "[0, 1]")
        if not isinstance(self.of, Proportional):
            checks.either("of", self.of, tuple(_PROPORTIONAL), other="Erk(power)")

    @property
    @override
    def layerwise(self) -> Proportional:
        """See `Allocation`."""
        return _PROPORTIONAL[self.of] if isinstance(self.of, str) else self.of

    @override
    def quotas(self, budget: Budget) -> list[Quota]:
        """See `Allocation`."""
        # Of full layers: a share of what earlier updates left would shrink from one to the next.
        guaranteed = map(min, budget.upper, self._guaranteed(self.layerwise.promised(budget)))
        floors = tuple(map(max, budget.floors, guaranteed))
        return [Quota(tuple(range(len(floors))), budget.keep, floors)]

    @override
    def units(self, queue: Queue, sure: Marks) -> Marks:
        """See `Allocation`."""
        fresh = queue.fresh()  # as for weights: of full groups
        promised = self.layerwise.units(fresh, fresh.best(queue.count(sure)))
        return queue.by_worth(sure | queue.best(self._guaranteed(fresh.count(promised))))

    def _guaranteed(self, counts: Sequence[int]) -> list[int]:
        """The guaranteed part of these counts."""
        # Exact arithmetic: 0.3 * 10 must not be 2 in one layer and 3 in its twin.
        share = Fraction(str(self.fraction))
        return [int(share * count) for count in counts]


@dataclass(frozen=True)
class ByComponent(Layerwise):
    """A sparsity for some components, with one ranking in each; the others share what is left.

    Attributes:
        sparsities: ``{component: share of zeros}``.
    """

    sparsities: Mapping[str, float]

    def __post_init__(self) -> None:
        """Validate."""
        for component, sparsity in self.sparsities.items():
            checks.sparsity(f"allocation[{component!r}]", sparsity)

    @override
    def at(self, progress: float) -> "ByComponent":
        """See `Allocation`."""
        return ByComponent({name: s * progress for name, s in self.sparsities.items()})

    @override
    def counts(self, budget: Budget) -> list[int]:
        """See `Layerwise`; inside a component all layers are as dense."""
        counts = [0] * len(budget.shapes)
        for quota in self.quotas(budget):
            inside = Uniform().counts(budget.part(quota.layers, quota.keep))
            for layer, count in zip(quota.layers, inside, strict=True):
                counts[layer] = count
        return counts

    @override
    def quotas(self, budget: Budget) -> list[Quota]:
        """See `Allocation`."""
        sizes, keep, total = budget.sizes, budget.keep, sum(budget.sizes)
        unknown = sorted(set(self.sparsities) - set(budget.components))
        if unknown:
            raise ValueError(
                f"`allocation` names components {unknown}, which do not exist. "
                f"Components: {sorted(set(budget.components))}."
            )
        components = list(enumerate(budget.components))
        members = [tuple(i for i, name in components if name == c) for c in self.sparsities]
        ideal = [
            sum(sizes[i] for i in layers) - round(sparsity * sum(sizes[i] for i in layers))
            for layers, sparsity in zip(members, self.sparsities.values(), strict=True)
        ]
        named = sum(ideal)
        rest = tuple(i for i, name in components if name not in self.sparsities)
        if rest:
            members.append(rest)
            ideal.append(keep - named)
        floors = budget.floors
        least = [sum(floors[i] for i in layers) for layers in members]
        most = [sum(budget.upper[i] for i in layers) for layers in members]
        # Named components may give way to the guard, and to rounding, but not to each other.
        slack = len(members) + sum(max(0, low - n) for low, n in zip(least, ideal, strict=True))
        fits = least[-1] <= ideal[-1] <= most[-1] if rest else abs(keep - named) <= slack
        if not fits:
            raise ValueError(
                f"`allocation` keeps {named} of {total} weights, which cannot give the sparsity "
                f"asked for ({1 - keep / total:.6g}: {keep} kept). Name fewer components, or ask "
                f"for sparsity={1 - named / total:.6g}."
            )
        counts = apportion([float(n) for n in ideal], keep, least, most)
        return [
            Quota(layers, count, tuple(budget.part(layers, count).floors))
            for layers, count in zip(members, counts, strict=True)
        ]

    @override
    def units(self, queue: Queue, sure: Marks) -> Marks:
        """Units may lie in two components.

        Raises:
            TypeError: Always.
        """
        raise TypeError("An allocation by component spreads single weights, not units.")


@dataclass(frozen=True)
class PerOutput(Allocation):
    """The same density in every output of every layer: the weights of one compete alone.

    Outputs are a weight's first dimension, of experts in a stack those of each. Where shares are no
    whole numbers, earlier outputs keep one weight more, so that the total is exact.

    Sun et al., "A simple and effective pruning approach for large language models", ICLR 2024.
    """

    @property
    @override
    def by_output(self) -> bool:
        """See `Allocation`."""
        return True

    @override
    def quotas(self, budget: Budget) -> list[Quota]:
        """See `Allocation`; of layers."""
        return Uniform().quotas(budget)

    @override
    def units(self, queue: Queue, sure: Marks) -> Marks:
        """Units may lie in several outputs.

        Raises:
            TypeError: Always.
        """
        raise TypeError("An allocation by output spreads single weights, not units.")


AllocationLike = str | Allocation | Mapping[str, float]
"""An allocation, its name, or a mapping component -> sparsity."""

_PROPORTIONAL: Mapping[str, Proportional] = {"erk": Erk(), "uniform": Uniform()}

_NAMED: Mapping[str, Allocation] = {
    "floor": Floor(),
    "global": Global(),
    "uniform": Uniform(),
    "erk": Erk(),
}

NAMES = tuple(_NAMED)
"""The allocations that have a name."""


def parse_allocation(given: object) -> Allocation:
    """The allocation that is meant.

    Args:
        given: An allocation, its name, or a mapping component -> sparsity.

    Raises:
        ValueError: If no allocation has the name, or a sparsity is out of range.
        TypeError: If it is no allocation.

    Example:
        >>> parse_allocation("floor")
        Floor(fraction=0.5, of='erk')
    """
    if isinstance(given, Allocation):
        return given
    if isinstance(given, Mapping):
        return ByComponent(given)
    if not isinstance(given, str):
        must = f"must be one of {NAMES}, Erk(...), Floor(...) or a mapping component -> sparsity"
        raise TypeError(checks.message("allocation", given, must))
    checks.one_of("allocation", given, NAMES)
    return _NAMED[given]


def apportion(
    ideal: Sequence[float], total: int, lower: Sequence[int], upper: Sequence[int]
) -> list[int]:
    """Whole numbers near ``ideal``, within bounds, that add up to ``total`` exactly.

    Largest remainders first, earlier positions first among equals. What bounds take away from one
    entry is spread over the others in proportion.

    Example:
        >>> apportion([1.5, 1.5, 7.0], 10, lower=[0, 0, 0], upper=[9, 9, 9])
        [2, 1, 7]
    """
    if not sum(lower) <= total <= sum(upper):
        raise ValueError(f"{total} lies outside the bounds {sum(lower)}..{sum(upper)}.")
    counts = [min(max(int(x), low), high) for x, low, high in zip(ideal, lower, upper, strict=True)]
    while (missing := total - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        room = [
            (h - c) if sign > 0 else (c - b) for c, b, h in zip(counts, lower, upper, strict=True)
        ]
        free = [i for i, r in enumerate(room) if r > 0]
        if abs(missing) <= len(free):
            free.sort(key=lambda i: (sign * (counts[i] - ideal[i]), i))
            steps = dict.fromkeys(free[: abs(missing)], 1)
        else:
            weight = {i: max(ideal[i], 1e-12) for i in free}
            mass = sum(weight.values())
            steps = {i: min(room[i], int(abs(missing) * weight[i] / mass)) for i in free}
        for i, step in steps.items():
            counts[i] += sign * step
    return counts


def guard(keep: int, upper: Sequence[int], min_keep: int) -> list[int]:
    """The least each layer keeps: ``min_keep``, unless the budget is too small for all."""
    least = [min(min_keep, most) for most in upper]
    return least if sum(least) <= keep else [0] * len(upper)
