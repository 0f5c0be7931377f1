"""Sites: the layers that could take another form, and why some cannot."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from mtprune.compression.attention import SelfAttention, can_open
from mtprune.compression.kernels import Dense, Kernel

__all__ = ["Site", "find_sites", "refuse_unfinished"]


Places = tuple[tuple[nn.Module, str], ...]
"""Where a module hangs: its parents, and the attribute of each."""


@dataclass(frozen=True, eq=False)
class Opened:
    """An attention whose projections are layers, as long as one of them has another form.

    Attributes:
        attention: As it was, with what torch has fused.
        own: As layers.
        parents: Where it hangs.
    """

    attention: nn.MultiheadAttention
    own: SelfAttention
    parents: Places

    def settle(self) -> None:
        """Hang there what is needed now."""
        replaced = any(isinstance(module, Kernel) for module in self.own.children())
        _hang(self.own if replaced else self.attention, self.parents)


@dataclass(frozen=True, eq=False)
class Site:
    """One prunable layer of a model, and where it hangs.

    Attributes:
        name: Its first name.
        layer: The layer as it is.
        parents: Module and attribute of all places where it hangs.
        held: Why it must stay dense; empty if nothing is against another form.
        opened: The attention that it is a projection of, if it is one.
    """

    name: str
    layer: Dense
    parents: Places
    held: str = ""
    opened: Opened | None = None

    def place(self, module: nn.Module) -> None:
        """Hang this module there instead."""
        _hang(module, self.parents)
        if self.opened is not None:
            self.opened.settle()

    @property
    def bytes(self) -> int:
        """Of the dense form."""
        bias = 0 if self.layer.bias is None else self.layer.bias.nbytes
        return self.layer.weight.nbytes + bias


def find_sites(model: nn.Module, attentions: Collection[str] = ()) -> list[Site]:
    """All Linear and Conv2d layers of a model, also those that must stay dense.

    Args:
        model: The model.
        attentions: Names of `MultiheadAttention` whose projections shall be layers too: they are
            opened, and closed again when the last of them is placed as it was.

    Example:
        >>> [site.name for site in find_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
        ['0']
    """
    places = _places(model)
    opened: dict[nn.Module, Opened] = {}
    for name, module in list(model.named_modules()):
        if name in attentions and isinstance(module, nn.MultiheadAttention) and can_open(module):
            own = SelfAttention.of(module)
            opened[own] = Opened(module, own, places[module])
            _hang(own, places[module])
    if opened:
        places = _places(model)
    inside = {id(m) for k in model.modules() if isinstance(k, Kernel) for m in k.modules()}
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
    sites = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or id(module) in inside:
            continue
        if "weight" in module._parameters:
            shared = uses[id(module.weight)] > 1
            held = _held(module, name, shared)
            parents = places.get(module, ())
            of = next((opened[parent] for parent, _ in parents if parent in opened), None)
            sites.append(Site(name, module, parents, held, of))
    return sites


def _places(model: nn.Module) -> dict[nn.Module, Places]:
    places: dict[nn.Module, Places] = {}
    for module in model.modules():
        for attribute, child in module._modules.items():
            if child is not None:
                places[child] = (*places.get(child, ()), (module, attribute))
    return places


def _hang(module: nn.Module, parents: Places) -> None:
    for parent, attribute in parents:
        parent._modules[attribute] = module


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
