"""Statistics: numbers about a layer that add up over batches and ranks.

A method names the statistics it decides by (`mtprune.methods.Needs`). Each is a function of what is
seen of a layer at one observation, and its values are added up until the next update. `PerWeight`
is the usual one, a saliency; a statistic of one's own may have any shape::

    class SecondMoment(Statistic):
        asks = frozenset({"inputs"})

        def of(self, seen):
            return seen.inputs.T @ seen.inputs

What a statistic asks for decides when it is computed. One that asks for the gradient is computed
in every task's sweep, for that task. One that asks for inputs alone is computed while the model
runs, layer by layer, so that inputs of different layers are never kept together; it adds up over
all batches, or, for a saliency, over those that each task's loss was computed from. One that asks
for neither looks at no data, and is computed when masks are made.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import distributed
from mtprune.bits import zeroed
from mtprune.model.inputs import Windows, why_no_inputs
from mtprune.model.layers import Layer
from mtprune.saliency import IN_PLACE, Saliency, asks

__all__ = ["JOINT", "PerWeight", "Seen", "Statistic", "why_no_inputs"]

JOINT = "(all tasks)"
"""The one voter when losses are not scored apart, and the owner of what is the same for all."""

_CHUNK = 1 << 17  # weights scored together on a CPU: what comes between stays in a core's cache

New = Callable[[tuple[int, ...], torch.device], Tensor]
"""Makes an empty sum of a shape; the device is that of its first value."""


class Seen:
    """A layer at one observation.

    Args:
        layer: The layer.
        weight: Its weight as the model holds it.
        mask: Where the weight counts as zero; None for nowhere.
        grad: The gradient of one task's loss times ``scale``; None if nobody asks.
        scale: Factor to take out of the gradient again.
        inputs: The layer's inputs, ``[rows, columns]``, or where they are to be had; None if
            nobody asks.
        task: The task; None where tasks are not told apart.
        generator: The pruner's own source of randomness; in a forward, one for this call of the
            layer alone.
    """

    def __init__(
        self,
        layer: Layer,
        weight: Tensor,
        *,
        mask: Tensor | None = None,
        grad: Tensor | None = None,
        scale: float = 1.0,
        inputs: Tensor | Windows | None = None,
        task: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.layer = layer
        self._inputs = inputs
        self.task = task
        self.generator = generator
        self._weight = weight
        self._mask = mask
        self._grad = grad
        self._scale = scale

    @cached_property
    def inputs(self) -> Tensor | None:
        """The layer's inputs, float32 ``[rows, columns]``; None if nobody asks."""
        return self._inputs.all if isinstance(self._inputs, Windows) else self._inputs

    @property
    def windows(self) -> Windows:
        """The same, not copied yet; only in the layer's own forward."""
        if not isinstance(self._inputs, Windows):
            raise RuntimeError("Windows of inputs are there in the layer's own forward only.")
        return self._inputs

    @cached_property
    def weight(self) -> Tensor:
        """The effective weight, zero where masked, float32, of the layer's shape."""
        return _effective(self._weight, self._mask)

    @cached_property
    def grad(self) -> Tensor:
        """The dense gradient of one task's loss in the effective weight, float32, same shape."""
        if self._grad is None:
            raise RuntimeError("This statistic did not ask for the gradient. Put it into `asks`.")
        return _unscaled(self._grad, self._scale)

    @property
    def is_contiguous(self) -> bool:
        """Whether `pieces` is free of copies."""
        return self._weight.is_contiguous()

    @property
    def numel(self) -> int:
        """How many of the layer's weights are here."""
        return self._weight.numel()

    @property
    def device(self) -> torch.device:
        """Where it is seen."""
        return self._weight.device

    def pieces(self, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Weight and gradient, flat, piece by piece, and the same pieces of other flat tensors."""
        assert self._grad is not None
        whole = max(self._weight.numel(), 1)
        size = _CHUNK if self.device.type == "cpu" else whole
        masks = None if self._mask is None else self._mask.reshape(-1).split(size)
        columns = (self._weight, self._grad, *others)
        rows = zip(*(t.reshape(-1).split(size) for t in columns), strict=True)
        for place, (weight, grad, *rest) in enumerate(rows):
            mask = None if masks is None else masks[place]
            yield _effective(weight, mask), _unscaled(grad, self._scale), *rest


class Statistic(ABC):
    """A number, or a tensor of them, about a layer: added up over batches and ranks.

    Attributes:
        asks: What it must be given besides the weight: ``"grad"``, ``"inputs"``, both or none;
            ``"task"`` if it differs between tasks without asking for a gradient.
        apart: Where it asks for inputs alone, whether each task has a sum of its own.
        dtype: Of its sums; the pruner's ``score_dtype`` unless given.
        per_weight: Whether it is a number for each weight, flat, in the weights' order.
    """

    asks: frozenset[str] = frozenset({"grad"})
    apart: bool = False
    dtype: torch.dtype | None = None
    per_weight: bool = False

    @property
    def when(self) -> Literal["sweep", "forward", "update"]:
        """When it is computed: in a task's sweep, in the model's forward, or at the update."""
        if "grad" in self.asks or self.asks >= {"inputs", "task"}:
            return "sweep"
        return "forward" if "inputs" in self.asks else "update"

    def fits(self, layer: Layer) -> str:
        """Why it cannot be had of a layer that asks for inputs; empty if it can."""
        return why_no_inputs(layer) if "inputs" in self.asks else ""

    @abstractmethod
    def of(self, seen: Seen) -> Tensor:
        """Its value at one observation, of any shape, the same at every observation."""

    def merge(self, total: Tensor, value: Tensor) -> Tensor:
        """Two values as one, the first of which may be changed in place: their sum.

        Whatever takes its place must not depend on the order in which values come.
        """
        return total.add_(value)

    def reduce(self, value: Tensor) -> Tensor:
        """The values of all ranks as one, the same on every rank: their sum."""
        return distributed.sum_(value)

    def is_sum(self, layer: Layer, value: Tensor) -> bool:
        """Whether a tensor, from a checkpoint that may hold anything, could be its sum."""
        return value.shape == self.zero(layer, layer.part.placed(layer.values)).shape

    def zero(self, layer: Layer, weight: Tensor) -> Tensor:
        """Its sum where no gradient has arrived.

        Args:
            layer: The layer.
            weight: Its weight, of the layer's shape.
        """
        nothing = torch.zeros_like(weight)
        return torch.zeros_like(
            self.of(Seen(layer, weight, grad=nothing, inputs=nothing[:1].flatten(1)))
        )

    def add(self, seen: Seen, total: Tensor | None, new: New) -> Tensor:
        """The sum with one observation more.

        Args:
            seen: The observation.
            total: The sum so far, which may be changed in place; None at first.
            new: Makes an empty one.
        """
        value = self.of(seen)
        if total is not None:
            return self.merge(total, value.to(total.device))
        total = new(tuple(value.shape), value.device)
        total += value.to(total.device)
        return total


@dataclass(frozen=True)
class PerWeight(Statistic):
    """A saliency: one number for each weight, flat, or for each unit in the layer.

    Attributes:
        saliency: The function of weight and gradient.
        pool: From a layer and the saliency of its weights, in its shape, to that of its units,
            flat; None for single weights.
        dtype: See `Statistic`.
    """

    saliency: Saliency
    pool: Callable[[Layer, Tensor], Tensor] | None = None
    dtype: torch.dtype | None = None
    apart: bool = field(default=True, init=False, repr=False)
    _space: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """See `Statistic`."""
        return asks(self.saliency)

    @property
    def per_weight(self) -> bool:  # type: ignore[override]
        """See `Statistic`."""
        return self.pool is None

    @override
    def of(self, seen: Seen) -> Tensor:
        named: dict[str, Any] = {name: getattr(seen, name) for name in self.asks if name != "grad"}
        grad = seen.grad if "grad" in self.asks else None
        score = checked(self.saliency(seen.weight, grad, **named), seen.layer)
        return score.reshape(-1) if self.pool is None else self._pooled(seen.layer, score)

    @override
    def zero(self, layer: Layer, weight: Tensor) -> Tensor:
        if self.pool is None:
            return torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
        nothing = torch.zeros(layer.shape, dtype=torch.float32, device=weight.device)
        return self.pool(layer, nothing)

    def _pooled(self, layer: Layer, score: Tensor) -> Tensor:
        """The saliency of the units in a layer, be all of it here or a part."""
        assert self.pool is not None
        part = layer.part
        return part.census.sum(self.pool(layer, part.placed(score)))

    @override
    def add(self, seen: Seen, total: Tensor | None, new: New) -> Tensor:
        into = IN_PLACE.get(self.saliency) if self.pool is None else None
        if into is None or not seen.is_contiguous:
            return super().add(seen, total, new)
        # Piece by piece, so that what comes between is never in memory, only in cache.
        first = total is None
        summed = new((seen.numel,), seen.device) if total is None else total
        for weight, grad, part in seen.pieces(summed):
            if first and part.dtype == weight.dtype and part.device == weight.device:
                into(weight, grad, part)
            else:
                part += into(weight, grad, self._scratch(weight)).to(part.device)
        return summed

    def _scratch(self, like: Tensor) -> Tensor:
        """A place for what is between, float32; the same one again on a CPU."""
        if like.device.type != "cpu":
            return torch.empty_like(like)
        if "cpu" not in self._space or self._space["cpu"].numel() < like.numel():
            self._space["cpu"] = torch.empty(_CHUNK)
        return self._space["cpu"][: like.numel()]


def checked(score: object, layer: Layer) -> Tensor:
    """The value of a saliency.

    Raises:
        ValueError: If it is not of the layer's shape.
    """
    shape = layer.part.shape
    if isinstance(score, Tensor) and tuple(score.shape) == shape:
        return score
    got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
    raise ValueError(
        f"The saliency of '{layer.name}' must have the weight's shape {shape}. Got {got}."
    )


def _effective(weight: Tensor, mask: Tensor | None) -> Tensor:
    return (weight if mask is None else zeroed(weight, mask)).to(torch.float32)


def _unscaled(grad: Tensor, scale: float) -> Tensor:
    grad = grad.to(torch.float32)
    return grad if scale == 1.0 else grad / scale
