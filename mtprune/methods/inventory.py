"""Taking stock: what a method can prune of a model, and what it must be shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mtprune.granularity import gates_of
from mtprune.methods.base import Method, Needs
from mtprune.model.components import declare, meant
from mtprune.model.coverage import survey
from mtprune.model.covering import cover
from mtprune.model.inventory import Inventory
from mtprune.model.layers import KINDS, Layer, find_layers, is_embedding
from mtprune.model.selectors import Spec, selected

__all__ = ["Selection", "check_parts", "take_inventory"]


@dataclass(frozen=True)
class Selection:
    """The modules a user names.

    Attributes:
        shared: What the tasks share.
        include: Embeddings and bare Parameters to prune too.
        exclude: What not to prune.
    """

    shared: Spec = "auto"
    include: Spec = ()
    exclude: Spec = ()


def take_inventory(
    model: nn.Module, tasks: Sequence[str], selection: Selection, method: Method[Any]
) -> tuple[Inventory, Needs]:
    """Sort the prunable layers of a model into those that take part and those that do not.

    Args:
        model: The model, unwrapped.
        tasks: The tasks.
        selection: The modules that are shared, included and excluded.
        method: The method.

    Returns:
        What the model has to prune, and what the method must be shown of it.

    Raises:
        ValueError: If no layer takes part, a component has the name of a task, or the method
            refuses the model.
    """
    gates = gates_of(method.granularity, model)
    prunable = find_layers(model, (selection.include, gates), selection.exclude)
    if not prunable:
        raise ValueError(
            f"The model has nothing prunable. Prunable are {KINDS}; `include` names other matrices."
        )
    asked = selected(model, selection.include, "include")
    _check_adapters([layer for layer in prunable if id(layer.parameter) not in asked])
    declared = declare(model, prunable, selection.shared)
    for component in dict.fromkeys(d.component for d in declared):
        if component in tasks:
            raise ValueError(
                f"Component '{component}' has the name of a task. A task's private weights are "
                "a component of that name: call the shared one something else."
            )
    included = selected(model, selection.include, "include")
    looked_up = [x.name for x in prunable if _is_looked_up(x) and id(x.parameter) not in included]
    tied = dict.fromkeys(looked_up, "it is tied to an embedding; `include` names it")
    reasons = {x.name: tied.get(x.name) or method.fits(x) for x in prunable}
    coverage = survey(
        model,
        [layer for layer in prunable if layer.name not in tied],
        selected(model, selection.exclude, "exclude"),
        meant(model, selection.shared),
    )
    unfit = {name: reason for name, reason in reasons.items() if reason}
    if len(unfit) == len(prunable):
        raise ValueError(
            f"{type(method).__name__} can prune none of these layers: {_listed(prunable, unfit)}. "
            "Take another method for this model: mtprune.Vote(sparsity) prunes single weights of "
            f"{KINDS}."
        )
    covered = cover(method.granularity, model, [x for x in prunable if x.name not in unfit])
    inventory = Inventory(
        tasks=tuple(tasks),
        layers=covered.layers,
        declared=[d for d in declared if not unfit.keys() >= set(d.names)],
        units=covered.units,
        left_dense=covered.dense,
        unfit=unfit,
        coverage=coverage,
    )
    needs = method.needs(inventory)
    if needs.macs:
        if inventory.census.is_scattered:
            raise ValueError(
                "Multiply-adds are measured on whole layers, and this model's are spread over "
                "ranks by fully_shard. Build the pruner before fully_shard."
            )
        inventory = inventory.measured(model, prunable, needs.example_inputs)
    if needs.latency is not None:
        if inventory.census.is_scattered:
            raise ValueError(
                "Times are measured on whole layers, and this model's are spread over ranks by "
                "fully_shard. Build the pruner before fully_shard."
            )
        inventory = inventory.timed(model, needs.latency, needs.example_inputs)
    method.check(inventory)
    return inventory, needs


def check_parts(inventory: Inventory, method: Method[Any], backend: str) -> None:
    """Refuse layers of which every rank has a part, if that is not enough to go on.

    Args:
        inventory: The layers.
        method: The method.
        backend: What keeps the masks.

    Raises:
        ValueError: With what is wrong and what to do.
    """
    if not inventory.census.is_scattered:
        return
    sharded = f"'{inventory.layers[0].name}' is sharded by fully_shard (FSDP2)"
    whole = [layer.name for layer in inventory.layers if layer.part.is_whole]
    if whole:
        raise ValueError(
            f"{sharded}, and '{whole[0]}' is not. Apply fully_shard to the model itself as well, "
            f"or pass exclude={whole}."
        )
    if backend != "inplace":
        raise ValueError(
            f"{sharded}, and backend={backend!r} puts tensors of its own into modules, which "
            "fully_shard knows nothing of. Pass backend='inplace'."
        )
    reason = method.needs_whole(inventory)
    if reason:
        raise ValueError(
            f"{sharded}, and {reason}. Every rank has some rows of each layer: take Vote with a "
            "saliency of single weights, or SoftThreshold, or DistributedDataParallel, under "
            "which every rank has it all."
        )


def _listed(layers: Sequence[Layer], reasons: Mapping[str, str]) -> str:
    """Layers by what they are and why they are left dense, a few names of each."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        module = type(layer.places[0][0]).__name__
        kinds.setdefault((module, reasons[layer.name]), []).append(f"'{layer.name}'")
    return "; ".join(
        ", ".join(names[:3])
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        + f" ({module}: {reason})"
        for (module, reason), names in kinds.items()
    )


def _check_adapters(layers: Sequence[Layer]) -> None:
    """Refuse to prune what is added to other weights, as the adapters of peft are.

    Args:
        layers: Those that nobody asked for by name.

    Raises:
        ValueError: If a layer is one.
    """
    for layer in layers:
        if any(part.startswith("lora_") for part in layer.name.split(".")):
            raise ValueError(
                f"'{layer.name}' is an adapter's: what is pruned of it is filled again when it is "
                "merged. Prune before you add adapters, finalize, and call "
                "mtprune.integrations.peft.keep_zeros(model) after get_peft_model. To prune the "
                "weights under adapters that are trained, pass exclude='*lora_*', and let them "
                "require gradients. For smaller adapters, pass include='*lora_*'."
            )


def _is_looked_up(layer: Layer) -> bool:
    """Whether a layer's weight is also that of an embedding."""
    return any(is_embedding(module) for module, _ in layer.places)
