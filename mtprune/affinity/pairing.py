"""Pairing: each task's outputs beside the targets of other samples.

Outputs move, not targets: outputs are tensors with samples first, while a batch may be anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["deal", "paired", "sample_count"]


def deal(size: int, tasks: Sequence[str], generator: torch.Generator) -> dict[str, Tensor]:
    """For each task, which sample's outputs stand beside each target, int64 ``[size]``.

    Samples are laid in a circle at random, and every task is handed on by a number of places of its
    own. So no task keeps its own outputs, and no target meets the outputs of one sample twice, if
    there are more samples than tasks. With fewer, tasks still differ as far as there are places.

    Args:
        size: Samples in the batch, at least 2.
        tasks: The tasks.
        generator: Draws the circle and the numbers.

    Example:
        >>> dealt = deal(4, ["seg", "depth"], torch.Generator().manual_seed(0))
        >>> [sorted(order.tolist()) for order in dealt.values()]
        [[0, 1, 2, 3], [0, 1, 2, 3]]
        >>> bool((dealt["seg"] == dealt["depth"]).any())
        False
    """
    circle = torch.randperm(size, generator=generator)
    spare = int(size > len(tasks))
    places = (torch.randperm(size - spare, generator=generator) + spare).tolist()
    orders = {}
    for i, task in enumerate(tasks):
        order = torch.empty_like(circle)
        order[circle] = circle.roll(places[i % len(places)])
        orders[task] = order
    return orders


def sample_count(outputs: Any, batch: int) -> int:
    """How many samples outputs are of.

    Args:
        outputs: What a forward returned.
        batch: The number of the batch, for messages.

    Raises:
        ValueError: If outputs do not tell, or there is one sample.
    """
    found = [x for x in _tensors(outputs) if x.dim() and x.is_floating_point()]
    sizes = sorted({len(x) for x in [x for x in found if x.requires_grad] or found})
    if not sizes:
        what = type(outputs).__name__
        if isinstance(outputs, Tensor):
            what = f"a tensor of shape {tuple(outputs.shape)}"
        raise ValueError(
            "Outputs have no batch dimension along which they could be paired with other samples' "
            f"targets. Got {what}. Let `forward` return tensors with samples first, and compute "
            "losses in `task_losses`."
        )
    if len(sizes) > 1:
        raise ValueError(
            f"Outputs hold tensors of {', '.join(map(str, sizes))} rows, so they do not tell which "
            "dimension is the batch's. Let `forward` return tensors with samples first."
        )
    if sizes[0] < 2:
        raise ValueError(
            f"Batch {batch} has one sample: there is no other to pair its outputs with. Pass "
            "batches of several samples, more than there are tasks."
        )
    return sizes[0]


def paired(outputs: Any, order: Tensor) -> Any:
    """Outputs in another order of samples.

    Args:
        outputs: What a forward returned: tensors in containers. Those of another length stay.
        order: Which sample's outputs come where, int64 ``[B]``.

    Example:
        >>> paired({"seg": torch.tensor([1.0, 2.0])}, torch.tensor([1, 0]))
        {'seg': tensor([2., 1.])}
    """

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != len(order):
            return tensor
        return tensor.index_select(0, order.to(tensor.device))

    return _mapped(outputs, moved)


def _tensors(outputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, field.name) for field in fields(leaf)])
    return found


def _mapped(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return change(leaf)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            own = {x.name: getattr(leaf, x.name) for x in fields(leaf) if x.init}
            return replace(leaf, **{name: _mapped(value, change) for name, value in own.items()})
        return leaf

    return tree_map(of, outputs)
