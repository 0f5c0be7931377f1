"""A round: one update in the making, from the first observation to the decision."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from mtprune.collect import Collector, Evidence
from mtprune.components import Layer
from mtprune.masking import Masking
from mtprune.methods import Decision, Method
from mtprune.poll import Pool, poll
from mtprune.saliency import uses_gradient
from mtprune.stability import Stability
from mtprune.units import Units, is_single
from mtprune.usage import Usage

__all__ = ["Round", "scale_of"]


class Round:
    """Gathers evidence, says when it is enough, and puts it to the method.

    Args:
        model: The model.
        layers: Its prunable layers.
        tasks: All tasks.
        method: What decides.
        masking: Where the masks are.
        usage: Who uses what.
        generator: The pruner's own.
        costs: What a weight of each layer costs, if that was measured.
        score_dtype: Of the scores.
        score_device: Where they are kept; None for where the weights are.
        units: The layers' units, if they are larger than a weight.
        whole: What all prunable layers of the model cost, if that was measured.

    Attributes:
        memory: What the last decision left to remember.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        tasks: Collection[str],
        method: Method,
        masking: Masking,
        usage: Usage,
        generator: torch.Generator,
        costs: Mapping[str, Fraction],
        score_dtype: torch.dtype = torch.float32,
        score_device: torch.device | None = None,
        units: Units | None = None,
        whole: Fraction = Fraction(0),
    ) -> None:
        self.memory: Mapping[str, Any] = {}
        self._costs = costs
        self._layers = layers
        self._tasks = list(tasks)
        self._method = method
        self._masking = masking
        self._usage = usage
        self._generator = generator
        self._stability = Stability()
        self._kept = Evidence()  # what has been seen until the last update, if that still counts
        self._singly = False  # batches that hold only some tasks have been seen
        self._units = units
        self._whole = whole
        pool = _pooling(method, units)
        self._pool: Pool = pool or (lambda _, score: score.reshape(-1))
        if units is not None:
            score_dtype = torch.float32  # there are few units, and each is a sum of many
        self._collector = Collector(
            model,
            layers,
            masking,
            saliency=method.saliency,
            pool=pool,
            disentangled=method.disentangled,
            dtype=score_dtype,
            device=score_device,
        )
        self._score_dtype = score_dtype
        self._score_device = score_device

    @property
    def evidence(self) -> Evidence:
        """What has been observed."""
        return self._collector.evidence

    @property
    def stable(self) -> bool | None:
        """Whether masks no longer changed; None where the number of observations was given."""
        return bool(self._stability.stable) if self._automatic else None

    def lead(self, present: Collection[str]) -> float:
        """How many steps before an update to begin observing, as batches hold these tasks."""
        self._singly = self._singly or len(present) < len(self._tasks)
        if self._cumulative:
            return math.inf
        wanted = self._method.observations
        batches = 4 if wanted == "auto" else wanted
        return batches * len(self._tasks) if self._singly else batches

    def observe(
        self, losses: Mapping[str, Tensor], scaler: Any, step: int, fold: bool = False
    ) -> None:
        """Take in the losses that are still wanted for the update of ``step``.

        With ``fold`` the gradient of all losses goes to ``.grad`` on the way.
        """
        lacking = self._tasks if self._automatic or self._cumulative else self.lacking()
        wanted = {task: loss for task, loss in losses.items() if task in lacking}
        others = [loss for task, loss in losses.items() if task not in wanted] if fold else None
        if not wanted and not fold:
            return
        self._collector.add(
            wanted,
            self._usage.settled,
            scale_of(scaler),
            guarded=scaler is not None,
            fold=others,
        )
        if self._automatic and not self.lacking():
            self._stability.enough(*self._question(step))

    def lacking(self) -> list[str]:
        """The tasks that must be observed again before anything can be decided."""
        wanted = self._method.observations
        lacking = []
        for task in self._tasks:
            seen = self.evidence.counts.get(task, 0)
            needed = 1 if wanted == "auto" else wanted
            if seen and not self._usage.is_clear(self.evidence, task):
                needed = max(needed, 2)
            if seen < needed:
                lacking.append(task)
        return lacking

    def unseen(self) -> list[str]:
        """The tasks that have not been observed at all."""
        return [task for task in self._tasks if not self.evidence.counts.get(task)]

    def is_enough(self, step: int) -> bool:
        """Whether more observations would no longer change the masks of the update of ``step``.

        Raises:
            RuntimeError: If the evidence is not finite. It is forgotten.
        """
        if not self._automatic:
            return True
        self._check()
        return self._stability.enough(*self._question(step))

    def decide(self, step: int) -> tuple[list[Layer], Decision]:
        """The layers that are pruned, and the decision about them.

        Raises:
            RuntimeError: If the evidence is not finite, or what was declared shared is not. It is
                forgotten.
        """
        self._check()
        try:
            self._usage.settle(self.evidence)
        except RuntimeError:
            self.forget()
            raise
        if self._cumulative:
            self._keep()
        return self._decide(step)

    def next(self) -> None:
        """Start the next round. Where scores add up over the run, so do observations."""
        counts = self.evidence.counts
        self.forget()
        if self._cumulative:
            self.evidence.counts.update(counts)

    def forget(self) -> None:
        """Drop what has been observed since the last update."""
        self._collector.reset()
        self._stability = Stability()

    def state_dict(self) -> dict[str, Any]:
        """As plain containers."""
        return {
            "singly": self._singly,
            "memory": dict(self.memory),
            "evidence": self.evidence.state_dict([layer.name for layer in self._layers]),
            "kept": self._kept.state_dict([layer.name for layer in self._layers]),
            "stability": self._stability.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._singly = state["singly"]
        self.memory = dict(state["memory"])
        self._collector.evidence, self._kept = (
            Evidence.from_state_dict(
                state[name], self._layers, self._score_dtype, self._score_device
            )
            for name in ("evidence", "kept")
        )
        self._stability = Stability()
        self._stability.load_state_dict(state["stability"])

    @property
    def _automatic(self) -> bool:
        """Whether observations go on until masks are stable."""
        return self._method.observations == "auto" and uses_gradient(self._method.saliency)

    @property
    def _cumulative(self) -> bool:
        """Whether scores add up over all updates."""
        return self._method.straight_through and uses_gradient(self._method.saliency)

    def _keep(self) -> None:
        """Add the scores since the last update to those of the run.

        They are apart until then, so that a loss that is not finite spoils only the last of them.
        """
        for voter, scores in self.evidence.scores.items():
            kept = self._kept.scores.setdefault(voter, {})
            for index, score in scores.items():
                kept[index] = kept[index].add_(score) if index in kept else score
        self.evidence.scores = {}

    def _check(self) -> None:
        problem = self.evidence.problem(self._layers)
        if problem is not None:
            self.forget()
            raise RuntimeError(problem)

    def _question(self, step: int) -> tuple[int, Callable[[], Sequence[Tensor]]]:
        """How many observations there are, and the masks they would give."""
        return min(self.evidence.counts.values()), lambda: self._decide(step)[1].masks

    def _decide(self, step: int) -> tuple[list[Layer], Decision]:
        users = self._usage.now(self.evidence)
        active = self._usage.active(users)
        components = self._usage.components(users)
        evidence = self.evidence
        if self._cumulative:
            evidence = replace(evidence, scores=self._kept.scores)
        ballot = poll(
            self._method,
            evidence,
            users,
            active,
            self._masking,
            components,
            self._generator,
            self._costs,
            self.memory,
            self._score_device,
            pool=self._pool,
            units=self._units,
            whole=self._whole,
        )
        decision = self._method.decide(ballot, step)
        if ballot.units is not None:
            decision = _spread(decision, ballot.units)
        return [layer for _, layer in active], decision


def _pooling(method: Method, units: Units | None) -> Pool | None:
    """How scores are kept; None for one of each weight."""
    if units is not None:
        return units.pool
    granularity = method.granularity
    if is_single(granularity) or not hasattr(granularity, "pool"):
        return None
    return lambda _, score: granularity.pool(score)


def _spread(decision: Decision, units: Units) -> Decision:
    """A decision about units as one about weights."""
    return replace(
        decision,
        masks=[mask.reshape(-1) for mask in units.spread(decision.masks)],
        alone=_Spread(decision.alone, units),
        units=dict(zip(units.names, decision.masks, strict=True)) if units.spanning else {},
    )


class _Spread(Mapping[str, Mapping[int, Tensor]]):
    """What each voter alone would keep, in weights, found out when somebody asks."""

    def __init__(self, alone: Mapping[str, Mapping[int, Tensor]], units: Units) -> None:
        self._alone = alone
        self._units = units
        self._known: dict[str, Mapping[int, Tensor]] = {}

    @override
    def __getitem__(self, voter: str) -> Mapping[int, Tensor]:
        if voter not in self._known:
            wishes, every = self._alone[voter], self._units.everything()
            masks = self._units.spread([wishes.get(g, mask) for g, mask in enumerate(every)])
            self._known[voter] = {place: mask.reshape(-1) for place, mask in enumerate(masks)}
        return self._known[voter]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._alone)

    @override
    def __len__(self) -> int:
        return len(self._alone)


def scale_of(scaler: Any) -> float:
    """By what a ``GradScaler`` multiplies losses; 1 if there is none."""
    return 1.0 if scaler is None else float(scaler.get_scale())
