"""Collecting: each task's statistics from the graph that is already there.

One forward, the user's, and one autograd sweep per task. A hook on every weight consumes its
gradient as it arrives, adds the statistics to the task's sums and hands on an empty gradient, so
that gradients of different tasks, or of all layers, are never alive together. ``.grad`` is not
written, and random state and buffers are as before, also when a checkpointed forward is run again.
Hooks exist only while a sweep runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mtprune import distributed
from mtprune.census import Census
from mtprune.holding import Hold
from mtprune.methods.base import Needs
from mtprune.model import factors
from mtprune.model.graph import reachable
from mtprune.model.layers import Layer
from mtprune.model.running import swept
from mtprune.observing.evidence import Evidence, Store
from mtprune.observing.inputs import Inputs
from mtprune.observing.jacobian import Jacobian
from mtprune.observing.roll import all_finite, means
from mtprune.observing.sweeps import backward, fold, gather, scatter, stream
from mtprune.statistics import JOINT, Seen

__all__ = ["Collector", "Losses"]


@dataclass(frozen=True)
class Losses:
    """The losses of one batch.

    Attributes:
        scored: Those to observe, by task: scalars whose graphs are alive.
        others: If not None, the sweeps are the training's backward as well: ``.grad`` receives the
            gradient of the sum of ``scored`` and of these, which are not observed.
        scale: Factor for the sweep, taken out of the gradients again.
        guarded: Discard a task's observation if a gradient is not finite.
        jacobian: Their gradients, if a backward has computed them already; then nothing is swept.
    """

    scored: Mapping[str, Tensor]
    others: Sequence[Tensor] | None = None
    scale: float = 1.0
    guarded: bool = False
    jacobian: Jacobian | None = None

    @property
    def folds(self) -> bool:
        """Whether the sweeps are the training's backward as well."""
        return self.others is not None


