"""Sites: the layers that could take another form, and why some must stay dense."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from mtprune.compression.attention import SelfAttention, can_open
from mtprune.compression.experts import OpenExperts, can_open_experts
from mtprune.compression.forms import Dense, Form
from mtprune.compression.forms.base import linear_of
from mtprune.holding.hidden import hidden_weights
from mtprune.model.layers import is_another_linear
from mtprune.model.layout import is_conv1d
from mtprune.model.parts import is_spread

__all__ = ["Opened", "Site", "find_sites", "refuse_unfinished"]


Parents = tuple[tuple[nn.Module, str], ...]
"""All modules that hold a module as a child, and under which attribute."""


@dataclass(frozen=True, eq=False)
class Opened:
    """A module whose matrices are layers, as long as one of them has another form.

    Attributes:
        name: Its first name.
        fused: The module as it was: an attention with torch's fused projections, experts in stacks.
        own: The same with its matrices as layers.
        parents: The parents of the module.
    """

    name: str
    fused: nn.Module
    own: SelfAttention | OpenExperts
    parents: Parents

    def settle(self) -> None:
        """Use the module with layers if one of them has another form, the fused one if not."""
        replaced = any(isinstance(module, Form) for module in self.own.modules())
        if replaced and isinstance(self.own, OpenExperts):
            self.own.settle()
        _set_child(self.parents, self.own if replaced else self.fused)


@dataclass(frozen=True, eq=False)
class Site:
    """A Linear or Conv2d of a model, and its place in the model.

    Attributes:
        name: The first name of the layer.
        layer: The layer as it is; where its class is another one that computes the same, a Linear
            with its values.
        parents: The parents of the layer.
        why_dense: Why the layer must stay dense; empty if it may take another form.
        opened: The attention, or the experts, that the layer is a matrix of, or None.
        standing: What stands there as it is, where that is of another class than `layer`.
    """

    name: str
    layer: Dense
    parents: Parents
    why_dense: str = ""
    opened: Opened | None = None
    standing: nn.Module | None = None

    @property
    def called(self) -> nn.Module:
        """The module that the model calls, as it was."""
        return self.layer if self.standing is None else self.standing

    def place(self, module: nn.Module | None) -> None:
        """Put a module in the place of the layer, or the layer itself."""
        _set_child(self.parents, self.called if module is None else module)
        if self.opened is not None:
            self.opened.settle()

    @property
    def bytes(self) -> int:
        """The bytes of the dense layer."""
        bias = 0 if self.layer.bias is None else self.layer.bias.nbytes
        return self.layer.weight.nbytes + bias


def find_sites(model: nn.Module, fused: Collection[str] = ()) -> list[Site]:
    """All Linear and Conv2d layers of a model, also those that must stay dense.

    Args:
        model: The model.
        fused: Names of `MultiheadAttention` whose projections become layers too, and of experts
            whose matrices do. Each is opened, and closed again when the last of them is dense.

    Example:
        >>> [site.name for site in find_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))]
        ['0']
    """
    parents = _parents(model)
    opened: dict[nn.Module, Opened] = {}
    for name, module in list(model.named_modules()):
        own = _own(module) if name in fused else None
        if own is not None:
            opened[own] = Opened(name, module, own, parents[module])
            _set_child(parents[module], own)
    if opened:
        parents = _parents(model)
    in_forms = {id(m) for form in model.modules() if isinstance(form, Form) for m in form.modules()}
    uses: Counter[int] = Counter()
    for module in model.modules():
        uses.update(id(parameter) for parameter in module._parameters.values())
    sites = []
    for name, module in model.named_modules():
        is_other = is_another_linear(module)
        if not (is_other or isinstance(module, (nn.Linear, nn.Conv2d))) or id(module) in in_forms:
            continue
        if "weight" in module._parameters:
            layer = _same_linear(module) if is_other else cast(Dense, module)
            why_dense = _why_dense(module, name, is_tied=uses[id(module.weight)] > 1)
            mine = parents.get(module, ())
            above = [up for p, _ in mine for up in (p, *(q for q, _ in parents.get(p, ())))]
            fusing = next((opened[parent] for parent in above if parent in opened), None)
            standing = module if is_other else None
            sites.append(Site(name, layer, mine, why_dense, fusing, standing))
    return sites


def _own(module: nn.Module) -> SelfAttention | OpenExperts | None:
    """A fused module with its matrices as layers; None if it has no such."""
    if isinstance(module, nn.MultiheadAttention):
        return SelfAttention.of(module) if can_open(module) else None
    return OpenExperts(module) if can_open_experts(module) else None


def _same_linear(module: nn.Module) -> nn.Linear:
    """A Linear with the values of a module that computes the same, in the same memory."""
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
    if is_conv1d(module):
        weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    return linear_of(weight, bias).train(module.training)


def _parents(model: nn.Module) -> dict[nn.Module, Parents]:
    """The parents of each module of a model."""
    parents: dict[nn.Module, Parents] = {}
    for module in model.modules():
        for attribute, child in module._modules.items():
            if child is not None:
                parents[child] = (*parents.get(child, ()), (module, attribute))
    return parents


def _set_child(parents: Parents, module: nn.Module) -> None:
    for parent, attribute in parents:
        parent._modules[attribute] = module


def _why_dense(module: nn.Module, name: str, is_tied: bool) -> str:
    """Why a layer must stay dense; empty if it may take another form."""
    if is_tied:
        return "its weight is tied to another"
    if type(module) not in (nn.Linear, nn.Conv2d) and not is_another_linear(module):
        # MultiheadAttention reads the weight of its out_proj, which is of such a type.
        return f"a {type(module).__name__} may do more than its base class"
    if not name:
        return "it is the whole model"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks"
    return ""


def refuse_unfinished(model: nn.Module) -> None:
    """Check that no weight is computed from a mask. What is parametrized stays as it is.

    Raises:
        ValueError: If a module is pruned but not finalized.
    """
    for hidden, attribute in hidden_weights(model):
        path = next(path for path, module in model.named_modules() if module is hidden)
        raise ValueError(
            f"'{path or type(hidden).__name__}' still has a mask that may open again on its "
            f"'{attribute}'. Call pruner.finalize() first."
        )
    for name, module in model.named_modules():
        parameters: dict[str, Any] = module._parameters
        pruned = [key[:-5] for key in parameters if key.endswith("_orig")]
        pruned = [key for key in pruned if key + "_mask" in module._buffers]
        label = name or type(module).__name__
        spread = [
            key for key, value in parameters.items() if value is not None and is_spread(value)
        ]
        if spread:
            raise ValueError(
                f"'{label}' has a part of its '{spread[0]}' on each rank. Gather the model on one: "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, "
                "cpu_offload=True)) of torch.distributed.checkpoint.state_dict on all ranks, then "
                "compress a plain model that has loaded it."
            )
        if pruned:
            raise ValueError(
                f"'{label}' still holds '{pruned[0]}_orig' and '{pruned[0]}_mask'. Call "
                "pruner.finalize() first, or torch.nn.utils.prune.remove for masks of your own."
            )
