"""Patterns: where transformers keep their heads, feed-forward neurons and experts.

A pattern is data (`Attention`, `FeedForward`, `Experts`): the paths of the weights of one block,
seen from the block. Blocks are told by these paths and by the shapes they lead to, whatever their
class is called. Before units are handed out, some of each group are removed on trial from a copy of
the model, so that a block that only looks like one that is known is refused at once, and by name.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from mtprune.model.blocks import Attention, Experts, FeedForward, Pattern, match
from mtprune.model.known import PATTERNS
from mtprune.model.names import unwrap
from mtprune.model.paths import numbers
from mtprune.model.routing import close
from mtprune.structure import Group

__all__ = [
    "PATTERNS",
    "Attention",
    "Experts",
    "FeedForward",
    "Pattern",
    "close_experts",
    "experts",
    "heads",
    "neurons",
]


def heads(
    model: nn.Module, patterns: Sequence[Pattern] = PATTERNS, example_inputs: Any = None
) -> list[Group]:
    """The attention heads of a model: one group for each block of attention.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.
        example_inputs: What the model is called with when heads are removed on trial: a tensor, a
            tuple of arguments, a dict of keyword arguments. Models of transformers are tried
            without, as long as they are not large.

    Raises:
        ValueError: If no block of the model fits a pattern, or no block can lose heads.

    Warns:
        UserWarning: Of blocks that fit a pattern and cannot lose heads; they are left out.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2)
        >>> [(group.name, group.size) for group in heads(encoder)]
        [('layers.0.self_attn.heads', 4), ('layers.1.self_attn.heads', 4)]
    """
    attentions = [p for p in patterns if isinstance(p, Attention)]
    return _groups(model, attentions, "attention heads", example_inputs)


def neurons(
    model: nn.Module, patterns: Sequence[Pattern] = PATTERNS, example_inputs: Any = None
) -> list[Group]:
    """The neurons between the two layers of feed-forward blocks: one group for each block.

    The experts of a block are one group: a neuron is the same one in each of them.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.
        example_inputs: What the model is called with when neurons are removed on trial: as for
            `heads`.

    Raises:
        ValueError: If no block of the model fits a pattern, or no block can lose neurons.

    Warns:
        UserWarning: Of blocks that fit a pattern and cannot lose neurons; they are left out.

    Example:
        >>> group, = neurons(nn.TransformerEncoderLayer(16, 4, 32))
        >>> group.size, [(member.tensor, member.role) for member in group.members]
        (32, [('linear1.weight', 'out'), ('linear1.bias', 'out'), ('linear2.weight', 'in')])
    """
    feed_forwards = [p for p in patterns if isinstance(p, FeedForward)]
    return _groups(model, feed_forwards, "feed-forward neurons", example_inputs)


def experts(
    model: nn.Module, patterns: Sequence[Pattern] = PATTERNS, example_inputs: Any = None
) -> list[Group]:
    """The experts of a model: one group for each block of experts.

    A unit is an expert with its row of the router. As many stay in each block as a token is sent
    to. While a model is pruned by them, and after that, closed experts get no token: as if they
    were not there.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.
        example_inputs: What the model is called with when experts are removed on trial: as for
            `heads`.

    Raises:
        ValueError: If no block of the model fits a pattern, or no block can lose experts.

    Warns:
        UserWarning: Of blocks that fit a pattern and cannot lose experts; they are left out.
    """
    known = [p for p in patterns if isinstance(p, Experts)]
    return _groups(model, known, "experts", example_inputs)


def close_experts(model: nn.Module, patterns: Sequence[Pattern] = PATTERNS) -> None:
    """Let experts whose rows of the router are zero get no token, from now on.

    `MultitaskPruner` does it when it prunes experts. A new model needs it before it computes what a
    pruned one did whose state it loads. What `compress` returns has no closed experts.

    Args:
        model: The model. Its routers get another class, which behaves the same as long as no row
            is zero.
        patterns: The patterns to look for; the first that fits a block counts.
    """
    model = unwrap(model)
    close(model, candidates(model, [p for p in patterns if isinstance(p, Experts)])[0])


def _groups(
    model: nn.Module, patterns: Sequence[Pattern], units: str, example_inputs: Any
) -> list[Group]:
    """The group of every block, by the first pattern that fits it.

    Args:
        model: The model.
        patterns: The patterns.
        units: The name of the units in errors.
        example_inputs: What the model is called with, or None.
    """
    from mtprune.compression.probe import refused  # it needs more than most runs do

    found, refusals = candidates(model, patterns)
    if not found:
        tried = ", ".join(f"'{name}'" for name in dict.fromkeys(p.name for p in patterns)) or "none"
        raise ValueError(
            f"{type(model).__name__} has no {units} where the patterns look. Tried: {tried}. The "
            f"model has {_contents(model)}. Say where they are with a pattern of your own: see "
            "mtprune.patterns."
        )
    hopeful = [group for group in found if group.name not in refusals]
    refusals |= refused(model, hopeful, example_inputs)
    groups = [group for group in hopeful if group.name not in refusals]
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has {units} that cannot be removed: {_listed(refusals)}. "
            "Prune its weights one by one, or in blocks."
        )
    if refusals:
        warnings.warn(f"Left out: {_listed(refusals)}.", stacklevel=3)
    return groups


def candidates(
    model: nn.Module, patterns: Sequence[Pattern] = PATTERNS
) -> tuple[list[Group], dict[str, str]]:
    """The group of every block that a pattern fits, tried or not.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.

    Returns:
        The groups, and why some of them cannot lose units by their patterns, by the group's name.

    Example:
        >>> groups, refusals = candidates(nn.TransformerEncoderLayer(16, 4, 32))
        >>> [group.name for group in groups], refusals
        (['neurons', 'self_attn.heads'], {})
    """
    stacks: dict[str, list[Group]] = {}
    refusals: dict[str, str] = {}
    taken: set[tuple[str, bool]] = set()  # the experts of a block have neurons, too
    for name, module in model.named_modules():
        for pattern in patterns:
            group = match(name, module, pattern)
            if group is None:
                continue
            mine = {(member.tensor, isinstance(pattern, Experts)) for member in group.members}
            if taken & mine:
                continue
            taken |= mine
            if isinstance(pattern, Experts):
                group = _told_above(model, name, group)
            stack = _stack(group.name, pattern)
            stacks.setdefault(stack, []).append(group)
            if pattern.why_not:
                refusals[stack] = pattern.why_not
    return [_together(name, groups) for name, groups in stacks.items()], refusals


def _stack(name: str, pattern: Pattern) -> str:
    """The name of a group, without the number of its block if all of a stack lose the same."""
    if not isinstance(pattern, Attention) or not pattern.stack:
        return name
    return re.sub(rf"(^|\.){pattern.stack}\.\d+\.", rf"\1{pattern.stack}.*.", name)


def _together(name: str, groups: Sequence[Group]) -> Group:
    """One group of the units that several lose together."""
    if len(groups) == 1 and groups[0].name == name:
        return groups[0]
    members = tuple(member for group in groups for member in group.members)
    counts = tuple(path for group in groups for path in group.counts)
    arguments = tuple(part for group in groups for part in group.arguments)
    return replace(groups[0], name=name, members=members, counts=counts, arguments=arguments)


def _told_above(model: nn.Module, block: str, group: Group) -> Group:
    """A group of experts with the numbers of them that are kept above their block, too."""
    parts = block.split(".") if block else []
    above = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts))]
    paths = [f"{owner}{name}" for owner in above for name in ("num_experts", "num_local_experts")]
    found = [path for path in paths if numbers(model, [path]) == [group.size]]
    return replace(group, counts=(*group.counts, *found))


def _listed(refusals: Mapping[str, str]) -> str:
    """Groups by the reason why they are refused, a few names of each."""
    alike: dict[str, list[str]] = {}
    for name, why in refusals.items():
        alike.setdefault(why, []).append(f"'{name}'")
    return "; ".join(
        ", ".join(names[:2])
        + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        + f": {why}"
        for why, names in alike.items()
    )


def _contents(model: nn.Module) -> str:
    """Some weights of a model, for an error."""
    names = [f"'{name}' {tuple(p.shape)}" for name, p in model.named_parameters() if p.dim() == 2]
    if not names:
        return "no weight with two dimensions"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
