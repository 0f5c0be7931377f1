"""Channels: the tensor entries that must be removed with a channel, found by torch-pruning.

torch-pruning runs the model, follows autograd's graph back from the outputs and says which indices
of which layers depend on one another. Here these indices become groups of units, and each group
must pass a trial. The vote, the masks and the removal do not use torch-pruning.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map

from mtprune.compression.running import call, named_tensors, parse, run
from mtprune.compression.trial import tried
from mtprune.holding.prune import plain_copy
from mtprune.model.names import unwrap
from mtprune.model.running import untouched
from mtprune.progress import bar, is_watched
from mtprune.structure import NOBODY, Group, Member

__all__ = ["channels", "found"]

Side = tuple[str, Literal["out", "in"]]
"""The outputs or the inputs of a layer, or of a bare Parameter, by its name."""

Spot = tuple[Side, int]
"""One index of a side."""

_CORNER = 64
"""Height and width of what is looked at of an image."""

Coupling = list[list[Spot]]
"""A group of torch-pruning: for each of its units, the spots that must be removed together."""


def channels(model: nn.Module, example_inputs: Any) -> list[Group]:
    """The channels of a model that can be removed, with all entries that depend on them.

    Channels that are added to one another are one unit, and so is a channel with its entries in a
    batch norm or a depthwise convolution. Of grouped convolutions and group norms, a unit is a
    whole group. Features of hidden Linear layers are channels too. Channels that reach an output
    stay. Each group is tried on a copy of the model, and left out if removing some of its units
    changes anything else.

    The model is left as it is. It may hold masks, of `torch.nn.utils.prune` or of
    `MultitaskPruner`: names are those without ``_orig``.

    Args:
        model: The model.
        example_inputs: The inputs to call it with: a tensor, a tuple of arguments, a dict of
            keyword arguments, or a list of these, of which the first is taken.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If the model does not run on the inputs.

    Example:
        >>> import importlib.util
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3))
        >>> if importlib.util.find_spec("torch_pruning"):
        ...     (group,) = channels(model, torch.randn(1, 3, 8, 8))
        ...     assert (group.name, group.size) == ("0.channels", 8)
    """
    return found(model, example_inputs)[0]


def found(model: nn.Module, example_inputs: Any) -> tuple[list[Group], dict[str, str]]:
    """The groups that `channels` gives, and why others, by their names, cannot be removed."""
    try:
        tp = import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            "Finding channels needs torch-pruning. Install the extra: pip install "
            "'mtprune[structured]'."
        ) from error
    work = plain_copy(unwrap(model)).eval()
    batch = _smaller(work, parse(example_inputs)[0])
    groups, uncut = _groups(work, *_couplings(tp, work, batch))
    fine, refused = tried(work, groups, [batch])
    return fine, uncut | refused


def _smaller(work: nn.Module, batch: Any) -> Any:
    """A corner of the images in a batch, if the model runs on it: channels depend on no size.

    Raises:
        ValueError: If the model does not run on the batch.
    """

    def corner(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return value[..., :_CORNER, :_CORNER]
        return value

    small = tree_map(corner, batch)
    sizes = [
        [leaf.shape for leaf in tree_leaves(x) if isinstance(leaf, Tensor)] for x in (batch, small)
    ]
    if sizes[0] != sizes[1]:
        with suppress(ValueError):
            run(work, [small])
            return small
    run(work, [batch])
    return batch


def _couplings(tp: Any, work: nn.Module, batch: Any) -> tuple[list[Coupling], set[int]]:
    """The groups of torch-pruning, and the numbers of those that reach an output.

    Args:
        tp: The package torch-pruning.
        work: A copy of the model.
        batch: One batch of example inputs.
    """
    for parameter in work.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    names = {module: name for name, module in work.named_modules()}

    def outputs(out: Any) -> list[Tensor]:
        # A clone marks each output with an operation, also one that a layer returned directly.
        return [t.clone() for _, t in named_tensors(out) if t.grad_fn is not None]

    with torch.enable_grad(), untouched(work), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = tp.DependencyGraph().build_dependency(
                work, batch, forward_fn=call, output_transform=outputs, verbose=False
            )
            _locate_concats(tp, graph)
            _locate_flattened(tp, graph)
            groups = list(bar(graph.get_all_groups(), is_watched(), "finding channels"))
        except Exception as error:
            raise ValueError(
                f"torch-pruning cannot follow the model on `example_inputs`: {error}."
            ) from error
    couplings: list[Coupling] = []
    fixed: set[int] = set()
    for number, group in enumerate(groups):
        units: dict[int, list[Spot]] = {}
        for item in group:
            module = item.dep.target.module
            if isinstance(module, nn.Parameter):
                name = graph._param_to_name[module]
            elif module in names:
                name = names[module]
            else:
                if isinstance(module, tp.ops._OutputOp):
                    fixed.add(number)
                continue
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            side: Side = (name, "out" if out else "in")
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                units.setdefault(root, []).append((side, index))
        couplings.append(list(units.values()))
    return couplings, fixed


def _locate_concats(tp: Any, graph: Any) -> None:
    """Set the range of each part of a concat, from the shapes that autograd recorded.

    torch-pruning infers the range from neighbouring layers, and is wrong if the result is flattened
    later, or if a part needs no gradient.
    """
    nodes = {node.grad_fn: node for node in graph.module2node.values()}
    for node in list(nodes.values()):
        if not isinstance(node.module, tp.ops._ConcatOp):
            continue
        whole = _shape(node.grad_fn)
        if node.grad_fn._saved_dim % 2**64 not in (1, 2**64 + 1 - len(whole)):
            continue
        parts = [fn for fn, _ in node.grad_fn.next_functions]
        sizes = [None if fn is None else _shape(fn, i)[1] for fn, i in node.grad_fn.next_functions]
        unknown = [i for i, size in enumerate(sizes) if size is None]
        if len(unknown) == 1:
            sizes[unknown[0]] = whole[1] - sum(size for size in sizes if size is not None)
        if None in sizes or any(fn is not None and fn not in nodes for fn in parts):
            continue
        node.enable_index_mapping = False  # torch-pruning would replace the mapping
        start, mapped = 0, set()
        for fn, size in zip(parts, sizes, strict=True):
            part = (start, start := start + (size or 0))
            if fn is None:
                continue
            for source, target, back in ((node, nodes[fn], True), (nodes[fn], node, False)):
                mapping = tp.dependency.index_mapping._ConcatIndexMapping(part, reverse=back)
                for dependency in source.dependencies:
                    if dependency.target is target and id(dependency) not in mapped:
                        mapped.add(id(dependency))
                        dependency.index_mapping[1] = mapping
                        break


def _locate_flattened(tp: Any, graph: Any) -> None:
    """Set the features that each channel becomes when it is flattened, from the shapes too.

    torch-pruning infers them from the layer that reads the features, and no layer reads features
    that are concatenated first.
    """
    nodes = {node.grad_fn: node for node in graph.module2node.values()}
    for node in nodes.values():
        parts = getattr(node.grad_fn, "next_functions", ())
        if not isinstance(node.module, tp.ops._ReshapeOp) or not parts or parts[0][0] not in nodes:
            continue
        before, after = _shape(*parts[0]), _shape(node.grad_fn)
        if len(before) < 3 or after != (before[0], prod(before[1:])) or _is_permuted(parts[0][0]):
            continue
        node.type = tp.ops.OPTYPE.ELEMENTWISE  # torch-pruning would replace the mapping
        each, source = after[1] // before[1], nodes[parts[0][0]]
        for start, end, back in ((node, source, True), (source, node, False)):
            mapping = tp.dependency.index_mapping._FlattenIndexMapping(each, reverse=back)
            for dependency in start.dependencies:
                if dependency.target is end:
                    dependency.index_mapping[0] = mapping


def _is_permuted(fn: Any) -> bool:
    """Whether an operation's output has its dimensions in another order than layers gave them."""
    while "Clone" in fn.name():
        fn = fn.next_functions[0][0]
    return "Permute" in fn.name() or "Transpose" in fn.name()


