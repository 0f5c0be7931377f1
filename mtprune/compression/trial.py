"""Trial: whether groups are complete, found out by removing some of their units."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.batchnorm import recalibrate_bn
from mtprune.compression.removal import removal_of, resize, spare
from mtprune.compression.running import named_tensors, run, unnested
from mtprune.compression.verify import TOLERANCES, difference
from mtprune.structure import NOBODY, Group

__all__ = ["complete"]


@torch.no_grad()
def complete(model: nn.Module, groups: Sequence[Group], batches: Sequence[Any]) -> list[Group]:
    """The groups of which any unit can be removed once its readers have zeros for it.

    In a copy of the model, some units of each group are no longer read, and then removed. If
    that changes the outputs, or the model no longer runs, more depends on them than the group says.

    Args:
        model: The model; it is left as it is.
        groups: The groups.
        batches: What it is run on.

    Example:
        >>> from mtprune.structure import Member
        >>> model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Softmax(-1), nn.Linear(4, 1))
        >>> units = (0, 1, 2, 3)
        >>> members = (Member("0.weight", 0, units), Member("2.weight", 1, units, "in"))
        >>> complete(model, [Group("softmax", 4, members)], [torch.ones(1, 2)])
        []
        >>> model[1] = nn.Sigmoid()
        >>> len(complete(model, [Group("sigmoid", 4, members)], [torch.ones(1, 2)]))
        1
    """
    random = torch.Generator().manual_seed(0)
    base = _shaken(model, batches, random)
    with unnested(base):
        pairs = [(group, _some(base, group, random)) for group in groups]
        pairs = [(group, dead) for group, dead in pairs if dead.any()]
        found = _holding(base, pairs, batches)
        if len(found) < len(pairs) and not _holds(base, found, batches):
            tried, found = found, []
            for pair in tried:
                if _holds(base, [*found, pair], batches):
                    found.append(pair)
    return [group for group, _ in found]


def _shaken(model: nn.Module, batches: Sequence[Any], random: torch.Generator) -> nn.Module:
    """A copy in which nothing hides what depends on it."""
    base = copy.deepcopy(model).eval()
    for parameter in base.parameters():
        # Not by zeros, as in a last layer at the start.
        if parameter.is_floating_point() and parameter.numel():
            size = float(parameter.abs().mean()) or 0.1
            noise = torch.randn(parameter.shape, generator=random) * size / 4
            parameter.add_(noise.to(parameter))
    with unnested(base), torch.random.fork_rng(devices=[]), suppress(ValueError):
        # Nor by being so faint that it is lost in rounding. There may be too little to measure.
        recalibrate_bn(base, batches)
    with unnested(base):
        tensors = [t for out in run(base, batches) for _, t in named_tensors(out)]
    finite = all(t.isfinite().all() for t in tensors)
    return base if finite else copy.deepcopy(model).eval()


def _some(model: nn.Module, group: Group, random: torch.Generator) -> Tensor:
    """A random number of random units, which leave something of every tensor."""
    share = 0.2 + 0.6 * float(torch.rand(1, generator=random))
    order = torch.randperm(group.size, generator=random)
    dead = torch.zeros(group.size, dtype=torch.bool)
    dead[order[: max(1, int(share * group.size))]] = True
    spare(model, group, torch.zeros_like(dead), dead)
    return dead


_Pairs = list[tuple[Group, Tensor]]


def _holding(base: nn.Module, pairs: _Pairs, batches: Sequence[Any]) -> _Pairs:
    """Those that can go, found by halving."""
    if not pairs or _holds(base, pairs, batches):
        return pairs
    if len(pairs) == 1:
        return []
    middle = len(pairs) // 2
    left, right = pairs[:middle], pairs[middle:]
    return [*_holding(base, left, batches), *_holding(base, right, batches)]


def _holds(base: nn.Module, pairs: _Pairs, batches: Sequence[Any]) -> bool:
    masked = copy.deepcopy(base)
    for group, dead in pairs:
        for member in group.members:
            if member.role == "in":
                tensor = masked.get_parameter(member.tensor).detach()
                index = member.index()
                lost = dead[index.clamp_min(0)] & (index != NOBODY)
                tensor.movedim(member.dim, 0)[lost.to(tensor.device)] = 0
    expected = run(masked, batches)
    try:
        resize(masked, removal_of(masked, [g for g, _ in pairs], [dead for _, dead in pairs]))
        got = run(masked, batches)
    except ValueError:
        return False
    for before, after in zip(expected, got, strict=True):
        found = dict(named_tensors(after))
        for name, tensor in named_tensors(before):
            # Rounding is ten times smaller than this, and a missing unit far larger.
            off = difference(tensor, found[name]) if name in found else float("inf")
            if off > 10 * TOLERANCES.get(tensor.dtype, 0.0):
                return False
    return True
