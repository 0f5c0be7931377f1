"""Tracking: what a run's curves are drawn from, while it runs.

Between updates there are a loss and a weight for each task. They stay tensors, on their device,
until they are written: nothing waits for a GPU. At an update there are the shares and overlaps of
its masks, too.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mtprune.facts import Count, Subject, moment, share
from mtprune.holding import Decision
from mtprune.methods.base import Ballot
from mtprune.statistics import JOINT

__all__ = ["Histogram", "Picture", "Tracker", "Value", "Writer", "histogram", "picture"]

_BINS = 64
_SIDE = 256


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie where.

    Attributes:
        counts: How many lie in each of n bins.
        edges: The n + 1 edges of the bins.
        sum: The sum of all numbers.
        squares: The sum of their squares.
    """

    counts: Sequence[int]
    edges: Sequence[float]
    sum: float
    squares: float


@dataclass(frozen=True)
class Picture:
    """A mask as a picture, white where weights are kept.

    Attributes:
        pixels: Shares kept, in [0, 1], float ``[rows, columns]``.
    """

    pixels: Tensor


Value = float | Histogram | Picture
"""What there is to write under one name."""

Weights = Mapping[str, float | Tensor]
"""What each task's loss counts."""


class Writer(Protocol):
    """What a tracker writes to; `mtprune.integrations.trackers` makes one of the usual trackers."""

    def log(self, mapping: Mapping[str, Any], step: int) -> object:
        """Write values by name, such as ``"mtprune/loss/seg"``, after some optimizer steps."""
        ...


class Tracker:
    """Follows a run and writes it down.

    Args:
        writer: Takes what is written.
        every: How many steps lie between two writes of losses and weights.
        layers: Whose masks are drawn; empty for the largest of the layers that most tasks use.
    """

    def __init__(self, writer: Writer, every: int, layers: Sequence[str] = ()) -> None:
        self._writer = writer
        self._every = every
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._last = 0
        self._waiting: list[_Reading] = []
        self._before: _Before | None = None
        self._now: tuple[int, Weights] = (0, {})

    def note(self, losses: Mapping[str, Tensor]) -> None:
        """Take in the losses of a batch, scalars; only their sums are kept."""
        for task, loss in losses.items():
            value = loss.detach().to(torch.float32)
            self._sums[task] = value if task not in self._sums else self._sums[task] + value
            self._seen[task] = self._seen.get(task, 0) + 1

    def tick(self, step: int, weights: Weights) -> None:
        """Write losses and weights if that is due after ``step`` optimizer steps."""
        self._now = (step, weights)
        if step - self._last >= self._every:
            self._read(step, weights)
        while self._waiting and self._waiting[0].arrived:
            self._waiting.pop(0).write(self._writer)

    def look(self, ballot: Ballot, worths: Callable[[Ballot], Sequence[Tensor]]) -> None:
        """See what an update is decided on.

        Args:
            ballot: The ballot.
            worths: What the method takes each weight to be worth.
        """
        scores = {voter: histogram(of) for voter, of in _by_voter(ballot).items()}
        values = {"worth": histogram(worths(ballot))}
        values |= {f"saliency/{'all' if v == JOINT else v}": of for v, of in scores.items()}
        self._before = _Before(ballot.subjects, [mask.clone() for mask in ballot.masks], values)

    def update(
        self, step: int, decision: Decision, counts: Sequence[Count], weights: Weights
    ) -> None:
        """Write down an update.

        Args:
            step: The optimizer steps so far.
            decision: What was decided on what `look` was shown.
            counts: The numbers of all pruned layers.
            weights: What each task's loss counts.
        """
        self._now = (step, weights)
        self.flush()
        values: dict[str, Value | None] = {**_numbers(counts)}
        if self._before is not None:
            values |= self._before.histograms
            if all(count.rank is None for count in counts):
                values |= self._before.overlaps(decision.masks)
                values |= self._before.pictures(decision.masks, self._layers)
        self._before = None
        known = {f"mtprune/{name}": value for name, value in values.items() if value is not None}
        self._writer.log(known, step)

    def write(self) -> None:
        """Write losses and weights now, as they were after the last step."""
        step, weights = self._now
        self._read(step, weights)
        self.flush()

    def flush(self) -> None:
        """Write all that has been read."""
        for reading in self._waiting:
            reading.write(self._writer)
        self._waiting.clear()

    def _read(self, step: int, weights: Weights) -> None:
        """Begin to bring losses and weights to where they can be written."""
        self._last = step
        means = {f"mtprune/loss/{task}": x / self._seen[task] for task, x in self._sums.items()}
        factors = {f"mtprune/weight/{task}": weight for task, weight in weights.items()}
        self._sums, self._seen = {}, {}
        if means or factors:
            self._waiting.append(_Reading.of(step, {**means, **factors}))


@dataclass(frozen=True)
class _Reading:
    """Numbers on their way from where they were computed.

    Attributes:
        step: The step they are of.
        values: The numbers by name, on the CPU, or on their way there.
        event: What has happened once they are there; None if they are.
    """

    step: int
    values: Mapping[str, float | Tensor]
    event: Any

    @classmethod
    def of(cls, step: int, values: Mapping[str, float | Tensor]) -> "_Reading":
        """The numbers of a step; on a GPU this waits for nothing."""
        fetched = {
            name: x.detach().to("cpu", non_blocking=True) if isinstance(x, Tensor) else float(x)
            for name, x in values.items()
        }
        event = None
        if any(isinstance(x, Tensor) and x.device.type == "cuda" for x in values.values()):
            event = torch.cuda.Event()
            event.record()
        return cls(step, fetched, event)

    @property
    def arrived(self) -> bool:
        """Whether the numbers are there."""
        return self.event is None or bool(self.event.query())

    def write(self, writer: Writer) -> None:
        """Write the numbers; waits until they are there."""
        if self.event is not None:
            self.event.synchronize()
        writer.log({name: float(value) for name, value in self.values.items()}, self.step)