def _shape(fn: Any, output: int = 0) -> tuple[int, ...]:
    """The shape of an operation's output."""
    return tuple(fn._input_metadata[output].shape)


def _groups(
    work: nn.Module, couplings: list[Coupling], fixed: set[int]
) -> tuple[list[Group], dict[str, str]]:
    """Groups of units from couplings without those that reach an output; why others cannot be cut.

    Args:
        work: A copy of the model.
        couplings: The groups of torch-pruning.
        fixed: The numbers of the couplings that reach an output.
    """
    modules = dict(work.named_modules())
    units = _join_spots(modules, couplings)
    order = {name: i for i, name in enumerate((*modules, *dict(work.named_parameters())))}
    tensors = work.state_dict(keep_vars=True)
    uses = Counter(id(p) for m in work.modules() for p in m._parameters.values() if p is not None)
    groups: list[Group] = []
    uncut: dict[str, str] = {}
    for numbers in _merge(couplings, units):
        if fixed.intersection(numbers):
            continue
        unit_numbers: dict[Any, int] = {}
        sides: dict[Side, dict[int, int]] = {}
        spots = {spot for n in numbers for unit in couplings[n] for spot in unit}
        for side, index in sorted(spots, key=lambda spot: (order[spot[0][0]], spot)):
            unit = unit_numbers.setdefault(units.find((side, index)), len(unit_numbers))
            sides.setdefault(side, {})[index] = unit
        candidates = list(_members(work, modules, sides))
        members = tuple(m for m in candidates if m is not None)
        is_tied = any(uses[id(tensors[m.tensor])] > 1 for m in members)
        makers = [m.tensor.rpartition(".")[0] for m in members if m.role == "out"]
        if len(unit_numbers) < 2 or not makers or all(m.role != "in" for m in members):
            continue
        name = f"{makers[0]}.channels"
        if is_tied:
            uncut[name] = "weights are used in two places"
        elif len(members) < len(candidates):
            uncut[name] = "a layer they go through cannot lose some of them"
        else:
            groups.append(Group(name, len(unit_numbers), members))
    groups.sort(key=lambda group: order[group.members[0].tensor.rpartition(".")[0]])
    return groups, uncut


