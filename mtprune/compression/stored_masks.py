"""Stored masks: what tasks voted for, as a folder holds it, a bit for each weight and task."""

from math import prod

import torch
from torch import Tensor, nn

from mtprune.compression.compress import is_compressed
from mtprune.compression.sites import refuse_unfinished
from mtprune.model.parts import Part
from mtprune.model.task_masks import (
    PackedTaskMasks,
    TaskMasks,
    masked_parameters,
    remembered_task_masks,
)
from mtprune.reading import Entry

__all__ = ["masks_of", "numbered", "read_masks"]


def masks_of(model: nn.Module, given: TaskMasks | None) -> PackedTaskMasks | None:
    """The task masks to save with a model; None for a compressed one.

    Raises:
        ValueError: If there are none, or they do not fit.
    """
    if is_compressed(model):
        if given is not None:
            raise ValueError(
                "This model is compressed, and `task_masks` are of the one it was made from. Save "
                "that one with them, or this one without."
            )
        return None
    known = remembered_task_masks(model)
    if given is None and known is None:
        raise ValueError(
            "This model has no plan: mtprune.compress did not make it. To save a model with what "
            "its tasks voted for, give task_masks=pruner.task_masks."
        )
    refuse_unfinished(model)
    if given is None:
        return known
    masked_parameters(model, given)
    return PackedTaskMasks.pack(given)


def numbered(masks: PackedTaskMasks) -> dict[str, list[str]]:
    """The name under which each mask is stored, and whose it is: task and parameter."""
    pairs = [[task, name] for task, own in masks.bits.items() for name in own]
    return {f"task_masks/{number}": pair for number, pair in enumerate(pairs)}


def read_masks(entry: Entry, tensors: dict[str, Tensor]) -> PackedTaskMasks:
    """The task masks, whose bits are taken out of the tensors.

    Raises:
        ValueError: If they are none.
    """
    parts = entry.fields(["tasks", "shapes", "bits"])
    tasks = [task.text() for task in parts["tasks"].items()]
    shapes = {
        name: tuple(size.whole() for size in part.items())
        for name, part in parts["shapes"].mapping().items()
    }
    bits: dict[str, dict[str, Tensor]] = {task: {} for task in tasks}
    for key, part in parts["bits"].mapping(tensors).items():
        task, name = part.items(2)
        shape = shapes[name.text(shapes)]
        if tensors[key].dtype != torch.uint8 or tensors[key].shape != (-(-prod(shape) // 8),):
            raise part.wrong(f"must name a mask of shape {shape}, as bits")
        bits[task.text(tasks)][name.text()] = tensors.pop(key)
    return PackedTaskMasks(bits, {name: Part(shape) for name, shape in shapes.items()})
