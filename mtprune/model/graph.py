"""The autograd graph of a loss: which leaves it leads to, and what its errors mean."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["advised", "reachable"]

_ADVICE = {
    "a second time": "Call observe() before backward(): the graph of this loss is gone.",
    "modified by an inplace operation": (
        "Call observe() before optimizer.step(): the weights have changed since the forward."
    ),
    "use_reentrant=True": (
        "Reentrant activation checkpointing cannot be observed. Use "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
    ),
    "donated buffer": (
        "This compiled graph frees its buffers after one backward. Set "
        "torch._functorch.config.donated_buffer = False before compiling."
    ),
}


def reachable(loss: Tensor) -> set[int]:
    """The ids of all leaf tensors to which the autograd graph of a loss leads.

    Raises:
        RuntimeError: If reentrant checkpointing hides what lies behind it.
    """
    found: set[int] = set()
    seen = set()
    stack: list[torch.autograd.graph.Node | None] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(_ADVICE["use_reentrant=True"])
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found


@contextmanager
def advised() -> Iterator[None]:
    """Say what to do where autograd says what is wrong."""
    try:
        yield
    except RuntimeError as error:
        for symptom, advice in _ADVICE.items():
            if symptom in str(error):
                raise RuntimeError(advice) from error
        raise