class _DisjointSets:
    """Sets without common items, which can be joined (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        """The representative of the set that an item is in."""
        while item in self._parents:
            parent = self._parents[item]
            self._parents[item] = self._parents.get(parent, parent)  # halve the path
            item = parent
        return item

    def join(self, items: Iterable[Any]) -> None:
        """Join the sets of all these items."""
        first: Any = None
        for item in items:
            root = self.find(item)
            if first is None:
                first = root
            elif root != first:
                self._parents[root] = first


def _join_spots(modules: dict[str, nn.Module], couplings: list[Coupling]) -> _DisjointSets:
    """The units of a model, each a set of spots.

    The spots of a unit of torch-pruning are one unit, and so are the channels of each group of a
    grouped convolution or a group norm.
    """
    units = _DisjointSets()
    for coupling in couplings:
        for spots in coupling:
            units.join(spots)
    for name, module in modules.items():
        if isinstance(module, _ConvNd) and module.groups > 1:
            _join_channels(units, (name, "out"), module.out_channels, module.groups)
            _join_channels(units, (name, "in"), module.in_channels, module.groups)
        elif isinstance(module, nn.GroupNorm):
            _join_channels(units, (name, "out"), module.num_channels, module.num_groups)
    return units


def _join_channels(units: _DisjointSets, side: Side, channels: int, groups: int) -> None:
    """Join the channels of each group of a layer, on both sides, to one unit."""
    for index in range(channels):
        units.join([("group", side[0], index // (channels // groups)), (side, index)])


def _merge(couplings: list[Coupling], units: _DisjointSets) -> Iterable[list[int]]:
    """The numbers of the couplings that share a unit, and so make one group."""
    groups = _DisjointSets()
    for number, coupling in enumerate(couplings):
        groups.join([number, *(("unit", units.find(spots[0])) for spots in coupling)])
    merged: dict[Any, list[int]] = {}
    for number in range(len(couplings)):
        merged.setdefault(groups.find(number), []).append(number)
    return merged.values()


def _members(
    work: nn.Module, modules: dict[str, nn.Module], sides: dict[Side, dict[int, int]]
) -> Iterator[Member | None]:
    """The members of a group, with None for a tensor that cannot be cut.

    Args:
        work: A copy of the model.
        modules: Its modules by name.
        sides: The unit of each index, for each side that the group includes.
    """
    for (name, side), indices in sides.items():
        module = modules.get(name)
        if module is None:  # a bare Parameter
            shape = work.get_parameter(name).shape
            dim = max(d for d, size in enumerate(shape) if size > 1)
            yield Member(name, dim, _units(indices, shape[dim]), "with")
        elif isinstance(module, nn.Linear):
            if side == "in":
                yield Member(f"{name}.weight", 1, _units(indices, module.in_features), "in")
            else:
                units = _units(indices, module.out_features)
                yield from _all_tensors(name, module, units, "out")
        elif isinstance(module, _ConvNd) and module.groups == 1:
            inputs, outputs = (0, 1) if module.transposed else (1, 0)
            if side == "in":
                yield Member(f"{name}.weight", inputs, _units(indices, module.in_channels), "in")
            else:
                units = _units(indices, module.out_channels)
                yield Member(f"{name}.weight", outputs, units)
                if module.bias is not None:
                    yield Member(f"{name}.bias", 0, units)
        elif isinstance(module, _ConvNd):
            inputs_of = sides.get((name, "in"), indices)
            if side == "in" and (name, "out") in sides:
                continue
            ins, outs = _units(inputs_of, module.in_channels), _units(indices, module.out_channels)
            if side == "in" or NOBODY in ins or NOBODY in outs:
                yield None  # torch-pruning did not follow one side
            else:
                yield Member(f"{name}.weight", 0, ins if module.transposed else outs, "with")
                if module.bias is not None:
                    yield Member(f"{name}.bias", 0, outs, "with")
        elif isinstance(module, (_NormBase, nn.GroupNorm, nn.PReLU)):
            tensors = {**module._parameters, **module._buffers}
            vectors = [t for t in tensors.values() if t is not None and t.dim() == 1]
            if not vectors:
                # A batch norm then has nothing to cut; an instance norm checks its channels.
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    yield None
            elif len(vectors[0]) > 1:
                yield from _all_tensors(name, module, _units(indices, len(vectors[0])), "with")
        else:
            yield None


def _all_tensors(
    name: str, module: nn.Module, units: tuple[int, ...], role: Literal["out", "with"]
) -> Iterator[Member]:
    """The members of all tensors of a module, along their first dimension, its weight first."""
    tensors = {"weight": None, **module._parameters, **module._buffers}
    for key, tensor in tensors.items():
        if tensor is not None and tensor.dim():
            yield Member(f"{name}.{key}", 0, units, role)


def _units(indices: dict[int, int], size: int) -> tuple[int, ...]:
    """The unit of each index along a dimension, or `NOBODY`."""
    return tuple(indices.get(index, NOBODY) for index in range(size))
