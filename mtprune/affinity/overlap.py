"""Overlap: intersection over union of the masks that tasks would have, and what to expect of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isfinite, isnan, nan, prod
from typing import TYPE_CHECKING

from torch import Tensor

from mtprune.affinity.contrasts import Contrast
from mtprune.model.task_masks import TaskMasks
from mtprune.text import columns

if TYPE_CHECKING:
    from mtprune.affinity.null import Null

__all__ = ["Affinity", "LayerAffinity", "chance", "compare", "iou", "overlap"]


class _Beside:
    """An overlap beside what to expect of unrelated tasks."""

    iou: float
    chance: float
    null: tuple[float, ...]

    @property
    def contrast(self) -> Contrast:
        """The overlap beside the null's."""
        return Contrast(self.iou, self.null)

    @property
    def expected(self) -> float:
        """The overlap to expect of unrelated tasks: the null's mean, or by chance without one."""
        return self.contrast.expected if self.null else self.chance

    @property
    def excess(self) -> float:
        """The overlap beyond that."""
        return self.iou - self.expected

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the excess to be expected lies, with a confidence of 95 %; None without a null."""
        return self.contrast.interval if self.null else None

    @property
    def reach(self) -> float | None:
        """Half the width of that interval; None without a null that tells."""
        return _reach(self.interval)


@dataclass(frozen=True)
class LayerAffinity(_Beside):
    """One layer's overlap.

    Attributes:
        name: The layer.
        iou: Intersection over union of its masks; NaN if all are empty.
        chance: The expected overlap of independent masks of the same densities.
        densities: Share kept by each task.
        null: The overlap in each draw of a null; empty without one.
        rank: Of two tasks, Spearman's correlation of their saliencies, beside the null's; None
            without a null.
        cosine: Of two tasks, the cosine of their gradients, likewise.
    """

    name: str
    iou: float
    chance: float
    densities: Mapping[str, float]
    null: tuple[float, ...] = ()
    rank: Contrast | None = None
    cosine: Contrast | None = None

    @property
    def empty(self) -> bool:
        """Whether no task keeps anything, so that there is no overlap: neither 0 nor 1."""
        return isnan(self.iou)


@dataclass(frozen=True)
class Affinity(_Beside):
    """The overlap of several tasks' masks. It prints as a table.

    Attributes:
        layers: The layers that all these tasks use, in order of position; in order of execution
            with a null.
        iou: Summed intersections over summed unions.
        chance: The expected overlap of independent masks of the same densities in every layer.
        null: The overlap in each draw of a null; empty without one.
        pairs: The affinity of every two of the tasks that share layers; empty for two tasks.
        rank: Of two tasks, the mean over weights of the layers' `LayerAffinity.rank`.
        cosine: Of two tasks, the cosine of their gradients in all layers together.
    """

    layers: tuple[LayerAffinity, ...]
    iou: float
    chance: float
    null: tuple[float, ...] = ()
    pairs: Mapping[tuple[str, str], "Affinity"] = field(default_factory=dict)
    rank: Contrast | None = None
    cosine: Contrast | None = None

    @property
    def empty(self) -> list[str]:
        """The layers of which no task keeps anything."""
        return [layer.name for layer in self.layers if layer.empty]

    def __str__(self) -> str:
        """A row for each layer, and one for all together."""
        head = ["layer", "overlap", "by chance"]
        if self.null:
            head += ["unrelated", "excess", "95 % interval"]
        two = self.rank is not None and self.cosine is not None
        head += ["rank", "unrelated", "cosine", "unrelated"] if two else []
        rows = [_cells(layer.name, layer) for layer in self.layers]
        return "\n".join(columns([head, *rows, _cells("all", self)]))


def _reach(interval: tuple[float, float] | None) -> float | None:
    if interval is None or not all(map(isfinite, interval)):
        return None
    return (interval[1] - interval[0]) / 2


def _cells(name: str, found: LayerAffinity | Affinity) -> list[str]:
    if isnan(found.iou):
        return [name, "empty"]
    cells = [name, f"{found.iou:.3f}", f"{found.chance:.3f}"]
    if found.interval is not None:
        low, high = found.interval
        cells += [f"{found.expected:.3f}", f"{found.excess:+.3f}", f"{low:+.3f} to {high:+.3f}"]
    for beside in (found.rank, found.cosine):
        if beside is not None:
            cells += [f"{beside.value:.3f}", f"{beside.expected:.3f}"]
    return cells


def iou(masks: Sequence[Tensor]) -> float:
    """Intersection over union of any number of masks; NaN if all are empty.

    Example:
        >>> import torch
        >>> iou([torch.tensor([True, True, False]), torch.tensor([True, False, False])])
        0.5
    """
    intersection, union = overlap(masks)
    return intersection / union if union else nan


def chance(densities: Sequence[float]) -> float:
    r"""Overlap of independent masks, :math:`\prod p_k / (1 - \prod (1 - p_k))`.

    Example:
        >>> round(chance([0.5, 0.5]), 4)
        0.3333
    """
    union = 1.0 - prod(1.0 - p for p in densities)
    return prod(densities) / union if union else nan


def compare(task_masks: TaskMasks, null: "Null | None" = None) -> Affinity:
    """Compare the masks of several tasks on the layers that all of them use.

    Args:
        task_masks: ``pruner.task_masks``, or some of its tasks; or those of the null itself.
        null: What `permuted` found of the same model, batches and sparsity: the overlap of
            unrelated tasks. Without it there is only what independent masks have by chance.

    Raises:
        ValueError: If there are fewer than two tasks, or no layer is used by all of them, or the
            null is of other tasks, layers or sparsity.

    Example:
        >>> import torch
        >>> both, one = torch.tensor([True, True]), torch.tensor([True, False])
        >>> found = compare({"seg": {"trunk": both}, "depth": {"trunk": one}})
        >>> found.iou, found.chance
        (0.5, 0.5)
    """
    if len(task_masks) < 2:
        raise ValueError(f"Affinity compares at least two tasks. Got {list(task_masks)}.")
    if null is not None:
        null.check(task_masks)
    if not _common(task_masks):
        raise ValueError(f"No layer is used by all of the tasks {list(task_masks)}.")
    found = _compare(task_masks, null)
    if len(task_masks) == 2:
        return found
    pairs = {}
    for one, other in combinations(task_masks, 2):
        masks = {task: task_masks[task] for task in (one, other)}
        if _common(masks):
            pairs[one, other] = _compare(masks, null)
    return replace(found, pairs=pairs)


def _compare(masks: TaskMasks, null: "Null | None") -> Affinity:
    """The affinity of all of some tasks together."""
    names = _common(masks)
    found = _Overlaps.of(masks, names)
    draws = [] if null is None else [draw.masks for draw in null.draws]
    drawn = [_Overlaps.of(draw.unpack(), names, masks) for draw in draws]
    pair = tuple(masks) if null is not None and len(masks) == 2 else ()
    layers = []
    for i, name in enumerate(names):
        densities = {task: float(own[name].float().mean()) for task, own in masks.items()}
        layers.append(
            LayerAffinity(
                name=name,
                iou=found.iou(i),
                chance=chance(list(densities.values())),
                densities=densities,
                null=tuple(draw.iou(i) for draw in drawn),
                rank=null.rank(pair, [name]) if null and pair else None,
                cosine=null.cosine(pair, [name]) if null and pair else None,
            )
        )
    sizes = [next(iter(masks.values()))[name].numel() for name in names]
    return Affinity(
        layers=tuple(layers if null is None else null.in_order(layers)),
        iou=found.iou(),
        chance=_chance_of_all(layers, sizes),
        null=tuple(draw.iou() for draw in drawn),
        rank=null.rank(pair, names) if null and pair else None,
        cosine=null.cosine(pair, names) if null and pair else None,
    )


def _chance_of_all(layers: Sequence[LayerAffinity], sizes: Sequence[int]) -> float:
    both = either = 0.0
    for layer, size in zip(layers, sizes, strict=True):
        both += size * prod(layer.densities.values())
        either += size * (1.0 - prod(1.0 - p for p in layer.densities.values()))
    return both / either if either else nan


def _common(masks: TaskMasks) -> list[str]:
    """The layers that all of some tasks use, in order of position."""
    first, *others = masks.values()
    return [name for name in first if all(name in own for own in others)]


@dataclass(frozen=True)
class _Overlaps:
    """How much masks overlap, layer by layer.

    Attributes:
        intersections: Weights that all keep.
        unions: Weights that some keep.
    """

    intersections: Sequence[int]
    unions: Sequence[int]

    @classmethod
    def of(
        cls, masks: TaskMasks, names: Sequence[str], tasks: Iterable[str] | None = None
    ) -> "_Overlaps":
        """Of some layers, and of all tasks or some."""
        tasks = list(masks if tasks is None else tasks)
        counts = [overlap([masks[task][name] for task in tasks]) for name in names]
        return cls([both for both, _ in counts], [either for _, either in counts])

    def iou(self, place: int | None = None) -> float:
        """Of one layer, or of all together; NaN if nothing is kept."""
        both = sum(self.intersections) if place is None else self.intersections[place]
        either = sum(self.unions) if place is None else self.unions[place]
        return both / either if either else nan


def overlap(masks: Sequence[Tensor]) -> tuple[int, int]:
    """How many weights are in all of the masks, and how many in any of them."""
    intersection, union = masks[0], masks[0]
    for mask in masks[1:]:
        intersection, union = intersection & mask, union | mask
    return int(intersection.sum()), int(union.sum())
