"""Experts: what a pattern says of a router and its experts, and the units it finds there."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mtprune.model.paths import at, in_runs, numbers
from mtprune.structure import Group, Member

__all__ = ["Experts", "match_experts"]


@dataclass(frozen=True)
class Experts:
    """A block in which a router sends each token to some of many experts.

    A unit is an expert, with its row of the router. Experts of which that row is zero are closed:
    they get no token.

    Attributes:
        name: The name in errors.
        gate: The path of the router's weight, with a row for each expert.
        up: The paths of tensors with a first layer for each expert, along their first dimension.
        down: The path of the tensor with a last layer for each expert.
        top_k: The path of the number of experts of each token; paths of several names, of which the
            first that is there counts, are separated by ``|``.
        along: Paths of further tensors with an entry for each expert, along their first dimension;
            those that are not there do not count.
        counts: Paths of numbers of experts.
        only: Paths with the values that a block must have there to fit.
        why_not: Why experts of such a block cannot be removed; empty if they can.

    Example:
        >>> import torch
        >>> from mtprune.patterns import experts
        >>> class Stacks(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_experts = 4
        ...         self.up = nn.Parameter(torch.rand(4, 6, 2))
        ...         self.down = nn.Parameter(torch.rand(4, 2, 6))
        >>> class Block(nn.Module):
        ...     top_k = 2
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router, self.experts = nn.Linear(2, 4, bias=False), Stacks()
        >>> mine = Experts("mine", "router.weight", ("experts.up",), "experts.down", "top_k")
        >>> group, = experts(Block(), (mine,))
        >>> group.name, group.size, group.least, group.gate.tensor
        ('experts', 4, 2, 'router.weight')
    """

    name: str
    gate: str
    up: tuple[str, ...]
    down: str
    top_k: str
    along: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    only: tuple[tuple[str, Any], ...] = ()
    why_not: str = ""


def match_experts(block: str, module: nn.Module, pattern: Experts) -> Group | None:
    """The experts of a module, or None if the pattern does not fit.

    Args:
        block: The name of the module, with a dot behind it; empty for the whole model.
        module: The module.
        pattern: The pattern.
    """
    gate = at(module, pattern.gate)
    stacks = [at(module, path) for path in (*pattern.up, pattern.down)]
    chosen = [n for n in numbers(module, pattern.top_k.split("|")) if n > 0]
    if not isinstance(gate, Tensor) or gate.dim() != 2 or not chosen:
        return None
    size = len(gate)
    if not all(isinstance(x, Tensor) and x.dim() == 3 and len(x) == size for x in stacks):
        return None
    if not chosen[0] <= size:
        return None
    units = in_runs(size, size)
    further = [
        path
        for path in pattern.along
        if isinstance(tensor := at(module, path), Tensor) and tensor.dim() and len(tensor) == size
    ]
    members = (
        *(Member(block + path, 0, units, "out") for path in pattern.up),
        *(Member(block + path, 0, units, "with") for path in further),
        Member(block + pattern.gate, 0, units, "gate"),
        Member(block + pattern.down, 0, units, "in"),
    )
    counts = tuple(block + path for path in pattern.counts if numbers(module, [path]) == [size])
    return Group(f"{block}experts", size, members, counts=counts, least=chosen[0])
