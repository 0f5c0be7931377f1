"""Holding: how a decision takes hold of a model, and how it lets go.

A method decides; its decision is a frozen value. The hold that goes with it puts the decision into
the model, keeps it there after every optimizer step, and says how each weight looks to those who
train it, score it and count it. A new way to take hold is one file beside this one: its decision
and its hold.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from mtprune.bits import pack_bits, unpack_bits
from mtprune.facts import Count, Subject, count
from mtprune.holding.masking import Gate, Masking
from mtprune.model.layers import Layer
from mtprune.reading import Entry
from mtprune.statistics import JOINT

__all__ = [
    "Decision",
    "Held",
    "HeldMasks",
    "Hold",
    "MaskHold",
    "Masks",
    "View",
    "by_task",
    "differ",
    "packed",
    "read_masks",
    "shaped",
    "whole",
]


@dataclass(frozen=True)
class Decision:
    """What a method decided at an update, layer by layer.

    Attributes:
        masks: The weights that are kept from now on, flat bool ``[n]`` for each layer.
        alone: For each voter and each layer it uses, the weights that voter alone would keep.
        memory: What the method wants to be told at its next update.
        units: For each group of units, which of them are kept; empty if units are single weights.
        voters: The names of those in ``alone`` that are no tasks, and vote everywhere.
    """

    masks: Sequence[Tensor]
    alone: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    units: Mapping[str, Tensor] = field(default_factory=dict)
    voters: Sequence[str] = ()

    @property
    def slopes(self) -> Mapping[str, float]:
        """For each task, the slope of its log-loss in the strength of pruning, if it is known."""
        return {}

    def tensors(self) -> Iterable[Tensor]:
        """All that must be equal on every rank."""
        return self.masks

    def alone_for(self, tasks: Iterable[str], place: int) -> dict[str, Tensor]:
        """The weights of one layer that each of some tasks alone would keep; empty if not asked."""
        return by_task(self.alone, tasks, place)

    def count(self, subject: Subject, place: int, alone: Mapping[str, Tensor]) -> Count:
        """The numbers of one layer, for the report.

        Args:
            subject: The layer.
            place: Its place among all.
            alone: What `alone_for` gives for it.
        """
        return count(subject, self.masks[place], alone)

    def record(self, subjects: Sequence[Subject]) -> tuple[list[Count], list[dict[str, Tensor]]]:
        """The numbers of all layers, and for each the mask of each task that uses it, as bits.

        Layer by layer, so that the masks of one layer are unpacked at a time.
        """
        counts, bits = [], []
        for place, subject in enumerate(subjects):
            alone = self.alone_for(subject.tasks, place)
            row = self.count(subject, place, alone)
            others = {voter: self.alone[voter][place] for voter in self.voters}
            wanted = {v: int((self.masks[place] & m).count_nonzero()) for v, m in others.items()}
            counts.append(replace(row, wanted={**row.wanted, **wanted}))
            wishes = {task: alone.get(task, self.masks[place]) for task in subject.tasks}
            bits.append({task: pack_bits(mask) for task, mask in wishes.items()})
        return counts, bits


@dataclass(frozen=True)
class Masks(Decision):
    """Masks that hold: pruned weights are zero from now on.

    Attributes:
        final: Whether they are for good; False where masks may open again.
    """

    final: bool = True


@dataclass(frozen=True)
class View:
    """A layer's weight as statistics see it.

    Attributes:
        weight: The weight, of the layer's shape.
        mask: Where it counts as zero; None for nowhere.
        basis: Columns ``[m, m]`` in which its matrix and that of the gradient are seen
            (`mtprune.model.factors`); None for the usual ones.
    """

    weight: Tensor
    mask: Tensor | None = None
    basis: Tensor | None = None


class Held(ABC):
    """What holds, as a checkpoint has it: `Hold.read` finds it, and `Hold.load` takes it."""

    @property
    @abstractmethod
    def kept(self) -> Mapping[str, int]:
        """How many parameters each layer keeps, by name; no layer where nothing holds yet."""


@dataclass(frozen=True)
class HeldMasks(Held):
    """Masks as a checkpoint holds them.

    Attributes:
        layers: The layers that have one.
        masks: Theirs, of the shapes of what is here.
        counts: How many weights each of them keeps.
    """

    layers: Sequence[Layer]
    masks: Sequence[Tensor]
    counts: Sequence[int]

    @property
    @override
    def kept(self) -> Mapping[str, int]:
        return dict(zip([layer.name for layer in self.layers], self.counts, strict=True))


D = TypeVar("D", bound=Decision)
M = TypeVar("M", bound=Masks)


class Hold(ABC, Generic[D]):
    """How decisions of one kind take hold of a model.

    Attributes:
        gate: Whether gradients pass where weights are masked.
        no_fold: Why a training's backward cannot be the scoring's too; empty if it can.
    """

    gate: Gate
    no_fold: str = ""

    @abstractmethod
    def take(self, layers: Sequence[Layer], decision: D) -> bool:
        """Let a decision hold from now on; whether it changed anything."""

    @abstractmethod
    def enforce(self) -> None:
        """Put right what an optimizer step has moved."""

    @abstractmethod
    def release(self) -> None:
        """Leave plain modules that compute the same; masks and counts stay readable."""

    @abstractmethod
    def mask(self, layer: Layer) -> Tensor:
        """The weights of a layer that are kept; all True before the first decision."""

    @abstractmethod
    def view(self, layer: Layer) -> View:
        """A layer's weight as statistics see it."""

    @abstractmethod
    def trained(self, layer: Layer) -> Tensor:
        """A layer's weight as the optimizer has it, but zero where it is pruned for good."""

    @abstractmethod
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        """The mask that a layer's gradient goes through on its way to ``.grad``, if any."""

    def kept(self, layer: Layer) -> int:
        """How many of a layer's parameters are kept."""
        return int(self.mask(layer).count_nonzero())

    def noted(self) -> list[float]:
        """One number for each layer that was noted since the last decision; often none."""
        return []

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The decision that holds now, as plain containers."""

    @abstractmethod
    def read(self, entry: Entry, layers: Sequence[Layer]) -> Held:
        """What `state_dict` returned, as values for `load`; nothing is changed.

        Args:
            entry: What it returned.
            layers: The layers that are pruned.

        Raises:
            ValueError: If it is not that.
        """

    @abstractmethod
    def load(self, held: Any) -> None:
        """Let that hold which `read` has found."""


class MaskHold(Hold[M]):
    """Masked weights are zero, and stay so.

    Args:
        masks: The back-end.
    """

    def __init__(self, masks: Masking) -> None:
        self._masks = masks
        self._layers: list[Layer] = []
        self._released: dict[str, Tensor] = {}
        self.gate = masks.gate

    @override
    def take(self, layers: Sequence[Layer], decision: M) -> bool:
        masks = shaped(layers, decision.masks)
        before = [self.mask(layer).clone() for layer in layers]
        self._put(layers, masks)
        return differ(before, masks)

    @override
    def enforce(self) -> None:
        self._masks.zero()

    @override
    def release(self) -> None:
        self._released = self._packed()
        self._masks.zero()
        self._masks.lift()

    @override
    def mask(self, layer: Layer) -> Tensor:
        mask = self._masks.mask(layer)
        if mask is not None:
            return mask
        if layer.name in self._released:
            return layer.part.of(unpack_bits(self._released[layer.name], layer.shape))
        return whole(layer)

    @override
    def view(self, layer: Layer) -> View:
        return View(layer.values, self._masks.mask(layer))

    @override
    def trained(self, layer: Layer) -> Tensor:
        return self._masks.masked(layer)

    @override
    def gradient_mask(self, layer: Layer) -> Tensor | None:
        return self._masks.gradient_mask(layer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"masks": self._packed() or dict(self._released)}

    @override
    def read(self, entry: Entry, layers: Sequence[Layer]) -> HeldMasks:
        return read_masks(entry.fields(["masks"], optional=["open"])["masks"], layers)

    @override
    def load(self, held: HeldMasks) -> None:
        if held.layers:
            self._put(held.layers, held.masks)
        else:
            self.discard()

    def discard(self) -> None:
        """Forget all masks, and leave weights as they are."""
        self._masks.lift()
        self._layers = []

    def _put(self, layers: Sequence[Layer], masks: Sequence[Tensor]) -> None:
        self._layers = list(layers)
        self._masks.put(layers, masks)
        self._masks.zero()

    def _packed(self) -> dict[str, Tensor]:
        return packed(self._layers, self._masks)


def whole(layer: Layer) -> Tensor:
    """A mask that keeps all of a layer that is here."""
    return torch.ones(layer.part.shape, dtype=torch.bool, device=layer.parameter.device)


def shaped(layers: Sequence[Layer], masks: Sequence[Tensor]) -> list[Tensor]:
    """Flat masks in the shapes of their layers, and where those are."""
    return [
        mask.view(layer.part.shape).to(layer.parameter.device)
        for layer, mask in zip(layers, masks, strict=True)
    ]


def packed(layers: Iterable[Layer], masks: Masking) -> dict[str, Tensor]:
    """The masks of layers as bits, by name."""
    kept = {layer: masks.mask(layer) for layer in layers}
    return {
        layer.name: pack_bits(layer.part.whole(mask))
        for layer, mask in kept.items()
        if mask is not None
    }


def read_masks(entry: Entry, layers: Sequence[Layer]) -> HeldMasks:
    """The masks of all layers, or of none, from their bits.

    Raises:
        ValueError: If they are not that.
    """
    bits = entry.mapping([layer.name for layer in layers])
    known = [layer for layer in layers if layer.name in bits]
    if known and len(known) < len(layers):
        raise entry.wrong(f"must have a mask for each of {len(layers)} layers")
    masks, counts = [], []
    for layer in known:
        size = math.prod(layer.shape)
        part = bits[layer.name]
        packed = part.tensor((-(-size // 8),), torch.uint8)
        if size % 8 and int(packed[-1]) >> size % 8:
            raise part.wrong(f"must have {size} bits, and zeros after them")
        mask = unpack_bits(packed.to(layer.parameter.device), layer.shape)
        masks.append(layer.part.of(mask))
        counts.append(int(mask.count_nonzero()))
    return HeldMasks(known, masks, counts)


def differ(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether some mask is not as before."""
    return any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


def by_task(
    alone: Mapping[str, Mapping[int, Tensor]], tasks: Iterable[str], place: int
) -> dict[str, Tensor]:
    """What each task alone would keep of a layer; all of them the same where one voter speaks."""
    if not alone:
        return {}
    voters = {task: JOINT if JOINT in alone else task for task in tasks}
    known = {voter: alone[voter][place] for voter in dict.fromkeys(voters.values())}
    return {task: known[voter] for task, voter in voters.items()}
