"""`MultitaskPruner`: state, and the order of calls. No mathematics."""

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import checkpoint, checks, distributed
from mtprune.facts import Facts, GroupRow, everywhere
from mtprune.holding import make_masking
from mtprune.holding.prune import accept_pruned_keys
from mtprune.methods import Method, Vote
from mtprune.methods.base import Ballot, check_method, describe
from mtprune.methods.inventory import Selection, check_parts, take_inventory
from mtprune.model.graph import bare
from mtprune.model.layers import Layer
from mtprune.model.names import unwrap
from mtprune.model.owner import check_free, claim, free, leave
from mtprune.model.parallel import check_parallel
from mtprune.model.routing import close
from mtprune.model.running import untouched
from mtprune.model.selectors import Spec
from mtprune.model.task_masks import PackedTaskMasks, remember_task_masks
from mtprune.observing.clock import Clock
from mtprune.observing.collector import Losses
from mtprune.observing.evidence import Store
from mtprune.observing.jacobian import Jacobian, check_jacobian, in_order
from mtprune.observing.losses import (
    LossFunction,
    check_devices,
    check_graphs,
    compute,
    given,
    parse,
    scalars,
)
from mtprune.observing.optimizers import follow, raw
from mtprune.observing.reach import Reach
from mtprune.observing.round import Round, scale_of
from mtprune.observing.supply import Supply
from mtprune.observing.sweeps import backward, check_fold
from mtprune.progress import bar
from mtprune.report import Report, make_report
from mtprune.tracking import Tracker
from mtprune.weighting import Weigher, parse_weighting

