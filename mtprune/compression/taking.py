"""Taking: a module that takes the entries of its own units of an argument it is called with.

Some models compute a number for each head once, slopes that tell distances for instance, and give
all of them to every block. The numbers follow from how many heads the model had, so they stay as
they are, and a block that has lost heads takes those of the heads it has.
"""

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.cuts import Taken

__all__ = ["check_takes", "take"]


@dataclass(frozen=True)
class _Take:
    """A hook that gives a module the entries of an argument that it takes.

    Attributes:
        name: The name of the argument.
        place: Its place among the arguments.
        dim: The dimension along which entries lie.
        size: How many there are, again and again.
        runs: The entries to take: where each run of them starts, and how long it is.
    """

    name: str
    place: int
    dim: int
    size: int
    runs: tuple[tuple[int, int], ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.name in kwargs:
            return args, {**kwargs, self.name: self.of(kwargs[self.name])}
        if self.place < len(args):
            part = self.of(args[self.place])
            return (*args[: self.place], part, *args[self.place + 1 :]), kwargs
        return args, kwargs

    def of(self, given: Any) -> Any:
        """The entries to take of an argument; all of it if it is the same for all units."""
        if not isinstance(given, Tensor) or given.dim() <= self.dim:
            return given
        if given.shape[self.dim] % self.size:
            return given
        # Slices and no list of indices: that would be copied to the device at every call.
        each = given.unflatten(self.dim, (-1, self.size))
        parts = [each.narrow(self.dim + 1, start, length) for start, length in self.runs]
        if not parts:
            parts = [each.narrow(self.dim + 1, 0, 0)]
        return torch.cat(parts, self.dim + 1).flatten(self.dim, self.dim + 1)


def take(module: nn.Module, part: Taken) -> None:
    """Let a module take a part of an argument from now on.

    What it takes already is taken first: entries are counted in those that it took until now.

    Args:
        module: The module.
        part: What it takes.

    Example:
        >>> class Shift(nn.Module):
        ...     def forward(self, x, by):
        ...         return x + by
        >>> shift = Shift()
        >>> take(shift, Taken("", "by", 0, 3, (0, 2)))
        >>> shift(torch.zeros(2), by=torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 3.])
    """
    place = _names(module).index(part.argument)
    hook = _Take(part.argument, place, part.dim, part.size, _runs(part.kept))
    module.register_forward_pre_hook(hook, with_kwargs=True)


def check_takes(model: nn.Module, part: Taken) -> None:
    """Check that a module of a model has the argument that it is to take a part of."""
    module = dict(model.named_modules()).get(part.module)
    if module is None or part.argument not in _names(module):
        got = "no such module" if module is None else f"a {type(module).__name__} without it"
        raise ValueError(
            f"The plan is for another model: '{part.module}' takes a part of its argument "
            f"'{part.argument}', and this model has {got} there."
        )


def _names(module: nn.Module) -> list[str]:
    """The names of the arguments of a module's forward."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _runs(indices: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Where runs of indices that follow each other start, and how long they are.

    Example:
        >>> _runs((0, 2, 3))
        ((0, 1), (2, 2))
    """
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(indices)) if b != a + 1]
    ends = [*breaks, len(indices)]
    return tuple((indices[a], b - a) for a, b in zip([0, *breaks], ends, strict=True) if b > a)
