r"""Affinity: the overlap of the masks that tasks would have on their own, against chance.

The intersection over union of two masks is high wherever both are dense, even if the tasks have
nothing in common: independent masks of densities p and q have :math:`pq / (p + q - pq)`. Network
architecture and layer density alone give a curve that falls with depth. So every overlap here comes
with its null, and sharing stops paying at a layer (a "watershed") where the *excess* over the null
drops.

Independent masks are a weak null: tasks that have nothing to do with each other still share the
weights and the pictures that their scores are made of. A stronger one scores the same tasks on
labels that were shuffled among the samples; `contrast` puts an overlap beside those of such nulls.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isnan, nan, prod

from torch import Tensor

__all__ = [
    "Affinity",
    "Contrast",
    "Contrasts",
    "LayerAffinity",
    "Watershed",
    "chance",
    "compare",
    "contrast",
    "iou",
    "watershed",
]


@dataclass(frozen=True)
class LayerAffinity:
    """One layer's overlap.

    Attributes:
        name: The layer.
        iou: Intersection over union of its masks; NaN if all are empty.
        chance: The expected overlap of independent masks of the same densities.
        densities: Share kept by each task.
    """

    name: str
    iou: float
    chance: float
    densities: Mapping[str, float]

    @property
    def excess(self) -> float:
        """The overlap beyond chance."""
        return self.iou - self.chance


@dataclass(frozen=True)
class Affinity:
    """The overlap of several tasks' masks.

    Attributes:
        layers: The layers that all these tasks use, in order of position.
        iou: Summed intersections over summed unions.
        chance: The expected overlap of independent masks of the same densities in every layer.
    """

    layers: tuple[LayerAffinity, ...]
    iou: float
    chance: float


@dataclass(frozen=True)
class Contrast:
    """An overlap beside those of nulls.

    Attributes:
        iou: The overlap; NaN if there is none.
        null: The overlap of each null.

    Example:
        >>> found = Contrast(0.75, null=(0.5, 0.25, 0.75))
        >>> found.expected, found.excess, found.p
        (0.5, 0.25, 0.5)
    """

    iou: float
    null: tuple[float, ...]

    @property
    def expected(self) -> float:
        """The mean overlap of the nulls that have one."""
        known = [value for value in self.null if not isnan(value)]
        return sum(known) / len(known) if known else nan

    @property
    def excess(self) -> float:
        """The overlap beyond that."""
        return self.iou - self.expected

    @property
    def p(self) -> float:
        """How often a null overlaps as much: (1 + those that do) / (1 + all nulls)."""
        if isnan(self.iou):
            return nan
        return (1 + sum(value >= self.iou for value in self.null)) / (1 + len(self.null))


@dataclass(frozen=True)
class Contrasts:
    """An affinity beside its nulls.

    Attributes:
        overall: Of all layers together.
        layers: ``{layer: contrast}``, in order of position.
    """

    overall: Contrast
    layers: Mapping[str, Contrast]


@dataclass(frozen=True)
class Watershed:
    """Where sharing stops paying.

    Attributes:
        before: Index of the last layer before the drop.
        drop: How far the curve falls from there to the next layer.
    """

    before: int
    drop: float


def iou(masks: Sequence[Tensor]) -> float:
    """Intersection over union of any number of masks; NaN if all are empty.

    Example:
        >>> import torch
        >>> iou([torch.tensor([True, True, False]), torch.tensor([True, False, False])])
        0.5
    """
    intersection, union = _overlap(masks)
    return intersection / union if union else nan


def chance(densities: Sequence[float]) -> float:
    r"""Overlap of independent masks, :math:`\prod p_k / (1 - \prod (1 - p_k))`.

    Example:
        >>> round(chance([0.5, 0.5]), 4)
        0.3333
    """
    union = 1.0 - prod(1.0 - p for p in densities)
    return prod(densities) / union if union else nan


def compare(task_masks: Mapping[str, Mapping[str, Tensor]]) -> Affinity:
    """Compare the masks of several tasks on the layers that all of them use.

    Args:
        task_masks: ``pruner.task_masks``, or some of its tasks.

    Raises:
        ValueError: If there are fewer than two tasks, or no layer is used by all of them.
    """
    if len(task_masks) < 2:
        raise ValueError(f"Affinity compares at least two tasks. Got {list(task_masks)}.")
    first, *others = task_masks.values()
    common = [name for name in first if all(name in masks for masks in others)]
    if not common:
        raise ValueError(f"No layer is used by all of the tasks {list(task_masks)}.")
    layers = []
    intersections = unions = chance_intersections = chance_unions = 0.0
    for name in common:
        masks = [masks[name] for masks in task_masks.values()]
        densities = [float(mask.float().mean()) for mask in masks]
        intersection, union = _overlap(masks)
        size = masks[0].numel()
        intersections, unions = intersections + intersection, unions + union
        chance_intersections += size * prod(densities)
        chance_unions += size * (1.0 - prod(1.0 - p for p in densities))
        layers.append(
            LayerAffinity(
                name=name,
                iou=intersection / union if union else nan,
                chance=chance(densities),
                densities=dict(zip(task_masks, densities, strict=True)),
            )
        )
    return Affinity(
        layers=tuple(layers),
        iou=intersections / unions if unions else nan,
        chance=chance_intersections / chance_unions if chance_unions else nan,
    )


def contrast(affinity: Affinity, nulls: Sequence[Affinity]) -> Contrasts:
    """Put an affinity beside those of nulls of your own, such as tasks with shuffled labels.

    Args:
        affinity: What `compare` found.
        nulls: What it found under each null, on the same layers.

    Example:
        >>> import torch
        >>> both, one = (torch.tensor([True, False]), torch.tensor([True, True]))
        >>> tasks = compare({"seg": {"trunk": both}, "depth": {"trunk": both}})
        >>> null = compare({"seg": {"trunk": both}, "depth": {"trunk": one}})
        >>> contrast(tasks, [null]).overall.excess
        0.5
    """
    if not nulls:
        raise ValueError("`nulls` must hold at least one affinity. Got none.")
    names = [layer.name for layer in affinity.layers]
    for null in nulls:
        if [layer.name for layer in null.layers] != names:
            raise ValueError(
                f"`nulls` must be of the layers {names}. Got {[x.name for x in null.layers]}."
            )
    return Contrasts(
        overall=Contrast(affinity.iou, tuple(null.iou for null in nulls)),
        layers={
            layer.name: Contrast(layer.iou, tuple(null.layers[i].iou for null in nulls))
            for i, layer in enumerate(affinity.layers)
        },
    )


def watershed(
    curve: Sequence[float], null: Sequence[float] | None = None, *, least: float = 0.1
) -> Watershed | None:
    """The largest single drop of a curve of overlaps, or of its excess over a null.

    Args:
        curve: Overlap of each layer, in order of depth. Layers without one (NaN) are passed over.
        null: The curve of unrelated tasks: `LayerAffinity.chance`, or `Contrast.expected` of
            permuted labels. Without it the drop may be the architecture's own.
        least: Drops smaller than this are noise.

    Returns:
        The place of the drop, or None if no drop is as large as ``least``.

    Example:
        >>> watershed([0.9, 0.8, 0.3, 0.2])
        Watershed(before=1, drop=0.5)
    """
    if null is not None and len(null) != len(curve):
        raise ValueError(f"`null` must have {len(curve)} values, one per layer. Got {len(null)}.")
    excess = curve if null is None else [c - n for c, n in zip(curve, null, strict=True)]
    known = [i for i, value in enumerate(excess) if not isnan(value)]
    drops = {i: round(excess[i] - excess[j], 12) for i, j in pairwise(known)}
    if not drops or max(drops.values()) < least:
        return None
    before = max(drops, key=drops.__getitem__)
    return Watershed(before, drops[before])


def _overlap(masks: Sequence[Tensor]) -> tuple[int, int]:
    """How many weights are in all of the masks, and how many in any of them."""
    intersection, union = masks[0], masks[0]
    for mask in masks[1:]:
        intersection, union = intersection & mask, union | mask
    return int(intersection.sum()), int(union.sum())
