"""Tasks: a name and a loss, and the forms in which losses arrive."""

from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from mtprune import distributed

__all__ = ["LossFunction", "check_devices", "check_graphs", "compute", "given", "parse", "scalars"]

LossFunction = Callable[[Any, Any], Any]
"""``loss(outputs, batch)`` -> a scalar tensor, or a list of them, which is summed."""


def parse(task_losses: object) -> dict[str, LossFunction | None]:
    """Tasks in their declared order; None for those whose losses the caller computes.

    Raises:
        TypeError: If it is no mapping name -> function and no sequence of names.
        ValueError: If it names no task, or one twice.
    """
    example = 'e.g. {"seg": seg_loss}'
    if isinstance(task_losses, Mapping):
        tasks: dict[str, LossFunction | None] = dict(task_losses)
        for name, loss in tasks.items():
            if not callable(loss):
                raise TypeError(
                    f"Loss of task {name!r} must be a function of (outputs, batch). Got {loss!r}."
                )
    elif isinstance(task_losses, Sequence) and not isinstance(task_losses, str):
        tasks = dict.fromkeys(task_losses)
        if len(tasks) != len(task_losses):
            raise ValueError(f"`task_losses` names a task twice: {list(task_losses)}.")
    else:
        raise TypeError(
            f"`task_losses` maps names to functions, {example}, or lists names. "
            f"Got {task_losses!r}."
        )
    if not tasks:
        raise ValueError(f"`task_losses` is empty: name at least one task, {example}.")
    for name in tasks:
        if not isinstance(name, str) or not name:
            raise TypeError(f"A task's name must be a non-empty string. Got {name!r}.")
    return tasks


def compute(
    tasks: Mapping[str, LossFunction | None],
    outputs: object,
    batch: object,
    only: Collection[str] | None,
) -> dict[str, Any]:
    """The losses of all tasks, or of some, exactly as their functions return them."""
    if only is not None:
        if isinstance(only, str):
            only = [only]
        unknown = [name for name in only if name not in tasks]
        if unknown:
            raise ValueError(f"`tasks` names {unknown}. Declared tasks: {list(tasks)}.")
    losses = {}
    for name, function in tasks.items():
        if only is not None and name not in only:
            continue
        if function is None:
            raise RuntimeError(
                f"Task '{name}' was declared without a loss function. Hand its loss to "
                "observe_losses(), or declare it as name -> function."
            )
        losses[name] = function(outputs, batch)
    return losses


def given(tasks: Collection[str], losses: object) -> dict[str, Any]:
    """The declared tasks' losses out of what the caller computed."""
    if isinstance(losses, Mapping):
        chosen = {name: losses[name] for name in tasks if name in losses}
        # With several ranks, one may have a batch of no task, and says so with an empty mapping.
        if not chosen and (losses or distributed.world() == 1):
            raise ValueError(
                f"`losses` has none of the declared tasks {list(tasks)}. Got keys {list(losses)}."
            )
        _check_spelling([key for key in losses if key not in tasks], set(tasks) - set(chosen))
        return chosen
    if isinstance(losses, Tensor) and losses.dim() == 1:
        losses = losses.unbind()
    if isinstance(losses, Sequence):
        if len(losses) != len(tasks):
            raise ValueError(
                f"`losses` must hold one loss per task, in the order {list(tasks)}. "
                f"Got {len(losses)}."
            )
        return dict(zip(tasks, losses, strict=True))
    raise TypeError(
        "`losses` must be a mapping task -> loss, or a sequence or 1-D tensor in the order "
        f"{list(tasks)}. Got {_what(losses)}."
    )


def _check_spelling(others: Collection[object], missing: Collection[str]) -> None:
    """Refuse a key that is no task where one that is spelled much like it is missing.

    Raises:
        ValueError: If there is one.
    """
    for key in others:
        meant = get_close_matches(str(key), missing, n=1, cutoff=0.66)
        if meant:
            raise ValueError(f"`losses` has '{key}', which is no task. Did you mean '{meant[0]}'?")


def scalar(name: str, loss: object) -> Tensor | None:
    """A task's loss as one scalar with a graph; None if it carries no gradient.

    Raises:
        TypeError: If it is neither a tensor nor a list of tensors.
        ValueError: If it is not a scalar.
    """
    if isinstance(loss, (list, tuple)):
        parts = [part for part in (scalar(name, x) for x in loss) if part is not None]
        return torch.stack(parts).sum() if parts else None
    if isinstance(loss, (int, float)):  # the constant of a task that sits this batch out
        return None
    if not isinstance(loss, Tensor):
        raise TypeError(f"Loss of task '{name}' must be a scalar tensor. Got {_what(loss)}.")
    if loss.numel() != 1:
        raise ValueError(
            f"Loss of task '{name}' must be a scalar. Got shape {tuple(loss.shape)}. "
            "Reduce it, e.g. with .mean()."
        )
    if not loss.requires_grad:
        return None
    return loss.reshape(())


def scalars(losses: Mapping[str, object]) -> dict[str, Tensor]:
    """The losses that carry a gradient, each as one scalar.

    Raises:
        TypeError: If one is neither a tensor nor a list of tensors.
        ValueError: If one is not a scalar.
    """
    parsed = {name: scalar(name, loss) for name, loss in losses.items()}
    return {name: loss for name, loss in parsed.items() if loss is not None}


def check_graphs(losses: Collection[str], present: Collection[str]) -> None:
    """Refuse losses that carry no gradient.

    Raises:
        ValueError: If one of them is not present.
    """
    for name in losses:
        if name not in present:
            raise ValueError(
                f"Loss of task '{name}' carries no gradient. Was it computed from detached "
                "outputs, or under torch.no_grad()?"
            )


def check_devices(losses: Mapping[str, Tensor], devices: Collection[torch.device]) -> None:
    """Refuse losses that are not where the model is.

    Raises:
        ValueError: If one is on no device of the model.
    """
    for name, loss in losses.items():
        if loss.device not in devices:
            raise ValueError(
                f"Loss of task '{name}' is on {loss.device}, the model on "
                f"{', '.join(sorted(map(str, devices)))}. Compute the loss where the model is."
            )


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"
