"""Tensors that say they are on an accelerator: what is done there can be seen without one."""

import torch
from torch import Tensor


class Place(str):
    """The CPU, under another name."""

    type = "elsewhere"


class Elsewhere(Tensor):
    """A tensor on the CPU that says otherwise, as does what is computed from it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return Place("cpu")  # type: ignore[return-value]


def elsewhere(tensor: Tensor) -> Tensor:
    """The same numbers, elsewhere."""
    return tensor.as_subclass(Elsewhere)
