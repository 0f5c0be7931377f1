"""Verification: a compressed model gives the outputs of the original, or it is not returned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mtprune.compression.calls import Calls
from mtprune.compression.forms import Form
from mtprune.compression.others import Others, other_inputs
from mtprune.compression.running import named_tensors, run
from mtprune.compression.sites import Site

__all__ = [
    "ROUNDING",
    "TOLERANCES",
    "Reference",
    "Replaced",
    "difference",
    "verify",
    "worst_layer",
]

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The largest relative difference of a sum in another order, by the type of the outputs."""

ROUNDING = {**TOLERANCES, torch.float32: 1e-4}
"""The relative rounding error of deep nets; a unit that is still needed makes far more."""

_AMPLIFIED = 100
"""How many last places of its inputs a change may be worth, where a model amplifies them."""


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


@dataclass(frozen=True)
class Reference:
    """What a model gives before it is changed, on its examples and on other inputs.

    Attributes:
        model: The model, in eval mode; it stays as it is.
        batches: Example inputs.
        others: Other inputs.
        expected: The outputs for the examples, one for each batch.
        elsewhere: The outputs for the others.
    """

    model: nn.Module
    batches: Sequence[Any]
    others: Others
    expected: Sequence[Any]
    elsewhere: Sequence[Any]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Any]) -> "Reference":
        """The reference that a model is.

        Raises:
            ValueError: If the model does not run on its examples.
        """
        expected = run(model, batches)
        others = other_inputs(model, batches)
        return cls(model, batches, others, expected, others.outputs)

    @property
    def proving(self) -> Sequence[Any]:
        """The inputs on which a constant must be one; none if some input cannot be varied."""
        return [] if self.others.unvaried else [*self.batches, *self.others.batches]

    def check(
        self,
        model: nn.Module,
        tolerance: float | None,
        culprit: Callable[[], str],
        *,
        exact: bool = False,
    ) -> None:
        """Compare a changed model with what it was, on all inputs.

        Args:
            model: The changed model.
            tolerance: As for `verify`.
            culprit: As for `verify`.
            exact: As for `verify`.

        Raises:
            ValueError: If the changed model does not run, or outputs hold no tensor.
            RuntimeError: If outputs differ.
        """
        verify(self.expected, run(model, self.batches), tolerance, culprit, exact)
        for other, before in zip(self.others.batches, self.elsewhere, strict=True):
            after = dict(named_tensors(run(model, [other])[0]))
            for name, tensor in named_tensors(before):
                if not tensor.is_floating_point():
                    continue  # an index or a class may change with the last place of a number
                usual = TOLERANCES.get(tensor.dtype, 0.0) if tolerance is None else tolerance
                allowed = 0.0 if exact else max(usual, ROUNDING.get(tensor.dtype, 0.0))
                off = difference(tensor, after[name]) if name in after else float("inf")
                if off > allowed and off > _AMPLIFIED * self._rounding(other, name):
                    raise RuntimeError(
                        f"{name} of the compressed model for inputs other than the examples is off "
                        f"by a relative {off:.1e}, and {allowed:.0e} is allowed."
                        + culprit()
                        + " Nothing was returned."
                    )

    def _rounding(self, batch: Any, name: str) -> float:
        """How far an output moves when inputs change in their last places."""
        near = tree_map(_nudged, batch)
        before, after = (dict(named_tensors(run(self.model, [x])[0])) for x in (batch, near))
        return difference(before[name], after[name]) if name in after else float("inf")


def _nudged(leaf: Any) -> Any:
    """A floating tensor, every number one place higher."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.nextafter(leaf, torch.full_like(leaf, torch.inf))


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
