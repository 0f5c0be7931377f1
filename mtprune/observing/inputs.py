"""Inputs: what goes into a layer, for statistics that ask for it.

Hooks exist only on steps whose batch is observed. A statistic of inputs alone is computed inside
the layer's own forward and only its sum is kept. Where a statistic asks for the gradient too, the
layer's inputs are kept until the sweep: by reference, for autograd keeps them just as long.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mtprune.holding import Hold
from mtprune.model.graph import leave_mark, marks
from mtprune.model.inputs import Windows, rows
from mtprune.model.layers import Layer
from mtprune.observing.evidence import Evidence, Store
from mtprune.statistics import JOINT, Seen, Statistic

__all__ = ["Inputs", "unseen"]


@dataclass(frozen=True)
class _Call:
    """One call of a layer.

    Attributes:
        index: Which layer.
        module: The module that was called.
        inputs: What it was called with, if a statistic asks for inputs and gradient.
        values: The statistics of inputs alone, by name.
    """

    index: int
    module: nn.Module
    inputs: Tensor | None
    values: Mapping[str, Tensor]


class Inputs:
    """Gathers the inputs of layers while a model runs.

    A forward may have nothing to do with the losses that are observed. So each call of a layer
    leaves a mark on the graph of its output, and counts if a loss leads to the mark.

    Args:
        layers: All prunable layers.
        hold: What holds their weights.
        statistics: All statistics by name; those that ask for inputs matter.
        store: How sums are kept.
        source: A source of randomness for the call of a layer, given its index.

    Attributes:
        hears: Whether it knows what layers were called with in the last forward, as far as any
            statistic asks.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        hold: Hold[Any],
        statistics: Mapping[str, Statistic],
        store: Store,
        source: Callable[[int], torch.Generator],
    ) -> None:
        asking = {name: s for name, s in statistics.items() if "inputs" in s.asks}
        self._layers = layers
        self._hold = hold
        self._store = store
        self._streamed = {name: s for name, s in asking.items() if s.when == "forward"}
        self._kept = {name: s for name, s in asking.items() if s.when != "forward"}
        self._source = source
        self._handles: list[RemovableHandle] = []
        self.hears = not asking
        self._calls: dict[int, _Call] = {}
        self._used: dict[str, set[int]] = {}

    def listen(self, on: bool) -> None:
        """Put hooks on all layers before a forward that is observed, or take them off."""
        self.forget()
        if not (self._streamed or self._kept):
            return
        self.hears = on
        if on == bool(self._handles):
            return
        if not on:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            return
        for index, layer in enumerate(self._layers):
            if all(s.fits(layer) for s in (*self._streamed.values(), *self._kept.values())):
                continue
            for module, _ in layer.places:
                hook = partial(self._see, index)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def match(self, losses: Mapping[str, Tensor]) -> None:
        """Find the calls that each task's loss was computed from."""
        if self._handles:
            self._used = {task: marks(loss) for task, loss in losses.items()}
            self._used[JOINT] = set().union(*self._used.values())

    def of(self, layer: Layer, voter: str) -> Tensor:
        """The inputs of a layer that a voter's loss depends on, float32 ``[rows, columns]``.

        Raises:
            RuntimeError: If there are none.
        """
        calls = [c for c in self._matched(voter) if self._layers[c.index] is layer]
        found = [rows(c.module, c.inputs) for c in calls if c.inputs is not None]
        if not found:
            raise RuntimeError(unseen(layer))
        return torch.cat(found)

    def add_to(self, evidence: Evidence, tasks: Sequence[str], apart: bool) -> None:
        """Add the statistics of inputs alone to the evidence.

        Args:
            evidence: The evidence.
            tasks: The tasks whose losses were observed.
            apart: Whether tasks are told apart at all.
        """
        for name, statistic in self._streamed.items():
            sums = evidence.statistics.setdefault(name, {})
            if not (statistic.apart and apart):
                self._add(name, JOINT, self._matched(JOINT), sums)
                continue
            for task in tasks:
                self._add(name, task, self._matched(task), sums)

    def _add(
        self, name: str, voter: str, calls: Sequence[_Call], sums: dict[str, dict[int, Tensor]]
    ) -> None:
        """Add one statistic of some calls to a voter's sums."""
        statistic, mine = self._streamed[name], sums.setdefault(voter, {})
        for call in sorted(calls, key=lambda call: call.index):
            if name not in call.values:  # it cannot be had of this layer
                continue
            # A copy, because sums change in place, and other tasks may have seen the same call.
            value = statistic.reduce(call.values[name].clone())
            index = call.index
            mine[index] = value if index not in mine else statistic.merge(mine[index], value)

    def forget(self) -> None:
        """Drop what was gathered since the last observation."""
        self._calls, self._used = {}, {}

    def _matched(self, voter: str) -> list[_Call]:
        used = self._used.get(voter, set())
        return [call for mark, call in self._calls.items() if mark in used]

    def _see(
        self,
        index: int,
        module: nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
    ) -> None:
        """Forward hook of one layer."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:  # a checkpoint runs its part once more
            return
        if output.grad_fn is None:  # no loss leads here
            return
        layer = self._layers[index]
        value = (given[0] if given else named["input"]).detach()
        values = {}
        with torch.no_grad():
            fitting = {name: s for name, s in self._streamed.items() if not s.fits(layer)}
            if fitting:
                view, source = self._hold.view(layer), self._source(index)
                seen = Seen(
                    layer,
                    view.weight,
                    mask=view.mask,
                    inputs=Windows(module, value),
                    generator=source,
                )
                for name, statistic in fitting.items():
                    values[name] = statistic.add(seen, None, partial(self._store.empty, name))
        kept = value if self._kept else None
        self._calls[leave_mark(output)] = _Call(index, module, kept, values)


def unseen(layer: Layer) -> str:
    """The message for a layer whose inputs no hook has seen."""
    return (
        f"Inputs of '{layer.name}' have not been seen. They are gathered while the model runs, by "
        "hooks on its modules, which a compiled model skips: observe the model itself."
    )
