"""Evidence: all that observations since the last update have shown."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtprune.methods.base import Needs
from mtprune.model.layers import Layer
from mtprune.reading import Entry
from mtprune.statistics import JOINT, Statistic

__all__ = ["Evidence", "Store"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Store:
    """How sums of statistics are kept.

    Attributes:
        statistics: The statistics by name.
        dtype: Of those that do not choose their own.
        device: Where they are kept; None for where the weights are.
    """

    statistics: Mapping[str, Statistic]
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    @classmethod
    def of(cls, needs: Needs, dtype: torch.dtype, device: torch.device | str | None) -> "Store":
        """The store for what a method needs.

        Raises:
            ValueError: If it cannot be kept in that type.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"`score_dtype` must be torch.float32 or torch.bfloat16. Got {dtype!r}."
            )
        if needs.over_the_run and dtype is not torch.float32:
            raise ValueError(
                f"Scores are added up over the whole run, as straight_through=True asks, which "
                f"{dtype} cannot hold. Leave `score_dtype` out."
            )
        return cls(needs.statistics, dtype, None if device is None else torch.device(device))

    def empty(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """A sum of nothing; ``device`` is that of the weights."""
        return torch.zeros(shape, dtype=self._dtype(name), device=self.device or device)

    def read(self, name: str, total: Entry, layer: Layer) -> Tensor:
        """A copy of a sum from a checkpoint, where and as it is kept; it need not be finite.

        Raises:
            ValueError: If it is not of the statistic's shape.
        """
        value = total.tensor(None, _FLOATS, finite=False)
        if not self.statistics[name].is_sum(layer, value):
            raise total.wrong(f"must be of a shape that '{name}' has in this layer")
        value = value.to(self.device or layer.parameter.device, self._dtype(name), copy=True)
        return self._spread(name, layer.part.of, value)

    def whole(self, name: str, total: Tensor, layer: Layer) -> Tensor:
        """A copy of a sum, of the whole layer wherever its parts are, for a checkpoint."""
        return self._spread(name, layer.part.whole, total.clone())

    def _spread(self, name: str, change: Callable[[Tensor], Tensor], total: Tensor) -> Tensor:
        """A sum after a change from the part of a layer to the whole, or back."""
        return change(total).reshape(-1) if self.statistics[name].per_weight else total

    def _dtype(self, name: str) -> torch.dtype:
        return self.statistics[name].dtype or self.dtype


@dataclass
class Evidence:
    """What has been seen since the last update.

    Attributes:
        statistics: For each statistic and each voter, its sum for each layer it was seen of.
        counts: Observations of each task.
        hits: For each task and each layer swept for it, a flag: some gradient was not zero.
        walked: For each task, bool ``[layers]``: the autograd graph leads there.
        finite: For each task, one flag per observation: the loss was finite.
        discarded: Observations of each task that a `GradScaler` overflow made worthless.
        losses: The sum of each task's losses.
    """

    statistics: dict[str, dict[str, dict[int, Tensor]]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    hits: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    walked: dict[str, Tensor] = field(default_factory=dict)
    finite: dict[str, list[Tensor]] = field(default_factory=dict)
    discarded: dict[str, int] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def reached(self, task: str, layers: int) -> Tensor:
        """Where some gradient of a task was not zero, bool ``[layers]``.

        The flags stay on their device until somebody asks: observing waits for nothing.
        """
        reached = torch.zeros(layers, dtype=torch.bool)
        hits = self.hits.get(task, {})
        for device in {flag.device for flag in hits.values()}:
            here = [i for i, flag in hits.items() if flag.device == device]
            reached[here] = torch.stack([hits[i] for i in here]).cpu()
        return reached

    def numbers(self) -> dict[str, dict[str, int]]:
        """How many observations of each task there are, and how many were discarded."""
        return {"observations": dict(self.counts), "discarded": dict(self.discarded)}

    def state_dict(self, layers: Sequence[Layer], store: Store) -> dict[str, Any]:
        """As plain containers, with layers under their names.

        Args:
            layers: The layers.
            store: How sums are kept.
        """
        return {
            "statistics": {
                statistic: {
                    voter: {
                        layers[i].name: store.whole(statistic, total, layers[i])
                        for i, total in totals.items()
                    }
                    for voter, totals in voters.items()
                }
                for statistic, voters in self.statistics.items()
            },
            "counts": dict(self.counts),
            "reached": {task: self.reached(task, len(layers)) for task in self.hits},
            "walked": {task: flags.clone() for task, flags in self.walked.items()},
            "finite": {task: torch.stack(flags) for task, flags in self.finite.items()},
            "discarded": dict(self.discarded),
            "losses": {task: total.clone() for task, total in self.losses.items()},
        }

    @classmethod
    def read(
        cls, entry: Entry, layers: Sequence[Layer], tasks: Collection[str], store: "Store"
    ) -> "Evidence":
        """The inverse of `state_dict`.

        Args:
            entry: What it returned.
            layers: The layers that there are.
            tasks: The tasks.
            store: How sums are kept.

        Raises:
            ValueError: If it is not that.
        """
        names = [layer.name for layer in layers]
        place = {name: i for i, name in enumerate(names)}
        parts = entry.fields(
            ["statistics", "counts", "reached", "walked", "finite", "discarded", "losses"]
        )
        flags = {
            name: {
                task: part.tensor((len(layers),), torch.bool).cpu().clone()
                for task, part in parts[name].mapping(tasks).items()
            }
            for name in ("reached", "walked")
        }
        return cls(
            statistics={
                statistic: {
                    voter: {
                        place[name]: store.read(statistic, total, layers[place[name]])
                        for name, total in totals.mapping(names).items()
                    }
                    for voter, totals in voters.mapping([*tasks, JOINT]).items()
                }
                for statistic, voters in parts["statistics"].mapping(store.statistics).items()
            },
            counts={task: part.whole() for task, part in parts["counts"].mapping(tasks).items()},
            hits={
                task: {
                    i: flag.to(layer.parameter.device)
                    for i, (flag, layer) in enumerate(zip(reached.unbind(), layers, strict=True))
                }
                for task, reached in flags["reached"].items()
            },
            walked=flags["walked"],
            finite={
                task: list(part.tensor((part.size(),), torch.bool).unbind())
                for task, part in parts["finite"].mapping(tasks).items()
            },
            discarded={
                task: part.whole() for task, part in parts["discarded"].mapping(tasks).items()
            },
            losses={
                task: part.tensor((), _FLOATS, finite=False)
                for task, part in parts["losses"].mapping(tasks).items()
            },
        )

    def problem(self, layers: Sequence[Layer], statistics: Mapping[str, Statistic]) -> str | None:
        """Why this evidence cannot be used: what is not finite, and whose; None if all is."""
        for task, flags in self.finite.items():
            if not all(bool(flag) for flag in flags):
                return (
                    f"Loss of task '{task}' is not finite. Check the loss and its targets; "
                    "masks are unchanged, and this evidence is dropped."
                )
        # A range says whether all is finite, in one look and without a copy.
        ranges = [
            (name, voter, index, total, torch.stack(total.aminmax()).isfinite().all())
            for name, voters in self.statistics.items()
            for voter, totals in voters.items()
            for index, total in totals.items()
            if total.numel()
        ]
        finite = _fetched([flag for *_, flag in ranges])
        for (name, voter, index, total, _), fine in zip(ranges, finite, strict=True):
            if not fine:
                bad = int((~torch.isfinite(total)).sum())
                whose = " of the summed losses" if voter == JOINT else f" of task '{voter}'"
                cause = "loss"
                if statistics[name].when == "forward":
                    whose, cause = "" if voter == JOINT else whose, "inputs"
                what = "Saliency" if name == "saliency" else f"Statistic '{name}'"
                return (
                    f"{what}{whose} is not finite in '{layers[index].name}' "
                    f"({bad} of {total.numel()}). Check the {cause}; masks are unchanged, and "
                    "this evidence is dropped."
                )
        return None


def _fetched(flags: Sequence[Tensor]) -> list[bool]:
    """Flags as Python values, with one transfer for each device."""
    values: dict[int, bool] = {}
    for device in {flag.device for flag in flags}:
        here = [i for i, flag in enumerate(flags) if flag.device == device]
        values.update(zip(here, torch.stack([flags[i] for i in here]).tolist(), strict=True))
    return [values[i] for i in range(len(flags))]
