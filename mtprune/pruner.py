"""`MultitaskPruner`: state, and the order of calls. No mathematics."""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import checkpoint, distributed
from mtprune.bits import pack_bits, unpack_bits
from mtprune.facts import Count, Facts, GroupRow, Subject
from mtprune.holding import Decision, make_masking
from mtprune.holding.prune import accept_pruned_keys
from mtprune.methods import Method, Vote
from mtprune.methods.base import Needs, check_method, describe
from mtprune.model.components import declare
from mtprune.model.inventory import Inventory, take_inventory
from mtprune.model.layers import Layer, find_layers
from mtprune.model.names import unwrap
from mtprune.model.running import untouched
from mtprune.model.selectors import Spec
from mtprune.model.task_masks import remember_task_masks
from mtprune.observing.clock import Clock
from mtprune.observing.collector import Losses
from mtprune.observing.evidence import Store
from mtprune.observing.losses import LossFunction, check_devices, compute, given, parse, scalar
from mtprune.observing.optimizers import follow, raw
from mtprune.observing.reach import Reach
from mtprune.observing.round import Round, scale_of
from mtprune.observing.sweeps import backward
from mtprune.report import Report, make_report
from mtprune.weighting import Weigher, parse_weighting

__all__ = ["MultitaskPruner"]

_LIVE: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[MultitaskPruner]]" = (
    weakref.WeakKeyDictionary()
)


