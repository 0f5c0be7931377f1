"""Jacobians: the gradients of all tasks as somebody else has computed them, in place of sweeps.

``torchjd.autojac.backward(losses)`` leaves them in ``.jac`` of every parameter, one row for each
loss: ``[tasks, *shape]``. ``mtl_backward`` does so for what tasks share, and leaves the gradient of
what one task has for itself in ``.grad``. Which loss leads to which parameter is still told by its
graph, of which a backward frees what was saved and not how it hangs together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import distributed
from mtprune.holding import Hold
from mtprune.model.graph import reachable
from mtprune.model.layers import Layer
from mtprune.observing.sweeps import Sink

__all__ = ["Jacobian", "check_jacobian", "in_order"]


@dataclass(frozen=True)
class Jacobian:
    """What ``.jac`` holds after a backward of several losses.

    Attributes:
        users: For each task, in the order of rows, the ids of the parameters that its loss leads
            to.
    """

    users: Mapping[str, set[int]]

    @classmethod
    def of(cls, losses: Mapping[str, Tensor], layers: Sequence[Layer]) -> "Jacobian":
        """The Jacobian of losses, in the order in which they were given to the backward.

        Raises:
            RuntimeError: If a layer that a loss leads to lacks it, or has that of other losses.
        """
        found = cls({task: reachable(loss) for task, loss in losses.items()})
        for layer in layers:
            if any(id(layer.parameter) in leaves for leaves in found.users.values()):
                found._check(layer)
        return found

    def feed(
        self,
        tasks: Sequence[str],
        layers: Mapping[int, Layer],
        sink: Sink,
        guarded: bool,
    ) -> bool:
        """Hand the gradients of some tasks' summed losses to ``sink``, layer by layer.

        Args:
            tasks: The tasks.
            layers: The layers by their number.
            sink: Takes the number of a layer and its gradient.
            guarded: Whether to look at all gradients first; False is returned if one is not finite.
        """
        grads = {index: self._gradient(tasks, layer) for index, layer in layers.items()}
        if guarded and not all(bool(torch.isfinite(grad).all()) for grad in grads.values()):
            return False
        for index, grad in grads.items():
            sink(index, grad)
        return True

    def _gradient(self, tasks: Sequence[str], layer: Layer) -> Tensor:
        """The gradient of some tasks' summed losses, of the layer's shape."""
        weight = layer.parameter
        rows = [row for row, task in enumerate(self.users) if task in tasks]
        jacobian: Tensor | None = getattr(weight, "jac", None)
        if jacobian is not None:
            return jacobian[rows[0]] if len(rows) == 1 else jacobian[rows].sum(0)
        if weight.grad is not None and self._owner(weight) in tasks:
            return weight.grad
        return torch.zeros_like(weight)

    def _owner(self, weight: nn.Parameter) -> str | None:
        """The only task whose loss leads to a weight, if it is one."""
        using = [task for task, leaves in self.users.items() if id(weight) in leaves]
        return using[0] if len(using) == 1 else None

    def _check(self, layer: Layer) -> None:
        weight = layer.parameter
        jacobian: Tensor | None = getattr(weight, "jac", None)
        if jacobian is None:
            if weight.grad is None or self._owner(weight) is None:
                raise RuntimeError(
                    f"'{layer.name}' has no Jacobian, though the losses lead there. Call "
                    "observe_jacobian() after torchjd's backward(losses) or mtl_backward(losses, "
                    "features), without `inputs`, and before jac_to_grad(), which takes it away."
                )
        elif jacobian.shape != (len(self.users), *layer.shape):
            raise RuntimeError(
                f"The Jacobian of '{layer.name}' has shape {tuple(jacobian.shape)}. Of the losses "
                f"{list(self.users)} it would have {(len(self.users), *layer.shape)}: hand over "
                "those that were given to the backward, in the same order."
            )


def in_order(losses: object, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Chosen losses in the order in which they were given, which is that of rows."""
    order = losses if isinstance(losses, Mapping) else chosen
    return {task: chosen[task] for task in order if task in chosen}


def check_jacobian(hold: Hold[Any]) -> None:
    """Refuse to take a training's gradients for those of scoring where they are not.

    Raises:
        ValueError: If weights are held in a way that needs a backward of its own.
        RuntimeError: If there are several processes.
    """
    if hold.no_fold:
        raise ValueError(
            "observe_jacobian() cannot score weights behind thresholds, whose gradient in training "
            "is another. Call observe() or observe_losses() before the backward."
        )
    if distributed.world() > 1:
        raise RuntimeError(
            "observe_jacobian() works in one process only: nothing averages `.jac` over ranks. "
            "Call observe() or observe_losses() before the backward."
        )
