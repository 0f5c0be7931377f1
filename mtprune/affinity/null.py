"""The null: tasks that have net, pictures and everything else in common, but not their targets.

Every task's outputs are put beside other samples' targets, for each task apart, and scored in the
way the tasks are. What two tasks' masks then overlap has nothing to do with the tasks. Once more
outputs stay beside their own targets: that is what the draws are held against.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain, combinations, islice
from math import isclose, nan, prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtprune import checks, saliency
from mtprune.affinity.contrasts import Contrast
from mtprune.affinity.likeness import Likeness
from mtprune.affinity.pairing import deal, paired, sample_count
from mtprune.facts import Subject
from mtprune.holding import MaskHold
from mtprune.holding.inplace import InplaceMasking
from mtprune.methods.inventory import Selection, take_inventory
from mtprune.methods.vote import PerTaskKeep, Vote
from mtprune.model.names import unwrap
from mtprune.model.owner import check_free
from mtprune.model.running import untouched
from mtprune.model.selectors import Spec
from mtprune.model.task_masks import PackedTaskMasks, TaskMasks
from mtprune.observing.collector import Collector, Losses
from mtprune.observing.evidence import Store
from mtprune.observing.losses import LossFunction, check_graphs, compute, parse, scalars
from mtprune.observing.pollster import Pollster
from mtprune.observing.reach import Reach
from mtprune.progress import bar
from mtprune.schedule import OneShot
from mtprune.statistics import PerWeight

__all__ = ["Draw", "Null", "permuted"]

Pair = tuple[str, ...]
N = TypeVar("N", bound=Any)

_SLACK = 0.02
"""By how much of its weights a task's masks may differ in size from those of the null."""


@dataclass(frozen=True)
class Draw:
    """What came of one way to pair outputs with targets.

    Attributes:
        masks: What each task alone would keep.
        likeness: For every two tasks and each layer that both use, how alike their scores are.
    """

    masks: PackedTaskMasks
    likeness: Mapping[Pair, Mapping[str, Likeness]]

    def rank(self, pair: Pair, names: Sequence[str]) -> float:
        """The rank correlation of two tasks' saliencies, averaged over the weights of layers."""
        return Likeness.sum([self._of(pair)[name] for name in names]).rank

    def cosine(self, pair: Pair, names: Sequence[str]) -> float:
        """The cosine of two tasks' gradients in some layers together."""
        return Likeness.sum([self._of(pair)[name] for name in names]).cosine

    def _of(self, pair: Pair) -> Mapping[str, Likeness]:
        return self.likeness[pair if pair in self.likeness else pair[::-1]]


