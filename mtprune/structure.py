"""Structure: what belongs together when a unit of a model, a neuron say, is removed.

A unit is never a slice of one tensor alone. A neuron is a row of the layer that makes it, its bias,
and a column of every layer that reads it; a channel also has its place in a batch norm. A `Group`
says for as many units as are alike where each of them lies, as plain data: it can be written by
hand, printed, and compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["NOBODY", "Group", "Member", "Role", "pool", "spread"]

NOBODY = -1
"""In place of a unit, where an index belongs to none."""

Role = Literal["out", "in", "with"]
"""Whether a tensor makes the units, reads them, or goes with them without being either."""


@dataclass(frozen=True)
class Member:
    """Where the units of a group lie in one tensor.

    Attributes:
        tensor: Name of the parameter or buffer, as in ``model.state_dict()`` before pruning.
        dim: Along which dimension.
        units: For each index along it, the unit it belongs to, or `NOBODY`.
        role: ``"out"`` where the tensor makes the units, ``"in"`` where it reads them, ``"with"``
            where it belongs to them and does neither: the entries of a norm, or the queries and
            keys of a head, which say where to look and not what is seen there.
    """

    tensor: str
    dim: int
    units: tuple[int, ...]
    role: Role = "out"

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """``units`` as a tensor, ``[n]``."""
        return torch.tensor(self.units, dtype=torch.long, device=device)


@dataclass(frozen=True)
class Group:
    """Units that are alike, and all the places where they lie.

    Attributes:
        name: What errors and reports call it.
        size: How many units there are.
        members: Where they lie.
        between: Path of the module or function that is applied to each unit on its own between
            those that make them and those that read them, an activation for instance.
        counts: Paths of numbers in the model that shrink with the group, in proportion.

    Example:
        >>> group = Group("hidden", 3, (Member("up.weight", 0, (0, 1, 2)),
        ...                             Member("down.weight", 1, (0, 1, 2), "in")))
        >>> pool(group, {"up.weight": torch.ones(3, 2), "down.weight": torch.ones(4, 3)})
        tensor([6., 6., 6.])
        >>> spread([group], [torch.tensor([True, False, True])], {"up.weight": (3, 2)})
        {'up.weight': tensor([[ True,  True],
                [False, False],
                [ True,  True]])}
    """

    name: str
    size: int
    members: tuple[Member, ...]
    between: str | None = None
    counts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        for member in self.members:
            wrong = [u for u in member.units if not NOBODY <= u < self.size]
            if wrong:
                raise ValueError(
                    f"Group '{self.name}' has {self.size} units, and '{member.tensor}' names unit "
                    f"{wrong[0]}."
                )


def pool(group: Group, values: Mapping[str, Tensor]) -> Tensor:
    """The sum of the values that belong to each unit, ``[size]``.

    Args:
        group: The units.
        values: A value for each element of some of the tensors; members not in it count nothing.
    """
    total: Tensor | None = None
    for member in group.members:
        value = values.get(member.tensor)
        if value is None:
            continue
        along = value.movedim(member.dim, 0).flatten(1).sum(1) if value.dim() > 1 else value
        if total is None:
            total = along.new_zeros(group.size)
        index = member.index(along.device)
        owned = index != NOBODY
        total.index_add_(0, index[owned], along[owned])
    if total is None:
        raise ValueError(f"None of the tensors of group '{group.name}' is among those given.")
    return total


def spread(
    groups: Iterable[Group], masks: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The masks of tensors from those of units: an element stays if all its units stay.

    Args:
        groups: The groups.
        masks: For each, what stays, bool ``[size]``.
        shapes: Of the tensors that are wanted.
    """
    found: dict[str, Tensor] = {}
    for group, mask in zip(groups, masks, strict=True):
        for member in group.members:
            shape = shapes.get(member.tensor)
            if shape is None:
                continue
            index = member.index(mask.device)
            along = mask[index.clamp_min(0)] | (index == NOBODY)
            along = along.view([-1 if d == member.dim else 1 for d in range(len(shape))])
            if member.tensor not in found:
                found[member.tensor] = torch.ones(shape, dtype=torch.bool, device=mask.device)
            found[member.tensor] &= along
    return found
