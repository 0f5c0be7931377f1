"""Patterns: where transformers keep their attention heads and feed-forward neurons.

A pattern is data: the paths of the weights of one block, seen from the block. A block is any
module of a model in which all paths of a pattern lead to weights whose shapes fit one another. A
path that is named more than once leads to several weights packed into one tensor, in that order
and in equal parts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from mtprune.structure import NOBODY, Group, Member, Role

__all__ = ["PATTERNS", "Attention", "FeedForward", "Pattern", "heads", "neurons"]


@dataclass(frozen=True)
class Attention:
    """A block of multi-head attention.

    Heads lie one after the other: along the rows of query, key and value, and the columns of the
    output. If several query heads share keys and values, a unit is a key head with all its queries.

    Attributes:
        name: The name in errors.
        query: The path of the weight of the queries.
        key: The path of the weight of the keys.
        value: The path of the weight of the values.
        out: The path of the weight that reads all heads.
        head_size: The path of the number of dimensions of one head.
        counts: Paths of numbers that shrink with the number of heads, in proportion.
        only: Paths with the values that a block must have there to fit.

    Example:
        >>> class Plain(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.size = 4  # 2 heads
        ...         self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)
        ...         self.v, self.o = nn.Linear(6, 8), nn.Linear(8, 6)
        >>> mine = Attention("plain", "q.weight", "k.weight", "v.weight", "o.weight", "size")
        >>> group, = heads(nn.Sequential(Plain()), (*PATTERNS, mine))
        >>> group.name, group.size, len(group.members)
        ('0.heads', 2, 7)
        >>> group.members[-1]
        Member(tensor='0.o.weight', dim=1, units=(0, 0, 0, 0, 1, 1, 1, 1), role='in')
    """

    name: str
    query: str
    key: str
    value: str
    out: str
    head_size: str
    counts: tuple[str, ...] = ()
    only: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class FeedForward:
    """A block of two layers with an activation between them.

    In a gated block several weights make the neurons, and the products of their outputs are read.

    Attributes:
        name: The name in errors.
        up: The paths of the weights that make the neurons.
        down: The path of the weight that reads the neurons.
        activation: The path of the module or function between them; None in a gated block.
        only: Paths with the values that a block must have there to fit.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.act, self.down = nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)
        >>> mine = FeedForward("mine", ("up.weight",), "down.weight", "act")
        >>> [(group.name, group.size) for group in neurons(Block(), (mine,))]
        [('neurons', 8)]
    """

    name: str
    up: tuple[str, ...]
    down: str
    activation: str | None = None
    only: tuple[tuple[str, Any], ...] = ()


Pattern = Attention | FeedForward
"""A shape of module in which heads or neurons are found."""

PATTERNS: tuple[Pattern, ...] = (
    Attention(
        "BERT",
        query="self.query.weight",
        key="self.key.weight",
        value="self.value.weight",
        out="output.dense.weight",
        head_size="self.attention_head_size",
        counts=("self.num_attention_heads", "self.all_head_size"),
    ),
    Attention(
        "DistilBERT",
        query="q_lin.weight",
        key="k_lin.weight",
        value="v_lin.weight",
        out="out_lin.weight",
        head_size="attention_head_size",
        counts=("n_heads", "dim"),
    ),
    Attention(
        "ModernBERT",
        query="Wqkv.weight",
        key="Wqkv.weight",
        value="Wqkv.weight",
        out="Wo.weight",
        head_size="head_dim",
    ),
    Attention(
        "torch.nn.MultiheadAttention",
        query="in_proj_weight",
        key="in_proj_weight",
        value="in_proj_weight",
        out="out_proj.weight",
        head_size="head_dim",
        counts=("num_heads",),
        # An added key takes part in every head, so that outputs are no averages of the values.
        only=(("bias_k", None), ("add_zero_attn", False)),
    ),
    FeedForward(
        "BERT",
        up=("intermediate.dense.weight",),
        down="output.dense.weight",
        activation="intermediate.intermediate_act_fn",
    ),
    FeedForward("DistilBERT", up=("lin1.weight",), down="lin2.weight", activation="activation"),
    FeedForward("ModernBERT", up=("Wi.weight", "Wi.weight"), down="Wo.weight"),
    FeedForward(
        "torch.nn.TransformerEncoderLayer",
        up=("linear1.weight",),
        down="linear2.weight",
        activation="activation",
    ),
)
"""All patterns known: BERT with RoBERTa, ELECTRA, MiniLM and others that name their layers alike,
DistilBERT, ModernBERT, and torch's own layers."""


def heads(model: nn.Module, patterns: Sequence[Pattern] = PATTERNS) -> list[Group]:
    """The attention heads of a model: one group for each block of attention.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.

    Raises:
        ValueError: If no block of the model fits a pattern.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, batch_first=True), 2)
        >>> [(group.name, group.size) for group in heads(encoder)]
        [('layers.0.self_attn.heads', 4), ('layers.1.self_attn.heads', 4)]
    """
    attentions = [p for p in patterns if isinstance(p, Attention)]
    return _groups(model, attentions, _heads, "attention heads")


def neurons(model: nn.Module, patterns: Sequence[Pattern] = PATTERNS) -> list[Group]:
    """The neurons between the two layers of feed-forward blocks: one group for each block.

    Args:
        model: Any model, with masks or without.
        patterns: The patterns to look for; the first that fits a block counts.

    Raises:
        ValueError: If no block of the model fits a pattern.

    Example:
        >>> group, = neurons(nn.TransformerEncoderLayer(16, 4, 32))
        >>> group.size, [(member.tensor, member.role) for member in group.members]
        (32, [('linear1.weight', 'out'), ('linear1.bias', 'out'), ('linear2.weight', 'in')])
    """
    feed_forwards = [p for p in patterns if isinstance(p, FeedForward)]
    return _groups(model, feed_forwards, _neurons, "feed-forward neurons")


