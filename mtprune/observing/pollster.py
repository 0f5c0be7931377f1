"""The pollster: from all that has been observed to what a method decides on."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from mtprune.facts import Subject
from mtprune.holding import Hold
from mtprune.methods.base import Ballot, Needs
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.observing.evidence import Evidence, Store
from mtprune.observing.inputs import unseen
from mtprune.statistics import JOINT, Seen, Statistic

__all__ = ["Pollster"]


class Pollster:
    """Puts what has been observed before a method.

    Args:
        inventory: What the model has to prune.
        needs: What the method must be shown.
        hold: What holds the weights.
        store: How sums of statistics are kept; decisions are made on the same device.
        generator: The pruner's own source of randomness.
    """

    def __init__(
        self,
        inventory: Inventory,
        needs: Needs,
        hold: Hold[Any],
        store: Store,
        generator: torch.Generator,
    ) -> None:
        self._inventory = inventory
        self._needs = needs
        self._hold = hold
        self._device = store.device
        self._generator = generator

    def ballot(
        self,
        evidence: Evidence,
        active: Sequence[tuple[int, Layer]],
        subjects: Sequence[Subject],
        memory: Mapping[str, Any],
    ) -> Ballot:
        """The ballot over some layers.

        Args:
            evidence: All that has been observed.
            active: The layers that are pruned, each with its place among all.
            subjects: The same layers: component, tasks and cost.
            memory: What the last decision left to remember.

        Raises:
            RuntimeError: If a statistic that looks at no data is not finite, or if inputs that a
                statistic asks for were not seen.
        """
        layers = [layer for _, layer in active]
        masks = [self._moved(self._hold.mask(layer).reshape(-1)) for layer in layers]
        weights = _Weights(layers, self._hold, self._device)
        voters = [list(s.tasks) if self._needs.apart else [JOINT] for s in subjects]
        units = self._inventory.units
        statistics = {
            name: [
                self._sums(name, statistic, evidence, index, electors)
                if statistic.when != "update"
                else self._data_free(statistic, layer, electors, weights[place])
                for place, ((index, layer), electors) in enumerate(zip(active, voters, strict=True))
            ]
            for name, statistic in self._needs.statistics.items()
        }
        return Ballot(
            subjects=subjects,
            statistics=statistics,
            masks=masks,
            weights=weights,
            generator=self._generator,
            units=None if units is None else units.among([index for index, _ in active]),
            losses={task: float(total) for task, total in evidence.losses.items()},
            noted=self._hold.noted(),
            memory=memory,
            total_macs=self._inventory.total_macs,
            pace=self._inventory.pace,
            parts=[layer.part for layer in layers],
            census=self._inventory.census,
        )

    def _sums(
        self,
        name: str,
        statistic: Statistic,
        evidence: Evidence,
        index: int,
        voters: Sequence[str],
    ) -> dict[str, Tensor]:
        """The sums of one statistic in one layer, for each voter."""
        layer, seen = self._inventory.layers[index], evidence.statistics.get(name, {})
        if statistic.when == "forward":
            owners = voters if statistic.apart and self._needs.apart else [JOINT]
            if statistic.fits(layer):
                return dict.fromkeys(owners, self._zero(statistic, layer))
            if any(index not in seen.get(owner, {}) for owner in owners):
                raise RuntimeError(unseen(layer))
            return {owner: seen[owner][index] for owner in owners}
        sums = {voter: seen.get(voter, {}).get(index) for voter in voters}
        return {
            # Used, but not in this graph: a gradient of zero.
            voter: self._zero(statistic, layer) if value is None else value
            for voter, value in sums.items()
        }

    def _zero(self, statistic: Statistic, layer: Layer) -> Tensor:
        return statistic.zero(layer, self._moved(layer.values))

    def _data_free(
        self, statistic: Statistic, layer: Layer, voters: Sequence[str], weight: Tensor
    ) -> dict[str, Tensor]:
        """A statistic of the weights as they are now: one for all voters, unless it names them."""
        weight = weight.view(layer.part.shape)
        if "task" in statistic.asks:
            values = {v: statistic.of(self._glance(layer, weight, v)) for v in voters}
        else:
            values = dict.fromkeys(voters, statistic.of(self._glance(layer, weight, None)))
        wrong = sum(int((~torch.isfinite(value)).any()) for value in values.values())
        if self._inventory.census.number(wrong, weight):
            raise RuntimeError(
                f"Saliency is not finite in '{layer.name}'. Check its weights; masks are unchanged."
            )
        return values

    def _glance(self, layer: Layer, weight: Tensor, task: str | None) -> Seen:
        return Seen(layer, weight, task=task, generator=self._generator)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None else tensor.to(self._device)


class _Weights(Sequence[Tensor]):
    """The weights of some layers as trained, flat, made when asked for: few methods ask."""

    def __init__(
        self, layers: Sequence[Layer], hold: Hold[Any], device: torch.device | None
    ) -> None:
        self._layers = layers
        self._hold = hold
        self._device = device

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...

    @override
    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(place, slice):
            return _Weights(self._layers[place], self._hold, self._device)
        weight = self._hold.trained(self._layers[place]).reshape(-1)
        return weight if self._device is None else weight.to(self._device)

    @override
    def __len__(self) -> int:
        return len(self._layers)
