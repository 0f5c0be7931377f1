"""Times: how long each form of a layer takes; layers that are alike are timed once."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mtprune.compression.calls import Calls
from mtprune.compression.forms import Form
from mtprune.compression.sites import Site
from mtprune.compression.timing import Measure

__all__ = ["Times", "bytes_of"]

ALIKE = 1.1
"""Layers of one shape are alike if no form stores so many times the bytes in one as in another."""


class Times:
    """The milliseconds of each form, remembered for layers that are alike.

    An encoder has six layers of each kind: they take as long as each other, if they have as many
    zeros in the same kinds of places.

    Args:
        measure: How functions are timed.
    """

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._known: dict[Any, list[tuple[Sequence[int], Sequence[float]]]] = {}

    @torch.no_grad()
    def of(self, site: Site, forms: Mapping[str, Form], calls: Calls) -> Sequence[float]:
        """The milliseconds of a layer and its forms for all calls."""
        layer = site.layer
        settings = tuple(repr(getattr(layer, name)) for name in layer.__constants__)
        counts = tuple((shape, times) for shape, (_, times) in calls.items())
        traits = (type(layer), settings, layer.bias is None, layer.weight.stride(), *forms, counts)
        known = self._known.setdefault(traits, [])
        bytes_ = [bytes_of(form) for form in forms.values()]
        for others, measured in known:
            if all(a < ALIKE * b and b < ALIKE * a for a, b in zip(bytes_, others, strict=True)):
                return measured
        total = [0.0] * (1 + len(forms))
        for x, times in calls.values():
            functions = [partial(module, x) for module in (layer, *forms.values())]
            # Outside autograd's and, as elsewhere, in the mode the model will run in.
            total = [t + times * ms for t, ms in zip(total, self._measure(functions), strict=True)]
        known.append((bytes_, total))
        return total


def bytes_of(form: Form) -> int:
    """The bytes that a form stores."""
    return sum(tensor.nbytes for tensor in form.state_dict().values())
