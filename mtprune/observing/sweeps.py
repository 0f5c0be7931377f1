"""Sweeps: one pass of gradients over the graph of a loss, each handed on as it arrives."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mtprune import distributed
from mtprune.bits import zeroed
from mtprune.census import Census
from mtprune.holding import Hold
from mtprune.model.graph import advised
from mtprune.model.layers import Layer

__all__ = ["backward", "check_fold", "fold", "gather", "scatter", "stream"]

Sink = Callable[[int, Tensor], None]
"""Takes the number of a layer and its dense gradient."""


def check_fold(hold: Hold[Any], census: Census) -> None:
    """Refuse to let the scoring be the training's backward where it cannot be.

    Raises:
        ValueError: If the weights are held in a way that needs a backward of their own.
        RuntimeError: If there are several processes.
    """
    if hold.no_fold:
        raise ValueError(hold.no_fold)
    if distributed.world() > 1 or census.is_scattered:
        raise RuntimeError(
            "fold=True works in one process only: in several, gradients are averaged by hooks "
            "that allow one backward per forward. Call observe() without it, then backward()."
        )


def stream(loss: Tensor, targets: Sequence[int], parameters: Sequence[Tensor], sink: Sink) -> None:
    """Feed each gradient to ``sink`` as it arrives; none outlives its hook."""
    stubs: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    handles = []

    def consume(index: int) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            sink(index, grad.to_dense() if grad.is_sparse else grad)
            # One zero, seen as many: autograd keeps a number instead of a gradient.
            stub = stubs.setdefault((grad.dtype, grad.device), grad.new_zeros(()).to_dense())
            return stub.expand(grad.shape)

        return hook

    try:
        for index, parameter in zip(targets, parameters, strict=True):
            handles.append(parameter.register_hook(consume(index)))
        _grad(loss, parameters)
    finally:
        for handle in handles:
            handle.remove()


def scatter(
    loss: Tensor, targets: Sequence[int], layers: Sequence[Layer], sink: Sink, guarded: bool
) -> bool:
    """Feed what is here of each gradient, its mean over ranks, to ``sink`` as it arrives.

    Gradients are sent in the order of the backward, which is the same on all ranks where it gathers
    weights from all of them. One is on its way while the next is computed: no more than two whole
    gradients are alive.

    Args:
        loss: What to differentiate.
        targets: Which layers.
        layers: The layers themselves.
        sink: Takes the parts.
        guarded: See `gather`.
    """
    waiting: list[tuple[int, Tensor]] = []
    under_way: deque[tuple[int, Callable[[], Tensor]]] = deque()
    stubs: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    handles = []

    def receive() -> None:
        index, arrived = under_way.popleft()
        if guarded:
            waiting.append((index, arrived()))
        else:
            sink(index, arrived())

    def consume(index: int, layer: Layer) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            dense = grad.to_dense() if grad.is_sparse else grad
            under_way.append((index, layer.part.averaged(dense)))
            if len(under_way) > 1:
                receive()
            stub = stubs.setdefault((grad.dtype, grad.device), grad.new_zeros(()).to_dense())
            return stub.expand(grad.shape)

        return hook

    leaves = [layer.leaf for layer in layers]
    try:
        for index, layer, leaf in zip(targets, layers, leaves, strict=True):
            handles.append(leaf.register_hook(consume(index, layer)))
        with layers[0].sharding.quiet():
            _grad(loss, leaves)
        while under_way:
            receive()
    finally:
        for handle in handles:
            handle.remove()
    if guarded:
        broken = [~torch.isfinite(mine).all() for _, mine in waiting]
        if bool(distributed.any_rank(torch.stack(broken).any())):
            return False
    for index, mine in waiting:
        sink(index, mine)
    return True


def fold(
    loss: Tensor,
    targets: Sequence[int],
    parameters: Sequence[Tensor],
    sink: Sink,
    guarded: bool,
    shown: Mapping[int, Tensor | None],
    keep: bool,
) -> bool:
    """A backward whose gradients are fed to ``sink`` on their way into ``.grad``.

    Args:
        loss: What to differentiate.
        targets: The layers to score.
        parameters: Their Parameters.
        sink: Takes their dense gradients.
        guarded: See `Collector.add`; False is returned if a gradient is not finite.
        shown: For each target the mask that training's gradient goes through, or None.
        keep: Whether the graph is needed again.
    """
    waiting: list[tuple[int, Tensor]] = []
    handles = []

    def consume(index: int) -> Callable[[Tensor], Tensor | None]:
        def hook(grad: Tensor) -> Tensor | None:
            dense = grad.to_dense() if grad.is_sparse else grad
            if guarded:
                waiting.append((index, dense))
            else:
                sink(index, dense)
            mask = shown[index]
            return None if mask is None else zeroed(dense, mask)

        return hook

    try:
        for index, parameter in zip(targets, parameters, strict=True):
            handles.append(parameter.register_hook(consume(index)))
        with advised():
            torch.autograd.backward(loss, retain_graph=keep)
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(torch.isfinite(grad).all()) for _, grad in waiting):
        return False
    for index, grad in waiting:
        sink(index, grad)
    return True


def backward(losses: Sequence[Tensor], scale: float) -> None:
    """The training's backward of summed losses."""
    total = torch.stack(list(losses)).sum()
    with advised():
        torch.autograd.backward(total if scale == 1.0 else total * scale)


def gather(
    loss: Tensor,
    targets: Sequence[int],
    parameters: Sequence[Tensor],
    sink: Sink,
    guarded: bool,
) -> bool:
    """All gradients at once, averaged over ranks in a fixed order; False if one is not finite."""
    # A loss without a graph is that of a rank which lacks the task.
    found = [None] * len(parameters) if loss.grad_fn is None else _grad(loss, parameters)
    grads = [
        torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
        for p, g in zip(parameters, found, strict=True)
    ]
    for grad in grads:
        distributed.mean_(grad)
    if guarded and not all(bool(torch.isfinite(grad).all()) for grad in grads):
        return False
    for index, grad in zip(targets, grads, strict=True):
        sink(index, grad)
    return True


def _grad(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    with advised():
        return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
