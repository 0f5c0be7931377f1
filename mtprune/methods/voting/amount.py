"""Amounts: the four ways to say how much is pruned, of which a vote takes one."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

from mtprune import checks
from mtprune.granularity import NM, Granularity
from mtprune.latency import Latency
from mtprune.model.covering import is_single

__all__ = ["WAYS", "PerTaskKeep", "check_amount"]

WAYS = ("sparsity", "macs", "speedup", "latency")


@dataclass(frozen=True)
class PerTaskKeep:
    """The published rule of DiSparse, in place of a sparsity: for comparison.

    Every task keeps the top ``int(ratio * N_k)`` of the weights it uses, then the vote merges the
    tasks' masks. The sparsity that results depends on the data; allocation does not apply.

    Attributes:
        ratio: Share of its weights each task keeps, in (0, 1].
    """

    ratio: float

    def __post_init__(self) -> None:
        """Validate."""
        checks.inside("ratio", self.ratio, "(0, 1]")

    def at(self, progress: float) -> float:
        """The share that is kept while only a part of the pruning is due."""
        return self.ratio if progress == 1 else 1 - (1 - self.ratio) * progress


def check_amount(ways: Mapping[str, Any], granularity: Granularity, inputs: Any) -> None:
    """Refuse anything but one way to say how much is pruned, with what it needs.

    Args:
        ways: What was given for each of the ways, None for nothing.
        granularity: What is pruned as one.
        inputs: What the model is called with to measure; None if that is not known.
    """
    given = {name: value for name, value in ways.items() if value is not None}
    if isinstance(granularity, NM):
        _check_fixed(given, granularity)
        return
    if len(given) > 1:
        raise ValueError(
            "One of `sparsity`, `macs`, `speedup` and `latency` says how much is pruned. Got "
            f"{' and '.join(given)}."
        )
    name, value = next(iter(given.items()), ("sparsity", None))
    if name == "sparsity":
        if not isinstance(value, PerTaskKeep):
            checks.sparsity(name, value)
        return
    timed = name == "latency" and Latency.of(value).times is not None
    if name != "latency":
        checks.number(name, value)
    if name == "macs":
        checks.share(name, value, "(0, 1]", must="is what stays, in (0, 1]")
    if name == "speedup":
        checks.inside(name, value, "[1, inf)", must="must be at least 1")
    if name != "latency" and is_single(granularity):
        raise ValueError(
            f"`{name}` needs units that can be left out of a product: Channel(...), "
            "Neuron(), Head() or Block(...). Of single weights, latency=... counts time, and "
            "SoftThreshold(..., budget_unit='macs') multiply-adds."
        )
    if name == "latency" and not (is_single(granularity) or _spans(granularity)):
        raise ValueError(
            f"`latency` is for single weights, and for units that can be removed: Channel(...), "
            f"Neuron() or Head(). Got {granularity!r}."
        )
    if inputs is None and not timed:
        raise ValueError(f"`{name}` needs `example_inputs`: what the model is called with.")


def _check_fixed(given: Mapping[str, Any], pattern: NM) -> None:
    """Refuse an amount beside a pattern that fixes it."""
    fixed, number = pattern.sparsity, given.get("sparsity")
    same = isinstance(number, (int, float)) and isclose(number, fixed)
    if given and not (list(given) == ["sparsity"] and same):
        extra = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(f"{pattern!r} fixes the sparsity: it is {fixed:g}. Leave {extra} out.")


def _spans(granularity: Granularity) -> bool:
    """Whether units span layers, and tokens are not sent to them."""
    several = granularity if isinstance(granularity, tuple) else (granularity,)
    return all(hasattr(one, "groups") and not hasattr(one, "gates") for one in several)
