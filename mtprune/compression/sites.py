"""Sites: the layers that could take another form, and why some cannot."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from mtprune.compression.kernels import Dense, Kernel

__all__ = ["Site", "find_sites", "refuse_unfinished"]


@dataclass(frozen=True, eq=False)
class Site:
    """One prunable layer of a model, and where it hangs.

    Attributes:
        name: Its first name.
        layer: The layer as it is.
        parents: Module and attribute of all places where it hangs.
        held: Why it must stay dense; empty if nothing is against another form.
    """

    name: str
    layer: Dense
    parents: tuple[tuple[nn.Module, str], ...]
    held: str = ""

    def place(self, module: nn.Module) -> None:
        """Hang this module there instead."""
        for parent, attribute in self.parents:
            parent._modules[attribute] = module

    @property
    def bytes(self) -> int:
        """Of the dense form."""
        bias = 0 if self.layer.bias is None else self.layer.bias.nbytes
        return self.layer.weight.nbytes + bias


def find_sites(model: nn.Module) -> list[Site]:
    """All Linear and Conv2d layers of a model, also those that must stay dense.

    Example:
        >>> [site.name for site in find_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
        ['0']
    """
    inside = {id(m) for k in model.modules() if isinstance(k, Kernel) for m in k.modules()}
    uses: Counter[int] = Counter()
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
        for attribute, child in module._modules.items():
            if child is not None:
                places.setdefault(child, []).append((module, attribute))
    sites = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or id(module) in inside:
            continue
        if "weight" in module._parameters:
            shared = uses[id(module.weight)] > 1
            held = _held(module, name, shared)
            sites.append(Site(name, module, tuple(places.get(module, ())), held))
    return sites


def _held(module: Dense, name: str, shared: bool) -> str:
    if shared:
        return "its weight is tied to another"
    if type(module) not in (nn.Linear, nn.Conv2d):
        # MultiheadAttention reads the weight of its out_proj, which is of such a type.
        return f"a {type(module).__name__} may do more than its base class"
    if not name:
        return "it is the whole model"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks"
    return ""


def refuse_unfinished(model: nn.Module) -> None:
    """Complain about weights that are still computed from something else.

    Raises:
        ValueError: If a module is pruned but not finalized, or parametrized.
    """
    for name, module in model.named_modules():
        held: dict[str, Any] = module._parameters
        pruned = [key[:-5] for key in held if key.endswith("_orig")]
        pruned = [key for key in pruned if key + "_mask" in module._buffers]
        label = name or type(module).__name__
        if pruned:
            raise ValueError(
                f"'{label}' still holds '{pruned[0]}_orig' and '{pruned[0]}_mask'. Call "
                "pruner.finalize() first, or torch.nn.utils.prune.remove for masks of your own."
            )
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"'{label}' is parametrized. Call pruner.finalize() first, or "
                "torch.nn.utils.parametrize.remove_parametrizations for those of your own."
            )
