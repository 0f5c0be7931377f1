"""Refitting a model that is sparse already, by whatever pruned it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.running import call
from mtprune.holding.refitted import move
from mtprune.model.inputs import Windows, why_no_windows
from mtprune.model.layers import Layer, default_attributes
from mtprune.model.names import own_name, unwrap
from mtprune.model.running import untouched
from mtprune.refitting import Refit, Sample
from mtprune.statistics import Seen

__all__ = ["Refitting", "refit"]


@dataclass(frozen=True)
class Refitting:
    """What `refit` did.

    Attributes:
        layers: The weights that were fitted, in the order in which the model runs them.
        left_alone: The other weights that hold zeros, each with the reason.
    """

    layers: tuple[str, ...]
    left_alone: Mapping[str, str]


@torch.no_grad()
def refit(
    model: nn.Module,
    batches: Iterable[Any],
    dense: nn.Module | Mapping[str, Tensor] | None = None,
    *,
    how: Refit | None = None,
    sequential: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
) -> Refitting:
    r"""Let the weights that stay make up for those that were pruned, layer by layer, in place.

    Each layer's weights and bias move so that its outputs, for the inputs it receives now, come
    closest to those of its dense weight (`mtprune.refitting`). Zeros stay zeros. Batch norms keep
    their statistics: call `mtprune.recalibrate_bn` afterwards. The model runs in the mode it is in;
    buffers and random state are left as they were.

    Args:
        model: Pruned by a pruner, finalized or not, by ``torch.nn.utils.prune``, or with zeros.
        batches: Some training batches: tensors, tuples of arguments, or dicts of keyword arguments.
        dense: The model as it was before pruning, or its state_dict. May be left out where
            ``torch.nn.utils.prune`` still has the pruned weights in ``weight_orig``.
        how: Samples, damping and steps; ``Refit()`` unless given.
        sequential: Fit one layer after the other, each on the inputs that those fitted before give
            it, with a forward over the batches for each layer. False fits all on the inputs of one
            forward (``docs/methods.md`` has both measured).
        forward: ``forward(model, batch)``, for batches of another kind.
        seed: Of the sample.

    Raises:
        ValueError: If ``batches`` is empty, or if weights before pruning are missing or of another
            shape; nothing is changed.

    Example:
        >>> from torch.nn.utils import prune
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> x[:, 4:] = x[:, :4]  # half of the inputs are copies
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> wanted, mask = model(x), torch.ones(4, 8)
        >>> mask[:, 4:] = 0
        >>> _ = prune.custom_from_mask(model[0], "weight", mask)
        >>> before = (model(x) - wanted).square().mean()
        >>> refit(model, [x], how=Refit(damping=0.01)).layers
        ('0.weight',)
        >>> bool((model(x) - wanted).square().mean() < before / 100)
        True
    """
    how = Refit() if how is None else how
    model, shown = unwrap(model), list(batches)
    if not shown:
        raise ValueError("`batches` is empty. Give at least one batch.")
    sparse = _sparse(model)
    left_alone = {x.name: why_no_windows(x) for x in sparse if why_no_windows(x)}
    layers = [x for x in sparse if x.name not in left_alone]
    lost = _lost(layers, dense)
    run = partial(_run, model, shown, call if forward is None else forward, how.samples, seed)
    with untouched(model):
        first = run(layers)
        order = list(first)
        left_alone.update({x.name: "its module is not called" for x in layers if x not in first})
        for layer in order:
            rows = run([layer])[layer] if sequential and layer is not order[0] else first[layer]
            kept = _kept(layer)
            move(layer, *how.change(rows, lost[layer].to(kept.device), kept))
            del first[layer], lost[layer]
            _refresh(layer)
    return Refitting(tuple(layer.name for layer in order), left_alone)


def _sparse(model: nn.Module) -> list[Layer]:
    """The layers that hold zeros."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    names = {id(p): own_name(model, name) for name, p in model.named_parameters()}
    for module in model.modules():
        for attribute in default_attributes(module):
            found = module._parameters
            parameter = found.get(attribute, found.get(attribute + "_orig"))
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, attribute))
    layers = [
        Layer(
            names[key].removesuffix("_orig"),
            tuple(uses),
            tuple(Layer("", tuple(uses), ()).parameter.shape),
        )
        for key, uses in places.items()
    ]
    return [layer for layer in layers if not bool(_kept(layer).all())]


def _kept(layer: Layer) -> Tensor:
    """Where a weight may move: where its mask says so, or where it is not zero."""
    module, attribute = layer.places[0]
    mask = module._buffers.get(attribute + "_mask")
    return layer.parameter.detach() != 0 if mask is None else mask != 0


def _lost(
    layers: Sequence[Layer], dense: nn.Module | Mapping[str, Tensor] | None
) -> dict[Layer, Tensor]:
    """For each layer its dense weight less what it computes with.

    Raises:
        ValueError: If a dense weight is missing or of another shape.
    """
    if isinstance(dense, nn.Module):
        dense = unwrap(dense).state_dict()
    lost = {}
    for layer in layers:
        now, kept = layer.parameter.detach(), _kept(layer)
        if dense is None:
            before = now
            if not bool(now.masked_fill(kept, 0).any()):
                raise ValueError(
                    f"The pruned weights of '{layer.name}' are zero, so nobody knows what they "
                    "were. Pass dense=, a copy of the model from before pruning."
                )
        else:
            known = dense.get(layer.name, dense.get(layer.name + "_orig"))
            if known is None or known.shape != now.shape:
                got = "no such weight" if known is None else f"shape {tuple(known.shape)}"
                raise ValueError(
                    f"`dense` must be the model before pruning, with '{layer.name}' of shape "
                    f"{layer.shape}. Got {got}."
                )
            before = known.to(now)
        lost[layer] = before - now.masked_fill(~kept, 0)
    return lost


def _run(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], Any],
    size: int,
    seed: int,
    layers: Sequence[Layer],
) -> dict[Layer, Tensor]:
    """A sample of each layer's inputs, in the order in which they are called first."""
    sample = Sample(size)
    generator = torch.Generator().manual_seed(seed)
    values: dict[Layer, Tensor] = {}

    def see(layer: Layer, module: nn.Module, given: tuple[Any, ...], named: Any) -> None:
        value = (given[0] if given else named["input"]).detach()
        weight = layer.parameter.detach()
        seen = Seen(layer, weight, inputs=Windows(module, value), generator=generator)
        rows = sample.of(seen)
        values[layer] = sample.merge(values[layer], rows) if layer in values else rows

    with _hooked(layers, see):
        for batch in batches:
            forward(model, batch)
    return {layer: sample.reduce(value) for layer, value in values.items()}


@contextmanager
def _hooked(layers: Sequence[Layer], see: Callable[..., None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(partial(see, layer), with_kwargs=True)
        for layer in layers
        for module in dict.fromkeys(module for module, _ in layer.places)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refresh(layer: Layer) -> None:
    """Let whoever reads a weight that ``torch.nn.utils.prune`` computes see the new one."""
    for module, attribute in layer.places:
        if attribute in module.__dict__ and attribute + "_mask" in module._buffers:
            shown = module.__dict__[attribute]
            if not isinstance(shown, nn.Parameter):
                module.__dict__[attribute] = layer.parameter * _kept(layer)