class MultitaskPruner:
    """Prunes a model for several tasks while you train it.

    Args:
        model: Any module. Compiled and DDP-wrapped models are looked into.
        task_losses: ``{name: loss(outputs, batch)}``, each a scalar tensor; or just the names, when
            you compute the losses and hand them to `observe_losses`.
        shared_modules: What the tasks share: modules, parameters, names or globs, a callable on the
            model, a mapping component -> any of these, or ``"auto"``: what at least two tasks are
            seen to use.
        method: How masks come about.
        optimizer: If given, masks hold after each of its steps, and its real steps are counted;
            otherwise calls of `step`. Regrowth needs it.
        include: Embeddings and bare Parameters to prune too.
        exclude: What not to prune.
        backend: ``"prune"`` (``torch.nn.utils.prune`` state) or ``"inplace"`` (masks beside the
            model: faster, and parameter names stay).
        seed: Of the pruner's own generator; the global one is never touched.
        score_dtype: Of the scores, ``torch.float32`` or ``torch.bfloat16``: half the memory, and
            masks that differ a little (``docs/results/speed.md``).
        score_device: Where scores are kept and masks are decided, for example ``"cpu"``; where the
            weights are unless given.

    Example:
        >>> model = nn.ModuleDict({"trunk": nn.Linear(4, 8), "a": nn.Linear(8, 1),
        ...                        "b": nn.Linear(8, 1)})
        >>> pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=Vote(sparsity=0.5))
        >>> hidden = model["trunk"](torch.randn(16, 4)).relu()
        >>> losses = {t: model[t](hidden).square().mean() for t in ("a", "b")}
        >>> _ = pruner.observe_losses(losses)
        >>> pruner.step(), pruner.sparsity
        (True, 0.5)
        >>> pruner.finalize()
    """

    def __init__(
        self,
        model: nn.Module,
        task_losses: Mapping[str, LossFunction] | Sequence[str],
        shared_modules: Spec = "auto",
        *,
        method: Method[Any] | None = None,
        optimizer: Any = None,
        include: Spec = (),
        exclude: Spec = (),
        backend: str = "prune",
        seed: int = 0,
        score_dtype: torch.dtype = torch.float32,
        score_device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module. Got {model!r}.")
        self._model = unwrap(model)
        alive = _LIVE.get(self._model)
        if alive is not None and alive() is not None:
            raise ValueError(
                "This model already has a live pruner. Call its finalize() before building another."
            )
        self._method: Method[Any] = Vote(sparsity=0.9) if method is None else method
        check_method(self._method)
        self._losses = parse(task_losses)
        prunable = find_layers(self._model, include, exclude)
        if not prunable:
            raise ValueError("The model has nothing prunable.")
        inventory, needs = self._inventory(prunable, shared_modules)
        self._stock = inventory
        self._optimizer = None if optimizer is None else raw(optimizer, inventory.layers)
        self._hold = self._method.hold(make_masking(backend, self._model), self._optimizer)
        self._weigher = Weigher(parse_weighting(self._method.weighting), list(self._losses))
        self._clock = Clock(self._method.schedule, opening=self._method.regrows)
        self._generator = torch.Generator().manual_seed(seed)
        self._reach = Reach(inventory)
        store = _store(needs, score_dtype, score_device)
        self._round: Round[Any] = Round(
            self._model,
            inventory,
            self._method,
            needs,
            self._hold,
            self._reach,
            store,
            self._generator,
        )
        self._alone: dict[str, dict[str, Tensor]] | None = {}
        self._facts = Facts()
        self._finalized = False
        handles = accept_pruned_keys(inventory.layers)
        if self._optimizer is not None:
            handles.append(follow(self._optimizer, self))
        self._release = weakref.finalize(self, _remove, handles)
        _LIVE[self._model] = weakref.ref(self)
        self._round.listen(self._clock.near)

    # What a training loop calls.

    def observe(
        self,
        outputs: object,
        batch: object,
        *,
        tasks: Collection[str] | None = None,
        scaler: Any = None,
        fold: bool = False,
    ) -> dict[str, Any]:
        """Compute the tasks' losses, and collect their saliency when an update is near.

        Call it between the forward and the backward pass. It costs one extra autograd sweep per
        task when masks are about to change, and nothing otherwise.

        Args:
            outputs: What the model returned; handed to the losses as it is.
            batch: The batch; likewise.
            tasks: The tasks this batch is for; all of them unless given.
            scaler: Your ``GradScaler``, if you train in float16.
            fold: Let the scoring be the training's backward too: the gradient of the plain sum of
                these losses, scaled if there is a ``scaler``, is added to the ``.grad`` of all that
                they reach, near an update or not. One backward is saved where scores are taken, and
                the gradient equals the usual one to rounding. Do not call ``backward`` on these
                losses again, which fails, and do not weigh them.

        Returns:
            ``{task: loss}``, untouched: yours to weigh and to call ``backward`` on, unless folded.
        """
        self._check_alive("observe")
        losses = compute(self._losses, outputs, batch, tasks)
        self._collect(losses, scaler, strict=True, fold=fold)
        return losses

    def observe_losses(self, losses: Any, *, scaler: Any = None, fold: bool = False) -> Any:
        """`observe`, for losses you computed.

        Args:
            losses: A mapping task -> loss (keys that are no task, such as ``"total"``, are
                ignored; a task that is missing, or whose loss has no graph, sits this one out), or
                a sequence or 1-D tensor in the declared order. A list of tensors is summed.
            scaler: Your ``GradScaler``, if you train in float16.
            fold: See `observe`. Only declared tasks' losses are part of the sum.

        Returns:
            ``losses``, untouched.
        """
        self._check_alive("observe_losses")
        self._collect(given(self._losses, losses), scaler, strict=False, fold=fold)
        return losses

    def step(self) -> bool:
        """Change the masks if an update is due; a cheap no-op otherwise.

        Call it after ``optimizer.step()``.

        Returns:
            Whether masks changed.

        Raises:
            RuntimeError: If an update is due but nothing, or for too long not every task, has been
                observed; or if a loss or saliency is not finite. Masks are unchanged.
        """
        self._check_alive("step")
        if self._optimizer is None:
            self._after_optimizer_step()
        update = self._clock.due()
        changed = update is not None and self._make(update)
        self._round.listen(self._clock.near)
        return changed

    def prune(
        self,
        batches: Iterable[Any],
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        progress: bool = True,
    ) -> Report:
        """Prune once, to the final sparsity, from batches instead of a training loop.

        The model runs in the mode it is in; its buffers and the random state are left as they were.

        Args:
            batches: As many as the method's ``observations`` are used; fewer are used as they are.
            forward: ``forward(model, batch)`` -> outputs; ``model(batch)`` unless given.
            progress: Show a progress bar, if tqdm is installed.
        """
        self._check_alive("prune")
        final = self._final_update()
        run = forward if forward is not None else _call
        with untouched(self._model), torch.enable_grad():
            self._round.listen(lambda lead: True)
            for batch in _bar(batches, progress):
                losses = compute(self._losses, run(self._model, batch), batch, None)
                self._collect(losses, None, strict=True, final=final)
                if not self._round.missing_tasks() and self._round.is_enough(final):
                    break
        if unseen := self._round.unseen():
            raise RuntimeError(
                f"`batches` gave no observation of tasks {unseen}. Pass at least one batch."
            )
        self._update(final)
        self._round.listen(self._clock.near)
        return self.report()

    def weigh(self, losses: Any) -> Tensor:
        """The weighted total of the losses: their plain sum, unless the method weighs tasks.

        Call it once in a step: a weighting that follows the losses takes each call for one.

        Args:
            losses: In any form that `observe_losses` takes.
        """
        chosen = given(self._losses, losses) if losses else {}
        parts = {name: scalar(name, loss) for name, loss in chosen.items()}
        found = {name: part for name, part in parts.items() if part is not None}
        if not found:
            raise ValueError(f"None of the losses {list(chosen)} carries a gradient.")
        return self._weigher.weigh(found)

    def finalize(self) -> None:
        """Bake the zeros in: plain modules, original parameter names, no hook of ours left.

        Masks, sparsity and report stay readable.
        """
        if not self._finalized:
            if self._alone:
                remember_task_masks(self._model, self._alone, self._shapes)
            self._hold.release()
            self._round.forget()
            self._round.listen(lambda lead: False)
            self._release()
            self._finalized = True
            _LIVE.pop(self._model, None)

    # What there is to read.

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: mask}``, True = keep; names as before pruning."""
        return {layer.name: self._hold.mask(layer).clone() for layer in self._active}

    @property
    def task_masks(self) -> dict[str, dict[str, Tensor]]:
        """``{task: {parameter name: mask}}``: what each task alone would keep of what it uses.

        From the scores of the last update; all True before the first.

        Raises:
            RuntimeError: After loading a checkpoint, which does not hold them, until an update.
        """
        if self._alone is None:
            raise RuntimeError(
                "Checkpoints do not hold task masks; they are there again after the next update."
            )
        if not self._alone:
            everything = {
                layer.name: torch.ones_like(self._hold.mask(layer)) for layer in self._stock.layers
            }
            return {task: dict(everything) for task in self._losses}
        return {
            task: {name: unpack_bits(bits, self._shapes[name]) for name, bits in masks.items()}
            for task, masks in self._alone.items()
        }

    @property
    def sparsity(self) -> float:
        """The exact share of pruned weights among those the pruner prunes.

        Where ranks are pruned, of the parameters that are saved.
        """
        total = sum(layer.parameter.numel() for layer in self._active)
        kept = sum(self._hold.kept(layer) for layer in self._active)
        return (total - kept) / total if total else 0.0

    def report(self) -> Report:
        """What was pruned at the last update, and for whom."""
        stock, done = self._stock, bool(self._facts.counts)
        facts = self._facts if done else Facts(tuple(map(_untold, stock.layers)))
        return make_report(
            facts,
            step=self._clock.done if done else None,
            tasks=list(self._losses),
            left_alone={**stock.left_dense, **self._reach.left_alone(), **stock.unfit},
            method=describe(self._method, defaults=False),
            weights={} if self._weigher.is_plain else self._weigher.weights,
            macs=float(stock.total_macs) if stock.costs else None,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in a new process: tensors, numbers, strings, containers."""
        settled = self._reach.settled
        return {
            **self._identity(),
            "step": self._clock.step,
            "done": self._clock.done,
            "users": None if settled is None else dict(settled),
            "facts": self._facts.state_dict(),
            "hold": self._hold.state_dict(),
            "weigher": self._weigher.state_dict(),
            **self._round.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: before or after the model's and optimizer's.

        Raises:
            ValueError: If it belongs to other tasks, layers or another method; nothing is changed.
        """
        self._check_alive("load_state_dict")
        if not isinstance(state, Mapping) or not {"version", "method", "evidence"} <= set(state):
            raise ValueError("This is not a state_dict of a MultitaskPruner.")
        state = checkpoint.upgraded(state, describe(self._method))
        checkpoint.check_same(state, self._identity())
        users = state["users"]
        settled = None if users is None else {t: f.cpu().clone() for t, f in users.items()}
        self._reach.settled = settled
        self._clock.step, self._clock.done = state["step"], state["done"]
        self._facts = Facts.from_state_dict(state["facts"])
        self._round.load_state_dict(state)
        self._weigher.load_state_dict(state["weigher"])
        self._generator.set_state(state["generator"].cpu())
        self._alone = None if state["hold"]["masks"] else {}
        self._hold.load_state_dict(state["hold"], self._active)
        self._round.listen(self._clock.near)

    # How an update comes about.

    @property
    def _active(self) -> list[Layer]:
        """The layers that are pruned."""
        return [layer for _, layer in self._reach.active()]

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {layer.name: layer.shape for layer in self._stock.layers}

    def _inventory(self, prunable: Sequence[Layer], shared: Spec) -> tuple[Inventory, Needs]:
        """What the model has to prune by this method, and what the method must be shown."""
        declared = declare(self._model, prunable, shared)
        method = self._method
        inventory = take_inventory(
            self._model,
            prunable,
            declared,
            list(self._losses),
            method.granularity,
            method.fits,
            type(method).__name__,
        )
        needs = method.needs(inventory)
        if needs.macs:
            inventory = inventory.measured(self._model, prunable, needs.example_inputs)
        method.check(inventory)
        return inventory, needs

    def _identity(self) -> dict[str, Any]:
        """The entries of a checkpoint in which it must agree with the pruner that loads it."""
        return {
            "version": checkpoint.VERSION,
            "tasks": sorted(self._losses),
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "method": describe(self._method),
        }

    def _after_optimizer_step(self) -> None:
        self._clock.step += 1
        self._hold.enforce()

    def _final_update(self) -> int:
        """The last update of the schedule.

        Raises:
            RuntimeError: If it has been made, or cannot be made without training.
        """
        if self._method.regrows:
            raise RuntimeError("Regrow trains sparsely: call observe() and step() in a loop.")
        final = self._clock.next
        while final is not None and (later := self._method.schedule.next_update(final)) is not None:
            final = later
        if final is None:
            raise RuntimeError("All updates of the schedule have been made already.")
        return final

    def _collect(
        self,
        losses: Mapping[str, Any],
        scaler: Any,
        *,
        strict: bool,
        final: int | None = None,
        fold: bool = False,
    ) -> None:
        """Check the losses, and let the round see those that are wanted now."""
        if fold:
            self._check_fold()
        scalars = {name: scalar(name, loss) for name, loss in losses.items()}
        if not torch.is_grad_enabled():
            return
        present = {name: loss for name, loss in scalars.items() if loss is not None}
        lead = self._round.lead(losses if strict else present)
        near = self._clock.next if self._clock.near(lead) else None
        update = near if final is None else final
        scale = scale_of(scaler)
        if update is None:
            if fold and present:
                backward(list(present.values()), scale)
            return
        check_devices(present, {layer.parameter.device for layer in self._stock.layers})
        for name in losses:
            if strict and name not in present:
                raise ValueError(
                    f"Loss of task '{name}' carries no gradient. Was it computed from detached "
                    "outputs, or under torch.no_grad()?"
                )
        others: list[Tensor] | None = [] if fold else None
        self._round.observe(Losses(present, others, scale, scaler is not None), update)

    def _make(self, update: int) -> bool:
        """Make an update that is due, if there is enough evidence; whether masks changed."""
        evidence = self._round.evidence
        if not (evidence.counts or evidence.discarded or self._facts.observations):
            raise RuntimeError(
                f"Step {update} is due but nothing has been observed. Call "
                "pruner.observe(outputs, batch) after the forward pass, before pruner.step()."
            )
        if self._round.missing_tasks():
            self._raise_if_late(update)
            return False
        return self._round.is_enough(update) and self._update(update)

    def _update(self, step: int) -> bool:
        """Make the update of ``step`` from the evidence; whether anything changed."""
        layers, subjects, decision = self._round.decide(step)
        device = layers[0].parameter.device
        distributed.check_equal(tensor.to(device) for tensor in decision.tensors())
        changed = self._hold.take(layers, decision)
        self._round.memory = decision.memory
        self._weigher.note(decision.slopes)
        self._record(subjects, decision, step)
        self._round.next()
        self._clock.done = step
        return changed

    def _record(self, subjects: Sequence[Subject], decision: Decision, step: int) -> None:
        """Keep what the report needs after the evidence is gone."""
        evidence = self._round.evidence
        self._alone = {task: {} for task in self._losses}
        for place, subject in enumerate(subjects):
            wishes = decision.alone_for(subject.tasks, place)
            for task in subject.tasks:
                wish = wishes.get(task, decision.masks[place])
                self._alone[task][subject.name] = pack_bits(wish)
        self._facts = Facts(
            counts=tuple(decision.count(subject, place) for place, subject in enumerate(subjects)),
            observations=dict(evidence.counts),
            stable=self._round.stable,
            discarded=dict(evidence.discarded),
            history=self._facts.history,
            groups=tuple(
                GroupRow(name, mask.numel(), int(mask.count_nonzero()))
                for name, mask in decision.units.items()
            ),
        ).remembering(step, self._weigher.weights)

    def _check_alive(self, call: str) -> None:
        if self._finalized:
            raise RuntimeError(
                f"{call}() was called after finalize(). Build a new MultitaskPruner to go on."
            )

    def _check_fold(self) -> None:
        """Refuse to let the scoring be the training's backward where it cannot."""
        if self._hold.no_fold:
            raise ValueError(self._hold.no_fold)
        if distributed.world() > 1:
            raise RuntimeError(
                "fold=True works in one process only: in several, gradients are averaged by hooks "
                "that allow one backward per forward. Call observe() without it, then backward()."
            )

    def _raise_if_late(self, update: int) -> None:
        unseen = self._round.unseen()
        if unseen and self._clock.overdue():
            names = ", ".join(f"'{task}'" for task in unseen)
            who = f"task {names} has" if len(unseen) == 1 else f"tasks {names} have"
            raise RuntimeError(
                f"Step {update} is due but {who} not been observed since step "
                f"{max(self._clock.done, 0)}. Call pruner.observe(..., tasks={unseen})."
            )


def _store(needs: Needs, dtype: object, device: torch.device | str | None) -> Store:
    """How sums of statistics are kept.

    Raises:
        ValueError: If not in that type.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"`score_dtype` must be torch.float32 or torch.bfloat16. Got {dtype!r}.")
    assert isinstance(dtype, torch.dtype)
    if needs.over_the_run and dtype is not torch.float32:
        raise ValueError(
            f"Scores are added up over the whole run, which {dtype} cannot hold. Leave "
            "`score_dtype` out."
        )
    return Store(needs.statistics, dtype, None if device is None else torch.device(device))


def _untold(layer: Layer) -> Count:
    """A layer before the first update."""
    size = layer.parameter.numel()
    return Count(layer.name, "", size, size, {}, size)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _bar(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, desc="observing", leave=False)
    return bar
