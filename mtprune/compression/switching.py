"""Switching: one model in memory, and the subnetwork of any of its tasks without loading again.

The weights that none of the chosen tasks would keep become zero, and their values are set aside, so
that they come back bitwise when other tasks are chosen. What is set aside is only what has left, so
a model and all its subnetworks take little more memory than the model.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtprune.bits import pack_bits, unpack_bits
from mtprune.compression.sites import refuse_unfinished
from mtprune.model.names import unwrap
from mtprune.model.task_masks import (
    check_tasks,
    masked_parameters,
    merged_task_masks,
    remembered_task_masks,
)

__all__ = ["forget", "switch_tasks", "whole"]


@dataclass(frozen=True)
class _Aside:
    """What has left a model for the time being.

    Attributes:
        tasks: The tasks that the model serves meanwhile.
        places: Where values have left, as bits, by parameter name.
        values: The values, in order of position.
        shapes: The shapes of the parameters.
    """

    tasks: tuple[str, ...]
    places: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]


_ASIDE: "weakref.WeakKeyDictionary[nn.Module, _Aside]" = weakref.WeakKeyDictionary()


def switch_tasks(model: nn.Module, tasks: Sequence[str] | None) -> float:
    """Turn a model into the subnetwork of some of its tasks, in place, or into the whole again.

    A weight stays if one of the tasks would keep it alone; all others are zero until the next
    switch. Outputs of other tasks mean nothing meanwhile. The model remembers what its tasks voted
    for if `load` made it, or if it is the very one that a pruner has finalized.

    Args:
        model: The model, not compressed.
        tasks: The tasks; None for all that the model has, as it was at first.

    Returns:
        The share of zeros among the weights that have task masks.

    Raises:
        ValueError: If the model remembers no task masks, or not those of these tasks.
        RuntimeError: If weights that had left have been trained, or loaded, since.

    Example:
        >>> from mtprune import MultitaskPruner, Vote
        >>> model = nn.ModuleDict({"trunk": nn.Linear(4, 8), "a": nn.Linear(8, 1),
        ...                        "b": nn.Linear(8, 1)})
        >>> pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=Vote(sparsity=0.5))
        >>> hidden = model["trunk"](torch.randn(16, 4)).relu()
        >>> _ = pruner.observe_losses({t: model[t](hidden).square().mean() for t in ("a", "b")})
        >>> _ = pruner.step()
        >>> pruner.finalize()
        >>> whole = switch_tasks(model, None)
        >>> switch_tasks(model, ["a"]) > whole, switch_tasks(model, None) == whole
        (True, True)
    """
    model = unwrap(model)
    refuse_unfinished(model)
    packed = remembered_task_masks(model)
    if packed is None:
        raise ValueError(
            "This model does not know what its tasks voted for: it is a copy, was compressed, or "
            "its last update was before a checkpoint. Save the finalized model with "
            "mtprune.save(model, directory, task_masks=...) and load that."
        )
    masks = packed.unpack()
    parameters = masked_parameters(model, masks)
    chosen = None if tasks is None else check_tasks(tasks, packed.bits)
    _put_back(model, parameters)
    if chosen is not None:
        _set_aside(model, chosen, parameters, merged_task_masks(masks, chosen))
    total = sum(p.numel() for p in parameters.values())
    return 1 - sum(int(p.count_nonzero()) for p in parameters.values()) / max(1, total)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Let a model be what it was at first, whatever tasks it serves before and after."""
    aside = _ASIDE.get(model)
    if aside is None:
        yield
        return
    switch_tasks(model, None)
    try:
        yield
    finally:
        switch_tasks(model, aside.tasks)


def forget(model: nn.Module) -> None:
    """Drop what has left a model, because all its weights are new."""
    _ASIDE.pop(model, None)


@torch.no_grad()
def _put_back(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Put what has left into its places again.

    Raises:
        RuntimeError: If something else is there; nothing is changed then.
    """
    aside = _ASIDE.get(model)
    if aside is None:
        return
    places = {
        name: unpack_bits(bits, aside.shapes[name]).to(parameters[name].device)
        for name, bits in aside.places.items()
    }
    for name, gone in places.items():
        if bool(parameters[name][gone].any()):
            raise RuntimeError(
                f"'{name}' has weights where the subnetwork of {list(aside.tasks)} has none: it "
                "was trained, or other weights were loaded, since. Load the model anew to switch."
            )
    for name, gone in places.items():
        parameters[name][gone] = aside.values[name].to(parameters[name])
    del _ASIDE[model]


@torch.no_grad()
def _set_aside(
    model: nn.Module,
    tasks: tuple[str, ...],
    parameters: Mapping[str, nn.Parameter],
    masks: Mapping[str, Tensor],
) -> None:
    """Let all weights leave that are not in the masks."""
    places, values = {}, {}
    for name, mask in masks.items():
        weight = parameters[name]
        # A zero with a sign is a value too: what comes back is bitwise the same.
        present = (weight != 0) | weight.signbit()
        gone = present & ~mask.to(weight.device)
        places[name], values[name] = pack_bits(gone).cpu(), weight[gone].clone()
        weight[gone] = 0
    _ASIDE[model] = _Aside(tasks, places, values, {n: tuple(m.shape) for n, m in masks.items()})