@dataclass(frozen=True)
class Null:
    """What tasks would keep if each one's targets were those of other samples.

    Attributes:
        tasks: The tasks.
        layers: The layers that some task uses, in order of execution: with their tasks and the
            multiply-adds that each weight has in one sample, where a product was seen.
        own: The draw in which outputs stay beside their own targets.
        draws: The others.
    """

    tasks: tuple[str, ...]
    layers: tuple[Subject, ...]
    own: Draw
    draws: tuple[Draw, ...]

    @property
    def task_masks(self) -> dict[str, dict[str, Tensor]]:
        """What each task alone would keep, outputs beside their own targets, as a pruner has it."""
        return self.own.masks.unpack()

    def rank(self, pair: Pair, names: Sequence[str]) -> Contrast:
        """The rank correlation of two tasks' saliencies in some layers, beside the draws'."""
        return Contrast(self.own.rank(pair, names), tuple(d.rank(pair, names) for d in self.draws))

    def cosine(self, pair: Pair, names: Sequence[str]) -> Contrast:
        """The cosine of two tasks' gradients in some layers, beside the draws'."""
        found = tuple(draw.cosine(pair, names) for draw in self.draws)
        return Contrast(self.own.cosine(pair, names), found)

    def in_order(self, layers: Collection[N]) -> list[N]:
        """Things that have the ``name`` of a layer, in order of execution."""
        places = {layer.name: place for place, layer in enumerate(self.layers)}
        return sorted(layers, key=lambda layer: places[layer.name])

    def check(self, task_masks: TaskMasks) -> None:
        """Refuse masks that are not to be held against this null.

        Raises:
            ValueError: If they are of other tasks, layers or sparsity.
        """
        if unknown := [task for task in task_masks if task not in self.tasks]:
            raise ValueError(f"`null` is of the tasks {list(self.tasks)}. Got masks of {unknown}.")
        own = self.own.masks.unpack()
        for task, masks in task_masks.items():
            for name, mask in masks.items():
                if name not in own[task] or own[task][name].shape != mask.shape:
                    raise ValueError(
                        f"`null` has no mask of shape {tuple(mask.shape)} for '{name}' of task "
                        f"'{task}'. Make it of the same model with the same `shared_modules`."
                    )
            kept, expected = (sum(int(m.sum()) for m in of.values()) for of in (masks, own[task]))
            weights = sum(mask.numel() for mask in masks.values())
            if len(masks) == len(own[task]) and abs(kept - expected) > _SLACK * weights:
                raise ValueError(
                    f"Task '{task}' keeps {kept:,} of {weights:,} weights, and {expected:,} in "
                    "`null`. Make it with the same method and sparsity."
                )


def permuted(
    model: nn.Module,
    task_losses: Mapping[str, LossFunction],
    batches: Iterable[Any],
    shared_modules: Spec = "auto",
    *,
    sparsity: float | PerTaskKeep,
    draws: int = 8,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    method: Vote | None = None,
    include: Spec = (),
    exclude: Spec = (),
    progress: bool = True,
) -> Null:
    """What unrelated tasks' masks overlap: the same, with outputs beside other samples' targets.

    Call it before pruning, on the model and the batches that masks are made of. In each draw the
    outputs are permuted along the batch, for each task apart: with more samples than tasks no
    output meets its own target, and no two tasks' targets come from one sample. Weights, gradients,
    buffers, hooks and the random state are left as they were; the model runs in the mode it is in.

    Args:
        model: The model, dense.
        task_losses: ``{task: loss(outputs, batch)}``; losses look at targets in ``batch`` alone.
        batches: Those that masks are made of. All are used, or as many as the ``observations`` of
            ``method`` say.
        shared_modules: As the pruner takes it.
        sparsity: Share of zeros in what a task alone would keep.
        draws: How often outputs are permuted. Each takes a forward for each batch, and a backward
            for each task.
        forward: ``forward(model, batch)`` -> outputs; ``model(batch)`` unless given. Tensors in
            them have samples first.
        seed: Of the permutations, and of what the forward draws in them.
        method: The vote that masks are made by, for how each task scores and ranks; ``|w * g|``
            over all it uses unless given. It is held once, at ``sparsity``, whatever its schedule.
        include: As the pruner takes it.
        exclude: As the pruner takes it.
        progress: Show a progress bar, if tqdm is installed.

    Raises:
        ValueError: If outputs have no batch dimension, a batch has one sample, or the loss of a
            task does not depend on which target its outputs are beside.

    Example:
        >>> model = nn.Linear(6, 2)
        >>> batch = torch.randn(8, 6), torch.randn(8, 2)
        >>> losses = {"left": lambda out, batch: (out[:, 0] - batch[1][:, 0]).square().mean(),
        ...           "right": lambda out, batch: (out[:, 1] - batch[1][:, 1]).square().mean()}
        >>> null = permuted(model, losses, [batch], sparsity=0.5, draws=4,
        ...                 forward=lambda model, batch: model(batch[0]), progress=False)
        >>> len(null.draws), [subject.name for subject in null.layers]
        (4, ['weight'])
    """
    checks.whole("draws", draws, least=1)
    tasks = parse(task_losses)
    if len(tasks) < 2:
        raise ValueError(f"Affinity compares at least two tasks. Got {list(tasks)}.")
    own = unwrap(model)
    check_free(own)
    selection = Selection(shared_modules, include, exclude)
    board = _Board(own, tasks, selection, _alone(method, sparsity), forward, seed)
    held = board.gather(batches)
    board.check_targets(held)
    passes: list[torch.Generator | None] = [None]
    passes += [torch.Generator().manual_seed(hash((seed, i)) & (2**63 - 1)) for i in range(draws)]
    found = [board.draw(held, shuffle) for shuffle in bar(passes, progress, "pairing")]
    return Null(tuple(tasks), tuple(board.subjects(held[0])), found[0], tuple(found[1:]))


