"""The poll: from what has been observed to the ballot a method decides on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import distributed
from mtprune.collect import JOINT, Evidence, checked
from mtprune.components import Layer
from mtprune.masking import Masking
from mtprune.methods.base import Ballot, Method
from mtprune.saliency import takes_generator, uses_gradient
from mtprune.softening import SoftMasking
from mtprune.units import Units
from mtprune.usage import Users

__all__ = ["Pool", "poll"]

Pool = Callable[[int, Tensor], Tensor]
"""From a layer's number and the saliency of its weights to what is kept of it, flat."""


def poll(
    method: Method,
    evidence: Evidence,
    users: Users,
    layers: Sequence[tuple[int, Layer]],
    masking: Masking,
    components: Mapping[str, str],
    generator: torch.Generator,
    costs: Mapping[str, Fraction],
    memory: Mapping[str, Any],
    device: torch.device | None = None,
    *,
    pool: Pool,
    units: Units | None = None,
    whole: Fraction = Fraction(0),
) -> Ballot:
    """The ballot over ``layers``, each given with its index among all prunable ones.

    Args:
        method: Whose saliency is asked for.
        evidence: The scores so far.
        users: What each task uses.
        layers: The layers that are pruned.
        masking: Where their masks are.
        components: Their components.
        generator: The pruner's own.
        costs: What a weight of each layer costs, if that was measured.
        memory: What the last decision left to remember.
        device: Where to decide; None for where the weights are.
        pool: How scores are kept.
        units: The units of all prunable layers, if they are larger than a weight.
        whole: What all prunable layers cost, if that was measured.

    Raises:
        RuntimeError: If a saliency that looks at no data is not finite.
    """
    weights = _Weights([layer for _, layer in layers], masking, device)
    scores = []
    for place, (index, layer) in enumerate(layers):
        voters = [task for task, flags in users.items() if flags[index]]
        voters = voters if method.disentangled else [JOINT]
        if method.saliency is None:
            scores.append(dict.fromkeys(voters, torch.zeros(0)))
        elif uses_gradient(method.saliency):
            seen = {voter: evidence.scores.get(voter, {}).get(index) for voter in voters}
            scores.append(
                {
                    # Used, but not in this graph: a gradient of zero.
                    voter: _zeros(pool, index, layer, device) if s is None else s
                    for voter, s in seen.items()
                }
            )
        else:
            own = {"generator": generator} if takes_generator(method.saliency) else {}
            shaped = weights[place].view(layer.shape).to(torch.float32)
            asked = checked(method.saliency(shaped, None, **own), layer)
            if not bool(torch.isfinite(asked).all()):
                raise RuntimeError(
                    f"Saliency is not finite in '{layer.name}'. Check its weights; masks are "
                    "unchanged."
                )
            scores.append(dict.fromkeys(voters, pool(index, asked)))
    ballot = Ballot(
        shapes=[layer.shape for _, layer in layers],
        components=[components[layer.name] for _, layer in layers],
        scores=scores,
        masks=[_moved(masking.current(layer).reshape(-1), device) for _, layer in layers],
        weights=weights,
        generator=generator,
        names=[layer.name for _, layer in layers],
        costs=[costs[layer.name] for _, layer in layers] if costs else [],
        losses={task: float(total) for task, total in evidence.losses.items()},
        seen=distributed.mean_(masking.seen().clone()).tolist()
        if isinstance(masking, SoftMasking)
        else [],
        memory=memory,
        whole=whole,
    )
    if units is None:
        return ballot
    return _grouped(ballot, units.among([index for index, _ in layers]))


def _grouped(ballot: Ballot, units: Units) -> Ballot:
    """The same ballot with units for weights, and their groups for layers."""
    voters = dict.fromkeys(voter for scores in ballot.scores for voter in scores)
    used = {
        voter: [place for place, scores in enumerate(ballot.scores) if voter in scores]
        for voter in voters
    }
    sums = {
        voter: units.gather({place: ballot.scores[place][voter] for place in places})
        for voter, places in used.items()
    }
    groups = range(len(units.names))
    return replace(
        ballot,
        components=[ballot.components[units.holding(group)[0]] for group in groups],
        scores=[{v: found[g] for v, found in sums.items() if g in found} for g in groups],
        masks=units.standing(ballot.masks),
        names=units.names,
        units=units,
        used=used,
    )


class _Weights(Sequence[Tensor]):
    """The weights of some layers as trained, flat, made when asked for: few methods ask."""

    def __init__(
        self, layers: Sequence[Layer], masking: Masking, device: torch.device | None
    ) -> None:
        self._layers = layers
        self._masking = masking
        self._device = device

    @overload
    def __getitem__(self, place: int) -> Tensor: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...

    @override
    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(place, slice):
            return _Weights(self._layers[place], self._masking, self._device)
        return _moved(self._masking.trained(self._layers[place]).reshape(-1), self._device)

    @override
    def __len__(self) -> int:
        return len(self._layers)


def _moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor if device is None else tensor.to(device)


def _zeros(pool: Pool, index: int, layer: Layer, device: torch.device | None) -> Tensor:
    where = device or layer.parameter.device
    return pool(index, torch.zeros(layer.shape, dtype=torch.float32, device=where))
