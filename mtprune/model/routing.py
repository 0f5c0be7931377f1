"""Routing: a router whose closed experts get no token, as if they were not there.

A weight of zero does not close an expert: its router's logit would be 0, which may be the highest.
So a router runs as the one it will be without them: with the rows of the others alone, and what it
chooses is counted in all experts again. An expert is closed if its row of the router is zero, so
masks close experts, and open them, and a model with zeros instead of masks computes the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtprune.structure import Group

__all__ = ["close", "closed", "closes", "is_closing", "reopen"]

_GATE = "_mtprune_gate"


@dataclass(frozen=True)
class _Gate:
    """What a router has of its experts.

    Attributes:
        weight: The attribute of the matrix with a row for each expert.
        tensors: Attributes of all tensors with an entry for each expert.
        numbers: Attributes of the number of experts.
        least: How many experts must be open.
    """

    weight: str
    tensors: tuple[str, ...]
    numbers: tuple[str, ...]
    least: int

    def closed(self, router: nn.Module) -> Tensor:
        """The experts that are closed, bool ``[experts]``: none if too few would be left."""
        gone = ~(getattr(router, self.weight).detach() != 0).flatten(1).any(1)
        enough = int((~gone).sum()) >= max(1, self.least)
        return gone if enough else torch.zeros_like(gone)


class _Routing(nn.Module):
    """The forward of a router with closed experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs of the router without the closed experts, counted in all of them."""
        gate: _Gate = self.__dict__[_GATE]
        gone = gate.closed(self)
        if not gone.any():
            return super().forward(*args, **kwargs)
        left = (~gone).nonzero().squeeze(1)
        # A narrow one beside it: this one may be running in another thread.
        narrow = object.__new__(_base(type(self)))
        narrow.__dict__.update(self.__dict__)
        for store in ("_parameters", "_buffers"):
            narrow.__dict__[store] = dict(getattr(self, store))
        for attribute in gate.tensors:
            found = getattr(self, attribute)
            stores = (narrow.__dict__["_parameters"], narrow.__dict__["_buffers"])
            store = next((s for s in stores if attribute in s), narrow.__dict__)
            store[attribute] = found.index_select(0, left)
        for attribute in gate.numbers:
            narrow.__dict__[attribute] = len(left)

        def narrowed(given: Any) -> Any:  # an offset for each expert may come from outside
            is_each = isinstance(given, Tensor) and given.shape == gone.shape
            return given.index_select(0, left) if is_each else given

        few, named = map(narrowed, args), {key: narrowed(x) for key, x in kwargs.items()}
        return _widened(narrow.forward(*few, **named), left, len(gone))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made when it is needed, so it is not found by its name."""
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_blank, (_base(type(self)),), *state)


_CLASSES: dict[type[nn.Module], Any] = {}


def _routing(cls: type[nn.Module]) -> Any:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (_Routing, cls), {"__module__": cls.__module__})
    return _CLASSES[cls]


def _base(cls: type[nn.Module]) -> Any:
    return cls.__mro__[2]


def _blank(cls: type[nn.Module]) -> Any:
    return object.__new__(_routing(cls))


def _widened(outputs: Any, left: Tensor, count: int) -> Any:
    """What a narrow router gives, as the wide one gives it: logits, and chosen experts.

    Args:
        outputs: A tensor of logits; or several tensors, logits first.
        left: The experts that are open.
        count: The number of all experts.
    """
    if isinstance(outputs, Tensor):
        if not outputs.is_floating_point():
            return left[outputs]
        wide = outputs.new_full((*outputs.shape[:-1], count), float("-inf"))
        return wide.index_copy(-1, left, outputs)
    first, *others = outputs
    chosen = [x if x.is_floating_point() else left[x] for x in others]
    return type(outputs)((_widened(first, left, count), *chosen))


def close(model: nn.Module, groups: Iterable[Group]) -> None:
    """Let experts whose rows of the router are zero get no token, from now on.

    Args:
        model: The model. Its routers get another class, which behaves the same as long as no row
            is zero.
        groups: Groups of units; those with a gate count.
    """
    for group in groups:
        if group.gate is None:
            continue
        path, _, weight = group.gate.tensor.rpartition(".")
        router = model.get_submodule(path)
        if is_closing(router):
            continue

        def own(names: Iterable[str], path: str = path) -> tuple[str, ...]:
            return tuple(n.rpartition(".")[2] for n in names if n.rpartition(".")[0] == path)

        tensors = own(member.tensor for member in group.members)
        router.__dict__[_GATE] = _Gate(weight, tensors, own(group.counts), group.least)
        router.__class__ = _routing(type(router))


def is_closing(router: nn.Module) -> bool:
    """Whether closed experts of a router get no token."""
    return isinstance(router, _Routing)


def closes(model: nn.Module, group: Group) -> bool:
    """Whether closed units of a group are not used: if not, a zero in its gate means nothing."""
    assert group.gate is not None
    return is_closing(model.get_submodule(group.gate.tensor.rpartition(".")[0]))


def closed(model: nn.Module, group: Group) -> Tensor:
    """The closed experts of a group, bool ``[size]``.

    Args:
        model: The model.
        group: Units with a gate.
    """
    gone = torch.zeros(group.size, dtype=torch.bool)
    assert group.gate is not None
    router = model.get_submodule(group.gate.tensor.rpartition(".")[0])
    if is_closing(router):
        gone[router.__dict__[_GATE].closed(router).cpu()] = True
    return gone


def reopen(modules: Iterable[nn.Module]) -> None:
    """Give routers that have no closed expert their own class again."""
    for router in modules:
        if isinstance(router, _Routing) and not router.__dict__[_GATE].closed(router).any():
            del router.__dict__[_GATE]
            router.__class__ = _base(type(router))
