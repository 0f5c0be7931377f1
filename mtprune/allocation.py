r"""Allocation: how a budget is spread over layers.

* ``"global"``: one ranking over all layers.
* ``"uniform"``: the same density in every layer.
* ``"erk"`` or ``Erk(power)``: density of layer l proportional to
  :math:`(\sum_i d_i / \prod_i d_i)^{power}` of its shape d, capped at 1.
* a mapping component -> sparsity, with one ranking inside each component.
* ``"floor"`` or ``Floor(fraction, of)``: every layer is sure of that fraction of what ``of`` would
  give it, filled by its own best; the rest goes by one ranking.

Whatever the allocation, the total is exact, and layers that would be emptied keep ``min_keep``
weights as long as the budget has one for each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from mtprune import checks
from mtprune.selection import Quota

__all__ = ["Allocation", "Erk", "Floor", "apportion", "erk_densities", "layer_counts", "quotas"]


@dataclass(frozen=True)
class Erk:
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


@dataclass(frozen=True)
class Floor:
    """A guaranteed share for every layer; the rest goes to the best wherever they are.

    Attributes:
        fraction: Share of the layerwise allocation that is guaranteed, in [0, 1].
        of: The layerwise allocation: ``"erk"``, ``"uniform"`` or ``Erk(power)``.
    """

    fraction: float = 0.5
    of: str | Erk = "erk"

    def __post_init__(self) -> None:
        """Validate."""
        checks.inside("fraction", self.fraction, "[0, 1]")
        if not isinstance(self.of, Erk):
            checks.either("of", self.of, ("erk", "uniform"), other="Erk(power)")


Allocation = str | Erk | Floor | Mapping[str, float]

NAMES = ("floor", "global", "uniform", "erk")


def erk_densities(
    shapes: Sequence[Sequence[int]], density: float, power: float = 1.0
) -> list[float]:
    r"""Densities :math:`d_l = \min(1, \epsilon\, r_l)` with :math:`\sum d_l n_l = density \cdot N`.

    Args:
        shapes: The layers' shapes; :math:`r_l = (\sum shape_l / \prod shape_l)^{power}`.
        density: Overall share of weights kept, in [0, 1].
        power: See `Erk`.

    Returns:
        One density per layer, in [0, 1].

    Example:
        >>> [round(d, 4) for d in erk_densities([(10, 10), (100, 100)], density=0.1)]
        [0.9182, 0.0918]
    """
    sizes = [prod(shape) for shape in shapes]
    raw = [(sum(shape) / size) ** power for shape, size in zip(shapes, sizes, strict=True)]
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


def layer_counts(
    of: str | Erk,
    shapes: Sequence[Sequence[int]],
    keep: int,
    upper: Sequence[int],
    min_keep: int = 1,
) -> list[int]:
    """How many weights each layer keeps under ``"uniform"``, ``"erk"`` or ``Erk(power)``.

    Args:
        of: The layerwise allocation.
        shapes: The layers' shapes.
        keep: The total, exact.
        upper: The most each layer can keep.
        min_keep: The least each layer keeps, as far as the total allows.
    """
    sizes = [prod(shape) for shape in shapes]
    density = keep / max(sum(sizes), 1)
    if of == "uniform":
        densities = [density] * len(shapes)
    else:
        densities = erk_densities(shapes, density, of.power if isinstance(of, Erk) else 1.0)
    ideal = [d * n for d, n in zip(densities, sizes, strict=True)]
    return apportion(ideal, keep, guard(keep, upper, min_keep), upper)


def guard(keep: int, upper: Sequence[int], min_keep: int) -> list[int]:
    """The least each layer keeps: ``min_keep``, unless the budget is too small for all."""
    least = [min(min_keep, most) for most in upper]
    return least if sum(least) <= keep else [0] * len(upper)


def quotas(
    allocation: Allocation,
    shapes: Sequence[Sequence[int]],
    components: Sequence[str],
    keep: int,
    upper: Sequence[int],
    min_keep: int = 1,
) -> list[Quota]:
    """The quotas by which ``keep`` weights are spread over the layers.

    Args:
        allocation: See the module.
        shapes: The layers' shapes, in order of position.
        components: The component of each layer.
        keep: The total, exact.
        upper: The most each layer can keep, that is, the weights not yet pruned for good.
        min_keep: The least each layer keeps, as far as the total allows.
    """
    everything = tuple(range(len(shapes)))
    floors = guard(keep, upper, min_keep)
    if allocation == "floor":
        allocation = Floor()
    if isinstance(allocation, Floor):
        counts = layer_counts(allocation.of, shapes, keep, upper, min_keep)
        # Exact arithmetic: 0.3 * 10 must not be 2 in one layer and 3 in its twin.
        share = Fraction(str(allocation.fraction))
        floors = [max(least, int(share * n)) for least, n in zip(floors, counts, strict=True)]
        return [Quota(everything, keep, tuple(floors))]
    if allocation == "global":
        return [Quota(everything, keep, tuple(floors))]
    if isinstance(allocation, Mapping):
        return _by_component(allocation, shapes, components, keep, upper, min_keep)
    if not isinstance(allocation, (str, Erk)):
        raise TypeError(f"Unknown allocation {allocation!r}.")
    counts = layer_counts(allocation, shapes, keep, upper, min_keep)
    return [Quota((layer,), count, (count,)) for layer, count in enumerate(counts)]


def _by_component(
    allocation: Mapping[str, float],
    shapes: Sequence[Sequence[int]],
    components: Sequence[str],
    keep: int,
    upper: Sequence[int],
    min_keep: int,
) -> list[Quota]:
    """One ranking in each named component; the others share what is left in one more."""
    sizes = [prod(shape) for shape in shapes]
    total = sum(sizes)
    unknown = sorted(set(allocation) - set(components))
    if unknown:
        raise ValueError(
            f"`allocation` names components {unknown}, which do not exist. "
            f"Components: {sorted(set(components))}."
        )
    members = [tuple(i for i, name in enumerate(components) if name == c) for c in allocation]
    ideal = [
        sum(sizes[i] for i in layers) - round(sparsity * sum(sizes[i] for i in layers))
        for layers, sparsity in zip(members, allocation.values(), strict=True)
    ]
    asked = sum(ideal)
    rest = tuple(i for i, name in enumerate(components) if name not in allocation)
    if rest:
        members.append(rest)
        ideal.append(keep - asked)
    floors = guard(keep, upper, min_keep)
    least = [sum(floors[i] for i in layers) for layers in members]
    most = [sum(upper[i] for i in layers) for layers in members]
    # Named components may give way to the guard, and to rounding, but not to each other.
    slack = len(members) + sum(max(0, low - n) for low, n in zip(least, ideal, strict=True))
    fits = least[-1] <= ideal[-1] <= most[-1] if rest else abs(keep - asked) <= slack
    if not fits:
        raise ValueError(
            f"`allocation` keeps {asked} of {total} weights, which is no way to the sparsity asked "
            f"for ({1 - keep / total:.6g}: {keep} kept). Name fewer components, or ask for "
            f"sparsity={1 - asked / total:.6g}."
        )
    counts = apportion([float(n) for n in ideal], keep, least, most)
    return [
        _among(layers, count, upper, min_keep)
        for layers, count in zip(members, counts, strict=True)
    ]


def _among(layers: tuple[int, ...], keep: int, upper: Sequence[int], min_keep: int) -> Quota:
    return Quota(layers, keep, tuple(guard(keep, [upper[i] for i in layers], min_keep)))
