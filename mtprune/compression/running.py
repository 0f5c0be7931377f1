"""Running a model on example inputs, and finding the tensors in its outputs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtprune.model.running import untouched

__all__ = ["call", "check_devices", "named_tensors", "parse", "run", "unnested"]


def parse(example_inputs: Any) -> list[Any]:
    """Example inputs as a list of batches: a list is several batches, anything else is one.

    Example:
        >>> len(parse(torch.zeros(2))), len(parse([torch.zeros(2), torch.zeros(8)]))
        (1, 2)

    Raises:
        ValueError: If the list is empty.
    """
    batches = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not batches:
        raise ValueError("`example_inputs` is an empty list. Give at least one batch.")
    return list(batches)


def check_devices(model: nn.Module, batches: Sequence[Any]) -> None:
    """Check that batches are on the device of the model, if the model is on one.

    Raises:
        ValueError: If a tensor of a batch is on another device.
    """
    devices = {p.device for p in model.parameters()}
    for i, batch in enumerate(batches):
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor) and len(devices) == 1 and leaf.device not in devices:
                raise ValueError(
                    f"`example_inputs[{i}]` is on {leaf.device} and the model on "
                    f"{next(iter(devices))}. Move one of them."
                )


def call(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for a tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple):
        return model(*batch)
    return model(batch)


def run(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """The outputs for all batches; buffers and random state are left as they were.

    Raises:
        ValueError: If the model fails on them.
    """
    return list(runs(model, batches))


@torch.no_grad()
def runs(model: nn.Module, batches: Sequence[Any]) -> Iterator[Any]:
    """`run`, one batch after the other, for those who may stop early."""
    for i, batch in enumerate(batches):
        with untouched(model):
            try:
                outputs = call(model, batch)
            except Exception as error:
                raise ValueError(
                    f"The model does not run on `example_inputs[{i}]`: {error} Give a tensor, a "
                    "tuple of arguments, a dict of keyword arguments, or a list of these."
                ) from error
        yield outputs


@contextmanager
def unnested(model: nn.Module) -> Iterator[None]:
    """Keep ``TransformerEncoder`` from nested tensors, which only its fused layers understand."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    settings = [encoder.use_nested_tensor for encoder in encoders]
    for encoder in encoders:
        encoder.use_nested_tensor = False
    try:
        yield
    finally:
        for encoder, setting in zip(encoders, settings, strict=True):
            encoder.use_nested_tensor = setting


def named_tensors(outputs: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a model's outputs, in nested mappings, sequences and dataclasses too.

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
