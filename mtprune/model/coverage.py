"""Coverage: how much of a model's matrices takes part, and what no rule speaks of.

What is pruned unless somebody says otherwise are the weights of known kinds of modules. A model may
keep most of its weights in others, and be called sparse while it is dense: so the rest is counted.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from mtprune.model.layers import Layer, is_embedding, never_pruned
from mtprune.model.names import own_name

__all__ = ["Coverage", "survey"]


@dataclass(frozen=True)
class Coverage:
    """The matrices of a model: parameters of two dimensions or more, without norms and embeddings.

    Embeddings count if they were included.

    Attributes:
        total: How many numbers they hold.
        unruled: For each matrix that no rule speaks of, how many numbers it holds.
        kinds: The kind of module that each of these is in.
    """

    total: int = 0
    unruled: Mapping[str, int] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    def share(self, layers: Sequence[Layer]) -> float:
        """The share of the matrices that these layers are; 1 of a model without matrices."""
        size = sum(layer.parameter.numel() for layer in layers)
        return size / self.total if self.total else 1.0

    def left_alone(self) -> dict[str, str]:
        """Why the matrices that no rule speaks of are left alone."""
        return {
            name: f"no rule for a matrix of {self.kinds[name]}: {size / self.total:.1%} of the "
            "model's; `include` names it"
            for name, size in self.unruled.items()
        }


def survey(
    model: nn.Module, layers: Sequence[Layer], excluded: Collection[int], declared: Collection[int]
) -> Coverage:
    """Count the matrices of a model.

    Args:
        model: The model, unwrapped.
        layers: Its prunable layers.
        excluded: The ids of the parameters that somebody excluded.
        declared: The ids of the parameters that somebody declared shared; of all if nobody did.

    Warns:
        UserWarning: If no rule speaks of most of what was declared and not excluded.
    """
    prunable = {id(layer.parameter) for layer in layers}
    embeddings = {
        id(parameter)
        for module in model.modules()
        if is_embedding(module)
        for parameter in module._parameters.values()
    }
    owners: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), (module, attribute))
    total, unruled, kinds, ruled, foreign = 0, {}, {}, 0, 0
    for name, parameter in model.named_parameters():
        module, attribute = owners[id(parameter)]
        if isinstance(parameter, nn.UninitializedParameter):
            continue
        if parameter.dim() < 2 or never_pruned(module, attribute):
            continue
        known = id(parameter) in prunable
        if id(parameter) in embeddings and not known:
            continue
        total += parameter.numel()
        if known or id(parameter) in excluded or not parameter.requires_grad:
            ruled += parameter.numel() if known and id(parameter) in declared else 0
            continue
        unruled[own_name(model, name)] = parameter.numel()
        kinds[own_name(model, name)] = type(module).__name__
        foreign += parameter.numel() if id(parameter) in declared else 0
    if foreign > ruled:
        most = sorted(unruled, key=lambda name: -unruled[name])
        named = ", ".join(f"'{name}' ({kinds[name]})" for name in most[:3])
        warnings.warn(
            f"Of the matrices to be pruned only {ruled / (ruled + foreign):.1%} take part: no rule "
            f"speaks of {named}{f' and {len(most) - 3} more' if len(most) > 3 else ''}. Name them "
            "with include=[...], or leave them out with exclude=[...].",
            stacklevel=5,
        )
    return Coverage(total, unruled, kinds)
