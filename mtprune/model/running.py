"""Running a model without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random state as they were, whatever runs inside."""
    kept = [(buffer, buffer.clone()) for buffer in _buffers(model)]
    random = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for buffer, copy in kept:
            # Batch norm writes without telling autograd, and so do we: the user's graph is alive.
            buffer.data.copy_(copy)
        torch.set_rng_state(random)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            ours = name.endswith("_mask") and name[:-5] + "_orig" in module._parameters
            if buffer is not None and not ours:
                yield buffer
