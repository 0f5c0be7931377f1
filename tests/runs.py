"""Runs that several tests look at: each is trained once, and no further than somebody asks.

A test that only reads what training left asks for a `Moment` instead of training on its own. It
says by which function the run starts and with which arguments; who says the same gets the same
run. What a test changes, finalizes or copies is a run of its own.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mtprune import Report
from tests.nets import aliases, read, weights


@dataclass(frozen=True)
class Moment:
    """What there was to see of a run after some of its steps; nobody may change it.

    Attributes:
        changed: Whether masks changed in the last of these steps.
        masks: The masks.
        weights: All parameters and buffers but masks, under their names before pruning.
        read: Each pruned weight as anyone reads it, under each of its names.
        sparsity: The exact share of pruned weights.
        report: The report.
        checkpoint: The states of model, optimizer and pruner, and the number of steps ``at``.
    """

    changed: bool
    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    read: Mapping[str, Tensor]
    sparsity: float
    report: Report
    checkpoint: Mapping[str, Any]


class Record:
    """The moments of one run.

    Args:
        start: Makes the run: a model, an optimizer and a pruner in a loop with ``step()``, which
            counts its steps as ``at``.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        with torch.random.fork_rng():
            self._run = start()
        self.names = aliases(self._run.model)
        self._moments = [self._seen(changed=False)]
        self._versions = [_versions(self._moments[0])]

    def at(self, steps: int) -> Moment:
        """The moment after so many steps."""
        while len(self._moments) <= steps:
            with torch.random.fork_rng():
                changed = self._run.step()
            self._moments.append(self._seen(changed))
            self._versions.append(_versions(self._moments[-1]))
        moment = self._moments[steps]
        assert _versions(moment) == self._versions[steps], "a test wrote into a record"
        return moment

    def until(self, steps: int) -> list[Moment]:
        """The moments after each of so many steps."""
        return [self.at(step) for step in range(1, steps + 1)]

    def _seen(self, changed: bool) -> Moment:
        run, pruner = self._run, self._run.pruner
        masks = pruner.masks
        names = [alias for name in masks for alias in self.names[name]]
        checkpoint = {
            "model": _copied(run.model.state_dict()),
            "optimizer": _copied(run.optimizer.state_dict()),
            "pruner": pruner.state_dict(),
            "at": run.at,
        }
        return Moment(
            changed,
            MappingProxyType(masks),
            MappingProxyType(weights(run)),
            MappingProxyType({name: read(run.model, name).detach().clone() for name in names}),
            pruner.sparsity,
            pruner.report(),
            MappingProxyType(checkpoint),
        )


@cache
def record(start: Callable[..., Any], *arguments: Hashable) -> Record:
    """The one run that starts so."""
    return Record(lambda: start(*arguments))


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _versions(moment: Moment) -> list[int]:
    """How often each tensor of a moment has been written to."""
    return [t._version for f in fields(moment) for t in _tensors(getattr(moment, f.name))]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
