"""Inputs: what goes into a layer, for statistics that ask for it.

Hooks exist only on steps whose batch is observed. A statistic of inputs alone is computed inside
the layer's own forward and only its sum is kept. Where a statistic asks for the gradient too, the
layer's inputs are kept until the sweep: by reference, for autograd keeps them just as long.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mtprune import distributed
from mtprune.holding import Hold
from mtprune.model.inputs import rows
from mtprune.model.layers import Layer
from mtprune.observing.evidence import Evidence, Store
from mtprune.statistics import JOINT, Seen, Statistic

__all__ = ["Inputs", "unseen"]


class Inputs:
    """Gathers the inputs of layers while a model runs.

    Args:
        layers: All prunable layers.
        hold: What holds their weights.
        statistics: All statistics by name; those that ask for inputs matter.
        store: How sums are kept.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        hold: Hold[Any],
        statistics: Mapping[str, Statistic],
        store: Store,
    ) -> None:
        asking = {name: s for name, s in statistics.items() if "inputs" in s.asks}
        self._layers = layers
        self._hold = hold
        self._store = store
        self._streamed = {name: s for name, s in asking.items() if s.when == "forward"}
        self._keeps = len(asking) > len(self._streamed)
        self._handles: list[RemovableHandle] = []
        self._sums: dict[str, dict[int, Tensor]] = {}
        self._kept: dict[str, list[tuple[nn.Module, Tensor]]] = {}

    def listen(self, on: bool) -> None:
        """Put hooks on all layers before a forward that is observed, or take them off."""
        self.forget()
        if not (self._streamed or self._keeps) or on == bool(self._handles):
            return
        if not on:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            return
        for index, layer in enumerate(self._layers):
            for module, _ in layer.places:
                hook = partial(self._see, index)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def of(self, layer: Layer) -> Tensor:
        """The inputs of a layer in the forward that is observed, float32 ``[rows, columns]``.

        Raises:
            RuntimeError: If there are none.
        """
        if layer.name not in self._kept:
            raise RuntimeError(unseen(layer))
        return torch.cat([rows(module, value) for module, value in self._kept[layer.name]])

    def add_to(self, evidence: Evidence) -> None:
        """Add what was summed in this forward to the evidence."""
        for name in self._streamed:
            sums = evidence.statistics.setdefault(name, {}).setdefault(JOINT, {})
            for index, value in sorted(self._sums.get(name, {}).items()):
                distributed.sum_(value)
                sums[index] = value if index not in sums else sums[index].add_(value)

    def forget(self) -> None:
        """Drop what was gathered since the last observation."""
        self._sums, self._kept = {}, {}

    def _see(
        self, index: int, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Forward pre-hook of one layer."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if torch._C._current_graph_task_id() != -1:  # a checkpoint runs its part once more
            return
        layer = self._layers[index]
        value = (given[0] if given else named["input"]).detach()
        if self._keeps:
            self._kept.setdefault(layer.name, []).append((module, value))
        if not self._streamed:
            return
        with torch.no_grad():
            inputs = rows(module, value)
            for name, statistic in self._streamed.items():
                view = self._hold.view(layer)
                seen = Seen(layer, view.weight, mask=view.mask, inputs=inputs)
                sums = self._sums.setdefault(name, {})
                new = partial(self._store.empty, name)
                sums[index] = statistic.add(seen, sums.get(index), new)


def unseen(layer: Layer) -> str:
    """The message for a layer whose inputs no hook has seen."""
    return (
        f"Inputs of '{layer.name}' have not been seen. They are gathered while the model runs, by "
        "hooks on its modules, which a compiled model skips: observe the model itself."
    )
