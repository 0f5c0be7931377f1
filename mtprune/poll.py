"""The poll: from what has been observed to the ballot a method decides on."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtprune.collect import Evidence
from mtprune.components import Layer
from mtprune.methods.base import JOINT, Ballot, Method
from mtprune.saliency import takes_generator, uses_gradient
from mtprune.usage import Users

__all__ = ["poll"]


def poll(
    method: Method,
    evidence: Evidence,
    users: Users,
    layers: Sequence[tuple[int, Layer]],
    masks: Sequence[Tensor],
    components: Mapping[str, str],
    generator: torch.Generator,
) -> Ballot:
    """The ballot over ``layers``, each given with its index among all prunable ones.

    Args:
        method: Whose saliency is asked for.
        evidence: The scores so far.
        users: What each task uses.
        layers: The layers that are pruned.
        masks: Their masks, shaped as they are.
        components: Their components.
        generator: The pruner's own.
    """
    weights = [
        (layer.parameter.detach() * mask).reshape(-1)
        for (_, layer), mask in zip(layers, masks, strict=True)
    ]
    scores = []
    for (index, _), weight in zip(layers, weights, strict=True):
        voters = [task for task, flags in users.items() if flags[index]]
        voters = voters if method.disentangled else [JOINT]
        if uses_gradient(method.saliency):
            seen = {voter: evidence.scores.get(voter, {}).get(index) for voter in voters}
            # Used, but not in this graph: a gradient of zero.
            blank = torch.zeros_like(weight, dtype=torch.float32)
            scores.append({voter: blank if s is None else s for voter, s in seen.items()})
        else:
            own = {"generator": generator} if takes_generator(method.saliency) else {}
            asked = method.saliency(weight.to(torch.float32), None, **own)
            scores.append(dict.fromkeys(voters, asked))
    return Ballot(
        shapes=[layer.shape for _, layer in layers],
        components=[components[layer.name] for _, layer in layers],
        scores=scores,
        masks=[mask.reshape(-1) for mask in masks],
        weights=weights,
        generator=generator,
    )
