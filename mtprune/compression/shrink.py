"""Shrinking: the units a model may lose, the dead ones gone, and what is left compared."""

import copy
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from mtprune.compression.plan import Plan, Removal
from mtprune.compression.removal import apply, constants, remove
from mtprune.compression.running import named_tensors, run, unnested
from mtprune.compression.trial import complete
from mtprune.compression.verify import difference, verify
from mtprune.model.layers import find_layers
from mtprune.patterns import heads, neurons
from mtprune.structure import Group

__all__ = ["check_shrunk", "shrink", "units_of"]


def _known(model: nn.Module, batches: Sequence[Any]) -> list[Group]:
    """Heads and neurons that are where patterns look, and can be removed."""
    found = []
    for look in (heads, neurons):
        with suppress(ValueError):  # there are none
            found += look(model)
    return complete(model, found, batches) if found else []


def units_of(model: nn.Module, groups: Any, batches: Sequence[Any]) -> list[Group]:
    """The groups in what the user gave."""
    if groups is None or groups == "auto":
        return _known(model, batches)
    given = [groups] if isinstance(groups, Group) or hasattr(groups, "groups") else groups
    found: list[Group] = []
    for item in given if isinstance(given, Iterable) else [given]:
        if isinstance(item, Group):
            found.append(item)
        elif hasattr(item, "groups"):
            found += item.groups(model, find_layers(model))
        else:
            raise TypeError(
                "`groups` must be groups (mtprune.structure.Group) or a granularity whose units "
                f"can be removed, mtprune.Channel(example_inputs) for instance. Got {item!r}."
            )
    return found


def shrink(
    work: nn.Module, units: Sequence[Group], batches: Sequence[Any], plan: Plan | None
) -> Removal:
    """Remove what is dead, or what the plan says."""
    if plan is None:
        return remove(work, units, batches) if units else Removal()
    if plan.removal:
        layers = dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in plan.removal.cuts)
        apply(work, plan.removal, constants(work, _layers(work, layers), batches))
    return plan.removal


def _layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    known = dict(model.named_modules())
    return [name for name in names if name in known]


def check_shrunk(
    model: nn.Module,
    work: nn.Module,
    expected: Sequence[Any],
    units: Sequence[Group],
    batches: Sequence[Any],
    tolerance: float | None,
) -> None:
    """Compare what is left after removal, and name the group that should not have been removed."""
    worst = partial(_worst_group, model, expected, units, batches)
    try:
        got = run(work, batches)
    except ValueError as error:
        raise RuntimeError(
            f"Without its dead units the model does not run: {error.__cause__}." + worst()
        ) from error
    verify(expected, got, tolerance, worst)


def _worst_group(
    model: nn.Module, expected: Sequence[Any], units: Sequence[Group], batches: Sequence[Any]
) -> str:
    """Which group does most harm when its dead units alone are removed."""
    worst, most = None, -1.0
    for group in units:
        alone = copy.deepcopy(model).eval()
        with unnested(alone):
            if not remove(alone, [group], batches):
                continue
            try:
                pairs = zip(expected, run(alone, batches), strict=True)
                off = max(
                    difference(a, b)
                    for before, after in pairs
                    for (_, a), (_, b) in zip(
                        named_tensors(before), named_tensors(after), strict=True
                    )
                )
            except ValueError:
                off = float("inf")
        if off > most:
            worst, most = group, off
    if worst is None:
        return " The plan removes units that are not dead in this model."
    layers = dict.fromkeys(m.tensor.rpartition(".")[0] for m in worst.members if m.role == "in")
    return (
        f" The worst group is '{worst.name}', which {list(layers)} read, off by {most:.1e} alone: "
        "more than its members depends on it. Leave it out of `groups`."
    )
