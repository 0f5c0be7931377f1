"""Methods by name: each a function of the sparsity and of the length of the run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mtprune import recipes, saliency, votes
from mtprune.methods import Method, SoftThreshold, Vote
from mtprune.refitting import Refit
from mtprune.schedule import Cubic, OneShot

__all__ = ["METHODS", "Maker", "dense"]

Maker = Callable[[float, int], Method[Any]]
"""A method for a sparsity and a run of so many optimizer steps."""

_NEVER = 2**62


def dense() -> Vote:
    """The method that prunes nothing, at no step.

    Example:
        >>> dense().sparsity
        0.0
    """
    return Vote(0.0, saliency=saliency.random, schedule=OneShot(at=_NEVER))


def _rounds(sparsity: float, steps: int, **others: Any) -> Vote:
    """`recipes.best` for trained weights, before fine-tuning."""
    method = recipes.best(sparsity)
    assert isinstance(method, Vote)
    return replace(method, **others)


def _gradual(sparsity: float, steps: int, **others: Any) -> Vote:
    """A vote in about ten updates over the first half of the run."""
    end = max(1, steps // 2)
    schedule = Cubic(begin=1, end=end, every=max(1, (end - 1) // 10))
    return Vote(sparsity, schedule=schedule, observations=min(4, schedule.every), **others)


def _thresholds(sparsity: float, steps: int, **others: Any) -> SoftThreshold:
    return replace(recipes.adapmtl(sparsity, steps), **others)


def _exchange(steps: int) -> dict[str, int]:
    """Updates of sparse training: a 400th of the run apart, further in short runs."""
    every = max(1, steps // 400, min(25, steps // 10))
    return {"every": every, "end": max(1, steps * 3 // 4)}


METHODS: Mapping[str, Maker] = {
    "dense": lambda sparsity, steps: dense(),
    "best": _rounds,
    "best_without_voters": lambda sparsity, steps: _rounds(sparsity, steps, voters=()),
    "best_with_refit": lambda sparsity, steps: _rounds(sparsity, steps, refit=Refit()),
    "best_lamp_voter": lambda sparsity, steps: _rounds(sparsity, steps, voters=(saliency.lamp,)),
    "best_joint": lambda sparsity, steps: _rounds(sparsity, steps, disentangled=False),
    "best_elsewhere": lambda sparsity, steps: recipes.best(sparsity, trained="elsewhere"),
    "best_from_scratch": lambda sparsity, steps: recipes.best(sparsity, steps, trained=False),
    "vote": _gradual,
    "majority": lambda sparsity, steps: _gradual(sparsity, steps, vote=votes.majority),
    "mean": lambda sparsity, steps: _gradual(sparsity, steps, vote=votes.mean),
    "intersection": lambda sparsity, steps: _gradual(sparsity, steps, vote=votes.intersection),
    "joint": lambda sparsity, steps: _gradual(sparsity, steps, disentangled=False),
    "disparse_static": lambda sparsity, steps: recipes.disparse_static(sparsity),
    "disparse_pretrained": lambda sparsity, steps: recipes.disparse_pretrained(sparsity),
    "disparse_dynamic": lambda s, steps: recipes.disparse_dynamic(s, **_exchange(steps)),
    "snip": lambda sparsity, steps: recipes.snip(sparsity),
    "rigl": lambda sparsity, steps: recipes.rigl(sparsity, **_exchange(steps)),
    "set_": lambda sparsity, steps: recipes.set_(sparsity, **_exchange(steps)),
    "magnitude": lambda sparsity, steps: recipes.magnitude(sparsity),
    "lamp": lambda sparsity, steps: recipes.lamp(sparsity),
    "wanda": lambda sparsity, steps: recipes.wanda(sparsity),
    "gradual_magnitude": lambda sparsity, steps: replace(
        recipes.magnitude(sparsity), schedule=_gradual(sparsity, steps).schedule
    ),
    "movement": recipes.movement,
    "flop": recipes.flop,
    "flop_saliency": lambda sparsity, steps: recipes.flop(sparsity, steps, gates="saliency"),
    "adapmtl": _thresholds,
    "adapmtl_uniform": lambda s, steps: _thresholds(s, steps, allocation="uniform"),
    "adapmtl_worst": lambda s, steps: _thresholds(s, steps, weighting="worst"),
    "adapmtl_published": recipes.adapmtl_published,
    "random": lambda sparsity, steps: recipes.random(sparsity),
}
"""Methods by name. Those that prune at once, or in `Rounds`, take no notice of the steps.

``METHODS["joint"](0.9, 2_000)`` prunes over the first half of a run of 2,000 steps. Names are those
of the trainers in ``examples/``.
"""
