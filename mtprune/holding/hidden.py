"""Hidden weights: the masks that a model holds now, whichever back-end put them there."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from mtprune.holding.inplace import Shadow
from mtprune.holding.masking import FromParent
from mtprune.model.layers import default_attributes, never_pruned
from mtprune.model.selectors import Spec, selected

__all__ = ["hidden_weights", "prunable"]


def hidden_weights(model: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """The masks that hide weights which keep their values, by module and attribute.

    Those of ``backend="inplace"`` while weights may come back: no buffer tells of them.
    """
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            from_parent = isinstance(hook, FromParent)
            shadow: object = hook.hook if isinstance(hook, FromParent) else hook
            if isinstance(shadow, Shadow):
                owner: Any = module.out_proj if from_parent else module
                found[owner, shadow.attribute] = shadow.mask.tensor
    return found


def prunable(model: nn.Module, include: Spec = ()) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
    """Every weight that is, was or could be pruned, with its mask if its module holds one.

    Args:
        model: The model, unwrapped, pruned or not.
        include: As for `mtprune.model.layers.find_layers`.
    """
    included = selected(model, include, "include")
    hidden = hidden_weights(model)
    for module in model.modules():
        default = default_attributes(module)
        for name, parameter in module._parameters.items():
            mask = module._buffers.get(name.removesuffix("_orig") + "_mask")
            mask = mask if name.endswith("_orig") else hidden.get((module, name))
            chosen = name in default or (
                id(parameter) in included and not never_pruned(module, name)
            )
            if parameter is not None and (mask is not None or chosen):
                yield parameter, mask
