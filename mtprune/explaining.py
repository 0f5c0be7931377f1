r"""Explained shares: how much of each task's loss the model has learned to avoid.

With the loss :math:`L_k` of task k and the loss :math:`L_k^0` of an output that is the same for
every sample, the explained share is :math:`r_k = 1 - L_k / L_k^0`: 1 without any loss, 0 for a
model that knows nothing about its inputs. A task that explains next to nothing has gradients like
any other, and in a vote as much to say. `priorities` takes its say away.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mtprune import checks, distributed
from mtprune.model.running import untouched
from mtprune.observing.losses import LossFunction, compute, parse

__all__ = ["explained", "priorities"]

Sums = dict[str, list[float]]
"""For each task, its loss, and that of an output that is the same for every sample."""


def explained(
    model: nn.Module,
    task_losses: Mapping[str, LossFunction],
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    baselines: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The explained share of every task, by one pass over validation batches.

    The loss without knowledge is, unless given, that of the mean output: each sample gets the mean
    of the outputs for the others of its batch. Where a loss is convex in the outputs, as squared
    error and cross-entropy are, outputs that have nothing to do with their samples are no better
    than their mean, so the share of such a task is at most 0, but for chance. The pass runs in
    evaluation mode; modes, buffers and the random state are left as they were.

    Args:
        model: Trained on the tasks, or in the middle of it.
        task_losses: ``{task: loss(outputs, batch)}``, means over samples, as the pruner takes them.
        batches: Of samples that the model was not trained on; more of them, less chance.
        forward: ``forward(model, batch)`` -> outputs; ``model(batch)`` unless given. Tensors in
            them have samples first. A batch of one sample is left out.
        baselines: Losses without knowledge of some tasks, such as the best constant output's:
            the entropy of the classes, the variance of a number.

    Returns:
        ``{task: share}``, at most 1; below 0 where the mean output is better than the outputs.

    Raises:
        ValueError: If a loss without knowledge cannot be had, or is not positive.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = nn.init.constant_(model.weight, 0.5)
        >>> x = torch.tensor([[-2.0], [2.0]])
        >>> losses = {
        ...     "learned": lambda y, x: (y[:, 0] - 0.5 * x[:, 0]).square().mean(),
        ...     "half way": lambda y, x: (y[:, 1] - x[:, 0]).square().mean(),
        ... }
        >>> explained(model, losses, [x], baselines={"half way": 4.0})
        {'learned': 1.0, 'half way': 0.75}
    """
    tasks, baselines = parse(task_losses), baselines or {}
    checks.mapping("baselines", baselines, "task -> loss")
    if unknown := [name for name in baselines if name not in tasks]:
        raise ValueError(f"`baselines` names {unknown}. Known here: {list(tasks)}.")
    for name, loss in baselines.items():
        checks.number("baselines", loss, of=f" of task '{name}'")
    sums, modes = Sums(), {module: module.training for module in model.modules()}
    try:
        model.eval()
        with untouched(model), torch.no_grad():
            for batch in batches:
                outputs = (forward or nn.Module.__call__)(model, batch)
                _add(sums, _losses(tasks, outputs, batch, baselines), _size(outputs))
    finally:
        for module, training in modes.items():
            module.training = training
    total = {name: _everyones(sums, name) for name in tasks}
    for name in tasks:
        _check(name, total[name], told=name in baselines)
    return {name: 1 - loss / without for name, (loss, without) in total.items()}


def priorities(
    shares: Mapping[str, float], *, full: float = 0.1, least: float = 0.01
) -> dict[str, float]:
    r"""Factors on the tasks' say, for ``Vote(priority=...)``, from their explained shares.

    A task with share :math:`r_k` has :math:`\min(1, r_k / \mathrm{full})`, at least ``least``.

    Args:
        shares: What `explained` returns.
        full: From which share on a task has its full say.
        least: What a task keeps that explains nothing.

    Example:
        >>> priorities({"seg": 0.62, "depth": 0.05, "shuffled": -0.03})
        {'seg': 1.0, 'depth': 0.5, 'shuffled': 0.01}
    """
    checks.mapping("shares", shares, "task -> explained share", filled=True)
    checks.inside("full", full, "(0, 1]")
    checks.inside("least", least, "(0, 1]")
    for task, share in shares.items():
        checks.inside("shares", share, "(-inf, 1]", of=f" of task '{task}'")
    return {task: max(least, min(1.0, share / full)) for task, share in shares.items()}


def _losses(
    tasks: Mapping[str, LossFunction | None],
    outputs: Any,
    batch: Any,
    baselines: Mapping[str, float],
) -> Sums:
    """The losses of a batch with its outputs, and without knowledge; empty if it is too small."""
    rest = [name for name in tasks if name not in baselines]
    without: dict[str, Any] = dict(baselines)
    if rest:
        size = _size(outputs)
        if size is None:
            raise ValueError(
                f"The outputs hold no tensor of numbers with samples first, whose mean the tasks "
                f"{rest} could be held against. Pass their losses without knowledge as `baselines`."
            )
        if size < 2:
            return {}
        without |= compute(tasks, tree_map(_mean_of_others, outputs), batch, rest)
    found = compute(tasks, outputs, batch, None)
    return {name: [_number(found[name]), _number(without[name])] for name in tasks}


def _mean_of_others(output: Any) -> Any:
    """What each sample gets instead of its own output, ``[B, ...]``."""
    if not _is_sampled(output):
        return output
    wide = output.float() if output.itemsize < 4 else output
    return ((wide.sum(0, keepdim=True) - wide) / (len(wide) - 1)).to(output.dtype)


def _is_sampled(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 0


def _size(outputs: Any) -> int | None:
    """The number of samples; None if outputs do not tell."""
    return next((len(output) for output in tree_leaves(outputs) if _is_sampled(output)), None)


def _number(loss: Any) -> float:
    parts = loss if isinstance(loss, (list, tuple)) else [loss]
    return sum(float(part) for part in parts)


def _add(sums: Sums, losses: Sums, size: int | None) -> None:
    for name, pair in losses.items():
        total = sums.setdefault(name, [0.0, 0.0])
        for i, loss in enumerate(pair):
            total[i] += (size or 1) * loss


def _everyones(sums: Sums, name: str) -> list[float]:
    """The sums of a task over all ranks."""
    pairs = [theirs[name] for theirs in distributed.gather(sums) if name in theirs]
    return [sum(column) for column in zip(*pairs, strict=True)]


def _check(name: str, sums: list[float], *, told: bool) -> None:
    """Refuse losses that have no share."""
    if not sums:
        raise ValueError("`batches` gave no batch of two samples or more. Pass larger ones.")
    loss, without = sums
    if not 0 < without < math.inf or not math.isfinite(loss):
        raise ValueError(
            f"The losses of task '{name}' add up to {loss:g}, and without knowledge to "
            f"{without:g}. A share needs a loss that is finite, and 0 at best."
        )
    if loss == without and not told:
        raise ValueError(
            f"The loss of task '{name}' is the same for any outputs. Compute it from what the "
            "forward returns, or pass its loss without knowledge in `baselines`."
        )
