"""Shrinking: dead units leave the model, and its outputs are compared with those before."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from mtprune.compression.constants import constants
from mtprune.compression.dead import pruned, removed
from mtprune.compression.others import Others
from mtprune.compression.plan import Plan, Removal
from mtprune.compression.removal import apply, remove
from mtprune.compression.running import named_tensors, run, unnested
from mtprune.compression.trial import complete
from mtprune.compression.verify import Reference, difference
from mtprune.model.layers import find_layers
from mtprune.model.routing import closes, reopen
from mtprune.patterns import candidates
from mtprune.structure import Group

__all__ = ["check_shrunk", "groups_of", "shrink"]


@dataclass(frozen=True)
class Units:
    """The units of a model.

    Attributes:
        groups: Those that can be removed.
        refused: Those that patterns find and a trial cannot remove.
    """

    groups: Sequence[Group] = ()
    refused: Sequence[Group] = ()

    def stayed(self, model: nn.Module, removal: Removal, others: Others) -> tuple[str, ...]:
        """A sentence for each group of which pruned units stay, with the reason.

        Args:
            model: The model before removal.
            removal: What was removed.
            others: The inputs on which constants had to be constants.
        """
        lines = []
        for group in (*self.groups, *self.refused):
            gone, dead = removed(group, removal), pruned(model, group)
            count = int((dead & ~gone).count_nonzero())
            if not count:
                continue
            if group.gate is not None and not closes(model, group):
                why = (
                    "its router still chooses among them, or too few would be left: "
                    "mtprune.patterns.close_experts(model) closes those whose row is zero"
                )
            elif group in self.refused:
                why = "without some of its units, on trial, the model no longer ran or gave others"
            elif others.unvaried:
                why = f"constants stay, because {' and '.join(others.unvaried)} could not be varied"
            elif bool((dead | gone).all()):
                why = "no layer can be left without any"
            else:
                why = "what they give depends on the inputs, or is read at padded borders"
            lines.append(f"stayed: {count} pruned of {group.size} units of '{group.name}': {why}")
        return tuple(lines)


def _known_groups(model: nn.Module, batches: Sequence[Any]) -> Units:
    """Heads and neurons that patterns find, and which of them a trial can remove."""
    groups, hopeless = candidates(model)
    hopeful = [group for group in groups if group.name not in hopeless]
    fine = complete(model, hopeful, batches) if hopeful else []
    return Units(fine, [group for group in groups if group not in fine])


def groups_of(model: nn.Module, groups: Any, batches: Sequence[Any]) -> Units:
    """The argument ``groups`` of `compress` as groups."""
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
    return Units(units)


def shrink(
    work: nn.Module, units: Sequence[Group], reference: Reference, plan: Plan | None
) -> Removal:
    """Remove the dead units of the groups, or the units that a plan removes."""
    if plan is None:
        removal = remove(work, units, reference.proving) if units else Removal()
        reopen(work.modules())
        return removal
    if plan.removal:
        known = dict(work.named_modules())
        layers = dict.fromkeys(cut.tensor.rpartition(".")[0] for cut in plan.removal.cuts)
        names = [name for name in layers if name in known]
        seen = [*reference.batches, *reference.others.batches]
        try:
            apply(work, plan.removal, constants(work, names, seen))
        except ValueError as error:
            raise ValueError(f"The plan does not fit this model: {error}") from error
    return plan.removal


def check_shrunk(
    work: nn.Module, reference: Reference, units: Sequence[Group], tolerance: float | None
) -> None:
    """Compare outputs after removal with those before, and name the group to leave out if not.

    Args:
        work: The model after removal.
        reference: The model before.
        units: The groups that were removed from.
        tolerance: As for `verify`.

    Raises:
        RuntimeError: If the model no longer runs, or outputs differ.
    """
    worst = partial(_worst_group, reference, units)
    try:
        reference.check(work, tolerance, worst)
    except ValueError as error:
        raise RuntimeError(
            f"Without its dead units the model does not run: {error.__cause__}." + worst()
        ) from error


def _worst_group(reference: Reference, units: Sequence[Group]) -> str:
    """A sentence on the group that changes outputs most when its dead units alone are removed."""
    worst, most = None, -1.0
    expected = [*reference.expected, *reference.elsewhere]
    batches = [*reference.batches, *reference.others.batches]
    for group in units:
        alone = copy.deepcopy(reference.model)
        with unnested(alone):
            if not remove(alone, [group], reference.proving):
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
        "more than its members depends on it. Pass `groups` as a list of groups without it."
    )
