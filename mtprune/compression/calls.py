"""Calls: the inputs that layers receive when the model runs on its example inputs."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mtprune.compression.attention import can_open
from mtprune.compression.running import run
from mtprune.compression.sites import Site

__all__ = ["Calls", "record_calls", "self_attentions"]

Calls = dict[tuple[int, ...], tuple[Tensor, int]]
"""For each shape of a layer's inputs: one such input, and how often the shape came."""

_ATTENDS = ("query", "key", "value")


def record_calls(
    model: nn.Module, sites: Iterable[Site], batches: Sequence[Any]
) -> dict[str, Calls]:
    """The calls of each layer, by its name, when the model runs on all batches."""
    calls: dict[str, Calls] = {}
    handles = []
    for site in sites:
        mine = calls.setdefault(site.name, {})

        def record(module: nn.Module, args: Any, kwargs: Any, mine: Calls = mine) -> None:
            x = args[0] if args else kwargs["input"]
            first, times = mine.get(tuple(x.shape), (x.detach(), 0))
            mine[tuple(x.shape)] = (first, times + 1)

        handles.append(site.called.register_forward_pre_hook(record, with_kwargs=True))
    try:
        run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def self_attentions(model: nn.Module, batches: Sequence[Any]) -> list[str]:
    """The names of attentions that can be opened and are only called as self-attention."""
    attends_to_itself: dict[str, bool] = {}
    handles = []
    for name, module in model.named_modules():
        if name and isinstance(module, nn.MultiheadAttention) and can_open(module):

            def record(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                query, key, value = (*args, *(kwargs[k] for k in _ATTENDS[len(args) :]))[:3]
                before = attends_to_itself.get(name, True)
                attends_to_itself[name] = before and query is key and key is value

            handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        if handles:
            run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, always in attends_to_itself.items() if always]
