"""Optimizers: counting their real steps, and starting weights anew."""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtprune.components import Layer

__all__ = ["Follower", "follow", "raw", "restart_"]


class Follower(Protocol):
    """Who wants to know of optimizer steps."""

    def _after_optimizer_step(self) -> None: ...


def raw(optimizer: Any, layers: Sequence[Layer]) -> Optimizer:
    """The torch optimizer itself, also from inside a wrapper that holds it as ``optimizer``.

    Raises:
        TypeError: If there is none.
        ValueError: If it trains none of the layers.
    """
    inner = optimizer
    while not isinstance(inner, Optimizer) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer. Got {optimizer!r}.")
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    if not any(id(layer.parameter) in trained for layer in layers):
        raise ValueError(
            "`optimizer` trains none of the prunable weights of this model. Build it on the "
            "parameters of the same model."
        )
    return inner


def follow(optimizer: Optimizer, follower: Follower) -> RemovableHandle:
    """Call the follower after every real step; a step that a GradScaler skips is none."""
    reference = weakref.ref(follower)

    def after_step(*_: object) -> None:
        alive = reference()
        if alive is not None:
            alive._after_optimizer_step()

    return optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def restart_(optimizer: Optimizer, layer: Layer, where: Tensor) -> None:
    """Let some weights start at zero, with none of the optimizer's memory of them.

    All state of the weight's shape is forgotten: momenta, second moments, and what there may be.
    """
    layer.parameter.masked_fill_(where, 0.0)
    for value in optimizer.state.get(layer.parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == where.shape:
            value.masked_fill_(where.to(value.device), 0)
