"""Joining: encoder layers run as one block where that is faster than part by part."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.forms import Form, building
from mtprune.compression.forms.sparse import Sparse
from mtprune.compression.plan import Joined, Plan
from mtprune.compression.running import run
from mtprune.compression.timing import Measure
from mtprune.compression.together import Together, can_join, join, separate, unpack
from mtprune.compression.verify import ROUNDING, difference

__all__ = ["MARGIN", "choose_blocks", "join_all", "separate_all", "unpack_all"]

MARGIN = 0.05
"""A block must beat its parts by this share of their time."""

ModuleCall = tuple[tuple[Any, ...], dict[str, Any]]
ModuleCalls = dict[Any, tuple[ModuleCall, int]]


@torch.no_grad()
def choose_blocks(
    model: nn.Module, batches: Sequence[Any], measure: Measure, removed: bool
) -> tuple[Joined, ...]:
    """The encoder layers of a model that are faster as one block, with all forms in their places.

    Args:
        model: The model; its layers are left as they are.
        batches: The example inputs.
        measure: How functions are timed.
        removed: Whether units were removed. Otherwise only layers with zeros are looked at: a
            dense model stays bitwise what it is.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name and can_join(layer) and (removed or _has_zeros(layer))
    }
    if not layers or building.unavailable():
        return ()
    found = []
    known: dict[Any, tuple[float, float]] = {}
    for name, calls in recorded_calls(model, layers, batches).items():
        layer = layers[name]
        join(layer)
        alike = all(_is_alike(layer, call) for call, _ in calls.values())
        key = (_traits(layer), tuple((shape, times) for shape, (_, times) in calls.items()))
        if alike and key not in known:
            known[key] = _timed(layer, calls, measure)
        separate(layer)
        unpack(layer)
        apart, together = known[key] if alike else (0.0, 0.0)
        if together < (1 - MARGIN) * apart:
            found.append(Joined(name, apart, together))
    return tuple(found)


def _traits(layer: nn.Module) -> Any:
    """What layers must have in common to be timed once: their modules, and sizes to a tenth."""
    sizes = (round(math.log(max(1, t.numel()), 1.1)) for t in layer.state_dict().values())
    return tuple(map(type, layer.modules())), tuple(sizes)


def _timed(layer: Any, calls: ModuleCalls, measure: Measure) -> tuple[float, float]:
    """The milliseconds of a joined layer for all calls, part by part and as a block."""
    apart = together = 0.0
    for (args, kwargs), times in calls.values():
        functions = [partial(f, layer, *args, **kwargs) for f in (_apart, _together)]
        # Twice, and the better one of each: a block is a matter of a millisecond, and other
        # load of the machine of ten.
        first, second = map(min, measure(functions), measure(functions))
        apart, together = apart + times * first, together + times * second
    return apart, together


def _apart(layer: Together, *args: Any, **kwargs: Any) -> Any:
    return layer.apart.forward(layer, *args, **kwargs)


def _together(layer: Together, *args: Any, **kwargs: Any) -> Any:
    return layer.forward(*args, **kwargs)


def _is_alike(layer: nn.Module, call: ModuleCall) -> bool:
    """Whether a joined layer gives as a block what it gives part by part."""
    args, kwargs = call
    expected, got = (f(layer, *args, **kwargs) for f in (_apart, _together))  # type: ignore[arg-type]
    return type(expected) is type(got) is Tensor and (
        difference(expected, got) <= ROUNDING[torch.float32]
    )


def _has_zeros(layer: nn.Module) -> bool:
    """Whether a weight of a layer has another form, or zeros enough for one."""
    return any(isinstance(module, Form) for module in layer.modules()) or any(
        weight.dim() == 2
        and weight.numel() > 0
        and int(weight.count_nonzero()) <= (1 - Sparse.min_zeros) * weight.numel()
        for weight in layer.parameters()
    )


def recorded_calls(
    model: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Any]
) -> dict[str, ModuleCalls]:
    """For each layer and shape of its inputs: one call, and how often the shape came."""
    calls: dict[str, ModuleCalls] = {name: {} for name in layers}
    handles = []
    for name, layer in layers.items():

        def record(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            mine, x = calls[name], (*args, *kwargs.values())[0]
            first, times = mine.get(x.shape, ((args, kwargs), 0))
            mine[x.shape] = (first, times + 1)

        handles.append(layer.register_forward_pre_hook(record, with_kwargs=True))
    try:
        run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def join_all(model: nn.Module, plan: Plan) -> None:
    """Let the layers that a plan joins run as blocks; what cannot, stays part by part.

    Raises:
        ValueError: If the plan is for another model.
    """
    modules = dict(model.named_modules())
    for name in _names(plan):
        if name not in modules:
            raise ValueError(
                f"The plan is for another model: it runs '{name}' as one block, and this model has "
                "no such layer."
            )
        if can_join(modules[name]):
            join(modules[name])


def separate_all(model: nn.Module, plan: Plan) -> None:
    """Let the layers that a plan joins run part by part again."""
    for name in _names(plan):
        separate(model.get_submodule(name))


def unpack_all(model: nn.Module, plan: Plan) -> None:
    """Drop what was packed of separated layers."""
    for name in _names(plan):
        unpack(model.get_submodule(name))


def _names(plan: Plan) -> Iterable[str]:
    return (block.layer for block in plan.blocks)
