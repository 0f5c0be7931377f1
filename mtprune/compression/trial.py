"""Trial: whether groups are complete, by removing some of their units from a copy."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.batchnorm import recalibrate_bn
from mtprune.compression.dead import keep_some
from mtprune.compression.removal import removal_of
from mtprune.compression.resizing import resize
from mtprune.compression.running import named_tensors, run, unnested
from mtprune.compression.verify import ROUNDING, difference
from mtprune.model.routing import close
from mtprune.structure import NOBODY, Group

__all__ = ["complete", "tried", "why_not"]


@torch.no_grad()
def complete(model: nn.Module, groups: Sequence[Group], batches: Sequence[Any]) -> list[Group]:
    """The groups whose units can be removed once the weights that read them are zero.

    In a copy of the model, the weights that read some units of each group become zero, and then
    these units are removed. If removal changes the outputs, or the model no longer runs, the group
    does not name all tensors that depend on its units.

    Args:
        model: The model; it is left as it is.
        groups: The groups.
        batches: The example inputs that the model is run on.

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
    return tried(model, groups, batches)[0]


@torch.no_grad()
def tried(
    model: nn.Module, groups: Sequence[Group], batches: Sequence[Any]
) -> tuple[list[Group], dict[str, str]]:
    """The groups that `complete` gives, and why the others do not pass, by their names.

    Args:
        model: The model; it is left as it is.
        groups: The groups.
        batches: The example inputs that the model is run on.
    """
    random = torch.Generator().manual_seed(0)
    base = _perturbed_copy(model, batches, random)
    with unnested(base):
        pairs = [(group, _some_units(base, group, random)) for group in groups]
        reasons = {group.name: _alone(group) for group, dead in pairs if not dead.any()}
        pairs = [(group, dead) for group, dead in pairs if dead.any()]
        passed = _removable(base, pairs, batches)
        if len(passed) < len(pairs) and not _can_remove(base, passed, batches):
            # Each half passed alone, and together they do not: add them one by one.
            candidates, passed = passed, []
            for pair in candidates:
                if _can_remove(base, [*passed, pair], batches):
                    passed.append(pair)
        fine = [group for group, _ in passed]
        for group, dead in pairs:
            if group not in fine:
                reasons[group.name] = _obstacle(base, [(group, dead)], batches) or _TOGETHER
    return fine, reasons


def _perturbed_copy(model: nn.Module, batches: Sequence[Any], random: torch.Generator) -> nn.Module:
    """A copy in which every dependency shows in the outputs."""
    base = copy.deepcopy(model).eval()
    for parameter in base.parameters():
        # Zeros, as in a last layer at the start, would hide it.
        if parameter.is_floating_point() and parameter.numel():
            size = float(parameter.abs().mean()) or 0.1
            noise = torch.randn(parameter.shape, generator=random) * size / 4
            parameter.add_(noise.to(parameter))
    with unnested(base), torch.random.fork_rng(devices=[]), suppress(ValueError):
        # So would batch norms that shrink it below rounding. Batches may be too small to measure.
        recalibrate_bn(base, batches)
    with unnested(base):
        tensors = [t for out in run(base, batches) for _, t in named_tensors(out)]
    finite = all(t.isfinite().all() for t in tensors)
    return base if finite else copy.deepcopy(model).eval()


def _some_units(model: nn.Module, group: Group, random: torch.Generator) -> Tensor:
    """A random number of random units, bool ``[size]``, without which no tensor is empty.

    The number that stays does not fit where units are put into rows by their number, into heads for
    instance: it is a prime that does not divide the size.
    """
    least = max(2, group.least)
    most = max(least, int(0.8 * group.size))
    primes = [n for n in range(least, most + 1) if all(n % d for d in range(2, int(n**0.5) + 1))]
    fitting = [n for n in primes if n >= 0.2 * group.size and group.size % n] or [group.size - 1]
    stay = fitting[int(torch.randint(len(fitting), (), generator=random))]
    order = torch.randperm(group.size, generator=random)
    dead = torch.zeros(group.size, dtype=torch.bool)
    dead[order[max(1, stay) :]] = True
    keep_some(model, group, torch.zeros_like(dead), dead)
    return dead


def _alone(group: Group) -> str:
    """Why no unit of a group can go."""
    if group.least >= group.size > 1:
        return f"all {group.size} of its units are needed"
    return "it has a single unit"


_TOGETHER = "with some units of other groups, some of them cannot be removed"

_Pairs = list[tuple[Group, Tensor]]
"""Groups, each with the units to remove, bool ``[size]``."""


def _removable(base: nn.Module, pairs: _Pairs, batches: Sequence[Any]) -> _Pairs:
    """The pairs that pass the trial, by halving; those of two halves may not pass together."""
    if not pairs or _can_remove(base, pairs, batches):
        return pairs
    if len(pairs) == 1:
        return []
    middle = len(pairs) // 2
    left, right = pairs[:middle], pairs[middle:]
    return [*_removable(base, left, batches), *_removable(base, right, batches)]


def _can_remove(base: nn.Module, pairs: _Pairs, batches: Sequence[Any]) -> bool:
    """Whether all these units can be removed together once no weight reads them."""
    return not _obstacle(base, pairs, batches)


@torch.no_grad()
def why_not(model: nn.Module, group: Group, batches: Sequence[Any]) -> str:
    """Why a group does not pass the trial; empty if it does.

    Args:
        model: The model; it is left as it is.
        group: The group.
        batches: The example inputs that the model is run on.
    """
    random = torch.Generator().manual_seed(0)
    base = _perturbed_copy(model, batches, random)
    with unnested(base):
        dead = _some_units(base, group, random)
        return _obstacle(base, [(group, dead)], batches) if dead.any() else _alone(group)


def _obstacle(base: nn.Module, pairs: _Pairs, batches: Sequence[Any]) -> str:
    """Why these units cannot be removed together once no weight reads them; empty if they can."""
    masked = copy.deepcopy(base)
    close(masked, [group for group, _ in pairs])
    for group, dead in pairs:
        ends = "in" if group.gate is None else "gate"
        for member in group.members:
            if member.role == ends:
                tensor = masked.get_parameter(member.tensor).detach()
                index = member.index()
                unread = dead[index.clamp_min(0)] & (index != NOBODY)
                tensor.movedim(member.dim, 0)[unread.to(tensor.device)] = 0
    try:
        expected = run(masked, batches)
        resize(masked, removal_of(masked, [g for g, _ in pairs], [dead for _, dead in pairs]))
        got = run(masked, batches)
    except ValueError as error:
        return f"without some of them the model does not run: {error.__cause__ or error}"
    for before, after in zip(expected, got, strict=True):
        tensors = dict(named_tensors(after))
        for name, tensor in named_tensors(before):
            off = difference(tensor, tensors[name]) if name in tensors else float("inf")
            if off > ROUNDING.get(tensor.dtype, 0.0):
                return "without some of them, which nobody reads, the model gives other outputs"
    return ""
