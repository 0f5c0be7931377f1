"""Shrinking: dead units leave the model, and its outputs are compared with those before."""

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

__all__ = ["check_shrunk", "groups_of", "shrink"]


def _known_groups(model: nn.Module, batches: Sequence[Any]) -> list[Group]:
    """Heads and neurons that patterns find and a trial can remove."""
    groups = []
    for find in (heads, neurons):
        with suppress(ValueError):  # the model has none
            groups += find(model)
    return complete(model, groups, batches) if groups else []


def groups_of(model: nn.Module, groups: Any, batches: Sequence[Any]) -> list[Group]:
    """The argument ``groups`` of `compress` as a list of groups."""
    if groups is None or groups == "auto":
        return _known_groups(model, batches)
    items = [groups] if isinstance(groups, Group) or hasattr(groups, "groups") else groups
    units: list[Group] = []
    for item in items if isinstance(items, Iterable) else [items]:
        if isinstance(item, Group):
            units.append(item)
        elif hasattr(item, "groups"):
            units += item.groups(model, find_layers(model))
        else:
            raise TypeError(
                "`groups` must be groups (mtprune.structure.Group) or a granularity whose units "
                f"can be removed, mtprune.Channel(example_inputs) for instance. Got {item!r}."
            )
    return units


def shrink(
    work: nn.Module, units: Sequence[Group], batches: Sequence[Any], plan: Plan | None
) -> Removal:
    """Remove the dead units of the groups, or the units that a plan removes."""
    if plan is None:
        return remove(work, units, batches) if units else Removal()
    if plan.removal:
        known = dict(work.named_modules())
        layers = dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in plan.removal.cuts)
        inputs = constants(work, [name for name in layers if name in known], batches)
        apply(work, plan.removal, inputs)
    return plan.removal


def check_shrunk(
    model: nn.Module,
    work: nn.Module,
    expected: Sequence[Any],
    units: Sequence[Group],
    batches: Sequence[Any],
    tolerance: float | None,
) -> None:
    """Compare outputs after removal with those before, and name the group to leave out if not.

    Args:
        model: The model before removal.
        work: The model after removal.
        expected: The outputs before, one for each batch.
        units: The groups that were removed from.
        batches: Example inputs.
        tolerance: As for `verify`.

    Raises:
        RuntimeError: If the model no longer runs, or outputs differ.
    """
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
    """A sentence on the group that changes outputs most when its dead units alone are removed."""
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
