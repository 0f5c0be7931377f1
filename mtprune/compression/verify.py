"""Verification: a compressed model gives the outputs of the original, or it is not returned."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtprune.compression.calls import Calls
from mtprune.compression.forms import Form
from mtprune.compression.running import named_tensors
from mtprune.compression.sites import Site

__all__ = ["TOLERANCES", "Replaced", "difference", "verify", "worst_layer"]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The largest relative difference of a sum in another order, by the type of the outputs."""


class Replaced(NamedTuple):
    """A layer in another form: its site, the form, and the calls of the layer."""

    site: Site
    form: Form
    calls: Calls


def difference(expected: Tensor, got: Tensor) -> float:
    """The Frobenius norm of the difference over that of the expected tensor.

    0 for equal tensors, where NaN equals NaN; infinite if shapes differ, or tensors without a norm.

    Example:
        >>> difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]))
        0.1
    """
    if expected.shape != got.shape:
        return float("inf")
    if torch.equal(expected, got):
        return 0.0
    if not expected.is_floating_point():
        return float("inf")
    # In this order: a tensor on another device must not be compared element by element.
    equal = (expected == got) | (expected.isnan() & got.isnan())
    delta = torch.where(equal, 0.0, (got.double() - expected.double()))
    finite = torch.where(expected.isfinite(), expected, 0.0).double()
    ratio = float(delta.norm() / finite.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return ratio if ratio == ratio else float("inf")


def verify(
    expected: Sequence[Any],
    got: Sequence[Any],
    tolerance: float | None,
    culprit: Callable[[], str],
    exact: bool = False,
) -> None:
    """Compare all outputs of two models.

    Args:
        expected: The original's outputs, one for each batch.
        got: The compressed model's outputs.
        tolerance: The relative difference allowed; `TOLERANCES` unless given.
        culprit: Called if outputs differ, for a sentence on the cause.
        exact: Whether outputs must be equal, because nothing was changed.

    Raises:
        ValueError: If outputs hold no tensor.
        RuntimeError: If outputs differ.
    """
    for i, (before, after) in enumerate(zip(expected, got, strict=True)):
        tensors_before, tensors_after = dict(named_tensors(before)), dict(named_tensors(after))
        if not tensors_before:
            raise ValueError(
                f"The model's output for `example_inputs[{i}]` holds no tensor to compare: "
                f"{type(before).__name__}. Mappings, sequences and dataclasses are looked into."
            )
        for name, tensor in tensors_before.items():
            allowed = TOLERANCES.get(tensor.dtype, 0.0) if tolerance is None else tolerance
            allowed = 0.0 if exact else allowed
            off = float("inf")
            if name in tensors_after:
                off = difference(tensor, tensors_after[name])
            if off > allowed:
                raise RuntimeError(
                    f"{name} of the compressed model for `example_inputs[{i}]` is off by a "
                    f"relative {off:.1e}, and {allowed:.0e} is allowed."
                    + culprit()
                    + " Nothing was returned."
                )


@torch.no_grad()
def worst_layer(replaced: Sequence[Replaced]) -> str:
    """A sentence on the layer that differs most from its dense form on its recorded inputs."""
    worst, most = None, -1.0
    for layer in replaced:
        for x, _ in layer.calls.values():
            off = difference(layer.site.layer(x), layer.form(x))
            if off > most:
                worst, most = layer, off
    if worst is None:
        return " No layer was replaced: the model does not repeat its own outputs."
    name = worst.site.name
    return (
        f" The worst layer is '{name}' ({worst.form.choice}), off by {most:.1e}: keep it dense "
        f"with plan.replace({name!r}, 'dense')."
    )
