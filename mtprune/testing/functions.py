"""Checks of the functions that a method is put together from."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.model.layers import Layer, find_layers
from mtprune.saliency import Saliency, asks
from mtprune.votes import Vote

__all__ = ["check", "check_saliency", "check_vote"]

_ROUNDING = 1e-6  # a vote may compute in float32
_MANY = 400


def check(fine: object, told: str) -> None:
    """Raise if something is not fine, with what there is to tell."""
    if not fine:
        raise AssertionError(told)


def check_vote(vote: Vote) -> None:
    """Check that a function is a vote.

    It turns percentiles ``[voters, weights]`` into a worth ``[weights]``, of each weight by itself,
    non-decreasing in every percentile, whatever the order of the rows; one voter alone is followed.

    Example:
        >>> from mtprune import votes
        >>> check_vote(votes.majority)
        >>> check_vote(lambda percentiles: -percentiles.amax(dim=0))
        Traceback (most recent call last):
        AssertionError: The vote falls where a percentile rises, with 1 voter.
    """
    generator = torch.Generator().manual_seed(0)
    for voters in range(1, 6):
        told = f", with {voters} voter{'s' * (voters > 1)}."
        drawn = torch.rand(voters, _MANY, generator=generator, dtype=torch.float64)
        drawn[:, ::2] = (drawn[:, ::2] * 4).floor() / 4  # some of them tie
        percentiles = drawn.clone()
        worth = vote(percentiles)
        check(
            _shape(worth) == (_MANY,),
            f"The vote must turn {(voters, _MANY)} into {(_MANY,)}. Got {_shape(worth)}.",
        )
        check(torch.equal(percentiles, drawn), f"The vote writes into the percentiles{told}")
        check(worth.isfinite().all(), f"The vote is not finite{told}")
        part = vote(drawn[:, 3:8])
        check(_close(part, worth[3:8]), f"The vote on a weight depends on other weights{told}")
        for row in range(voters):
            higher = drawn.clone()
            higher[row] += (1 - higher[row]) * torch.rand(_MANY, generator=generator)
            falls = bool((vote(higher) < worth - _ROUNDING).any())
            check(not falls, f"The vote falls where a percentile rises{told}")
        for order in itertools.permutations(range(voters)):
            other = vote(drawn[list(order)])
            check(_close(other, worth), f"The vote depends on the order of the rows{told}")
    rising = torch.linspace(0, 0.99, 100, dtype=torch.float64)
    followed = (vote(rising[None]).diff() > 0).all()
    check(followed, "The vote does not follow a voter that is alone.")


def check_saliency(saliency: Saliency) -> None:
    """Check that a function is a saliency.

    For weights of any shape it gives a finite number for each weight, the same each time, also
    where weights or gradients are zero, and writes into neither.

    Example:
        >>> check_saliency(lambda weight, grad: weight.abs().sum())
        Traceback (most recent call last):
        AssertionError: The saliency of weights (4, 3) must be of that shape. Got ().
    """
    generator = torch.Generator().manual_seed(0)
    for module in (nn.Linear(3, 4), nn.Linear(1, 1), nn.Conv2d(3, 2, 3), nn.Conv1d(2, 5, 1)):
        layer = find_layers(module)[0]
        rows = 7, layer.parameter[0].numel()
        for zeros in itertools.product((1, 0), repeat=3):
            weight, grad, inputs = (
                torch.randn(shape, generator=generator) * factor
                for shape, factor in zip((layer.shape, layer.shape, rows), zeros, strict=True)
            )
            _check_scores(saliency, layer, {"weight": weight, "grad": grad, "inputs": inputs})


def _check_scores(saliency: Saliency, layer: Layer, given: Mapping[str, Tensor]) -> None:
    """Check the saliency of one layer, given its weight, gradient and inputs."""
    asked, told = asks(saliency), f"The saliency of weights {layer.shape}"
    grad = given["grad"] if "grad" in asked else None

    def score() -> Any:
        others = {"layer": layer, "task": "a", "generator": torch.Generator().manual_seed(0)}
        named = {**others, "inputs": given["inputs"]}
        return saliency(given["weight"], grad, **{n: x for n, x in named.items() if n in asked})

    before = {name: value.clone() for name, value in given.items()}
    first, second = score(), score()
    got = _shape(first)
    check(got == layer.shape, f"{told} must be of that shape. Got {got}.")
    kept = all(torch.equal(given[name], value) for name, value in before.items())
    check(kept, f"{told} writes into what it is given.")
    check(torch.equal(first, second), f"{told} differs from call to call.")
    zero = " and ".join(name for name, value in given.items() if not value.any())
    where = f" where {zero} are zero" if zero else ""
    check(first.isfinite().all(), f"{told} is not finite{where}.")


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=_ROUNDING)
