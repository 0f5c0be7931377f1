"""`MultitaskPruner`: state, and the order of calls. No mathematics."""

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import distributed
from mtprune.bits import pack_bits, unpack_bits
from mtprune.clock import Clock
from mtprune.collect import JOINT, backward, untouched
from mtprune.components import Layer, Spec, declare, find_layers, unwrap
from mtprune.loosening import LooseMasking
from mtprune.lowering import RankMasking
from mtprune.masking import accept_pruned_keys, make_masking
from mtprune.methods import Decision, Method, Vote
from mtprune.methods.base import Ranks, describe
from mtprune.optimizers import follow, raw, restart_
from mtprune.report import (
    Count,
    Facts,
    GroupRow,
    Report,
    count,
    count_rank,
    make_report,
    moment,
    remember,
)
from mtprune.round import Round, scale_of
from mtprune.softening import SoftMasking
from mtprune.tasks import LossFunction, check_devices, compute, given, parse, scalar
from mtprune.units import cover
from mtprune.usage import Usage
from mtprune.weighting import Weigher, parse_weighting
from mtprune.wishes import remember_task_masks

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
        method: Method | None = None,
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
        self._method: Method = Vote(sparsity=0.9) if method is None else method
        if isinstance(method, type) or not hasattr(self._method, "decide"):
            raise TypeError(
                f"`method` must be a method such as Vote(sparsity=0.9), or a recipe that has been "
                f"called. Got {method!r}."
            )
        self._losses = parse(task_losses)
        prunable = find_layers(self._model, include, exclude)
        if not prunable:
            raise ValueError("The model has nothing prunable.")
        declared = declare(self._model, prunable, shared_modules)
        fit, self._unfit = _sorted_out(self._method, prunable)
        declared = [d for d in declared if not self._unfit.keys() >= set(d.names)]
        self._covered = cover(self._method.granularity, self._model, fit)
        self._layers = self._covered.layers
        self._usage = Usage(self._layers, self._losses, declared)
        self._usage.check_names(self._method)
        self._optimizer = None if optimizer is None else raw(optimizer, self._layers)
        if self._method.regrows and self._optimizer is None:
            raise ValueError(
                "Regrowth resets the optimizer's state of weights that come back. "
                "Pass optimizer=... to the pruner."
            )
        if score_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"`score_dtype` must be torch.float32 or torch.bfloat16. Got {score_dtype!r}."
            )
        check = getattr(self._method, "check_reach", None)
        if check is not None:
            check(*self._usage.sizes())
        self._weigher = Weigher(
            parse_weighting(getattr(self._method, "weighting", "uniform")), list(self._losses)
        )
        self._costs = _measured(self._method, self._model, prunable)
        self._whole = sum((self._cost_of(x) for x in prunable), Fraction(0))
        check = getattr(self._method, "check_units", None)
        if check is not None and self._covered.units is not None:
            costs = [self._costs[layer.name] for layer in self._layers] if self._costs else []
            check(self._covered.units, costs, self._whole)
        self._masking = make_masking(backend, self._model)
        if self._method.straight_through:
            if score_dtype is not torch.float32:
                raise ValueError(
                    f"straight_through=True adds scores up over the whole run, which {score_dtype} "
                    "cannot hold. Leave `score_dtype` out."
                )
            self._masking = LooseMasking(self._masking, self._model)
        if getattr(self._method, "lowers", False):
            self._masking = RankMasking()
        if self._method.softens:
            self._masking = SoftMasking(self._masking, self._model, self._method.watch)
        self._clock = Clock(self._method.schedule, opening=self._method.regrows)
        self._generator = torch.Generator().manual_seed(seed)
        self._round = Round(
            self._model,
            self._layers,
            self._losses,
            self._method,
            self._masking,
            self._usage,
            self._generator,
            self._costs,
            score_dtype,
            None if score_device is None else torch.device(score_device),
            self._covered.units,
            self._whole,
        )
        self._alone: dict[str, dict[str, Tensor]] | None = {}
        self._facts = Facts()
        self._final: dict[str, Tensor] | None = None
        self._final_sparsity = 0.0
        handles = accept_pruned_keys(self._layers)
        if self._optimizer is not None:
            handles.append(follow(self._optimizer, self))
        self._release = weakref.finalize(self, _remove, handles)
        _LIVE[self._model] = weakref.ref(self)

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
            self._clock.step += 1
            self._masking.enforce()
        update = self._clock.due()
        if update is None:
            return False
        evidence = self._round.evidence
        if not (evidence.counts or evidence.discarded or self._facts.observations):
            raise RuntimeError(
                f"Step {update} is due but nothing has been observed. Call "
                "pruner.observe(outputs, batch) after the forward pass, before pruner.step()."
            )
        if self._round.lacking():
            self._raise_if_late(update)
            return False
        return self._round.is_enough(update) and self._update(update)

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
        if self._method.regrows:
            raise RuntimeError("Regrow trains sparsely: call observe() and step() in a loop.")
        final = self._clock.next
        while final is not None and (later := self._method.schedule.next_update(final)) is not None:
            final = later
        if final is None:
            raise RuntimeError("All updates of the schedule have been made already.")
        run = forward if forward is not None else _call
        with untouched(self._model), torch.enable_grad():
            for batch in _bar(batches, progress):
                losses = compute(self._losses, run(self._model, batch), batch, None)
                self._collect(losses, None, strict=True, final=final)
                if not self._round.lacking() and self._round.is_enough(final):
                    break
        if unseen := self._round.unseen():
            raise RuntimeError(
                f"`batches` gave no observation of tasks {unseen}. Pass at least one batch."
            )
        self._update(final)
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
        if self._final is None:
            self._final, self._final_sparsity = self.masks, self.sparsity
            if self._alone:
                remember_task_masks(
                    self._model, self._alone, {x.name: x.shape for x in self._layers}
                )
            self._masking.remove()
            self._round.forget()
            self._release()
            _LIVE.pop(self._model, None)

    # What there is to read.

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{parameter name: mask}``, True = keep; names as before pruning."""
        if self._final is not None:
            return dict(self._final)
        return {
            layer.name: self._masking.current(layer).clone() for _, layer in self._usage.active()
        }

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
        shapes = {layer.name: layer.shape for layer in self._layers}
        if not self._alone:
            everything = {
                layer.name: torch.ones_like(self._masking.current(layer)) for layer in self._layers
            }
            return {task: dict(everything) for task in self._losses}
        return {
            task: {name: unpack_bits(bits, shapes[name]) for name, bits in masks.items()}
            for task, masks in self._alone.items()
        }

    @property
    def sparsity(self) -> float:
        """The exact share of pruned weights among those the pruner prunes.

        Where ranks are pruned, of the parameters that are saved.
        """
        if self._final is not None:
            return self._final_sparsity
        layers = [layer for _, layer in self._usage.active()]
        total = sum(layer.parameter.numel() for layer in layers)
        kept = sum(self._masking.kept(layer) for layer in layers)
        return (total - kept) / total if total else 0.0

    def report(self) -> Report:
        """What was pruned at the last update, and for whom."""
        facts = self._facts
        return make_report(
            facts.counts or [self._untold(layer) for layer in self._layers],
            step=self._clock.done if facts.counts else None,
            tasks=list(self._losses),
            observations=facts.observations,
            stable=facts.stable,
            discarded=facts.discarded,
            left_alone={**self._covered.dense, **self._usage.left_alone(), **self._unfit},
            method=describe(self._method, defaults=False),
            groups=facts.groups,
            macs=float(self._whole) if self._costs else None,
            weights={} if self._weigher.is_plain else self._weigher.weights,
            history=facts.history,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in a new process: tensors, numbers, strings, containers."""
        active = [layer for _, layer in self._usage.active()]
        held: dict[str, Tensor | None] = {x.name: self._masking.mask(x) for x in active}
        if self._final is not None and self._facts.counts:
            held.update(self._final)
        return {
            "version": 1,
            "tasks": sorted(self._losses),
            "method": describe(self._method),
            "shapes": {layer.name: list(layer.shape) for layer in self._layers},
            "step": self._clock.step,
            "done": self._clock.done,
            "users": None if self._usage.settled is None else dict(self._usage.settled),
            "masks": {name: pack_bits(mask) for name, mask in held.items() if mask is not None},
            "facts": self._facts.state_dict(),
            "soft": self._soft_state(active),
            "loose": isinstance(self._masking, LooseMasking) and self._masking.is_loose,
            "ranks": self._masking.rank_state() if isinstance(self._masking, RankMasking) else {},
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
        if not isinstance(state, Mapping) or not set(self.state_dict()) <= set(state):
            raise ValueError("This is not a state_dict of a MultitaskPruner.")
        shapes = {layer.name: list(layer.shape) for layer in self._layers}
        for key, mine in (
            ("version", 1),
            ("tasks", sorted(self._losses)),
            ("shapes", shapes),
            ("method", describe(self._method)),
        ):
            if state[key] != mine:
                difference = _difference(state[key], mine)
                raise ValueError(f"This checkpoint is of a pruner with other {key}: {difference}")
        users = state["users"]
        settled = None if users is None else {t: f.cpu().clone() for t, f in users.items()}
        self._usage.settled = settled
        self._clock.step, self._clock.done = state["step"], state["done"]
        self._facts = Facts.from_state_dict(state["facts"])
        self._round.load_state_dict(state)
        self._weigher.load_state_dict(state["weigher"])
        self._generator.set_state(state["generator"].cpu())
        self._alone = None if state["masks"] else {}
        active = [layer for _, layer in self._usage.active() if layer.name in state["masks"]]
        masks = [
            unpack_bits(state["masks"][x.name].to(x.parameter.device), x.shape) for x in active
        ]
        if state["soft"]:
            assert isinstance(self._masking, SoftMasking)
            self._masking.restore(active, masks, state["soft"])
        elif state["loose"]:
            assert isinstance(self._masking, LooseMasking)
            self._masking.loosen(active, masks)
        elif isinstance(self._masking, RankMasking):
            self._masking.restore([layer for _, layer in self._usage.active()], state["ranks"])
        elif active:
            self._masking.install(active, masks)
        else:
            self._masking.lift()

    # How an update comes about.

    def _after_optimizer_step(self) -> None:
        self._clock.step += 1
        self._masking.enforce()

    def _collect(
        self,
        losses: Mapping[str, Any],
        scaler: Any,
        *,
        strict: bool,
        final: int | None = None,
        fold: bool = False,
    ) -> None:
        """Check the losses, and let the collector see those that are wanted now."""
        if fold and self._method.softens:
            raise ValueError(
                "fold=True cannot train thresholds. Call observe() without it, then "
                "pruner.weigh(losses).backward()."
            )
        if fold and distributed.world() > 1:
            raise RuntimeError(
                "fold=True works in one process only: in several, gradients are averaged by hooks "
                "that allow one backward per forward. Call observe() without it, then backward()."
            )
        scalars = {name: scalar(name, loss) for name, loss in losses.items()}
        if not torch.is_grad_enabled():
            return
        present = {name: loss for name, loss in scalars.items() if loss is not None}
        lead = self._round.lead(losses if strict else present)
        near = self._clock.next if self._clock.near(lead) else None
        update = near if final is None else final
        if update is None:
            if fold and present:
                backward(list(present.values()), scale_of(scaler))
            return
        check_devices(present, {layer.parameter.device for layer in self._layers})
        for name in losses:
            if strict and name not in present:
                raise ValueError(
                    f"Loss of task '{name}' carries no gradient. Was it computed from detached "
                    "outputs, or under torch.no_grad()?"
                )
        self._round.observe(present, scaler, update, fold)

    def _update(self, step: int) -> bool:
        """Make the update of ``step`` from the evidence; whether masks changed."""
        layers, decision = self._round.decide(step)
        masks = [
            mask.view(layer.shape).to(layer.parameter.device)
            for layer, mask in zip(layers, decision.masks, strict=True)
        ]
        distributed.check_equal(masks)
        before = [self._masking.current(layer).clone() for layer in layers]
        if self._optimizer is not None and self._method.regrows:
            for layer, old, new in zip(layers, before, masks, strict=True):
                restart_(self._optimizer, layer, new & ~old)
        if decision.softly is not None:
            assert isinstance(self._masking, SoftMasking)
            softly = decision.softly
            self._masking.soften(layers, softly.thresholds, masks, softly.leak, softly.gains)
        lowered = False
        if decision.ranks is not None:
            lowered = self._lower(layers, decision.ranks)
        elif decision.provisional:
            assert isinstance(self._masking, LooseMasking)
            self._masking.loosen(layers, masks)
        elif decision.softly is None or decision.softly.settled:
            self._masking.install(layers, masks)
        self._round.memory = decision.memory
        self._weigher.note(decision.memory.get("slopes", {}))
        self._record(layers, decision, step)
        self._round.next()
        self._clock.done = step
        changed = any(not torch.equal(old, new) for old, new in zip(before, masks, strict=True))
        return changed or lowered

    def _lower(self, layers: Sequence[Layer], decided: Ranks) -> bool:
        """Let ranks, or gates, take hold; whether a rank changed."""
        assert isinstance(self._masking, RankMasking)
        kept = zip(decided.kept, layers, strict=True)
        distributed.check_equal(mask.to(layer.parameter.device) for mask, layer in kept)
        before = [self._masking.rank(layer) for layer in layers]
        self._masking.lower(layers, decided.kept, decided.gates)
        return before != [self._masking.rank(layer) for layer in layers]

    def _record(self, layers: Sequence[Layer], decision: Decision, step: int) -> None:
        """Keep what the report needs after the evidence is gone."""
        evidence = self._round.evidence
        components = self._usage.components(self._usage.now(evidence))
        counts = []
        alone: dict[str, dict[str, Tensor]] = {task: {} for task in self._losses}
        voters = {task: JOINT if JOINT in decision.alone else task for task in self._losses}
        softly = decision.softly
        for place, layer in enumerate(layers):
            mask = decision.masks[place]
            using = [task for task in self._losses if self._usage.uses(task, layer)]
            asked = {voters[task] for task in using} if decision.alone else set()
            known = {voter: decision.alone[voter][place] for voter in asked}
            wishes = {task: known[voters[task]] for task in using if asked}
            for task in using:
                alone[task][layer.name] = pack_bits(wishes.get(task, mask))
            tau = None if softly is None else float(softly.thresholds[place])
            cost = self._costs.get(layer.name)
            component = components[layer.name]
            if decision.ranks is not None:
                counts.append(_count_rank(layer, component, place, using, decision.ranks))
            else:
                counts.append(
                    count(
                        layer.name,
                        component,
                        mask,
                        wishes,
                        using=using,
                        threshold=tau,
                        cost=None if cost is None else float(cost),
                    )
                )
        self._alone = alone
        self._facts = Facts(
            counts=tuple(counts),
            observations=dict(evidence.counts),
            stable=self._round.stable,
            discarded=dict(evidence.discarded),
            history=remember(self._facts.history, moment(counts, step, self._weigher.weights)),
            groups=tuple(
                GroupRow(name, mask.numel(), int(mask.count_nonzero()))
                for name, mask in decision.units.items()
            ),
        )

    def _untold(self, layer: Layer) -> Count:
        """A layer before the first update."""
        size = layer.parameter.numel()
        return Count(layer.name, "", size, size, {}, size)

    def _cost_of(self, layer: Layer) -> Fraction:
        """The multiply-adds of a layer, 0 unless measured."""
        return self._costs.get(layer.name, Fraction(0)) * layer.parameter.numel()

    def _soft_state(self, active: Sequence[Layer]) -> dict[str, Any]:
        """The thresholds, while they are not yet fixed."""
        masking = self._masking
        return masking.soft_state(active) if isinstance(masking, SoftMasking) else {}

    def _check_alive(self, call: str) -> None:
        if self._final is not None:
            raise RuntimeError(
                f"{call}() was called after finalize(). Build a new MultitaskPruner to go on."
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


def _sorted_out(method: Method, layers: Sequence[Layer]) -> tuple[list[Layer], Mapping[str, str]]:
    """The layers a method can prune, and why not the others."""
    unfit = getattr(method, "unfit", None)
    reasons = {} if unfit is None else {layer.name: unfit(layer) for layer in layers}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    if len(reasons) == len(layers):
        name, reason = next(iter(reasons.items()))
        raise ValueError(
            f"{type(method).__name__} can prune none of these layers: '{name}' and "
            f"{len(layers) - 1} more are left dense ({reason})."
        )
    return [layer for layer in layers if layer.name not in reasons], reasons


def _count_rank(
    layer: Layer, component: str, place: int, using: Sequence[str], decided: Ranks
) -> Count:
    """What an update decided about a layer's rank."""
    voters = {task: JOINT if JOINT in decided.alone else task for task in using}
    wishes = {task: decided.alone[v][place] for task, v in voters.items() if v in decided.alone}
    return count_rank(layer.name, component, layer.shape, decided.kept[place], wishes, using)


def _measured(method: Method, model: nn.Module, layers: Sequence[Layer]) -> Mapping[str, Fraction]:
    """What a weight of each layer costs, if the method asks."""
    if not method.needs_costs:
        return {}
    from mtprune.macs import macs_per_weight  # most runs do without

    found = macs_per_weight(model, layers, getattr(method, "inputs_to_measure", None))
    return {layer.name: cost for layer, cost in zip(layers, found, strict=True)}


def _difference(theirs: object, mine: object) -> str:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        theirs = {k: v for k, v in theirs.items() if mine.get(k) != v} or sorted(theirs)
        mine = {k: mine.get(k) for k in theirs} if isinstance(theirs, dict) else sorted(mine)
    return f"it has {theirs}, this one {mine}."


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
