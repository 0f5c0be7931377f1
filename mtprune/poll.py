"""The poll: from what has been observed to the ballot a method decides on."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from mtprune import distributed
from mtprune.collect import Evidence, checked
from mtprune.components import Layer
from mtprune.masking import Masking
from mtprune.methods.base import JOINT, Ballot, Method
from mtprune.saliency import takes_generator, uses_gradient
from mtprune.softening import SoftMasking
from mtprune.usage import Users

__all__ = ["poll"]


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
                    voter: _zeros(method, layer, device) if s is None else s
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
            scores.append(dict.fromkeys(voters, method.granularity.pool(asked)))
    return Ballot(
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


def _zeros(method: Method, layer: Layer, device: torch.device | None) -> Tensor:
    where = device or layer.parameter.device
    return method.granularity.pool(torch.zeros(layer.shape, dtype=torch.float32, device=where))
