"""Collecting: each task's saliency from the graph that is already there.

One forward, the user's, and one autograd sweep per task. A hook on every weight consumes its
gradient as it arrives, adds the saliency to the task's buffer and hands on an empty one, so that
gradients of different tasks, or of all layers, are never alive together. ``.grad`` is not written,
and random state and buffers are as before, also when a checkpointed forward is run again. Hooks
exist only while a sweep runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mtprune import distributed
from mtprune.bits import zeroed
from mtprune.components import Layer
from mtprune.masking import Masking
from mtprune.saliency import IN_PLACE, Saliency, uses_gradient

__all__ = ["JOINT", "Collector", "Evidence", "backward", "checked", "reachable", "untouched"]

JOINT = "(all tasks)"
"""The one voter when the sum of the losses is scored instead of each loss."""

Sink = Callable[[int, Tensor], None]

_CHUNK = 1 << 17  # weights scored together on a CPU: what comes between stays in a core's cache


@dataclass
class Evidence:
    """What has been seen since the last update.

    Attributes:
        scores: For each voter, the summed saliency of each layer it reaches: flat float32.
        counts: Observations of each task.
        hits: For each task and each layer swept for it, a flag: some gradient was not zero.
        walked: For each task, bool ``[layers]``: the autograd graph leads there.
        finite: For each task, one flag per observation: the loss was finite.
        discarded: Observations of each task that a `GradScaler` overflow made worthless.
        losses: The sum of each task's losses.
    """

    scores: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    hits: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    walked: dict[str, Tensor] = field(default_factory=dict)
    finite: dict[str, list[Tensor]] = field(default_factory=dict)
    discarded: dict[str, int] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)

    def reached(self, task: str, layers: int) -> Tensor:
        """Where some gradient of a task was not zero, bool ``[layers]``.

        The flags stay on their device until somebody asks: observing waits for nothing.
        """
        reached = torch.zeros(layers, dtype=torch.bool)
        hits = self.hits.get(task, {})
        for device in {flag.device for flag in hits.values()}:
            here = [i for i, flag in hits.items() if flag.device == device]
            reached[here] = torch.stack([hits[i] for i in here]).cpu()
        return reached

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """As plain containers, with layers under their ``names``."""
        return {
            "scores": {
                voter: {names[i]: score.clone() for i, score in scores.items()}
                for voter, scores in self.scores.items()
            },
            "counts": dict(self.counts),
            "reached": {task: self.reached(task, len(names)) for task in self.hits},
            "walked": {task: flags.clone() for task, flags in self.walked.items()},
            "finite": {task: torch.stack(flags) for task, flags in self.finite.items()},
            "discarded": dict(self.discarded),
            "losses": {task: total.clone() for task, total in self.losses.items()},
        }

    @classmethod
    def from_state_dict(
        cls,
        state: Mapping[str, Any],
        layers: Sequence[Layer],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> "Evidence":
        """The inverse of `state_dict`; for ``dtype`` and ``device`` see `Collector`."""
        place = {layer.name: i for i, layer in enumerate(layers)}
        return cls(
            scores={
                voter: {
                    place[name]: score.to(
                        device or layers[place[name]].parameter.device, dtype, copy=True
                    )
                    for name, score in scores.items()
                }
                for voter, scores in state["scores"].items()
            },
            counts=dict(state["counts"]),
            hits={
                task: {
                    i: flag.to(layer.parameter.device, copy=True)
                    for i, (flag, layer) in enumerate(zip(flags, layers, strict=True))
                }
                for task, flags in state["reached"].items()
            },
            walked={task: flags.cpu().clone() for task, flags in state["walked"].items()},
            finite={task: list(flags.unbind()) for task, flags in state["finite"].items()},
            discarded=dict(state["discarded"]),
            losses=dict(state["losses"]),
        )

    def problem(self, layers: Sequence[Layer]) -> str | None:
        """Why this evidence cannot be used: what is not finite, and whose; None if all is."""
        for task, flags in self.finite.items():
            if not all(bool(flag) for flag in flags):
                return (
                    f"Loss of task '{task}' is not finite. Check the loss and its targets; "
                    "masks are unchanged, and this evidence is dropped."
                )
        # A range says whether all is finite, in one look and without a copy.
        found = [
            (voter, index, torch.stack(score.aminmax()).isfinite().all())
            for voter, scores in self.scores.items()
            for index, score in scores.items()
            if score.numel()
        ]
        for (voter, index, _), fine in zip(found, _fetched([f for *_, f in found]), strict=True):
            if not fine:
                score = self.scores[voter][index]
                bad = int((~torch.isfinite(score)).sum())
                whose = "the summed losses" if voter == JOINT else f"task '{voter}'"
                return (
                    f"Saliency of {whose} is not finite in '{layers[index].name}' "
                    f"({bad} of {score.numel()}). Check the loss; masks are unchanged, and "
                    "this evidence is dropped."
                )
        return None


@dataclass(frozen=True)
class _Fold:
    """A sweep is to be part of the training's backward.

    Attributes:
        keep: Whether the graph is needed again after it.
    """

    keep: bool


class Collector:
    """Turns losses into evidence.

    Args:
        model: The model, for its buffers.
        layers: Its prunable layers.
        masking: Where the masks are: saliency is that of the effective weight.
        saliency: A function of weight and gradient; None to learn only who uses what.
        pool: How the saliency of a layer, by its number, is kept; None as it is, flat.
        disentangled: Score each loss apart from the others, or their sum.
        dtype: Of the scores.
        device: Where the scores are kept; None for where the weights are.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        masking: Masking,
        *,
        saliency: Saliency | None,
        pool: Callable[[int, Tensor], Tensor] | None = None,
        disentangled: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._masking = masking
        self._saliency = saliency
        self._pool = pool
        self._disentangled = disentangled
        self._data_free = not uses_gradient(saliency)
        self._into = IN_PLACE.get(saliency) if pool is None and saliency is not None else None
        self._space = torch.empty(0)
        self._dtype = dtype
        self._device = device
        self.evidence = Evidence()

    def reset(self) -> None:
        """Forget all evidence."""
        self.evidence = Evidence()

    def add(
        self,
        losses: Mapping[str, Tensor],
        users: Mapping[str, Tensor] | None,
        scale: float = 1.0,
        guarded: bool = False,
        fold: Sequence[Tensor] | None = None,
    ) -> None:
        """One observation of each task in ``losses``.

        Args:
            losses: Scalar losses whose graphs are alive.
            users: For each task, bool ``[layers]``, the layers it uses; None while that is unknown.
            scale: Factor for the sweep, taken out of the gradients again.
            guarded: Discard a task's observation if a gradient is not finite.
            fold: If given, the sweeps are the training's backward as well: ``.grad`` receives the
                gradient of the sum of ``losses`` and of these, which are not observed.

        If this fails half way, all evidence is forgotten.
        """
        try:
            self._add(losses, users, scale, guarded, fold)
        except BaseException:
            self.reset()  # half an observation is none
            raise

    def _add(
        self,
        losses: Mapping[str, Tensor],
        users: Mapping[str, Tensor] | None,
        scale: float,
        guarded: bool,
        fold: Sequence[Tensor] | None,
    ) -> None:
        evidence = self.evidence
        scored = not self._data_free
        rest = list(fold or ())  # what no sweep has folded yet
        with untouched(self._model), self._dense_gradients():
            flags, able = {}, []
            for task, loss in losses.items():
                flags[task] = ~distributed.any_rank(~torch.isfinite(loss.detach()))
                if not guarded or bool(flags[task]):
                    able.append(task)
                else:
                    rest.append(loss)
            valid = []
            folds = fold is not None and scored
            for task in able:
                last = not rest and task == able[-1]
                folding = _Fold(keep=not last) if folds and self._disentangled else None
                if self._probe(task, losses[task], users, scale, guarded, folding):
                    valid.append(task)
            if scored and not self._disentangled and valid:
                walked = [evidence.walked[task] for task in valid]
                targets = torch.stack(walked).any(0).nonzero().flatten().tolist()
                chosen = [(task, losses[task]) for task in valid]
                rest += [losses[task] for task in able if task not in valid]
                folding = _Fold(keep=bool(rest)) if folds else None
                if not self._sweep(chosen, targets, JOINT, scale, guarded, False, folding):
                    valid = []
            elif not (scored and self._disentangled):
                rest += [losses[task] for task in able]
            for task in losses:
                if task in valid:
                    evidence.counts[task] = evidence.counts.get(task, 0) + 1
                    evidence.finite.setdefault(task, []).append(flags[task])
                    value = distributed.mean_(losses[task].detach().to(torch.float32).clone())
                    evidence.losses[task] = evidence.losses.get(task, 0.0) + value
                else:
                    evidence.discarded[task] = evidence.discarded.get(task, 0) + 1
        if fold is not None and rest:
            backward(rest, scale)

    def _probe(
        self,
        task: str,
        loss: Tensor,
        users: Mapping[str, Tensor] | None,
        scale: float,
        guarded: bool,
        folding: "_Fold | None",
    ) -> bool:
        """Sweep for what is asked of one task alone; whether its gradients could be used."""
        targets = self._targets(task, loss, users)
        scored = self._disentangled and not self._data_free
        if not scored and users is not None:
            return True
        voter = task if scored else None
        return self._sweep([(task, loss)], targets, voter, scale, guarded, users is None, folding)

    def _targets(self, task: str, loss: Tensor, users: Mapping[str, Tensor] | None) -> list[int]:
        """The layers worth sweeping for a task; remembers where its graph leads."""
        if users is not None:
            self.evidence.walked[task] = users[task]
            return [int(i) for i in users[task].nonzero().flatten()]
        found = reachable(loss)
        walked = torch.tensor([id(layer.parameter) in found for layer in self._layers])
        if distributed.world() > 1:
            walked = distributed.any_rank(walked.to(loss.device)).cpu()
        before = self.evidence.walked.get(task)
        self.evidence.walked[task] = walked if before is None else walked | before
        return [int(i) for i in walked.nonzero().flatten()]

    def _sweep(
        self,
        losses: Sequence[tuple[str, Tensor]],
        targets: Sequence[int],
        voter: str | None,
        scale: float,
        guarded: bool,
        probe: bool,
        folding: "_Fold | None",
    ) -> bool:
        """One pass over the graph of the summed losses; whether its gradients could be used."""
        evidence = self.evidence
        loss = losses[0][1]
        for _, other in losses[1:]:
            loss = loss + other
        if scale != 1.0:
            loss = loss * scale
        hits = evidence.hits.setdefault(losses[0][0], {}) if probe else {}

        def sink(index: int, grad: Tensor) -> None:
            grad = grad.detach()
            if probe:
                hits[index] = _any(grad) | hits[index] if index in hits else _any(grad)
            if voter is not None:
                self._score(voter, index, grad, scale)

        parameters = [self._layers[i].parameter for i in targets]
        if folding is not None:
            shown = {i: self._masking.gradient_mask(self._layers[i]) for i in targets}
            if not _sweep_folding(loss, targets, parameters, sink, guarded, shown, folding.keep):
                return False
        elif not parameters:
            pass
        elif guarded or distributed.world() > 1:
            if not _sweep_whole(loss, targets, parameters, sink, guarded):
                return False
        else:
            _sweep_streaming(loss, targets, parameters, sink)
        return True

    def _score(self, voter: str, index: int, grad: Tensor, scale: float) -> None:
        """Add a layer's saliency to a voter's buffer."""
        layer = self._layers[index]
        weight, mask = self._masking.scored(layer)
        buffers = self.evidence.scores.setdefault(voter, {})
        first = index not in buffers
        if self._into is None or not weight.is_contiguous():
            assert self._saliency is not None
            grad = self._masking.rotated(layer, grad)
            weight, grad = _prepared(weight, mask, grad, scale)
            score = checked(self._saliency(weight, grad), layer)
            flat = score.reshape(-1) if self._pool is None else self._pool(index, score)
            if first:
                buffers[index] = self._buffer(flat.numel(), flat.device)
            buffers[index] += flat.to(buffers[index].device)
            return
        # Piece by piece, so that what comes between is never in memory, only in cache.
        if first:
            buffers[index] = self._buffer(weight.numel(), weight.device)
        size = _CHUNK if weight.device.type == "cpu" else max(weight.numel(), 1)
        masks = None if mask is None else mask.reshape(-1).split(size)
        for i, (part, w, g) in enumerate(
            zip(*(t.reshape(-1).split(size) for t in (buffers[index], weight, grad)), strict=True)
        ):
            w, g = _prepared(w, None if masks is None else masks[i], g, scale)
            if first and part.dtype == w.dtype and part.device == w.device:
                self._into(w, g, part)
            else:
                part += self._into(w, g, self._scratch(w)).to(part.device)

    def _scratch(self, like: Tensor) -> Tensor:
        """A place for what is between, float32; the same one again on a CPU."""
        if like.device.type != "cpu":
            return torch.empty_like(like)
        if self._space.numel() < like.numel():
            self._space = torch.empty(_CHUNK)
        return self._space[: like.numel()]

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        """An empty score buffer, flat."""
        return torch.zeros(size, dtype=self._dtype, device=self._device or device)

    @contextmanager
    def _dense_gradients(self) -> Iterator[None]:
        """Let the gradient of masked weights through, so that growth can see them."""
        self._masking.gate.set(True)
        try:
            yield
        finally:
            self._masking.gate.set(False)