__all__ = ["MultitaskPruner"]


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
        sparsity: In place of `method`: that share of zeros by `recipes.best(sparsity, steps)`.
        steps: With `sparsity`, the length of the run in optimizer steps; without it the pruner is
            for `prune`.
        optimizer: If given, masks hold after each of its steps, and its real steps are counted;
            otherwise calls of `step`. Regrowth needs it.
        include: Embeddings and bare Parameters to prune too.
        exclude: What not to prune.
        backend: ``"prune"``: modules with masks hold ``weight_orig`` and ``weight_mask``, the state
            of ``torch.nn.utils.prune``. ``"inplace"``: masks are beside the model, and parameter
            names never change; faster. `LowRank` has no masks, so names stay with either.
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
        sparsity: float | None = None,
        steps: int | None = None,
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
        check_parallel(model)
        self._model = unwrap(model)
        check_free(self._model)
        self._method: Method[Any] = _method_of(method, sparsity, steps)
        check_method(self._method)
        self._losses = parse(task_losses)
        self._backend = backend
        inventory, needs = take_inventory(
            self._model,
            list(self._losses),
            Selection(shared_modules, include, exclude),
            self._method,
        )
        self._inventory = inventory
        check_parts(inventory, self._method, backend)
        self._optimizer = None if optimizer is None else raw(optimizer, inventory.layers)
        self._hold = self._method.hold(make_masking(backend, self._model), self._optimizer)
        self._weigher = Weigher(parse_weighting(self._method.weighting), list(self._losses))
        self._clock = Clock(self._method.schedule, opening=self._method.regrows)
        self._generator = torch.Generator().manual_seed(seed)
        self._reach = Reach(inventory)
        self._round: Round[Any] = Round(
            self._model,
            inventory,
            self._method,
            needs,
            self._hold,
            self._reach,
            Store.of(needs, score_dtype, score_device),
            self._generator,
        )
        self._task_masks: PackedTaskMasks | None = None
        self._facts = Facts.before(inventory.layers)
        self._backend = backend
        self._trackers: list[Tracker] = []
        self._finalized = False
        handles = accept_pruned_keys(inventory.layers)
        self._release = weakref.finalize(self, _remove, handles)
        claim(self._model, self)
        close(self._model, () if inventory.units is None else inventory.units.gated)
        if self._optimizer is not None:
            # Masks go on holding if somebody drops the pruner, until there is another one.
            handle = follow(self._optimizer, self, self._hold.enforce)
            leave(self._model, handle.remove)
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
        self._check_loops()
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
        self._check_loops()
        self._collect(given(self._losses, losses), scaler, strict=False, fold=fold)
        return losses

    def observe_jacobian(self, losses: Any, *, scaler: Any = None) -> Any:
        """`observe_losses` after torchjd's backward: gradients are read from ``.jac``, not swept.

        Call it between ``torchjd.autojac.backward(losses)``, or ``mtl_backward(losses, features)``,
        and ``jac_to_grad``. ``.jac`` must be that of these losses alone, and so must ``.grad`` of
        what one task has for itself after ``mtl_backward``: call ``zero_grad`` before.

        Args:
            losses: As for `observe_losses`, in the order in which the backward was given them.
            scaler: Your ``GradScaler``, if the losses of the backward were scaled.

        Returns:
            ``losses``, untouched.

        Raises:
            RuntimeError: If there is no such Jacobian, or masks hide from it what the method looks
                at, or there are several processes.
            ValueError: If thresholds are in front of the weights.
        """
        self._check_alive("observe_jacobian")
        self._check_loops()
        check_jacobian(self._hold)
        chosen = in_order(losses, given(self._losses, losses))
        self._collect(chosen, scaler, strict=False, swept=True)
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
        self._check_loops()
        if self._optimizer is None:
            self._after_optimizer_step()
        update = self._clock.due()
        changed = False
        if update is not None:
            self._meet("step")
            if self._is_ready(update):
                self._warn_of_haste(update)
                changed = self._update(update)
        for tracker in self._trackers:
            tracker.tick(self._clock.step, self._weigher.current)
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
                With `Rounds` as many for each: a list or a loader that has fewer is begun
                again, an iterator is refused.
            forward: ``forward(model, batch)`` -> outputs; ``model(batch)`` unless given.
            progress: Show a progress bar, if tqdm is installed.
        """
        self._check_alive("prune")
        if self._method.regrows:
            raise RuntimeError("Regrow trains sparsely: call observe() and step() in a loop.")
        updates = self._clock.at_once
        if not updates:
            raise RuntimeError("All updates of the schedule have been made already.")
        run = forward if forward is not None else nn.Module.__call__
        with untouched(self._model), torch.enable_grad():
            supply = Supply(batches, len(updates), self._round.wanted)
            for update in updates:
                self._round.listen(lambda lead: True)
                for batch in bar(supply.of(update), progress, "observing"):
                    with bare() if self._round.by_graph else nullcontext():
                        outputs = run(self._model, batch)
                    losses = compute(self._losses, outputs, batch, None)
                    self._collect(losses, None, strict=True, final=update)
                    if not self._round.missing_tasks() and self._round.is_enough(update):
                        break
                self._meet("prune")
                if unseen := self._round.unseen():
                    raise RuntimeError(
                        f"`batches` gave no observation of tasks {unseen}. Pass at least one batch."
                    )
                if update != updates[-1]:
                    self._update(update)
                    self._write_losses()
        self._update(updates[-1])
        self._write_losses()
        self._round.listen(self._clock.near)
        return self.report()

    def weigh(self, losses: Any) -> Tensor:
        """The weighted total of the losses: their plain sum, unless the method weighs tasks.

        Call it once in a step: a weighting that follows the losses takes each call for one.

        Args:
            losses: In any form that `observe_losses` takes.
        """
        chosen = given(self._losses, losses) if losses else {}
        present = scalars(chosen)
        if not present:
            raise ValueError(f"None of the losses {list(chosen)} carries a gradient.")
        return self._weigher.weigh(present)

    def track(self, writer: Any, *, every: int = 50, layers: Collection[str] = ()) -> Tracker:
        """Write curves of the run while it goes on; names begin with ``mtprune/``.

        Every so many steps each task's ``loss`` and ``weight``; at an update also ``sparsity`` and
        ``kept``, the share of all kept weights, by component and by task, the share of a task's
        weights it would keep alone (``wanted``), thresholds, the overlap of the masks before and
        after (``iou``), histograms of ``worth`` and of the decimal logarithms of each task's
        ``saliency``, and a layer's ``mask`` as a picture. Losses are means over the steps since the
        last write, of this process, and are not waited for: on a GPU they are written once they
        have arrived. Of several processes only the first writes.

        Args:
            writer: TensorBoard's ``SummaryWriter``, a W&B run, the module ``mlflow``, a Lightning
                logger, or an object with ``log(mapping, step)``, which gets the numbers alone.
            every: How many steps lie between two writes of losses and weights.
            layers: The layers whose masks are drawn, as `masks` names them; the largest of those
                that most tasks use unless given.

        Returns:
            The tracker; its ``write()`` writes losses and weights at once.
        """
        self._check_alive("track")
        checks.whole("every", every, least=1)
        known = [layer.name for layer in self._inventory.layers]
        if unknown := sorted(set(layers) - set(known)):
            raise ValueError(f"`layers` names {unknown}. Prunable here: {known}.")
        from mtprune.integrations.trackers import writer_of  # most runs do not need it

        tracker = Tracker(writer_of(writer), every, list(layers))
        if distributed.rank() == 0:
            self._trackers.append(tracker)
        return tracker

    def finalize(self) -> None:
        """Bake the zeros in: plain modules, original parameter names, no hook of ours left.

        Masks, sparsity and report stay readable.
        """
        if not self._finalized:
            self._warn_of_the_rest()
            for tracker in self._trackers:
                tracker.flush()
            if self._task_masks is not None:
                remember_task_masks(self._model, self._task_masks)
            self._hold.release()
            self._facts = self._facts.left(self._kept())
            self._round.forget()
            self._round.listen(lambda lead: False)
            self._release()
            self._finalized = True
            free(self._model)

    # What there is to read.

    @property
    def method(self) -> Method[Any]:
        """How masks come about."""
        return self._method

    @property
    def seed(self) -> int:
        """The seed of the pruner's own generator."""
        return self._generator.initial_seed()

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: mask}``, True = keep; names as before pruning."""
        return {x.name: x.part.shown(self._hold.mask(x).clone()) for x in self._active}

    @property
    def task_masks(self) -> dict[str, dict[str, Tensor]]:
        """``{task: {parameter name: mask}}``: what each task alone would keep of what it uses.

        From the scores of the last update; all True before the first.

        Raises:
            RuntimeError: After loading a checkpoint, which does not hold them, until an update.
        """
        if self._task_masks is not None:
            return self._task_masks.unpack()
        masks = {x.name: self._hold.mask(x) for x in self._inventory.layers}
        if not all(bool(mask.all()) for mask in masks.values()):
            raise RuntimeError(
                "Checkpoints do not hold task masks; they are there again after the next update."
            )
        return {task: dict(masks) for task in self._losses}

    @property
    def sparsity(self) -> float:
        """The exact share of pruned weights among those the pruner prunes.

        Where ranks are pruned, of the parameters that are saved.
        """
        total = sum(layer.parameter.numel() for layer in self._active)
        scattered = self._inventory.census.is_scattered
        # What other ranks keep is known since the last update: nobody is asked here.
        counts = self._facts.kept if scattered else self._kept()
        kept = sum(counts[layer.name] for layer in self._active)
        return (total - kept) / total if total else 0.0

    def report(self) -> Report:
        """What was pruned at the last update, and for whom."""
        inventory = self._inventory
        return make_report(
            self._facts,
            step=self._clock.done if self._clock.done >= 0 else None,
            tasks=list(self._losses),
            left_alone={
                **inventory.left_dense,
                **self._reach.left_alone(),
                **inventory.unfit,
                **inventory.coverage.left_alone(),
            },
            coverage=inventory.coverage.share(self._active),
            method=describe(self._method, defaults=False),
            weights={} if self._weigher.is_plain else self._weigher.weights,
            macs=float(inventory.total_macs) if inventory.costs else None,
            timing=self._round.timing,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in a new process: tensors, numbers, strings, containers."""
        settled = self._reach.settled
        return checkpoint.sealed(
            {
                **self._identity(),
                "step": self._clock.step,
                "done": self._clock.done,
                "users": None if settled is None else dict(settled),
                "led": self._reach.led,
                "facts": self._facts.state_dict(),
                "hold": self._hold.state_dict(),
                "weigher": self._weigher.state_dict(),
                **self._round.state_dict(),
                "generator": self._generator.get_state(),
            }
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: before or after the model's and optimizer's.

        Raises:
            ValueError: If it is damaged, was never that of a pruner, or belongs to other tasks,
                layers or another method. Nothing is changed then.
        """
        self._check_alive("load_state_dict")
        entries = checkpoint.opened(state, self._identity())
        # First all of it is read, so that nothing has changed where something cannot be.
        users = self._reach.read(entries["users"])
        layers = [layer for _, layer in self._reach.active(users)]
        step, done = self._clock.read(entries["step"], entries["done"])
        sizes = {layer.name: layer.parameter.numel() for layer in self._inventory.layers}
        facts = Facts.read(entries["facts"], sizes, list(self._losses))
        held = self._hold.read(entries["hold"], layers)
        if done >= 0 and users is None:
            raise entries["users"].wrong("must tell which task uses which layer, after an update")
        led = self._reach.read_led(entries["led"], users)
        subjects = [] if users is None else self._reach.subjects(users)
        checkpoint.check_counts(entries, held, facts, subjects)
        if done >= 0:
            checkpoint.check_promise(entries, facts, self._method.promised(subjects, done))
        past = self._round.read(entries, users)
        weights = self._weigher.read(entries["weigher"])
        random = checkpoint.random_state(entries["generator"])
        checkpoint.check_seal(entries)
        self._reach.settled, self._reach.led = users, led
        self._clock.step, self._clock.done = step, done
        self._facts = facts if facts.counts else Facts.before(self._inventory.layers)
        self._round.load(past)
        self._weigher.load(weights)
        self._generator.set_state(random)
        self._task_masks = None
        self._hold.load(held)
        self._round.listen(self._clock.near)

    # How an update comes about.

    @property
    def _active(self) -> list[Layer]:
        """The layers that are pruned."""
        return [layer for _, layer in self._reach.active()]

    def _kept(self) -> dict[str, int]:
        """How many parameters each layer keeps, on all ranks together; they all must ask."""
        layers = self._active
        counts = self._inventory.census.places([self._hold.kept(layer) for layer in layers])
        return {layer.name: total for layer, (_, total) in zip(layers, counts, strict=True)}

    def _identity(self) -> dict[str, Any]:
        """The entries of a checkpoint in which it must agree with the pruner that loads it."""
        return {
            "version": checkpoint.VERSION,
            "tasks": sorted(self._losses),
            "shapes": {x.name: list(x.shape) for x in self._inventory.layers},
            "method": describe(self._method),
        }

    def _after_optimizer_step(self) -> None:
        self._clock.step += 1
        self._hold.enforce()

    def _collect(
        self,
        losses: Mapping[str, Any],
        scaler: Any,
        *,
        strict: bool,
        final: int | None = None,
        fold: bool = False,
        swept: bool = False,
    ) -> None:
        """Check the losses, and let the round see those that are wanted now.

        Args:
            losses: The losses.
            scaler: See `observe`.
            strict: Whether each must have a graph.
            final: The update they are for, if it is known.
            fold: See `observe`.
            swept: Whether a backward has left their gradients in ``.jac``.
        """
        if fold:
            check_fold(self._hold, self._inventory.census)
        present: Mapping[str, Tensor] = scalars(losses)
        if not torch.is_grad_enabled():
            return
        for tracker in self._trackers:
            tracker.note(present)
        own, known = losses, losses if strict else present
        soon = final is not None or self._clock.near(self._round.earliest)
        if soon:
            self._check_spread()
        if soon and distributed.world() > 1:
            if strict:
                check_graphs(own, present)
            known = present = self._round.agree(present, self._clock.step)
        lead = self._round.lead(known)
        near = self._clock.next if self._clock.near(lead) and self._round.hears else None
        update = near if final is None else final
        scale = scale_of(scaler, next(iter(present.values()), None) if fold else None)
        if update is None:
            if fold and present:
                backward(list(present.values()), scale)
            return
        check_devices(present, {layer.parameter.device for layer in self._inventory.layers})
        if strict:
            check_graphs(own, present)
        jacobian = Jacobian.of(present, self._inventory.layers) if swept else None
        others: list[Tensor] | None = [] if fold else None
        self._round.observe(Losses(present, others, scale, scaler is not None, jacobian), update)

    def _check_spread(self) -> None:
        """Refuse a model that has been spread over ranks, since we were built, in vain."""
        if distributed.is_on():
            check_parallel(self._model)
            check_parts(self._inventory, self._method, self._backend)

    def _meet(self, call: str) -> None:
        """Wait until all ranks are in the same call, if there are several."""
        if distributed.world() > 1:
            distributed.meet(call, self._clock.step, list(self._losses), [])

    def _is_ready(self, update: int) -> bool:
        """Whether there is enough evidence for an update that is due."""
        if self._clock.done < 0:
            self._round.check_seen(update)
        if self._round.missing_tasks():
            if self._clock.overdue():
                self._round.check_late(update, self._clock.done)
            return False
        return self._round.is_enough(update)

    def _update(self, step: int) -> bool:
        """Make the update of ``step`` from the evidence; whether anything changed."""
        layers, subjects, decision = self._round.decide(step, self._show)
        device = layers[0].parameter.device
        layers[0].part.check_equal(tensor.to(device) for tensor in decision.tensors())
        layers[0].sharding.reshard()
        changed = self._hold.take(layers, decision)
        self._round.memory = decision.memory
        self._weigher.note(decision.slopes)
        here, bits = decision.record(subjects)
        counts = everywhere(here, self._inventory.census)
        self._task_masks = PackedTaskMasks.of(self._losses, layers, bits)
        self._facts = Facts(
            tuple(counts),
            stable=self._round.stable,
            groups=tuple(GroupRow.of(name, kept) for name, kept in decision.units.items()),
            history=self._facts.history,
            **self._round.evidence.numbers(),
        ).remembering(step, self._weigher.weights)
        self._round.next()
        self._clock.done = step
        for tracker in self._trackers:
            now = max(step, self._clock.step)
            tracker.update(now, decision, self._facts.counts, self._weigher.current)
        return changed

    def _write_losses(self) -> None:
        """Let trackers write the losses of an update where there is no loop to write them in."""
        for tracker in self._trackers:
            tracker.write()

    def _show(self, ballot: Ballot) -> None:
        """Let trackers see what an update is decided on."""
        for tracker in self._trackers:
            tracker.look(ballot, self._method.worths)

    def _warn_of_haste(self, update: int) -> None:
        """Warn if all is pruned in a loop by scores of weights that no step has trained."""
        schedule = self._method.schedule
        if update == 0 and schedule.next_update(0) is None and self._method.wants_training:
            warnings.warn(
                "Everything is pruned at the first step of this loop, by scores of weights that "
                "no step of it has trained. Prune while it trains: sparsity=..., steps=... in "
                "place of `method`, or schedule=Cubic(...). If they were trained before: "
                "pruner.prune(batches). At initialisation on purpose: recipes.disparse_static.",
                stacklevel=3,
            )

    def _warn_of_the_rest(self) -> None:
        """Warn if less is pruned than was asked for, because the schedule is not at its end."""
        final, done = self._clock.final, self._clock.done
        if self._method.sparsity == 0:
            return
        if final is None or (done >= 0 and self._method.schedule.progress(done) >= 1):
            return
        warnings.warn(
            f"finalize() was called at step {self._clock.step}, before the last update of the "
            f"schedule at step {final}: {self.report().sparsity:.2%} of the weights are zero. "
            "Train until then, or ask for fewer steps. Was pruner.step() called after every "
            "optimizer step, or pruner.prune(batches) without a loop?",
            stacklevel=3,
        )

    def _check_loops(self) -> None:
        if not self._clock.loops:
            raise RuntimeError(
                f"{self._method.schedule!r} prunes before training: call pruner.prune(batches). In "
                "a loop take Cubic(...) or recipes.best(sparsity, steps)."
            )

    def _check_alive(self, call: str) -> None:
        if self._finalized:
            raise RuntimeError(
                f"{call}() was called after finalize(). Build a new MultitaskPruner to go on."
            )


def _method_of(
    method: Method[Any] | None, sparsity: float | None, steps: int | None
) -> Method[Any]:
    """The method that was given, or the best one for a sparsity."""
    if method is not None and (sparsity is not None or steps is not None):
        raise ValueError(
            "`method` says by itself how much is pruned and when. Leave `sparsity` and `steps` "
            "out, or `method`."
        )
    if sparsity is None and steps is not None:
        raise ValueError("`steps` goes with `sparsity`: say how much is to be pruned by then.")
    if sparsity is None:
        return Vote(sparsity=0.9) if method is None else method
    from mtprune import recipes  # most runs do not need it

    return recipes.best(sparsity, steps)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