@dataclass(frozen=True)
class _Before:
    """What is remembered of a ballot until the decision is known.

    Attributes:
        subjects: The layers.
        masks: The masks that held until then, flat bool ``[n]``.
        histograms: Those of worths and saliencies, None where there are none.
    """

    subjects: Sequence[Subject]
    masks: Sequence[Tensor]
    histograms: Mapping[str, Histogram | None]

    def overlaps(self, masks: Sequence[Tensor]) -> dict[str, Value]:
        """The intersection over union of the masks before and after, of all and by component."""
        both: dict[str, int] = {}
        either: dict[str, int] = {}
        for subject, old, new in zip(self.subjects, self.masks, masks, strict=True):
            new = new.to(old.device)
            for name in ("iou/all", f"iou/component/{subject.component}"):
                both[name] = both.get(name, 0) + int((old & new).count_nonzero())
                either[name] = either.get(name, 0) + int((old | new).count_nonzero())
        return {name: both[name] / either[name] if either[name] else 1.0 for name in both}

    def pictures(self, masks: Sequence[Tensor], layers: Sequence[str]) -> dict[str, Value]:
        """The masks of some layers."""
        whole = [
            (subject, mask)
            for subject, mask in zip(self.subjects, masks, strict=True)
            if mask.numel() == math.prod(subject.shape)
        ]
        largest = max(whole, key=lambda x: (len(x[0].tasks), x[1].numel()), default=None)
        chosen = layers or ([] if largest is None else [largest[0].name])
        return {
            f"mask/{subject.name}": picture(mask.view(subject.shape))
            for subject, mask in whole
            if subject.name in chosen
        }


def histogram(parts: Sequence[Tensor]) -> Histogram | None:
    """The histogram of all finite numbers of some tensors; None of none.

    Example:
        >>> found = histogram([torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0])])
        >>> found.edges[0], found.edges[-1], found.counts[0], found.counts[-1], found.sum
        (0.0, 2.0, 1, 2, 5.0)
    """
    numbers = [part.detach().reshape(-1).to(torch.float64) for part in parts]
    numbers = [part[part.isfinite()] for part in numbers]
    numbers = [part for part in numbers if part.numel()]
    if not numbers:
        return None
    low = min(float(part.min()) for part in numbers)
    high = max(float(part.max()) for part in numbers)
    width = (high - low) / _BINS or 1.0 / _BINS
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for part in numbers:
        places = ((part - low) / width).long().clamp_(0, _BINS - 1)
        counts += torch.bincount(places, minlength=_BINS).cpu()
    return Histogram(
        counts.tolist(),
        [low + width * place for place in range(_BINS + 1)],
        sum(float(part.sum()) for part in numbers),
        sum(float(part.square().sum()) for part in numbers),
    )


def picture(mask: Tensor) -> Picture:
    """A mask as a picture: a row for each output, and at most 256 pixels each way.

    Args:
        mask: Bool, of any shape.

    Example:
        >>> picture(torch.tensor([[True, False]])).pixels.tolist()
        [[1.0, 0.0]]
    """
    flat = mask.reshape(len(mask), -1) if mask.dim() else mask.reshape(1, 1)
    pixels = flat.to(torch.float32)
    if max(pixels.shape) > _SIDE:
        sides = (min(pixels.shape[0], _SIDE), min(pixels.shape[1], _SIDE))
        pixels = adaptive_avg_pool2d(pixels[None], sides)[0]
    return Picture(pixels.cpu())


def _by_voter(ballot: Ballot) -> dict[str, list[Tensor]]:
    """The logarithms of each voter's saliencies, where they are positive."""
    found: dict[str, list[Tensor]] = {}
    for layer in ballot.scores:
        for voter, scores in layer.items():
            found.setdefault(voter, []).append(scores[scores > 0].to(torch.float64).log10())
    return found


def _numbers(counts: Sequence[Count]) -> dict[str, float]:
    """Shares pruned, kept and wanted, and thresholds, by component and by task."""
    now = moment(counts, 0, {})
    numbers = {"sparsity/all": now.sparsity}
    for component, its in now.components.items():
        numbers[f"sparsity/component/{component}"] = its["sparsity"]
        numbers[f"kept/component/{component}"] = its["share"]
        if "threshold" in its:
            numbers[f"threshold/component/{component}"] = its["threshold"]
    everything = sum(count.kept for count in counts)
    for task in dict.fromkeys(task for count in counts for task in count.tasks):
        used = [count for count in counts if task in count.tasks]
        size, kept = sum(c.parameters for c in used), sum(c.kept for c in used)
        numbers[f"sparsity/task/{task}"] = share(size - kept, size)
        numbers[f"kept/task/{task}"] = share(kept, everything)
        if all(task in count.wanted for count in used):
            numbers[f"wanted/task/{task}"] = share(sum(c.wanted[task] for c in used), kept)
    return numbers