def _alone(method: Vote | None, sparsity: float | PerTaskKeep) -> Vote:
    """The vote whose tasks' own wishes are asked for, dense and at once."""
    if method is None:
        return Vote(sparsity, observations="auto")
    given: object = method
    if not isinstance(given, Vote):
        must = "must be a Vote, in which each task has masks of its own, or None"
        raise TypeError(checks.message("method", method, must))
    if not method.disentangled or "grad" not in saliency.asks(method.saliency):
        raise ValueError(
            "`method` scores tasks alike: with disentangled=False, or by a saliency that looks at "
            "no data, all their masks are the same. Affinity needs a score of each task."
        )
    return replace(
        method,
        sparsity=sparsity,
        macs=None,
        speedup=None,
        schedule=OneShot(),
        straight_through=False,
        refit=None,
    )


class _Board:
    """A model on which tasks score weights, and nothing is pruned.

    Args:
        model: The model.
        tasks: The tasks and their losses.
        selection: The modules that are shared, included and excluded.
        method: How tasks score and rank.
        forward: See `permuted`.
        seed: Of what is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Mapping[str, LossFunction | None],
        selection: Selection,
        method: Vote,
        forward: Callable[[nn.Module, Any], Any] | None,
        seed: int,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._method = method
        self._forward = forward or nn.Module.__call__
        self._seed = seed
        self._inventory, needs = take_inventory(model, list(tasks), selection, method)
        gradients = {_GRADIENT: PerWeight(_signed)}
        self._needs = replace(needs, statistics={**needs.statistics, **gradients})
        self._reach = Reach(self._inventory)

    def gather(self, batches: Iterable[Any]) -> list[Any]:
        """The batches that count.

        Raises:
            ValueError: If there are none.
        """
        wanted = self._method.observations
        held = list(batches if wanted == "auto" else islice(batches, wanted))
        if not held:
            raise ValueError("`batches` gave no batch. Pass at least one.")
        return held

    def draw(self, batches: Sequence[Any], shuffle: torch.Generator | None) -> Draw:
        """Score the tasks on some batches.

        Args:
            batches: The batches.
            shuffle: Pairs outputs with targets of other samples; None for their own.
        """
        hold = MaskHold[Any](InplaceMasking(self._model))
        random = torch.Generator().manual_seed(self._seed)
        store = Store.of(self._needs, torch.float32, None)
        layers = self._inventory.layers
        collector = Collector(self._model, layers, hold, self._needs, store, random)
        pollster = Pollster(self._inventory, self._needs, hold, store, random)
        try:
            with untouched(self._model), torch.enable_grad():
                if shuffle is not None:
                    torch.manual_seed(shuffle.initial_seed())
                for number, batch in enumerate(batches):
                    collector.listen(True)
                    losses = scalars(self._losses(batch, number, shuffle))
                    check_graphs(self._tasks, losses)
                    collector.add(Losses(losses), self._reach.settled)
        finally:
            collector.listen(False)
        if problem := collector.evidence.problem(layers, self._needs.statistics):
            raise RuntimeError(problem.replace("; masks are unchanged, and this", ". This"))
        self._reach.settle(collector.evidence)
        active = self._reach.active()
        subjects = self._subjects
        ballot = pollster.ballot(collector.evidence, active, subjects, {})
        decision = self._method.decide(ballot, 0)
        _, bits = decision.record(subjects)
        masks = PackedTaskMasks.of(self._tasks, [layer for _, layer in active], bits)
        likeness: dict[Pair, dict[str, Likeness]] = {}
        for place, subject in enumerate(subjects):
            scores, gradients = ballot.scores[place], ballot.statistics[_GRADIENT][place]
            alone = decision.alone_for(subject.tasks, place)
            for pair in combinations(subject.tasks, 2):
                both = ([of[task] for task in pair] for of in (scores, gradients, alone))
                likeness.setdefault(pair, {})[subject.name] = Likeness.of(*both)
        return Draw(masks, likeness)

    def subjects(self, batch: Any) -> list[Subject]:
        """The layers in the order in which a forward reads them, with their multiply-adds."""
        from mtprune.model.macs import FlopsPerLayer  # slow to import

        counter = FlopsPerLayer(self._inventory.layers)
        with untouched(self._model), torch.enable_grad(), counter:
            outputs = self._forward(self._model, batch)
        samples = sample_count(outputs, 0)
        reads = {name: place for place, name in enumerate(counter.flops)}
        found, last = [], -1  # a layer that no product reads comes after the one before it
        for i, subject in enumerate(self._subjects):
            last = reads.get(subject.name, last)
            flops = counter.flops.get(subject.name)
            cost = Fraction(flops, 2 * samples * prod(subject.shape)) if flops else None
            found.append((last, i, replace(subject, cost=cost)))
        return [subject for *_, subject in sorted(found, key=lambda entry: entry[:2])]

    def check_targets(self, batches: Sequence[Any]) -> None:
        """Refuse a task whose loss does not depend on what its outputs are beside.

        That of errors which all have one sign is the same for any order of samples, and yet
        another beside another batch.

        Raises:
            ValueError: If there is one.
        """
        with untouched(self._model), torch.enable_grad():
            outputs = self._forward(self._model, batches[0])
        turned = paired(outputs, torch.arange(sample_count(outputs, 0)).roll(1))
        for task in self._tasks:
            own = self._value(task, outputs, batches[0])
            others = ((outputs, batch) for batch in batches[1:])
            pairs = chain([(turned, batches[0])], others)
            if all(isclose(self._value(task, *pair), own, rel_tol=1e-5) for pair in pairs):
                raise ValueError(
                    f"The loss of task '{task}' is the same whichever targets its outputs are "
                    "beside, so there is no null. Targets must come from the batch, not from the "
                    "outputs, and differ between samples. If they do, pass several batches."
                )

    @torch.no_grad()
    def _value(self, task: str, outputs: Any, batch: Any) -> float:
        """The loss of a task; NaN if outputs do not go with a batch."""
        try:
            loss = compute(self._tasks, outputs, batch, [task])[task]
        except Exception:  # targets of another size, which says that the loss looks at them
            return nan
        return sum(float(part) for part in tree_leaves(loss))

    @property
    def _subjects(self) -> list[Subject]:
        """The layers that some task uses, in order of position, once that is known."""
        assert self._reach.settled is not None
        return self._reach.subjects(self._reach.settled)

    def _losses(self, batch: Any, number: int, shuffle: torch.Generator | None) -> dict[str, Any]:
        """The losses of a batch, each task's outputs beside the targets it is dealt."""
        outputs = self._forward(self._model, batch)
        samples = sample_count(outputs, number)
        if shuffle is None:
            return compute(self._tasks, outputs, batch, None)
        return {
            task: compute(self._tasks, paired(outputs, order), batch, [task])[task]
            for task, order in deal(samples, list(self._tasks), shuffle).items()
        }


_GRADIENT = "gradient of each task"


def _signed(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient, which adds up with its sign."""
    return grad
