"""LoRA on a pruned model: adapters that leave the zeros of the weights they adapt as they are.

An adapter of peft adds ``B A`` to a weight, and that sum has no zeros. Here the adapter counts only
where the weight is not zero, in the forward as well as when it is merged, so that what was trained
is what ``merge_and_unload`` gives, and that is as sparse as before.
"""

from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["keep_zeros"]

_HELD = "_mtprune_keeps_zeros"


def keep_zeros(model: nn.Module) -> list[str]:
    """Let the LoRA adapters of a model leave the zeros of its Linear layers as they are.

    Call it on what ``peft.get_peft_model`` returned, once the base is pruned and finalized. It
    counts for all adapters, also those that are added later, so each task can have its own on one
    pruned base. The adapter's product is computed as a matrix in every forward. Adapters that drop
    out inputs are refused: the part that is left out would be another one each time.

    Args:
        model: The model with adapters, not merged.

    Returns:
        The names of the layers with zeros that are held.

    Raises:
        ValueError: If there is no LoRA adapter, or one that cannot be held.

    Example:
        >>> import importlib.util
        >>> if importlib.util.find_spec("peft"):
        ...     from peft import LoraConfig, get_peft_model
        ...     base = nn.Sequential(nn.Linear(4, 4))
        ...     _ = base[0].weight.data[0].zero_()
        ...     model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        ...     names = keep_zeros(model)
        ...     assert int(model.merge_and_unload()[0].weight[0].count_nonzero()) == 0
    """
    found = {n: m for n, m in model.named_modules() if is_adapted(m)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LoRA adapter. Give what peft.get_peft_model returned."
        )
    problems = {name: why for name, layer in found.items() if (why := _problem(layer))}
    for name, why in problems.items():
        raise ValueError(f"The zeros of '{name}' cannot be kept: {why}")
    held = []
    for name, layer in found.items():
        if bool((layer.base_layer.weight == 0).any()):
            held.append(name)
            if not hasattr(layer, _HELD):
                _hold(layer)
    return held


def is_adapted(module: Any) -> bool:
    """Whether a module is a layer of peft with LoRA adapters."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "lora_A")


def _problem(layer: Any) -> str:
    """Why the zeros of an adapted layer cannot be kept; empty if they can."""
    if not isinstance(layer.base_layer, nn.Linear):
        kind = type(layer.base_layer).__name__
        return f"it is a {kind}. Name nn.Linear layers alone in `target_modules`."
    if layer.merged:
        return "its adapters are merged. Call unmerge_adapter() first."
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in layer.lora_dropout.values()):
        return "its adapter drops out inputs. Build it with lora_dropout=0."
    if getattr(layer, "lora_variant", None):
        return "its adapter is none of plain LoRA. Build it without use_dora."
    return ""


def _hold(layer: Any) -> None:
    """Let adapters count only where the weight is not zero."""
    layer.register_buffer(_HELD, layer.base_layer.weight == 0, persistent=False)
    kind: Any = type(layer)
    layer.__class__ = _holding(kind)


@cache
def _holding(kind: Any) -> Any:
    """A class of adapted layers whose adapters leave zeros as they are.

    A subclass, and not functions on the layer: those would be about the same layer in a copy.
    """

    class Holding(kind):  # type: ignore[misc]
        def get_delta_weight(self, adapter: str) -> Tensor:
            return self._product(adapter).masked_fill(getattr(self, _HELD), 0)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(x, *args, **kwargs)
            if self.disable_adapters or self.merged:
                return output
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    extra = self._product(adapter).where(getattr(self, _HELD), 0)
                    output = output - F.linear(x.to(extra.dtype), extra).to(output.dtype)
            return output

        def _product(self, adapter: str) -> Tensor:
            product: Tensor = super().get_delta_weight(adapter)
            return product

    Holding.__name__ = Holding.__qualname__ = kind.__name__
    return Holding
