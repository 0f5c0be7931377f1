"""Blocks: what a pattern says of attention and feed-forward blocks, and the units it finds there.

A pattern is data: the paths of the weights of one block, seen from the block. A block is any
module of a model in which all paths of a pattern lead to weights whose shapes fit one another. A
path that is named more than once leads to several weights packed into one tensor, in that order:
one after the other, or interleaved head by head.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from mtprune.model.experts import Experts, match_experts
from mtprune.model.layout import is_conv1d, layout_of
from mtprune.model.paths import at, in_runs, is_at, numbers
from mtprune.structure import NOBODY, Argument, Group, Member, Role

__all__ = ["Attention", "Experts", "FeedForward", "Pattern", "match"]


@dataclass(frozen=True)
class Attention:
    """A block of multi-head attention.

    Heads lie one after the other: along the outputs of query, key and value, and the inputs of the
    output. If several query heads share keys and values, a unit is a key head with all its queries;
    if all of them share one, a unit is a query head alone.

    Attributes:
        name: The name in errors.
        query: The path of the weight of the queries.
        key: The path of the weight of the keys.
        value: The path of the weight of the values.
        out: The path of the weight that reads all heads.
        head_size: The path of the number of dimensions of one head in the output; paths of several
            names, of which the first that is there counts, are separated by ``|``.
        counts: Paths of numbers that shrink with the number of query heads, in proportion.
        only: Paths with the values that a block must have there to fit.
        key_counts: Paths of numbers that shrink with the number of key heads.
        ratios: Paths of numbers of query heads for each key head.
        interleaved: Whether what is packed into one tensor is so head by head.
        tables: Paths of further tensors with entries for each query head, as many for each, and the
            dimension along which they lie; those that are not there do not count.
        number: The path of the number of query heads, for blocks that do not keep the size.
        needs: Paths that must be there.
        stack: The name of the list whose blocks share their heads, if they do: what one of them
            adds to its scores, all of them add.
        why_not: Why heads of such a block cannot be removed; empty if they can.
        arguments: Names of arguments of the block's ``forward`` with an entry for each query head,
            and the dimension along which these lie, for each of a batch if that lies there too.
        least: How many heads must stay: 1 if the block's ``forward`` does not run without any.

    Example:
        >>> from mtprune.patterns import PATTERNS, heads
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
    key_counts: tuple[str, ...] = ()
    ratios: tuple[str, ...] = ()
    interleaved: bool = False
    tables: tuple[tuple[str, int], ...] = ()
    number: str = ""
    needs: tuple[str, ...] = ()
    stack: str = ""
    why_not: str = ""
    arguments: tuple[tuple[str, int], ...] = ()
    least: int = 0


