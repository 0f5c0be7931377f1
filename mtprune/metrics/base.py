"""What the streaming metrics share: sums that add up, and how bad values are reported."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from mtprune import checks, distributed
from mtprune.reading import Entry

__all__ = ["Compat", "Metric"]

Compat = Literal["disparse", "adapmtl"]
"""Whose published quirks to reproduce."""

State = dict[str, dict[str, Tensor]]


class Metric(ABC):
    """A metric that streams. Its own class says what outputs and targets look like.

    Example:
        >>> from mtprune.metrics import Depth
        >>> first, second = Depth(), Depth()
        >>> first.update(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 2.0]]]))
        >>> second.update(torch.tensor([[[2.0, 2.0]]]), torch.tensor([[[2.0, 0.0]]]))
        >>> round(first.merge(second).compute()["absolute"], 4)
        0.6667
    """

    _flaws_are: ClassVar[Mapping[str, str]] = {}
    """Flaw -> what to say of it, about ``{count}`` and the ``{value}`` shown as an example."""

    def __init__(self, compat: Compat | None, sums: Mapping[str, Tensor]) -> None:
        checks.either("compat", compat, (None, "disparse", "adapmtl"))
        self.compat = compat
        self._sums = dict(sums)
        self._flaws = self._flawless()

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Raises:
            ValueError: If shapes or types are wrong; on the CPU also if values are.
        """
        if targets.numel():
            with torch.no_grad():
                self._update(outputs, targets)

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The metrics of all that was added, by name.

        Raises:
            ValueError: If values were bad, or there was nothing to measure.
        """

    @abstractmethod
    def _update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def reset(self) -> None:
        """Forget what was added."""
        self._sums = {name: torch.zeros_like(held) for name, held in self._sums.items()}
        self._flaws = self._flawless()

    def merge(self, other: Self) -> Self:
        """Add what ``other`` has seen.

        Returns:
            This metric.

        Raises:
            ValueError: If ``other`` measures something else.
        """
        if type(other) is not type(self) or other._options() != self._options():
            raise ValueError(
                f"Only equal metrics merge. Got {other._describe()} for {self._describe()}."
            )
        self._absorb(other.state_dict())
        return self

    def all_reduce(self) -> None:
        """Add up what all ranks have seen, so that `compute` gives the same on each of them.

        Every rank calls it, once, after its last update. Does nothing on one process.
        """
        parts = distributed.gather({kind: _cpu(held) for kind, held in self.state_dict().items()})
        self.load_state_dict(parts[0])
        for part in parts[1:]:
            self._absorb(part)

    def state_dict(self) -> State:
        """What was added, as tensors in dicts."""
        return {"sums": dict(self._sums), "flaws": dict(self._flaws)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `state_dict`, for a metric built with the same arguments.

        Raises:
            ValueError: If it is of another metric, or damaged; nothing is changed.
        """
        whole = Entry(
            state,
            f"This state for {self._describe()}",
            "Load the state_dict() of a metric built with the same arguments.",
        )
        parts = whole.fields(["sums", "flaws"])
        sums, flaws = (
            # What was added up need not be finite.
            {
                name: part.tensor(tuple(mine[name].shape), mine[name].dtype, finite=False).clone()
                for name, part in parts[kind].fields(mine).items()
            }
            for kind, mine in (("sums", self._sums), ("flaws", self._flaws))
        )
        for kind, found in (("sums", sums), ("flaws", flaws)):
            for name, held in found.items():
                # How many: of values, or of bad ones.
                count = held[:1] if kind == "flaws" else held
                if not held.is_floating_point() and bool((count < 0).any()):
                    raise parts[kind][name].wrong("must be counts, which are not negative")
        self._sums, self._flaws = sums, flaws

    # What the metrics are made with.

    def _add(self, **amounts: Tensor) -> None:
        """Add to sums of the same shape."""
        for name, amount in amounts.items():
            self._sums[name] = _moved(self._sums[name], amount.device) + amount

    def _count(self, name: str, places: Tensor, weights: Tensor) -> None:
        """Add integer ``weights`` to the ``places`` of a histogram."""
        held = _moved(self._sums[name], places.device)
        flat = weights.reshape(-1).to(held.dtype)
        self._sums[name] = held.view(-1).scatter_add(0, places.reshape(-1), flat).view(held.shape)

    def _flag(self, flaw: str, bad: Tensor, values: Tensor | None = None) -> None:
        """Note where something is ``bad``; of integer ``values`` an example is shown."""
        count = bad.sum()
        shown = count if values is None else values.masked_fill(~bad, _LEAST).amax()
        if _can_look(bad):
            if count:
                raise ValueError(self._complaint(flaw, int(count), int(shown)))
            return
        held = _moved(self._flaws[flaw], bad.device)
        self._flaws[flaw] = _worse(held, torch.stack([count, shown]))

    def _total(self, name: str, what: str) -> float:
        """A sum to divide by, once values are known to be good."""
        for flaw, (count, shown) in self._flaws.items():
            if count:
                raise ValueError(self._complaint(flaw, int(count), int(shown)))
        total = float(self._sums[name].sum())
        if total == 0:
            raise ValueError(f"{type(self).__name__}: {what}, so there is nothing to measure.")
        return total

    def _refuse(self, problem: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {problem}")

    def _complaint(self, flaw: str, count: int, value: int) -> str:
        text = self._flaws_are[flaw].format(count=count, value=value, **self._options())
        return f"{type(self).__name__}: {text}"

    def _flawless(self) -> dict[str, Tensor]:
        """How many bad values there were, and the largest of them."""
        return {flaw: torch.tensor([0, _LEAST]) for flaw in self._flaws_are}

    def _absorb(self, state: State) -> None:
        for name, amount in state["sums"].items():
            self._sums[name] = self._sums[name] + amount.to(self._sums[name].device)
        for flaw, other in state["flaws"].items():
            self._flaws[flaw] = _worse(self._flaws[flaw], other.to(self._flaws[flaw].device))

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _describe(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options().items())
        return f"{type(self).__name__}({options})"


_LEAST = torch.iinfo(torch.int64).min


def single(metric: Metric, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps with one channel, ``[B, 1, H, W]`` or ``[B, H, W]``, both as ``[B, H, W]``."""
    shapes = f"Got {list(outputs.shape)} and {list(targets.shape)}"
    pair = [x.squeeze(1) if x.ndim == 4 and x.shape[1] == 1 else x for x in (outputs, targets)]
    if any(x.ndim != 3 for x in pair) or pair[0].shape != pair[1].shape:
        raise metric._refuse(
            f"outputs and targets must both be [B, 1, H, W] or [B, H, W]. {shapes}."
        )
    return pair[0].double(), pair[1].double()


def integers(*shape: int) -> Tensor:
    """Counts."""
    return torch.zeros(shape, dtype=torch.int64)


def reals(*shape: int) -> Tensor:
    """Sums."""
    return torch.zeros(shape, dtype=torch.float64)


def _can_look(values: Tensor) -> bool:
    """Whether reading values costs no waiting."""
    return values.device.type == "cpu"


def _moved(held: Tensor, device: torch.device) -> Tensor:
    """Onto an accelerator without waiting for it; back from one the copy must be complete."""
    return held.to(device, non_blocking=device.type != "cpu")


def _worse(one: Tensor, other: Tensor) -> Tensor:
    return torch.stack([one[0] + other[0], torch.maximum(one[1], other[1])])


def _cpu(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in held.items()}
