"""Verification: the compressed model says what the original says, or it is not handed out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.running import Calls, named_tensors
from mtprune.compression.sites import Site

__all__ = ["TOLERANCES", "blame", "difference", "verify"]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The largest relative difference of a sum in another order, by the type of the outputs."""


def difference(expected: Tensor, got: Tensor) -> float:
    """The Frobenius norm of the difference over that of what was expected.

    0 for equal tensors, where NaN equals NaN; infinite where shapes, or tensors without a norm,
    differ.

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
    same = (expected == got) | (expected.isnan() & got.isnan())
    delta = torch.where(same, 0.0, (got.double() - expected.double()))
    whole = torch.where(expected.isfinite(), expected, 0.0).double()
    ratio = float(delta.norm() / whole.norm().clamp_min(torch.finfo(torch.float64).tiny))
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
        got: The compressed model's.
        tolerance: Of the relative difference; that of the type unless given.
        culprit: Called if outputs differ: a sentence on where that comes from.
        exact: Whether nothing was changed, so that nothing may differ.

    Raises:
        ValueError: If there is nothing to compare.
        RuntimeError: If outputs differ.
    """
    for i, (before, after) in enumerate(zip(expected, got, strict=True)):
        wanted, found = dict(named_tensors(before)), dict(named_tensors(after))
        if not wanted:
            raise ValueError(
                f"The model's output for `example_inputs[{i}]` holds no tensor to compare: "
                f"{type(before).__name__}. Mappings, sequences and dataclasses are looked into."
            )
        for name, tensor in wanted.items():
            allowed = TOLERANCES.get(tensor.dtype, 0.0) if tolerance is None else tolerance
            allowed = 0.0 if exact else allowed
            off = difference(tensor, found[name]) if name in found else float("inf")
            if off > allowed:
                raise RuntimeError(
                    f"{name} of the compressed model for `example_inputs[{i}]` is off by a "
                    f"relative {off:.1e}, and {allowed:.0e} is allowed."
                    + culprit()
                    + " Nothing was returned."
                )


@torch.no_grad()
def blame(replaced: Mapping[str, tuple[Site, nn.Module, Calls]]) -> str:
    """Which layer differs most from its dense form on what it was given.

    Args:
        replaced: For each layer in another form, where it is, that form, and what it was given.
    """
    worst, most = "", -1.0
    for name, (site, module, given) in replaced.items():
        for x, _ in given.values():
            off = difference(site.layer(x), module(x))
            if off > most:
                worst, most = name, off
    if not worst:
        return " No layer was replaced: the model does not repeat its own outputs."
    choice = getattr(replaced[worst][1], "choice", "?")
    return (
        f" The worst layer is '{worst}' ({choice}), off by {most:.1e}: keep it dense with "
        f"plan.replace({worst!r}, 'dense')."
    )
