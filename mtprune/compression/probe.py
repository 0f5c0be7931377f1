"""Probing: groups that patterns find are tried as soon as they are found.

A trial needs inputs. Where nobody gives any, each model of transformers inside a model is tried on
its own: it says what it is called with, and how large that is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mtprune.compression.running import parse, run
from mtprune.compression.trial import complete, why_not
from mtprune.holding.prune import plain_copy
from mtprune.model.names import unwrap
from mtprune.structure import Group, Member

__all__ = ["refused"]

_MOST = 200_000_000
"""Parameters of a model that is tried though nobody asked: a trial works on copies."""

_LENGTH = 6

_TOGETHER = "with some units of other groups, some of them cannot be removed"


def refused(model: nn.Module, groups: Sequence[Group], example_inputs: Any) -> dict[str, str]:
    """Why some groups cannot be removed from a model, by their names.

    Args:
        model: The model, with masks or without; it is left as it is.
        groups: The groups.
        example_inputs: What the model is called with; None for what its parts are known to take.

    Raises:
        ValueError: If the model does not run on inputs that were given.
    """
    if not groups:
        return {}
    if example_inputs is not None:
        work = plain_copy(unwrap(model)).eval()
        batches = parse(example_inputs)
        run(work, batches)  # raises if they do not fit the model
        return _reasons(work, groups, batches)
    reasons: dict[str, str] = {}
    for name, part in _pretrained(model):
        inside = [
            group for group in groups if all(m.tensor.startswith(name) for m in group.members)
        ]
        if inside and sum(p.numel() for p in part.parameters()) <= _MOST:
            work = plain_copy(part).eval()
            batches = [batch for batch in _guesses(work) if _runs(work, batch)][:1]
            if batches:
                reasons |= _reasons(work, [_seen_from(name, group) for group in inside], batches)
    return reasons


def _reasons(work: nn.Module, groups: Sequence[Group], batches: Sequence[Any]) -> dict[str, str]:
    """Why some groups do not pass a trial."""
    passed = {group.name for group in complete(work, groups, batches)}
    failed = [group for group in groups if group.name not in passed]
    return {group.name: why_not(work, group, batches) or _TOGETHER for group in failed}


def _pretrained(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost models of transformers in a model, after the prefixes of their names."""
    if hasattr(model, "main_input_name") and hasattr(model, "config"):
        yield name, model
        return
    for key, child in model.named_children():
        yield from _pretrained(child, f"{name}{key}.")


def _seen_from(prefix: str, group: Group) -> Group:
    """A group with the names that its tensors have in a part of the model, under its own name."""

    def inner(path: str) -> str:
        return path.removeprefix(prefix)

    members = tuple(Member(inner(m.tensor), m.dim, m.units, m.role) for m in group.members)
    counts = tuple(inner(path) for path in group.counts if path.startswith(prefix))
    arguments = tuple(replace(part, module=inner(part.module)) for part in group.arguments)
    return replace(group, members=members, counts=counts, arguments=arguments, between=None)


def _guesses(model: Any) -> Iterator[dict[str, Tensor]]:
    """What a model of transformers may be called with, by the name of its main input."""
    config, main = model.config, model.main_input_name
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    random = torch.Generator().manual_seed(0)

    def ids(settings: Any) -> Tensor:
        # Away from the first ones, which may stand for padding and for ends.
        most = getattr(settings, "vocab_size", None) or 8
        low = min(3, most - 1)
        return torch.randint(low, most, (2, _LENGTH), generator=random).to(device)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    words = {"input_ids": ids(text)}
    size = getattr(vision, "image_size", None) or 64
    high, wide = size if isinstance(size, (tuple, list)) else (size, size)
    pixels = {"pixel_values": numbers(1, getattr(vision, "num_channels", 3) or 3, high, wide)}
    if main == "pixel_values":
        yield pixels
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or 80
        for length in (2 * (getattr(config, "max_source_positions", None) or 50), 100):
            yield {"input_features": numbers(1, bins, length), "decoder_input_ids": ids(config)}
            yield {"input_features": numbers(1, bins, length)}
    elif main == "input_values":
        yield {"input_values": numbers(1, 4000)}
    else:
        if getattr(config, "is_encoder_decoder", False):
            yield {**words, "decoder_input_ids": ids(text)}
        if vision is not config:
            yield {**words, **pixels}
        yield words


def _runs(model: nn.Module, batch: Any) -> bool:
    """Whether a model runs on a batch."""
    try:
        run(model, [batch])
    except ValueError:
        return False
    return True
