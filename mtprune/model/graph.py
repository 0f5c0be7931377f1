"""The autograd graph of a loss: which leaves it leads to, and what its errors mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["advised", "bare", "leave_mark", "marks", "reachable"]

_MARK = "mtprune"
_COUNTER = count()

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
    leaves: set[int] = set()
    for node in _nodes(loss):
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(_ADVICE["use_reentrant=True"])
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.add(id(variable))
    return leaves


def bare() -> saved_tensors_hooks:
    """Build graphs that tell where they lead and keep no activations: for a forward alone.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> with bare():
        ...     loss = layer(torch.ones(1, 2)).exp().sum()
        >>> reachable(loss) == {id(layer.weight), id(layer.bias)}
        True
    """

    def refuse(nothing: None) -> Tensor:
        raise RuntimeError(
            "The method looks at no gradient, so prune() keeps nothing to differentiate, and a "
            "loss did. Take observe() and step() in place of prune()."
        )

    return saved_tensors_hooks(lambda tensor: None, refuse)


def leave_mark(output: Tensor) -> int:
    """Mark the node that made a tensor, in addition to marks it has; the mark.

    A mark keeps nothing alive.
    """
    mark = next(_COUNTER)
    assert output.grad_fn is not None
    _metadata(output.grad_fn).setdefault(_MARK, []).append(mark)
    return mark


def marks(loss: Tensor) -> set[int]:
    """The marks in the autograd graph of a loss.

    Example:
        >>> layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
        >>> output, unused = layer(torch.ones(1, 2)), other(torch.ones(1, 2))
        >>> mark, _ = leave_mark(output), leave_mark(unused)
        >>> marks(output.relu().sum()) == {mark}
        True
    """
    return {mark for node in _nodes(loss) for mark in _metadata(node).get(_MARK, ())}


def _metadata(node: torch.autograd.graph.Node) -> dict[str, list[int]]:
    """A dictionary that a node keeps; torch declares it as a method."""
    kept: Any = node.metadata
    metadata: dict[str, list[int]] = kept
    return metadata


def _nodes(loss: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """All nodes of the autograd graph of a loss."""
    seen = set()
    stack: list[torch.autograd.graph.Node | None] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


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