def _prepared(
    weight: Tensor, mask: Tensor | None, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The effective weight and the gradient of the unscaled loss, float32."""
    weight = (weight if mask is None else zeroed(weight, mask)).to(torch.float32)
    grad = grad.to(torch.float32)
    return weight, grad if scale == 1.0 else grad / scale


def _any(grad: Tensor) -> Tensor:
    """Whether any of a gradient is not zero, bool, on its device."""
    if grad.device.type != "cpu":
        return grad.any()
    flat = grad.reshape(-1)
    return flat[:1024].any() or flat.any()  # the first few tell, as a rule


def _fetched(flags: Sequence[Tensor]) -> list[bool]:
    """Flags as Python values, with one transfer for each device."""
    values: dict[int, bool] = {}
    for device in {flag.device for flag in flags}:
        here = [i for i, flag in enumerate(flags) if flag.device == device]
        values.update(zip(here, torch.stack([flags[i] for i in here]).tolist(), strict=True))
    return [values[i] for i in range(len(flags))]


def checked(score: object, layer: Layer) -> Tensor:
    """What a saliency returned for a layer.

    Raises:
        ValueError: If it is not of the layer's shape.
    """
    if isinstance(score, Tensor) and tuple(score.shape) == layer.shape:
        return score
    got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
    raise ValueError(
        f"The saliency of '{layer.name}' must have the weight's shape {layer.shape}. Got {got}."
    )


def reachable(loss: Tensor) -> set[int]:
    """The ids of all leaf tensors to which the autograd graph of a loss leads.

    Raises:
        RuntimeError: If reentrant checkpointing hides what lies behind it.
    """
    found: set[int] = set()
    seen = set()
    stack: list[torch.autograd.graph.Node | None] = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(_ADVICE["use_reentrant=True"])
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _sweep_streaming(
    loss: Tensor, targets: Sequence[int], parameters: Sequence[Tensor], sink: Sink
) -> None:
    """Feed each gradient to ``sink`` as it arrives; none outlives its hook."""
    stubs: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    handles = []

    def consume(index: int) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            sink(index, grad.to_dense() if grad.is_sparse else grad)
            # One zero, seen as many: autograd keeps a number instead of a gradient.
            stub = stubs.setdefault((grad.dtype, grad.device), grad.new_zeros(()).to_dense())
            return stub.expand(grad.shape)

        return hook

    try:
        for index, parameter in zip(targets, parameters, strict=True):
            handles.append(parameter.register_hook(consume(index)))
        _grad(loss, parameters)
    finally:
        for handle in handles:
            handle.remove()


def _sweep_folding(
    loss: Tensor,
    targets: Sequence[int],
    parameters: Sequence[Tensor],
    sink: Sink,
    guarded: bool,
    shown: Mapping[int, Tensor | None],
    keep: bool,
) -> bool:
    """A backward whose gradients are fed to ``sink`` on their way into ``.grad``.

    Args:
        loss: What to differentiate.
        targets: The layers to score.
        parameters: Their Parameters.
        sink: Takes their dense gradients.
        guarded: See `Collector.add`; False is returned if a gradient is not finite.
        shown: For each target the mask that training's gradient goes through, or None.
        keep: Whether the graph is needed again.
    """
    held: list[tuple[int, Tensor]] = []
    handles = []

    def consume(index: int) -> Callable[[Tensor], Tensor | None]:
        def hook(grad: Tensor) -> Tensor | None:
            dense = grad.to_dense() if grad.is_sparse else grad
            if guarded:
                held.append((index, dense))
            else:
                sink(index, dense)
            mask = shown[index]
            return None if mask is None else zeroed(dense, mask)

        return hook

    try:
        for index, parameter in zip(targets, parameters, strict=True):
            handles.append(parameter.register_hook(consume(index)))
        with _advised():
            torch.autograd.backward(loss, retain_graph=keep)
    finally:
        for handle in handles:
            handle.remove()
    if not all(bool(torch.isfinite(grad).all()) for _, grad in held):
        return False
    for index, grad in held:
        sink(index, grad)
    return True


def backward(losses: Sequence[Tensor], scale: float) -> None:
    """The training's backward of summed losses."""
    total = torch.stack(list(losses)).sum()
    with _advised():
        torch.autograd.backward(total if scale == 1.0 else total * scale)


def _sweep_whole(
    loss: Tensor,
    targets: Sequence[int],
    parameters: Sequence[Tensor],
    sink: Sink,
    guarded: bool,
) -> bool:
    """All gradients at once, averaged over ranks in a fixed order; False if one is not finite."""
    grads = [
        torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
        for p, g in zip(parameters, _grad(loss, parameters), strict=True)
    ]
    for grad in grads:
        distributed.mean_(grad)
    if guarded and not all(bool(torch.isfinite(grad).all()) for grad in grads):
        return False
    for index, grad in zip(targets, grads, strict=True):
        sink(index, grad)
    return True


_ADVICE = {
    "a second time": "Call observe() before backward(): the graph of this loss is gone.",
    "modified by an inplace operation": (
        "Call observe() before optimizer.step(): the weights have changed since the forward."
    ),
    "use_reentrant=True": (
        "Reentrant activation checkpointing cannot be observed. Use "
        "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
    ),
    "donated buffer": (
        "This compiled graph frees its buffers after one backward. Set "
        "torch._functorch.config.donated_buffer = False before compiling."
    ),
}


def _grad(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
    with _advised():
        return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


@contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        for symptom, advice in _ADVICE.items():
            if symptom in str(error):
                raise RuntimeError(advice) from error
        raise


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leave buffers and random state as they were, whatever runs inside."""
    kept = [(buffer, buffer.clone()) for buffer in _buffers(model)]
    random = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for buffer, copy in kept:
            # Batch norm writes without telling autograd, and so do we: the user's graph is alive.
            buffer.data.copy_(copy)
        torch.set_rng_state(random)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            ours = name.endswith("_mask") and name[:-5] + "_orig" in module._parameters
            if buffer is not None and not ours:
                yield buffer
