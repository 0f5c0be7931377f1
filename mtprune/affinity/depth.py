"""Depth: where, in the order in which a net computes, the tasks part."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isnan

from mtprune.affinity.contrasts import Contrast
from mtprune.affinity.overlap import Affinity, LayerAffinity

__all__ = ["Watershed", "watershed"]


@dataclass(frozen=True)
class Watershed:
    """Where sharing stops paying.

    Attributes:
        before: Index of the last layer before the drop.
        drop: How far the curve falls from there to the next layer.
    """

    before: int
    drop: float


def watershed(
    curve: Sequence[float] | Affinity, null: Sequence[float] | None = None, *, least: float = 0.1
) -> Watershed | None:
    """The largest single drop of a curve of overlaps, or of its excess over a null.

    Of an affinity that was compared with the null of `permuted` it is the largest drop of the
    excess, from layer to layer as the net computes, that chance does not explain: the excess before
    it is above 0, and the drop is, each beyond an interval that holds for all layers at once.

    Args:
        curve: What `compare` found with a null; or the overlap of each layer, in order of depth.
            Layers without an overlap (NaN) are passed over.
        null: With a curve of numbers, that of unrelated tasks, such as `LayerAffinity.chance`, or
            `Contrast.expected` of nulls of your own. Without it the drop may be the architecture's
            own.
        least: Smaller drops are not looked at.

    Returns:
        The place of the drop, or None if there is none.

    Raises:
        ValueError: If an affinity has no null, or the curves are of different lengths.

    Example:
        >>> watershed([0.9, 0.8, 0.3, 0.2])
        Watershed(before=1, drop=0.5)
    """
    if isinstance(curve, Affinity):
        if null is not None:
            raise ValueError("`null` goes with a curve of numbers: an affinity has its own.")
        return _beyond_chance(curve.layers, least)
    if null is not None and len(null) != len(curve):
        raise ValueError(f"`null` must have {len(curve)} values, one per layer. Got {len(null)}.")
    excess = list(curve) if null is None else [c - n for c, n in zip(curve, null, strict=True)]
    known = [i for i, value in enumerate(excess) if not isnan(value)]
    return _largest({i: excess[i] - excess[j] for i, j in pairwise(known)}, least)


def _beyond_chance(layers: Sequence[LayerAffinity], least: float) -> Watershed | None:
    if not all(layer.null for layer in layers):
        raise ValueError(
            "An affinity has a watershed against its null: compare(task_masks, null=null), with "
            "the null of affinity.permuted(...)."
        )
    known = [i for i, layer in enumerate(layers) if not layer.empty]
    steps = {i: (i, j) for i, j in pairwise(known)}
    drops = {}
    for i, (_, j) in steps.items():
        here, there = layers[i].contrast, layers[j].contrast
        both = zip(here.null, there.null, strict=True)
        drop = Contrast(here.value - there.value, tuple(one - other for one, other in both))
        if min(x.within(of=len(steps))[0] for x in (here, drop)) > 0:
            drops[i] = drop.excess
    return _largest(drops, least)


def _largest(drops: dict[int, float], least: float) -> Watershed | None:
    drops = {i: round(drop, 12) for i, drop in drops.items()}
    if not drops or max(drops.values()) < least:
        return None
    before = max(drops, key=drops.__getitem__)
    return Watershed(before, drops[before])