@dataclass(frozen=True)
class FeedForward:
    """A block of two layers with an activation between them.

    In a gated block several weights make the neurons, and the products of their outputs are read.

    Attributes:
        name: The name in errors.
        up: The paths of the weights that make the neurons.
        down: The path of the weight that reads the neurons.
        activation: The path of the module or function between them, which is applied to each neuron
            on its own; None if there is more between them, a product with gates for instance.
        only: Paths with the values that a block must have there to fit.
        counts: Paths of numbers that shrink with the number of neurons, in proportion.
        along: Paths of further tensors with an entry for each neuron, along their first dimension.
        interleaved: Whether what is packed into one tensor is so neuron by neuron.
        unit: How many neurons, one after the other, are kept or pruned together.
        why_not: Why neurons of such a block cannot be removed; empty if they can.

    Example:
        >>> from mtprune.patterns import neurons
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
    counts: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    interleaved: bool = False
    unit: int = 1
    why_not: str = ""


Pattern = Attention | FeedForward | Experts
"""A shape of module in which heads, neurons or experts are found."""


def match(name: str, module: nn.Module, pattern: Pattern) -> Group | None:
    """The units of a module, or None if the pattern does not fit it.

    Args:
        name: The name of the module.
        module: The module.
        pattern: The pattern.
    """
    if not all(is_at(module, path, value) for path, value in pattern.only):
        return None
    block = f"{name}." if name else ""
    if isinstance(pattern, Attention):
        there = all(at(module, path) is not None for path in pattern.needs)
        return _heads(block, module, pattern) if there else None
    if isinstance(pattern, Experts):
        return match_experts(block, module, pattern)
    return _neurons(block, module, pattern)


class _Matrix(NamedTuple):
    """A weight: how many outputs and inputs it has, and along which dimensions they lie."""

    outputs: int
    inputs: int
    makes: int
    reads: int


def _heads(block: str, module: nn.Module, pattern: Attention) -> Group | None:
    """The heads of a module, or None if the pattern does not fit."""
    paths = (pattern.query, pattern.key, pattern.value)
    weights, out = [_matrix(module, path) for path in paths], _matrix(module, pattern.out)
    if out is None or not all(weights):
        return None
    size, queries = _split(module, pattern, out.inputs)
    if size * queries != out.inputs or not queries:
        return None
    lengths = _lengths([w.outputs for w in weights if w], pattern, out.inputs)
    keys = lengths[2] // size if lengths else 0
    if not lengths or not keys or lengths[2] % size or lengths[1] % keys:
        return None
    if lengths[0] % queries or queries % keys:
        return None
    alone = keys == 1 < queries  # keys that all queries share are no part of any of them
    count = queries if alone else keys
    runs = keys if pattern.interleaved else 1
    members: list[Member] = []
    for i, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        if alone and i:
            continue
        packed = [lengths[j] for j, other in enumerate(paths) if other == path]
        units = _unpacked(packed, paths[:i].count(path), count, runs)
        role: Role = "out" if i == 2 else "with"
        members += _makers(block, module, path, weight, units, role)
    for path, dim in pattern.tables:
        table = at(module, path)
        if isinstance(table, Tensor):
            if table.dim() <= dim or table.shape[dim] % queries:
                return None
            members.append(Member(block + path, dim, in_runs(table.shape[dim], count), "with"))
    members.append(Member(block + pattern.out, out.reads, in_runs(out.inputs, count), "in"))
    changing = (*pattern.counts, *(pattern.ratios if alone else pattern.key_counts))
    counts = tuple(block + path for path in changing if numbers(module, [path]))
    heads, name = in_runs(queries, count), block.removesuffix(".")
    arguments = tuple(Argument(name, key, dim, heads) for key, dim in pattern.arguments)
    return Group(
        f"{block}heads",
        count,
        tuple(members),
        counts=counts,
        least=min(pattern.least, count),
        arguments=arguments,
    )


def _split(module: nn.Module, pattern: Attention, width: int) -> tuple[int, int]:
    """The size of a head in the output, and the number of query heads; 0 if they are not told."""
    if sizes := [n for n in numbers(module, pattern.head_size.split("|")) if n > 0]:
        return sizes[0], width // sizes[0]
    counts = [n for n in numbers(module, [pattern.number]) if n > 0] if pattern.number else []
    return (width // counts[0], counts[0]) if counts else (0, 0)


def _lengths(outputs: Sequence[int], pattern: Attention, width: int) -> tuple[int, ...] | None:
    """How many outputs queries, keys and values have; None if that cannot be.

    Args:
        outputs: The outputs of the weight of each, in which others may be packed.
        pattern: The pattern.
        width: The dimensions of all query heads in the output.
    """
    if pattern.key != pattern.value:
        return tuple(outputs) if pattern.query not in (pattern.key, pattern.value) else None
    if pattern.query == pattern.key:
        key, rest = divmod(outputs[2] - width, 2)
        lengths = (width, key, key)
    elif pattern.interleaved:  # as many heads of keys as of queries, of a size of their own
        lengths, rest = (outputs[0], outputs[2] - width, width), 0
    else:
        key, rest = divmod(outputs[2], 2)
        lengths = (outputs[0], key, key)
    return None if rest or min(lengths) < 1 else lengths


def _neurons(block: str, module: nn.Module, pattern: FeedForward) -> Group | None:
    """The neurons of a module, or None if the pattern does not fit."""
    weights, down = [_matrix(module, path) for path in pattern.up], _matrix(module, pattern.down)
    act = pattern.activation
    if down is None or not down.inputs or not (act is None or callable(at(module, act))):
        return None
    width = down.inputs
    if width % pattern.unit:
        return None
    count = width // pattern.unit
    members: list[Member] = []
    for i, (path, weight) in enumerate(zip(pattern.up, weights, strict=True)):
        parts = pattern.up.count(path)
        if weight is None or weight.outputs != parts * width:
            return None
        runs = width if pattern.interleaved else 1
        units = _unpacked([width] * parts, pattern.up[:i].count(path), count, runs)
        members += _makers(block, module, path, weight, units, "out")
    for path in pattern.along:
        tensor = at(module, path)
        if isinstance(tensor, Tensor):
            if len(tensor) != width:
                return None
            members.append(Member(block + path, 0, in_runs(width, count), "with"))
    members.append(Member(block + pattern.down, down.reads, in_runs(width, count), "in"))
    return Group(
        f"{block}neurons",
        count,
        tuple(members),
        between=None if act is None else block + act,
        counts=tuple(block + path for path in pattern.counts if numbers(module, [path])),
    )


def _makers(
    block: str,
    module: nn.Module,
    path: str,
    weight: _Matrix | None,
    units: tuple[int, ...],
    role: Role,
) -> Iterator[Member]:
    """The members of a weight that makes units, and of its bias."""
    assert weight is not None
    yield Member(block + path, weight.makes, units, role)
    named = path.endswith("weight")
    bias = path.removesuffix("weight") + "bias" if named else f"{path}_bias"
    tensor = at(module, bias)
    if isinstance(tensor, Tensor):
        yield Member(block + bias, tensor.dim() - 1, units, role)


def _unpacked(lengths: Sequence[int], which: int, count: int, runs: int) -> tuple[int, ...]:
    """The unit of each index of one of the parts that are packed into a tensor; others have none.

    Args:
        lengths: The lengths of the parts.
        which: Which part.
        count: The number of units.
        runs: In how many equal runs the parts lie, of each run a piece of every part.

    Example:
        >>> _unpacked([4, 4], 1, 2, 1)
        (-1, -1, -1, -1, 0, 0, 1, 1)
        >>> _unpacked([4, 4], 1, 2, 2)
        (-1, -1, 0, 0, -1, -1, 1, 1)
    """
    units = iter(in_runs(lengths[which], count))
    found: list[int] = []
    for _ in range(runs):
        for i, length in enumerate(lengths):
            found += [next(units) if i == which else NOBODY for _ in range(length // runs)]
    return tuple(found)


def _matrix(module: nn.Module, path: str) -> _Matrix | None:
    """The weight at a path: of a Linear or Conv1D, or the block's own; None if there is none."""
    owner = path.rpartition(".")[0]
    holder = at(module, owner) if owner else module
    weight = at(module, path)
    if not isinstance(weight, Tensor) or not isinstance(holder, nn.Module):
        return None
    layout = layout_of(holder, path.rpartition(".")[2], weight.shape)
    # Experts of a stack all lose the same units. In other modules, rows may not be outputs.
    if not layout.stacked and not (
        weight.dim() == 2 and (isinstance(holder, nn.Linear) or is_conv1d(holder) or not owner)
    ):
        return None
    makes, reads = layout.outputs, layout.inputs
    return _Matrix(weight.shape[makes], weight.shape[reads], makes, reads)
