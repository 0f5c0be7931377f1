"""Running a model without leaving a trace."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["swept", "untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random state as they were, whatever runs inside."""
    random = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with _same_buffers(model):
            yield
    finally:
        torch.set_rng_state(random)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def swept(model: nn.Module) -> Iterator[None]:
    """The same around a sweep, which draws no numbers itself.

    A part of the forward that is run again may, though, if it was told not to mind the random
    state. Where several threads run, nobody knows who has drawn, and numbers that another thread
    has drawn must not come again: then the random state is left as it is.
    """
    alone = threading.active_count() == 1
    random = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        with _same_buffers(model):
            yield
    finally:
        if alone and threading.active_count() == 1:
            if not torch.equal(torch.get_rng_state(), random):
                torch.set_rng_state(random)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in _buffers(model)]
    try:
        yield
    finally:
        for buffer, copy in kept:
            # Batch norm writes without telling autograd, and so do we: the user's graph is alive.
            buffer.data.copy_(copy)


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            ours = name.endswith("_mask") and name[:-5] + "_orig" in module._parameters
            if buffer is not None and not ours:
                yield buffer