class Collector:
    """Turns losses into evidence.

    Args:
        model: The model, for its buffers.
        layers: Its prunable layers.
        hold: What holds the weights: statistics are those of the effective weight.
        needs: The statistics, and whether each loss is scored apart from the others.
        store: How their sums are kept.
        generator: The pruner's own source of randomness.

    Attributes:
        evidence: All that has been observed since the last update.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        hold: Hold[Any],
        needs: Needs,
        store: Store,
        generator: torch.Generator,
    ) -> None:
        self._model = model
        self._layers = layers
        self._hold = hold
        self._apart = needs.apart
        self._by_graph = needs.by_graph
        self._swept = {name: s for name, s in needs.statistics.items() if s.when == "sweep"}
        self._store = store
        self._generator = generator
        self._inputs = Inputs(layers, hold, needs.statistics, store, self._source)
        self.evidence = Evidence()

    def reset(self) -> None:
        """Forget all evidence."""
        self.evidence = Evidence()
        self._inputs.forget()

    def listen(self, near: bool) -> None:
        """Before a step's forward: gather inputs in it if an update is near, or stop."""
        self._inputs.listen(near)

    @property
    def hears(self) -> bool:
        """Whether inputs were gathered in the last forward, or nothing asks for them."""
        return self._inputs.hears

    def _source(self, index: int) -> torch.Generator:
        """A source of randomness for a layer in one forward, the same at each of its calls.

        It follows from the pruner's seed and from what has been observed, and draws nothing from
        the pruner's own: a forward that nobody observes changes nothing, and ranks, whose data
        differ, stay alike.
        """
        seen = sum(self.evidence.counts.values())
        key = (self._generator.initial_seed(), seen, index, distributed.rank())
        return torch.Generator().manual_seed(hash(key) & (2**63 - 1))

    def skip(self) -> None:
        """Let a batch pass that is not observed."""
        self._inputs.forget()

    def add(self, losses: Losses, users: Mapping[str, Tensor] | None) -> None:
        """One observation of each task in ``losses``.

        Args:
            losses: The losses of one batch.
            users: For each task, bool ``[layers]``, the layers it uses; None while that is unknown.

        If this fails half way, all evidence is forgotten.
        """
        try:
            self._add(losses, users)
        except BaseException:
            self.reset()  # half an observation is none
            raise
        finally:
            self._inputs.forget()

    def _add(self, losses: Losses, users: Mapping[str, Tensor] | None) -> None:
        """Observe every task whose loss can be used."""
        scored = losses.scored
        if losses.jacobian is not None:
            self._check_hidden()
        self._inputs.match(scored)
        with swept(self._model), self._dense_gradients():
            finite = all_finite(scored)
            able = [task for task in scored if not losses.guarded or bool(finite[task])]
            walked = self._walk({task: scored[task] for task in able}, users)
            # The losses that no sweep has folded yet.
            rest = [*(losses.others or ()), *(x for task, x in scored.items() if task not in able)]
            if self._swept and self._apart:
                valid = self._score_apart(losses, walked, users, rest)
            else:
                valid = [
                    task
                    for task, targets in walked.items()
                    if self._probe(task, targets, losses, users, None)
                ]
                if self._swept and valid:
                    rest += [scored[task] for task in able if task not in valid]
                    valid = self._score_together(losses, valid, rest)
                else:
                    rest += [scored[task] for task in able]
            if valid:
                self._inputs.add_to(self.evidence, valid, self._apart)
            if users is None and self._census.is_scattered and not self._by_graph:
                self._agree(walked)
            self._count(scored, finite, valid)
        if losses.folds and rest:
            backward(rest, losses.scale)

    def _score_apart(
        self,
        losses: Losses,
        walked: Mapping[str, Sequence[int]],
        users: Mapping[str, Tensor] | None,
        rest: Sequence[Tensor],
    ) -> list[str]:
        """One sweep for each task; the tasks whose gradients could be used."""
        valid: list[str] = []
        for place, (task, targets) in enumerate(walked.items(), 1):
            last = not rest and place == len(walked)
            folding = _Fold(keep=not last) if losses.folds else None
            if self._probe(task, targets, losses, users, folding):
                valid.append(task)
        return valid

    def _score_together(
        self, losses: Losses, valid: list[str], rest: Sequence[Tensor]
    ) -> list[str]:
        """One sweep for the sum of the losses; the tasks whose gradients could be used."""
        walked = [self.evidence.walked[task] for task in valid]
        targets = torch.stack(walked).any(0).nonzero().flatten().tolist()
        folding = _Fold(keep=bool(rest)) if losses.folds else None
        return valid if self._sweep(losses, _Sweep(valid, targets, JOINT, False, folding)) else []

    def _count(
        self, losses: Mapping[str, Tensor], finite: Mapping[str, Tensor], valid: Sequence[str]
    ) -> None:
        """Note one observation of each task, or that it was discarded."""
        evidence = self.evidence
        for task in losses:
            counts = evidence.counts if task in valid else evidence.discarded
            counts[task] = counts.get(task, 0) + 1
        for task, value in means({task: losses[task] for task in valid}).items():
            evidence.finite.setdefault(task, []).append(finite[task])
            evidence.losses[task] = evidence.losses.get(task, 0.0) + value

    def _probe(
        self,
        task: str,
        targets: Sequence[int],
        losses: Losses,
        users: Mapping[str, Tensor] | None,
        folding: "_Fold | None",
    ) -> bool:
        """Sweep for the statistics of one task alone; whether its gradients could be used."""
        scored = self._apart and bool(self._swept)
        if not scored and users is not None:
            return True
        if self._by_graph and not scored:
            yes = torch.tensor(True)
            self.evidence.hits.setdefault(task, {}).update(dict.fromkeys(targets, yes))
            return True
        voter = task if scored else None
        return self._sweep(losses, _Sweep([task], targets, voter, users is None, folding))

    def _walk(
        self, losses: Mapping[str, Tensor], users: Mapping[str, Tensor] | None
    ) -> dict[str, list[int]]:
        """The layers worth sweeping for each task; remembers where graphs lead."""
        if users is not None:
            walked = {task: users[task] for task in losses}
            self.evidence.walked.update(walked)
        elif losses:
            walked = self._reached(losses)
            for task, found in walked.items():
                before = self.evidence.walked.get(task)
                self.evidence.walked[task] = found if before is None else found | before
        else:
            walked = {}
        return {task: found.nonzero().flatten().tolist() for task, found in walked.items()}

    def _reached(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each task, bool ``[layers]``, where its graph leads on any rank.

        Raises:
            RuntimeError: If ranks gather weights for each other, and graphs differ between them.
        """
        leaves = [layer.leaf for layer in self._layers]
        reached = [reachable(loss) for loss in losses.values()]
        mine = torch.tensor([[id(leaf) in found for leaf in leaves] for found in reached])
        if distributed.world() == 1:
            return dict(zip(losses, mine.unbind(), strict=True))
        device = next(iter(losses.values())).device
        somewhere, elsewhere = distributed.any_rank(torch.stack([mine, ~mine]).to(device)).cpu()
        if self._census.is_scattered and bool((somewhere & elsewhere).any()):
            self._refuse_unlike(list(losses), somewhere & ~mine)
        return dict(zip(losses, somewhere.unbind(), strict=True))

    def _sweep(self, losses: Losses, sweep: "_Sweep") -> bool:
        """One pass over the graph of summed losses; whether its gradients could be used."""
        first, *others = sweep.tasks
        loss = losses.scored[first]
        for task in others:
            loss = loss + losses.scored[task]
        if losses.scale != 1.0:
            loss = loss * losses.scale
        hits = self.evidence.hits.setdefault(first, {}) if sweep.probes else {}

        def sink(index: int, grad: Tensor) -> None:
            grad = grad.detach()
            if sweep.probes:
                hits[index] = _any(grad) | hits[index] if index in hits else _any(grad)
            if sweep.voter is not None:
                self._score(sweep.voter, index, grad, losses.scale)

        if losses.jacobian is not None:
            layers = {i: self._layers[i] for i in sweep.targets}
            return losses.jacobian.feed(sweep.tasks, layers, sink, losses.guarded)
        targets, asked = sweep.targets, [self._layers[i] for i in sweep.targets]
        parameters = [layer.leaf for layer in asked]
        if sweep.folding is not None:
            shown = {i: self._hold.gradient_mask(self._layers[i]) for i in targets}
            return fold(loss, targets, parameters, sink, losses.guarded, shown, sweep.folding.keep)
        if not parameters:
            return True
        if self._census.is_scattered:
            return scatter(loss, targets, asked, sink, losses.guarded)
        if losses.guarded or distributed.world() > 1:
            return gather(loss, targets, parameters, sink, losses.guarded)
        stream(loss, targets, parameters, sink)
        return True

    def _score(self, voter: str, index: int, grad: Tensor, scale: float) -> None:
        """Add a layer's statistics to a voter's sums."""
        layer = self._layers[index]
        view = self._hold.view(layer)
        if view.basis is not None:
            grad = factors.rotate(grad.to(view.basis.dtype), view.basis).view(layer.shape)
        for name, statistic in self._swept.items():
            seen = Seen(
                layer,
                view.weight,
                mask=view.mask,
                grad=grad,
                scale=scale,
                inputs=self._inputs.of(layer, voter) if "inputs" in statistic.asks else None,
                task=voter,
                generator=self._generator,
            )
            sums = self.evidence.statistics.setdefault(name, {}).setdefault(voter, {})
            new = partial(self._store.empty, name)
            if "inputs" in statistic.asks and distributed.world() > 1:
                # Rows of inputs differ between ranks, so values add up over them.
                value = statistic.add(seen, None, new)
                distributed.sum_(value)
                sums[index] = value if index not in sums else sums[index].add_(value)
            else:
                sums[index] = statistic.add(seen, sums.get(index), new)

    @property
    def _census(self) -> Census:
        return self._layers[0].part.census

    def _agree(self, walked: Mapping[str, Sequence[int]]) -> None:
        """Let a gradient count as other than zero if it is in the part of any rank."""
        places = [(task, index) for task, targets in walked.items() for index in targets]
        if not places:
            return
        device = self._layers[0].values.device
        nothing = torch.zeros((), dtype=torch.bool, device=device)
        hits = [self.evidence.hits.setdefault(task, {}) for task, _ in places]
        mine = [of.get(index, nothing) for of, (_, index) in zip(hits, places, strict=True)]
        flags = distributed.any_rank(torch.stack([flag.to(device) for flag in mine]))
        for of, (_, index), flag in zip(hits, places, flags.unbind(), strict=True):
            of[index] = flag

    def _refuse_unlike(self, tasks: Sequence[str], lacking: Tensor) -> NoReturn:
        """Refuse graphs that differ between ranks which gather weights for each other.

        Args:
            tasks: The tasks.
            lacking: Bool ``[tasks, layers]``, where other ranks' graphs lead and not that here.

        Raises:
            RuntimeError: With the first rank that lacks something, on all of them.
        """
        problem = None
        for task, unlike in zip(tasks, lacking, strict=True):
            names = [f"'{self._layers[i].name}'" for i in unlike.nonzero().flatten().tolist()]
            if names and problem is None:
                problem = (
                    f"The loss of task '{task}' leads to {', '.join(names)} on some ranks and not "
                    f"on rank {distributed.rank()}. Under fully_shard every rank must run the same "
                    "layers."
                )
        raise RuntimeError(self._census.anyone(problem))

    def _check_hidden(self) -> None:
        """Refuse a training's gradients if masks hide from them what a statistic looks at.

        Raises:
            RuntimeError: If so.
        """
        for layer in self._layers:
            shown = self._hold.gradient_mask(layer)
            if shown is None or bool(shown.all()):
                continue
            view = self._hold.view(layer)
            for statistic in self._swept.values():
                hidden, whole = (
                    statistic.of(
                        Seen(
                            layer,
                            view.weight,
                            mask=view.mask,
                            grad=grad,
                            inputs=torch.ones(1, view.weight[:1].numel(), device=grad.device),
                            generator=torch.Generator().manual_seed(0),
                        )
                    )
                    for grad in (shown.to(view.weight.dtype), torch.ones_like(view.weight))
                )
                if not torch.equal(hidden, whole):
                    raise RuntimeError(
                        f"`.jac` of '{layer.name}' is zero where weights are pruned, and this "
                        "method looks at the gradient there. Call observe() or observe_losses() "
                        "before the backward."
                    )
            return  # one layer tells

    @contextmanager
    def _dense_gradients(self) -> Iterator[None]:
        """Let the gradient of masked weights through, so that growth can see them."""
        self._hold.gate.set(True)
        try:
            yield
        finally:
            self._hold.gate.set(False)


@dataclass(frozen=True)
class _Fold:
    """A sweep is to be part of the training's backward.

    Attributes:
        keep: Whether the graph is needed again after it.
    """

    keep: bool


@dataclass(frozen=True)
class _Sweep:
    """One pass over a graph.

    Attributes:
        tasks: The tasks whose losses are summed.
        targets: The layers to sweep.
        voter: Whose statistics are gathered; None for nobody's.
        probes: Whether to note where gradients are not zero.
        folding: If it is part of the training's backward.
    """

    tasks: Sequence[str]
    targets: Sequence[int]
    voter: str | None
    probes: bool
    folding: _Fold | None


def _any(grad: Tensor) -> Tensor:
    """Whether any of a gradient is not zero, bool, on its device."""
    if grad.device.type != "cpu":
        return grad.any()
    flat = grad.reshape(-1)
    return flat[:1024].any() or flat.any()  # the first few tell, as a rule
