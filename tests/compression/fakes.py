"""Shared by the tests of compression: a clock with given times, and random zeros."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mtprune.compression.experts import OpenExperts
from mtprune.compression.forms import Form
from mtprune.model.layers import find_layers


class FakeTimes:
    """A measure with a given time for each form, 10 ms for all others, and for the whole model.

    ``experts`` is the time of experts one by one, ``dense`` that of stacks too.
    """

    def __init__(self, whole: tuple[float, float] = (2.0, 1.0), **ms: float) -> None:
        self.ms = {name.replace("two_four", "2:4"): value for name, value in ms.items()}
        self.whole = whole
        self.timed = 0

    def __call__(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        self.timed += 1
        for function in functions:
            function()
        modules = [getattr(function, "func", None) for function in functions]
        if modules[0] is None:
            return list(self.whole)
        return [self.ms.get(_kind(m), 10.0) if isinstance(m, nn.Module) else 10.0 for m in modules]


def _kind(module: nn.Module) -> str:
    if isinstance(module, OpenExperts):
        return "experts"
    return module.choice if isinstance(module, Form) else "dense"


def prefer(choice: str) -> FakeTimes:
    return FakeTimes(**{choice: 0.1, "dense": 1.0, "experts": 0.1})


@torch.no_grad()
def zero_(model: nn.Module, sparsity: float, rows: float = 0.0, cols: float = 0.0) -> nn.Module:
    """Random zeros, and whole dead rows and columns, in all that is prunable."""
    for layer in find_layers(model):
        weight = layer.parameter
        keep = torch.rand(layer.shape) >= sparsity
        keep &= (torch.rand(layer.shape[0]) >= rows).view(-1, *[1] * (weight.dim() - 1))
        if weight.dim() > 1:
            keep &= (torch.rand(layer.shape[1]) >= cols).view(-1, *[1] * (weight.dim() - 2))
        weight.mul_(keep.to(weight.dtype))
    return model


def leaves(outputs: Any) -> list[torch.Tensor]:
    from mtprune.compression.running import named_tensors

    return [tensor for _, tensor in named_tensors(outputs)]
