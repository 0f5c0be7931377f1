"""Plain: the configuration that describes a smaller model, if there is one.

A compressed model whose layers all have the same widths is one that its own class could have built,
with other numbers in the configuration: fewer heads, fewer neurons. Which numbers these are is
found by trying, on the meta device, where nothing is computed. A configuration is taken only if it
builds a model with the very shapes, and the very numbers in its modules, of the compressed one.
"""

import copy
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from mtprune.compression.cuts import Removal

__all__ = ["plain_config"]

_WIDTHS = re.compile(r"head|expert|hidden_dim|inter|inner|ffn|d_ff|mlp")
"""How numbers of heads, neurons and experts are called in configurations."""


class _Place(NamedTuple):
    """A number in a configuration, or in one that is part of it."""

    holder: Any
    name: str

    @property
    def value(self) -> Any:
        return getattr(self.holder, self.name)


def plain_config(model: Any, removal: Removal) -> Any:
    """The configuration of a model without some of its units; None if it has none.

    Args:
        model: A model of transformers after removal, all of its layers dense.
        removal: What was removed.
    """
    if removal.taken or not _is_even(model, removal):  # slopes would follow from the number
        return None
    config = copy.deepcopy(model.config)
    wanted = _facts(model)
    off = _off(model, config, wanted)
    sizes = [s for cut in removal.cuts for s in zip(cut.shape, cut.after, strict=True)]
    ratios = list(dict.fromkeys(Fraction(a, b) for b, a in sizes if a < b))
    untold = list(dict.fromkeys(a for b, a in sizes if a < b))
    found = True
    while off and found:
        found = False
        for place in _places(config):
            old = place.value
            # What is not given follows from other widths.
            news = untold if old is None else [int(old * r) for r in ratios if not old * r % 1]
            for new in dict.fromkeys(news):
                now = _off_with(model, config, place, new, wanted)
                if now < off:
                    off, found = now, True
                    break
                setattr(place.holder, place.name, old)
    return None if off else config


def _is_even(model: Any, removal: Removal) -> bool:
    """Whether tensors that differ in the number of their layer alone are left with one shape."""

    def alike(name: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)

    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, tensor in model.state_dict().items():
        shapes.setdefault(alike(name), set()).add(tuple(tensor.shape))
    return all(len(shapes.get(alike(cut.tensor), ())) == 1 for cut in removal.cuts)


def _facts(model: Any) -> set[tuple[str, Any]]:
    """The shapes of a model's tensors, and the numbers that its modules keep."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    facts: set[tuple[str, Any]] = {(name, tuple(tensor.shape)) for name, tensor in tensors}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, float)) and not key.startswith("_") and key != "training":
                facts.add((f"{name}.{key}", value))
    return facts


def _off(model: Any, config: Any, wanted: set[tuple[str, Any]]) -> float:
    """In how many facts a model of this configuration differs; infinite if there is none."""
    try:
        with torch.device("meta"):
            return float(len(_facts(type(model)(copy.deepcopy(config))) ^ wanted))
    except Exception:  # whatever a class says of numbers that it cannot have
        return float("inf")


def _off_with(
    model: Any, config: Any, place: _Place, new: int, wanted: set[tuple[str, Any]]
) -> float:
    """The same with another number, which stays in the configuration."""
    try:
        setattr(place.holder, place.name, new)
    except Exception:  # of the checks of configurations
        return float("inf")
    return _off(model, config, wanted)


def _places(config: Any) -> Iterator[_Place]:
    """The numbers of heads, neurons and experts in a configuration, not given ones too."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            yield from _places(value)
            continue
        is_width = not name.startswith("_") and _WIDTHS.search(name)
        if is_width and (value is None or type(value) is int):
            yield _Place(config, name)
