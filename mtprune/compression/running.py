"""Running a model on its example inputs: outputs, and what each layer was given."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtprune.compression.attention import can_open
from mtprune.compression.sites import Site
from mtprune.model.running import untouched

__all__ = [
    "Calls",
    "call",
    "calls",
    "check_devices",
    "named_tensors",
    "parse",
    "run",
    "self_attentions",
    "unnested",
]

Calls = dict[tuple[int, ...], tuple[Tensor, int]]
"""For each shape that a layer was given: one such input, and how often it came."""


def parse(example_inputs: Any) -> list[Any]:
    """The batches in what the user gave.

    Example:
        >>> len(parse(torch.zeros(2))), len(parse([torch.zeros(2), torch.zeros(8)]))
        (1, 2)

    Raises:
        ValueError: If there is none.
    """
    batches = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not batches:
        raise ValueError("`example_inputs` is an empty list. Give at least one batch.")
    return list(batches)


def check_devices(model: nn.Module, batches: Sequence[Any]) -> None:
    """Complain about inputs that are somewhere else than the model.

    Raises:
        ValueError: If they are.
    """
    there = {p.device for p in model.parameters()}
    for i, batch in enumerate(batches):
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and len(there) == 1 and leaf.device not in there:
                raise ValueError(
                    f"`example_inputs[{i}]` is on {leaf.device} and the model on "
                    f"{next(iter(there))}. Move one of them."
                )


def call(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


@torch.no_grad()
def run(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """The outputs for all batches; buffers and random state are left as they were.

    Raises:
        ValueError: If the model fails on them.
    """
    outputs = []
    for i, batch in enumerate(batches):
        with untouched(model):
            try:
                outputs.append(call(model, batch))
            except Exception as error:
                raise ValueError(
                    f"The model does not run on `example_inputs[{i}]`: {error} Give a tensor, a "
                    "tuple of arguments, a dict of keyword arguments, or a list of these."
                ) from error
    return outputs


def calls(model: nn.Module, sites: Iterable[Site], batches: Sequence[Any]) -> dict[str, Calls]:
    """What each layer is given when the model runs on all batches."""
    found: dict[str, Calls] = {}
    handles = []
    for site in sites:
        mine = found.setdefault(site.name, {})

        def note(module: nn.Module, args: Any, kwargs: Any, mine: Calls = mine) -> None:
            x = args[0] if args else kwargs["input"]
            held, times = mine.get(tuple(x.shape), (x.detach(), 0))
            mine[tuple(x.shape)] = (held, times + 1)

        handles.append(site.layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return found


def self_attentions(model: nn.Module, batches: Sequence[Any]) -> list[str]:
    """Attentions that look at what they are given and nothing else, and that can be opened."""
    alone: dict[str, bool] = {}
    handles = []
    for name, module in model.named_modules():
        if name and isinstance(module, nn.MultiheadAttention) and can_open(module):

            def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                query, key, value = (*args, *(kwargs[k] for k in _ATTENDS[len(args) :]))[:3]
                alone[name] = alone.get(name, True) and query is key and key is value

            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        if handles:
            run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, only in alone.items() if only]


_ATTENDS = ("query", "key", "value")


@contextmanager
def unnested(model: nn.Module) -> Iterator[None]:
    """Keep ``TransformerEncoder`` from nested tensors, which only its fused layers understand."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    before = [encoder.use_nested_tensor for encoder in encoders]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder, was in zip(encoders, before, strict=True):
            encoder.use_nested_tensor = was


def named_tensors(outputs: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """All tensors in what a model returned: mappings, sequences and dataclasses are looked into.

    Example:
        >>> [name for name, _ in named_tensors({"a": (torch.ones(1), torch.ones(1))})]
        ["output['a'][0]", "output['a'][1]"]
    """
    if isinstance(outputs, Tensor):
        yield name, outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        for field in dataclasses.fields(outputs):
            yield from named_tensors(getattr(outputs, field.name), f"{name}.{field.name}")
    elif isinstance(outputs, (list, tuple)):
        for i, value in enumerate(outputs):
            yield from named_tensors(value, f"{name}[{i}]")
