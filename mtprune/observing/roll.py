"""The roll: which tasks all ranks together observe.

Ranks may have batches of different tasks, one loader for each. A task's gradient is then the mean
over the ranks that have it, and all ranks take part in its sweep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtprune import distributed

__all__ = ["Roll", "all_finite", "call_roll", "means"]


@dataclass(frozen=True)
class Roll:
    """The losses that all ranks together have.

    Attributes:
        losses: For each task that some rank has, this rank's loss: such that the mean over all
            ranks is that over the ranks which have the task. 0 on a rank that does not.
        partial: Whether some rank lacks a task that another has.
    """

    losses: Mapping[str, Tensor]
    partial: bool = False


def call_roll(
    losses: Mapping[str, Tensor], tasks: Sequence[str], step: int, device: torch.device
) -> Roll:
    """Agree with all ranks on the tasks of a batch. On one process nothing needs to be agreed on.

    Args:
        losses: The losses of this rank's batch.
        tasks: All tasks.
        step: The step that this rank is at.
        device: Where the model is.

    Raises:
        RuntimeError: If ranks are in different calls or at different steps, or one does not come.
    """
    if distributed.world() == 1:
        return Roll(losses)
    everyone = distributed.meet("observe", step, tasks, [task in losses for task in tasks])
    found, partial = {}, False
    for place, task in enumerate(tasks):
        having = sum(flags[place] for flags in everyone)
        if not having:
            continue
        partial |= having < len(everyone)
        loss = losses.get(task)
        if loss is None:
            found[task] = torch.zeros((), device=device)
        else:
            found[task] = loss if having == len(everyone) else loss * (len(everyone) / having)
    return Roll(found, partial)


def all_finite(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each task, bool 0-dim, whether its loss is finite on all ranks."""
    finite = {task: loss.detach().isfinite() for task, loss in losses.items()}
    if distributed.world() == 1 or not finite:
        return finite
    flags = torch.stack(list(finite.values()))
    return dict(zip(finite, (~distributed.any_rank(~flags)).unbind(), strict=True))


def means(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each task, float32 0-dim, the mean of its loss over ranks."""
    values = {task: loss.detach().to(torch.float32).clone() for task, loss in losses.items()}
    if distributed.world() == 1 or not values:
        return values
    found = distributed.mean_(torch.stack(list(values.values())))
    return dict(zip(values, found.unbind(), strict=True))
