"""A round: one update in the making, from the first observation to the decision."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from mtprune.facts import Subject
from mtprune.holding import Decision, Hold
from mtprune.latency import Timing
from mtprune.methods.base import Ballot, Method, Needs
from mtprune.model.inventory import Inventory
from mtprune.model.layers import Layer
from mtprune.model.parallel import check_replicas
from mtprune.observing.collector import Collector, Losses
from mtprune.observing.evidence import Evidence, Store
from mtprune.observing.pollster import Pollster
from mtprune.observing.reach import Reach, Users
from mtprune.observing.roll import call_roll
from mtprune.observing.stability import Stability
from mtprune.reading import Entry

__all__ = ["Past", "Round", "scale_of"]

D = TypeVar("D", bound=Decision)


@dataclass(frozen=True)
class Past:
    """A round as a checkpoint holds it.

    Attributes:
        singly: Whether batches that hold only some tasks have been seen.
        memory: What the last decision left to remember.
        evidence: What has been seen since the last update.
        kept: What has been seen until then, if that still counts.
        stability: The masks from fewer observations.
    """

    singly: bool
    memory: Mapping[str, Any]
    evidence: Evidence
    kept: Evidence
    stability: Stability


class Round(Generic[D]):
    """Gathers evidence, says when it is enough, and puts it to the method.

    Args:
        model: The model.
        inventory: What it has to prune.
        method: The method that decides.
        needs: What the method must be shown.
        hold: What holds the weights.
        reach: Which task uses which layer.
        store: How sums of statistics are kept.
        generator: The pruner's own source of randomness.

    Attributes:
        memory: What the last decision left to remember.
    """

    def __init__(
        self,
        model: nn.Module,
        inventory: Inventory,
        method: Method[D],
        needs: Needs,
        hold: Hold[D],
        reach: Reach,
        store: Store,
        generator: torch.Generator,
    ) -> None:
        self.memory: Mapping[str, Any] = {}
        self._model = model
        self._met = False  # with other ranks
        self._inventory = inventory
        self._method = method
        self._needs = needs
        self._reach = reach
        self._store = store
        self._stability = Stability()
        self._kept = Evidence()  # what has been seen until the last update, if that still counts
        self._singly = False  # batches that hold only some tasks have been seen
        self._collector = Collector(model, inventory.layers, hold, needs, store, generator)
        self._pollster = Pollster(inventory, needs, hold, store, generator)

    @property
    def evidence(self) -> Evidence:
        """All that has been observed since the last update."""
        return self._collector.evidence

    @property
    def stable(self) -> bool | None:
        """Whether masks no longer changed; None where the number of observations was given."""
        return bool(self._stability.stable) if self._automatic else None

    @property
    def timing(self) -> Timing | None:
        """The time of the pruned model, where the last decision was about that."""
        told = self.memory.get("latency")
        return Timing(**told) if told else None

    @property
    def earliest(self) -> float:
        """How many steps before an update observing may begin, whatever batches hold."""
        if self._cumulative:
            return math.inf
        wanted = self._needs.observations
        return (4 if wanted == "auto" else wanted) * len(self._inventory.tasks)

    def agree(self, losses: Mapping[str, Tensor], step: int) -> Mapping[str, Tensor]:
        """The losses that all ranks together have, from those of this one.

        Args:
            losses: The losses of this rank's batch.
            step: The step that this rank is at.

        Raises:
            ValueError: If ranks would drift apart.
            RuntimeError: If ranks are not in the same call, or their batches hold different tasks
                and a statistic asks for inputs.
        """
        if not self._met:
            check_replicas(self._model)
            self._met = True
        device = self._inventory.layers[0].parameter.device
        roll = call_roll(losses, self._inventory.tasks, step, device)
        asks = (statistic.asks for statistic in self._needs.statistics.values())
        if roll.partial and any("inputs" in names for names in asks):
            raise RuntimeError(
                "Ranks have batches of different tasks, and this method looks at the inputs of "
                "layers, which add up over all ranks. Give every rank the same tasks."
            )
        if roll.partial and self._inventory.census.is_scattered:
            raise RuntimeError(
                "Ranks have batches of different tasks, and fully_shard gathers weights in every "
                "backward, in which all ranks take part. Give every rank the same tasks."
            )
        return roll.losses

    @property
    def by_graph(self) -> bool:
        """Whether nothing is differentiated: graphs alone tell which task uses which layer."""
        return self._needs.by_graph

    @property
    def wanted(self) -> int | None:
        """How many batches with all tasks an update is made from; None if that is found out."""
        wanted = self._needs.observations
        return None if wanted == "auto" else wanted

    @property
    def hears(self) -> bool:
        """Whether the last forward can be observed: inputs were gathered in it, if any are asked.

        They were not if `lead` has just grown, because a batch lacks tasks for the first time.
        """
        return self._collector.hears

    def lead(self, present: Collection[str]) -> float:
        """How many steps before an update to begin observing, as batches hold these tasks."""
        self._singly = self._singly or len(present) < len(self._inventory.tasks)
        if self._cumulative:
            return math.inf
        wanted = self._needs.observations
        batches = 4 if wanted == "auto" else wanted
        return batches * len(self._inventory.tasks) if self._singly else batches

    def listen(self, near: Callable[[float], bool]) -> None:
        """Gather inputs in the next forward, if a statistic asks for them and an update is near.

        Args:
            near: Whether an update is due within a number of steps.
        """
        self._collector.listen(near(self.lead(self._inventory.tasks)))

    def observe(self, losses: Losses, step: int) -> None:
        """Take in the losses that are still wanted for the update of ``step``.

        Args:
            losses: The losses of one batch. Where they are folded, the gradient of all of them
                goes to ``.grad`` on the way.
            step: The step of the update.
        """
        lacking = self._missing_now()
        wanted = {task: loss for task, loss in losses.scored.items() if task in lacking}
        if losses.folds:
            rest = [loss for task, loss in losses.scored.items() if task not in wanted]
            losses = replace(losses, others=rest)
        if not wanted and not losses.folds:
            self._collector.skip()
            return
        self._collector.add(replace(losses, scored=wanted), self._reach.settled)
        if self._automatic and not self.missing_tasks():
            self._stability.enough(*self._question(step))

    def check_seen(self, step: int) -> None:
        """Refuse an update for which nothing has been observed.

        Raises:
            RuntimeError: If so.
        """
        if not (self.evidence.counts or self.evidence.discarded):
            raise RuntimeError(
                f"Step {step} is due but nothing has been observed. Call "
                "pruner.observe(outputs, batch) after the forward pass, before pruner.step(). A "
                "loss counts if it carries a gradient: hand it over before .item() or .detach()."
            )

    def check_late(self, step: int, since: int) -> None:
        """Refuse to wait any longer for tasks that nobody has observed.

        Args:
            step: The step of the update.
            since: The step of the update before it.

        Raises:
            RuntimeError: If there are such tasks.
        """
        unseen = self.unseen()
        if unseen:
            names = ", ".join(f"'{task}'" for task in unseen)
            who = f"task {names} has" if len(unseen) == 1 else f"tasks {names} have"
            raise RuntimeError(
                f"Step {step} is due but {who} not been observed since step {max(since, 0)}. Call "
                f"pruner.observe(..., tasks={unseen})."
            )

    def missing_tasks(self) -> list[str]:
        """The tasks that must be observed again before anything can be decided."""
        wanted = self._needs.observations
        missing = []
        for task in self._inventory.tasks:
            seen = self.evidence.counts.get(task, 0)
            needed = 1 if wanted == "auto" else wanted
            if seen and not self._reach.is_clear(self.evidence, task):
                needed = max(needed, 2)
            if seen < needed:
                missing.append(task)
        return missing

    def unseen(self) -> list[str]:
        """The tasks that have not been observed at all."""
        return [task for task in self._inventory.tasks if not self.evidence.counts.get(task)]

    def is_enough(self, step: int) -> bool:
        """Whether more observations would no longer change the masks of the update of ``step``.

        Raises:
            RuntimeError: If the evidence is not finite. It is forgotten.
        """
        if not self._automatic:
            return True
        self._check()
        return self._stability.enough(*self._question(step))

    def decide(
        self, step: int, look: Callable[[Ballot], object] = lambda ballot: None
    ) -> tuple[list[Layer], list[Subject], D]:
        """The layers that are pruned, and the decision about them.

        Args:
            step: The step of the update.
            look: Sees what is decided on.

        Raises:
            RuntimeError: If the evidence is not finite, or what was declared shared is not. It is
                forgotten.
        """
        self._check()
        settled = self._reach.settled
        try:
            self._reach.settle(self.evidence)
        except RuntimeError:
            self.forget()
            raise
        if self._cumulative:
            self._keep()
        try:
            return self._decide(step, look)
        except Exception:
            self._reach.settled = settled  # which layers are pruned is as before too
            raise

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
        layers = self._inventory.layers
        return {
            "singly": self._singly,
            "memory": dict(self.memory),
            "evidence": self.evidence.state_dict(layers, self._store),
            "kept": self._kept.state_dict(layers, self._store),
            "stability": self._stability.state_dict(),
        }

    def read(self, parts: Mapping[str, Entry], users: Users | None) -> "Past":
        """What `state_dict` returned, as values; nothing is changed.

        Args:
            parts: The entries, and maybe others.
            users: Which task uses which layer, if that is settled.

        Raises:
            ValueError: If it is not what `state_dict` returns.
        """
        layers = [layer for _, layer in self._reach.active(users)]
        evidence, kept = (
            Evidence.read(parts[name], self._inventory.layers, self._inventory.tasks, self._store)
            for name in ("evidence", "kept")
        )
        if users is None and set(evidence.walked) < set(evidence.counts):
            raise parts["evidence"]["walked"].wrong("must have all tasks that were observed")
        return Past(
            singly=parts["singly"].flag(),
            memory=self._method.recall(parts["memory"], layers),
            evidence=evidence,
            kept=kept,
            stability=Stability.read(parts["stability"]),
        )

    def load(self, past: "Past") -> None:
        """Go on where `state_dict` was taken."""
        self._singly, self.memory = past.singly, past.memory
        self._collector.evidence, self._kept = past.evidence, past.kept
        self._stability = past.stability

    @property
    def _automatic(self) -> bool:
        """Whether observations go on until masks are stable."""
        return self._needs.observations == "auto" and self._needs.looks_at_data

    @property
    def _cumulative(self) -> bool:
        """Whether scores add up over all updates."""
        return self._needs.over_the_run and self._needs.looks_at_data

    def _missing_now(self) -> Sequence[str]:
        """The tasks whose losses are wanted."""
        everyone = self._automatic or self._cumulative
        return self._inventory.tasks if everyone else self.missing_tasks()

    def _keep(self) -> None:
        """Add the sums since the last update to those of the run.

        They are apart until then, so that a loss that is not finite spoils only the last of them.
        """
        for name, voters in self.evidence.statistics.items():
            for voter, sums in voters.items():
                kept = self._kept.statistics.setdefault(name, {}).setdefault(voter, {})
                merge = self._needs.statistics[name].merge
                for index, value in sums.items():
                    kept[index] = merge(kept[index], value) if index in kept else value
        self.evidence.statistics = {}

    def _check(self) -> None:
        problem = self.evidence.problem(self._inventory.layers, self._needs.statistics)
        problem = self._inventory.census.anyone(problem)
        if problem is not None:
            self.forget()
            raise RuntimeError(problem)

    def _question(self, step: int) -> tuple[int, Callable[[], Sequence[Tensor]]]:
        """How many observations there are, and the masks they would give."""

        def masks() -> list[Tensor]:
            layers, _, decision = self._decide(step)
            pairs = zip(layers, decision.masks, strict=True)
            return [layer.part.whole(mask).reshape(-1) for layer, mask in pairs]

        return min(self.evidence.counts.values()), masks

    def _decide(
        self, step: int, look: Callable[[Ballot], object] = lambda ballot: None
    ) -> tuple[list[Layer], list[Subject], D]:
        users = self._reach.now(self.evidence)
        active = self._reach.active(users)
        subjects = self._reach.subjects(users)
        evidence = self.evidence
        if self._cumulative:
            evidence = replace(evidence, statistics=self._kept.statistics)
        ballot = self._pollster.ballot(evidence, active, subjects, self.memory)
        look(ballot)
        return [layer for _, layer in active], subjects, self._method.decide(ballot, step)


def scale_of(scaler: Any, loss: Tensor | None = None) -> float:
    """The factor a ``GradScaler`` puts on losses; 1 if there is none.

    Args:
        scaler: The scaler.
        loss: One of the losses, if nobody else scales any. A scaler starts with its first.
    """
    if scaler is not None and loss is not None:
        scaler.scale(loss.detach())
    return 1.0 if scaler is None else float(scaler.get_scale())
