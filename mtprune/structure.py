"""Structure: the tensor entries that belong to a unit of a model, a neuron for instance.

A unit has entries in several tensors. A neuron is a row of the layer that makes it, an entry of its
bias, and a column of every layer that reads it; a channel also has entries in a batch norm. A
`Group` names the entries of many units of one kind, as plain data: it can be written by hand,
printed, and compared.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["NOBODY", "Argument", "Group", "Member", "Role"]

NOBODY = -1
"""The unit of an index that belongs to no unit."""

Role = Literal["out", "in", "with", "gate"]
"""Whether a tensor makes the units, reads them, or belongs to them and does neither; or whether it
decides which of them are used, so that units whose entries are zero there are closed."""


@dataclass(frozen=True)
class Member:
    """The entries of a group's units in one tensor.

    Attributes:
        tensor: The name of the parameter or buffer, as in ``model.state_dict()`` before pruning.
        dim: The dimension along which the units lie.
        units: For each index along the dimension the unit that it belongs to, or `NOBODY`.
        role: ``"out"`` if the tensor makes the units, ``"in"`` if it reads them, ``"with"`` if it
            belongs to them and does neither: the entries of a norm, or the queries and keys of a
            head, which decide where a head looks and not what it reads there. ``"gate"`` if it
            decides which units are used: the rows of a router, which sends tokens to experts.
    """

    tensor: str
    dim: int
    units: tuple[int, ...]
    role: Role = "out"

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """``units`` as a tensor, ``[n]``."""
        return torch.tensor(self.units, dtype=torch.long, device=device)


@dataclass(frozen=True)
class Argument:
    """The entries of a group's units in what a module is called with.

    A model may compute a number for each head once, a slope that tells distances for instance, and
    give all of them to every block. A block that has lost heads takes those of the heads it has.

    Attributes:
        module: The name of the module.
        name: The name of the argument of its ``forward``.
        dim: The dimension along which the units lie.
        units: The unit of each entry along it. What is longer, because a batch lies along the same
            dimension, holds them again and again.
    """

    module: str
    name: str
    dim: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Units of one kind, and all tensors with entries of them.

    Attributes:
        name: The name in errors and reports.
        size: The number of units.
        members: The entries of the units, tensor by tensor.
        between: The path of the module or function that is applied to each unit on its own between
            the tensors that make the units and those that read them, an activation for instance.
        counts: Paths of numbers in the model that shrink with the group, in proportion.
        least: How many units must stay: as many experts as each token is sent to.
        arguments: The entries of the units in what modules are called with.

    Example:
        >>> group = Group("hidden", 3, (Member("up.weight", 0, (0, 1, 2)),
        ...                             Member("down.weight", 1, (0, 1, 2), "in")))
        >>> [(member.tensor, member.role) for member in group.members]
        [('up.weight', 'out'), ('down.weight', 'in')]
        >>> group.members[1].index()
        tensor([0, 1, 2])
    """

    name: str
    size: int
    members: tuple[Member, ...]
    between: str | None = None
    counts: tuple[str, ...] = ()
    least: int = 0
    arguments: tuple[Argument, ...] = ()

    def __post_init__(self) -> None:
        """Validate."""
        if not 0 <= self.least <= self.size:
            raise ValueError(
                f"Group '{self.name}' has {self.size} units, and {self.least} of them must stay."
            )
        for member in self.members:
            wrong = [u for u in member.units if not NOBODY <= u < self.size]
            if wrong:
                raise ValueError(
                    f"Group '{self.name}' has {self.size} units, and '{member.tensor}' names unit "
                    f"{wrong[0]}."
                )

    @property
    def gate(self) -> Member | None:
        """The member that decides which units are used, if there is one."""
        return next((member for member in self.members if member.role == "gate"), None)
