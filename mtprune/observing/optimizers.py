"""Optimizers: finding them inside wrappers, and counting their real steps."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from mtprune.model.layers import Layer
from mtprune.model.parallel import check_optimizer

__all__ = ["Follower", "follow", "raw"]


class Follower(Protocol):
    """Who wants to know of optimizer steps."""

    def _after_optimizer_step(self) -> None: ...


def raw(optimizer: Any, layers: Sequence[Layer]) -> Optimizer:
    """The torch optimizer itself, also from inside a wrapper that holds it as ``optimizer``.

    Raises:
        TypeError: If there is none.
        ValueError: If it trains none of the layers.
    """
    inner: Any = optimizer
    while not _steps_itself(inner) and hasattr(inner, "optimizer"):
        check_optimizer(inner)
        inner = inner.optimizer
    check_optimizer(inner)
    if not _steps_itself(inner):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer. Got {optimizer!r}.")
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    if not any(id(layer.parameter) in trained for layer in layers):
        raise ValueError(
            "`optimizer` trains none of the prunable weights of this model. Build it on the "
            "parameters of the same model."
        )
    return inner


def _steps_itself(optimizer: Any) -> TypeGuard[Optimizer]:
    """Whether it is a torch optimizer with hooks of its own.

    A wrapper may be of that class without them, as accelerate's is. One that has them, and an
    optimizer inside too, is left as it is: what it does after the inner step moves weights as well.
    """
    return isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks")


def follow(
    optimizer: Optimizer, follower: Follower, orphaned: Callable[[], None]
) -> RemovableHandle:
    """Call the follower after every real step; a step that a GradScaler skips is none.

    Args:
        optimizer: The optimizer.
        follower: Who is called, as long as somebody else keeps it.
        orphaned: What is called in its place when it is gone; it must not keep the follower.
    """
    reference = weakref.ref(follower)

    def after_step(*_: object) -> None:
        alive = reference()
        if alive is not None:
            alive._after_optimizer_step()
        else:
            orphaned()

    return optimizer.register_step_post_hook(after_step)