P = TypeVar("P", Attention, FeedForward)


def _groups(
    model: nn.Module,
    patterns: Sequence[P],
    match: Callable[[str, nn.Module, P], Group | None],
    units: str,
) -> list[Group]:
    """The group of every block, by the first pattern that fits it.

    Args:
        model: The model.
        patterns: The patterns.
        match: From the prefix of a module's names, the module and a pattern to the group of the
            module, or None if the pattern does not fit.
        units: The name of the units in errors.
    """
    groups: list[Group] = []
    taken: set[str] = set()
    for name, module in model.named_modules():
        for pattern in patterns:
            group = match(f"{name}." if name else "", module, pattern)
            tensors = set() if group is None else {member.tensor for member in group.members}
            if group is not None and not tensors & taken:
                groups.append(group)
                taken |= tensors
    if not groups:
        tried = ", ".join(f"'{pattern.name}'" for pattern in patterns) or "none"
        raise ValueError(
            f"{type(model).__name__} has no {units} where the patterns look. Tried: {tried}. The "
            f"model has {_contents(model)}. Say where they are with a pattern of your own: see "
            "mtprune.patterns."
        )
    return groups


def _heads(block: str, module: nn.Module, pattern: Attention) -> Group | None:
    """The heads of a module, or None if the pattern does not fit."""
    paths = (pattern.query, pattern.key, pattern.value)
    rows, columns = _row_counts(module, paths), _width(module, pattern.out)
    size = _at(module, pattern.head_size)
    if rows is None or columns is None or not isinstance(size, int) or size < 1:
        return None
    count = rows[2] // size
    # The output has a column for each row of the queries.
    if count == 0 or rows[2] % size or columns != rows[0] or any(n % count for n in rows):
        return None
    if not _has_values(module, pattern.only):
        return None
    members = _makers(block, module, paths, rows, count, ("with", "with", "out"))
    reader = Member(block + pattern.out, 1, _runs(columns, count), "in")
    counts = tuple(block + path for path in pattern.counts)
    return Group(f"{block}heads", count, (*members, reader), counts=counts)


def _neurons(block: str, module: nn.Module, pattern: FeedForward) -> Group | None:
    """The neurons of a module, or None if the pattern does not fit."""
    rows, columns = _row_counts(module, pattern.up), _width(module, pattern.down)
    if rows is None or not columns or any(n != columns for n in rows):
        return None
    act = pattern.activation
    if not (act is None or callable(_at(module, act))):
        return None
    if not _has_values(module, pattern.only):
        return None
    roles: list[Role] = ["out" for _ in rows]
    members = _makers(block, module, pattern.up, rows, columns, roles)
    return Group(
        f"{block}neurons",
        columns,
        (*members, Member(block + pattern.down, 1, _runs(columns, columns), "in")),
        between=None if act is None else block + act,
    )


def _makers(
    block: str,
    module: nn.Module,
    paths: Sequence[str],
    rows: Sequence[int],
    count: int,
    roles: Sequence[Role],
) -> Iterator[Member]:
    """The members of the weights that make units, and of their biases.

    Args:
        block: The prefix of the block's names.
        module: The block.
        paths: The paths of the weights.
        rows: The number of rows of each weight.
        count: The number of units.
        roles: The role of each weight.
    """
    for i, path in enumerate(paths):
        before = sum(rows[j] for j in range(i) if paths[j] == path)
        after = sum(rows[j] for j in range(i + 1, len(paths)) if paths[j] == path)
        units = (NOBODY,) * before + _runs(rows[i], count) + (NOBODY,) * after
        yield Member(block + path, 0, units, roles[i])
        bias = path.removesuffix("weight") + "bias"
        if isinstance(_at(module, bias), Tensor):
            yield Member(block + bias, 0, units, roles[i])


def _runs(length: int, count: int) -> tuple[int, ...]:
    """The unit of each index if units lie one after the other and are equally long."""
    return tuple(i * count // length for i in range(length))


def _row_counts(module: nn.Module, paths: Sequence[str]) -> list[int] | None:
    """The number of rows of each weight, which may be packed; None if a weight is missing."""
    counts = []
    for path in paths:
        weight, parts = _weight(module, path), paths.count(path)
        if weight is None or len(weight) % parts:
            return None
        counts.append(len(weight) // parts)
    return counts


def _width(module: nn.Module, path: str) -> int | None:
    """The number of columns of a weight; None if the weight is missing."""
    weight = _weight(module, path)
    return None if weight is None else weight.shape[1]


def _weight(module: nn.Module, path: str) -> Tensor | None:
    """The weight ``[outputs, inputs]`` at a path: of a Linear, or the block's own."""
    owner = path.rpartition(".")[0]
    # In other modules, rows may not be outputs.
    if owner and not isinstance(_at(module, owner), nn.Linear):
        return None
    weight = _at(module, path)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _has_values(module: nn.Module, only: Sequence[tuple[str, Any]]) -> bool:
    """Whether a module has these values at these paths."""
    return all(_at(module, path) == value for path, value in only)


def _at(module: nn.Module, path: str) -> Any:
    """The attribute at a path, or None."""
    value: Any = module
    for attribute in path.split("."):
        value = getattr(value, attribute, None)
    return value


def _contents(model: nn.Module) -> str:
    """Some weights of a model, for an error."""
    names = [f"'{name}' {tuple(p.shape)}" for name, p in model.named_parameters() if p.dim() == 2]
    if not names:
        return "no weight with two dimensions"
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
