r"""`SigmoidThreshold`: the published dynamics of AdapMTL, for comparison."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from typing_extensions import override

from mtprune import checks
from mtprune.holding import Hold, MaskHold, Masking, Phased
from mtprune.holding.soft import SoftHold, SoftThresholds
from mtprune.methods.base import Ballot, Method, Needs
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.reading import Entry
from mtprune.schedule import Linear, Schedule
from mtprune.weighting import parse_weighting

__all__ = ["SigmoidThreshold"]


@dataclass(frozen=True)
class SigmoidThreshold(Method[SoftThresholds]):
    r"""The original dynamics of AdapMTL's code, reproduced for comparison.

    Every component has the threshold :math:`\sigma(s)`, and s is trained like a weight, with the
    weights' own rule, learning rate and weight decay. While the sparsity is at or above the target
    s is not updated; nothing else enforces it. The sparsity that results follows the learning rate
    and the weight decay more than the losses, and may be anything: this method is exempt from the
    exact count.

    Attributes:
        sparsity: The share of zeros at which thresholds rest, in [0, 1).
        end: Step at which masks are fixed; the original never fixes them.
        init: Where s starts.
        lr: Its learning rate.
        weight_decay: Its weight decay, which pulls s towards 0 and so the threshold towards 0.5.
        rule: ``"adam"`` (betas 0.5 and 0.999), or ``"sgd"`` without momentum.
        weighting: See `SoftThreshold`; the original's is ``"noise"``.

    Example:
        >>> round(SigmoidThreshold(0.9, end=100, init=-15.0).threshold(-15.0), 10)
        3.059e-07
    """

    sparsity: float
    end: int
    init: float = -20.0
    lr: float = 1e-3
    weight_decay: float = 1e-4
    rule: Literal["adam", "sgd"] = "adam"
    weighting: Any = "noise"

    def __post_init__(self) -> None:
        """Validate."""
        checks.sparsity("sparsity", self.sparsity)
        Linear(begin=0, end=self.end, every=1)
        checks.either("rule", self.rule, ("adam", "sgd"))
        checks.inside("lr", self.lr, "[0, inf)", must="must be at least 0")
        checks.inside("weight_decay", self.weight_decay, "[0, inf)", must="must be at least 0")
        parse_weighting(self.weighting)

    @property
    def schedule(self) -> Schedule:  # type: ignore[override]
        """Every step, until the end."""
        return Linear(begin=0, end=self.end, every=1)

    def threshold(self, s: float) -> float:
        """The threshold of a component."""
        return 1.0 / (1.0 + math.exp(-s)) if s > -700.0 else 0.0

    @override
    def needs(self, inventory: Inventory) -> Needs:
        return Needs()

    @override
    def recall(self, memory: Entry, layers: Sequence[Layer]) -> Mapping[str, Any]:
        """See `Method`."""
        if not memory.mapping():
            return {}
        parts = memory.fields(["s", "first", "second", "updates"])
        components = list(parts["s"].mapping())
        found: dict[str, Any] = {
            name: {key: part.number() for key, part in parts[name].fields(components).items()}
            for name in ("s", "first", "second")
        }
        for part in parts["second"].mapping().values():
            part.number(least=0.0)
        return {**found, "updates": parts["updates"].whole()}

    @override
    def hold(self, masks: Masking, optimizer: Optimizer | None) -> Hold[SoftThresholds]:
        return Phased(SoftHold(masks, "slope"), MaskHold(masks))

    @override
    def decide(self, ballot: Ballot, step: int) -> SoftThresholds:
        """One step of the thresholds."""
        memory: dict[str, Any] = dict(ballot.memory) or {
            "s": dict.fromkeys(ballot.components, float(self.init)),
            "first": dict.fromkeys(ballot.components, 0.0),
            "second": dict.fromkeys(ballot.components, 0.0),
            "updates": 0,
        }
        zeros = sum(int((~mask).sum()) for mask in ballot.masks)
        if ballot.memory and zeros < self.sparsity * ballot.total:
            memory.update(self._train(ballot, memory))
        taus = [
            torch.as_tensor(self.threshold(memory["s"].get(name, self.init)), device=w.device).to(w)
            for name, w in zip(ballot.components, ballot.weights, strict=True)
        ]
        masks = [w.abs() > tau for w, tau in zip(ballot.weights, taus, strict=True)]
        return SoftThresholds(masks, thresholds=taus, final=step >= self.end, memory=memory)

    def _train(self, ballot: Ballot, memory: Mapping[str, Any]) -> dict[str, Any]:
        """What the optimizer does to every s, its gradient that of the last backward."""
        slope = dict.fromkeys(memory["s"], 0.0)
        for component, found in zip(ballot.components, ballot.noted, strict=True):
            slope[component] += found
        count = memory["updates"] + 1
        moved: dict[str, dict[str, float]] = {"s": {}, "first": {}, "second": {}}
        for component, s in memory["s"].items():
            # Slopes are those in the log-threshold: d log(tau) / ds = 1 - tau.
            grad = slope[component] * (1.0 - self.threshold(s)) + self.weight_decay * s
            first = 0.5 * memory["first"][component] + 0.5 * grad
            second = 0.999 * memory["second"][component] + 0.001 * grad**2
            if self.rule == "adam":
                size = math.sqrt(second / (1.0 - 0.999**count)) + 1e-8
                change = first / (1.0 - 0.5**count) / size
            else:
                change = grad
            moved["s"][component] = s - self.lr * change
            moved["first"][component], moved["second"][component] = first, second
        return {**moved, "updates": count}
