"""Channels: what must go when a channel goes, found by torch-pruning.

Only the finding is theirs. torch-pruning runs the model, follows autograd's graph back from the
outputs and says which indices of which layers hang together. That becomes groups of units here,
each of which is tried out before it is believed; what is pruned, by whose vote, and how it is
removed has nothing to do with torch-pruning.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import import_module
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from mtprune.compression.running import call, named_tensors, parse, run
from mtprune.compression.trial import complete
from mtprune.holding.prune import plain_copy
from mtprune.model.names import unwrap
from mtprune.model.running import untouched
from mtprune.structure import NOBODY, Group, Member

__all__ = ["channels"]

Side = tuple[str, Literal["out", "in"]]
"""The outputs or the inputs of a layer, by its name; of a bare Parameter the first."""


def channels(model: nn.Module, example_inputs: Any) -> list[Group]:
    """The channels of a model that can be removed, with all that depends on them.

    Channels that are added to one another, scaled by a batch norm, or pass through a depthwise or
    grouped convolution are one unit with what they meet there: of grouped convolutions, and of
    group norms, whole groups go. Features of hidden Linear layers are channels too. Those that
    reach an output stay, and so does what cannot be followed: each group is tried out on a copy of
    the model, and left out if removing some of it changes anything else.

    The model is left as it is. It may be pruned at the moment, by `torch.nn.utils.prune` or by
    `MultitaskPruner`: names are those without ``_orig``.

    Args:
        model: The model.
        example_inputs: What it is called with: a tensor, a tuple of arguments, a dict of keyword
            arguments, or a list of these, of which the first is taken.

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
    try:
        tp = import_module("torch_pruning")
    except ImportError as error:
        raise ImportError(
            "Finding channels needs torch-pruning. Install the extra: pip install "
            "'mtprune[structured]'."
        ) from error
    batch = parse(example_inputs)[0]
    work = plain_copy(unwrap(model)).eval()
    run(work, [batch])  # complains about what the model cannot run on
    found = _groups(work, *_couplings(tp, work, batch))
    return complete(work, found, [batch])


Spot = tuple[Side, int]
"""One index of a side."""


def _couplings(tp: Any, work: nn.Module, batch: Any) -> tuple[list[list[list[Spot]]], set[int]]:
    """For each group of torch-pruning the spots of each of its units; and which reach an output."""
    for parameter in work.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    names = {module: name for name, module in work.named_modules()}

    def outputs(out: Any) -> list[Tensor]:
        # An operation of its own marks each output, also one that is a layer's own.
        return [t.clone() for _, t in named_tensors(out) if t.grad_fn is not None]

    with torch.enable_grad(), untouched(work), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = tp.DependencyGraph().build_dependency(
                work, batch, forward_fn=call, output_transform=outputs, verbose=False
            )
            _place_concats(tp, graph)
            _place_flattened(tp, graph)
            groups = list(graph.get_all_groups())
        except Exception as error:
            raise ValueError(
                f"torch-pruning cannot follow the model on `example_inputs`: {error}."
            ) from error
    found: list[list[list[Spot]]] = []
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
        found.append(list(units.values()))
    return found, fixed


def _place_concats(tp: Any, graph: Any) -> None:
    """Say where in a concat each of its parts lies, from the shapes that autograd noted.

    torch-pruning infers it from layers around, and is wrong about what is flattened later or
    joined with something that needs no gradient.
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
        node.enable_index_mapping = False  # theirs would take the place of ours
        start, done = 0, set()
        for fn, size in zip(parts, sizes, strict=True):
            place = (start, start := start + (size or 0))
            if fn is None:
                continue
            for source, target, back in ((node, nodes[fn], True), (nodes[fn], node, False)):
                mapping = tp.dependency.index_mapping._ConcatIndexMapping(place, reverse=back)
                for dependency in source.dependencies:
                    if dependency.target is target and id(dependency) not in done:
                        done.add(id(dependency))
                        dependency.index_mapping[1] = mapping
                        break


def _place_flattened(tp: Any, graph: Any) -> None:
    """Say which features a channel becomes when what follows it is flattened, from the shapes too.

    torch-pruning infers it from the layer that reads them, and none reads what is joined first.
    """
    nodes = {node.grad_fn: node for node in graph.module2node.values()}
    for node in nodes.values():
        parts = getattr(node.grad_fn, "next_functions", ())
        if not isinstance(node.module, tp.ops._ReshapeOp) or not parts or parts[0][0] not in nodes:
            continue
        before, after = _shape(*parts[0]), _shape(node.grad_fn)
        if len(before) < 3 or after != (before[0], prod(before[1:])):
            continue
        node.type = tp.ops.OPTYPE.ELEMENTWISE  # theirs would take the place of ours
        each, source = after[1] // before[1], nodes[parts[0][0]]
        for start, end, back in ((node, source, True), (source, node, False)):
            mapping = tp.dependency.index_mapping._FlattenIndexMapping(each, reverse=back)
            for dependency in start.dependencies:
                if dependency.target is end:
                    dependency.index_mapping[0] = mapping


def _shape(fn: Any, output: int = 0) -> tuple[int, ...]:
    """The shape of what an operation put out."""
    return tuple(fn._input_metadata[output].shape)


def _groups(work: nn.Module, coupled: list[list[list[Spot]]], fixed: set[int]) -> list[Group]:
    """Groups of units from what hangs together."""
    modules = dict(work.named_modules())
    together = _Together()
    for units in coupled:
        for spots in units:
            together.join(spots)
    for name, module in modules.items():
        if isinstance(module, _ConvNd) and module.groups > 1:
            _join(together, (name, "out"), module.out_channels, module.groups)
            _join(together, (name, "in"), module.in_channels, module.groups)
        elif isinstance(module, nn.GroupNorm):
            _join(together, (name, "out"), module.num_channels, module.num_groups)
    # Two of their groups that share a unit are one of ours.
    same = _Together()
    for number, units in enumerate(coupled):
        same.join([number, *(("unit", together.find(spots[0])) for spots in units)])
    merged: dict[Any, list[int]] = {}
    for number in range(len(coupled)):
        merged.setdefault(same.find(number), []).append(number)
    order = {name: i for i, name in enumerate((*modules, *dict(work.named_parameters())))}
    held = work.state_dict(keep_vars=True)
    uses = Counter(id(p) for m in work.modules() for p in m._parameters.values() if p is not None)
    groups = []
    for numbers in merged.values():
        if fixed.intersection(numbers):
            continue
        units = [spots for number in numbers for spots in coupled[number]]
        numbered: dict[Any, int] = {}
        sides: dict[Side, dict[int, int]] = {}
        all_spots = {spot for spots in units for spot in spots}
        for side, index in sorted(all_spots, key=lambda spot: (order[spot[0][0]], spot)):
            unit = numbered.setdefault(together.find((side, index)), len(numbered))
            sides.setdefault(side, {})[index] = unit
        found = list(_members(work, modules, sides))
        members = tuple(m for m in found if m is not None)
        tied = any(uses[id(held[m.tensor])] > 1 for m in members)
        if len(members) < len(found) or tied or len(numbered) < 2:
            continue
        makers = [m.tensor.rpartition(".")[0] for m in members if m.role == "out"]
        if makers and any(m.role == "in" for m in members):
            groups.append(Group(f"{makers[0]}.channels", len(numbered), members))
    return sorted(groups, key=lambda group: order[group.members[0].tensor.rpartition(".")[0]])


class _Together:
    """What is the same by a chain of pairs."""

    def __init__(self) -> None:
        self._above: dict[Any, Any] = {}

    def find(self, item: Any) -> Any:
        """The one that stands for all that are the same."""
        while item in self._above:
            above = self._above[item]
            self._above[item] = self._above.get(above, above)  # halve the way for the next
            item = above
        return item

    def join(self, items: Iterable[Any]) -> None:
        """Make these the same."""
        first: Any = None
        for item in items:
            top = self.find(item)
            if first is None:
                first = top
            elif top != first:
                self._above[top] = first


def _join(together: _Together, side: Side, channels: int, groups: int) -> None:
    """Let the channels of each group of a layer, on whatever side, be one unit."""
    for index in range(channels):
        together.join([("group", side[0], index // (channels // groups)), (side, index)])


def _members(
    work: nn.Module, modules: dict[str, nn.Module], sides: dict[Side, dict[int, int]]
) -> Iterator[Member | None]:
    """Where units lie, or None where that is nothing which can be cut."""
    for (name, side), held in sides.items():
        module = modules.get(name)
        if module is None:  # a bare Parameter
            shape = work.get_parameter(name).shape
            dim = max(d for d, size in enumerate(shape) if size > 1)
            yield Member(name, dim, _units(held, shape[dim]), "with")
        elif isinstance(module, nn.Linear):
            if side == "in":
                yield Member(f"{name}.weight", 1, _units(held, module.in_features), "in")
            else:
                yield from _lines(name, module, _units(held, module.out_features), "out")
        elif isinstance(module, _ConvNd) and module.groups == 1:
            inputs, outputs = (0, 1) if module.transposed else (1, 0)
            if side == "in":
                yield Member(f"{name}.weight", inputs, _units(held, module.in_channels), "in")
            else:
                units = _units(held, module.out_channels)
                yield Member(f"{name}.weight", outputs, units)
                if module.bias is not None:
                    yield Member(f"{name}.bias", 0, units)
        elif isinstance(module, _ConvNd):
            other = sides.get((name, "in"), held)
            if side == "in" and (name, "out") in sides:
                continue
            ins, outs = _units(other, module.in_channels), _units(held, module.out_channels)
            if side == "in" or NOBODY in ins or NOBODY in outs:
                yield None  # one end is not followed
            else:
                yield Member(f"{name}.weight", 0, ins if module.transposed else outs, "with")
                if module.bias is not None:
                    yield Member(f"{name}.bias", 0, outs, "with")
        elif isinstance(module, (_NormBase, nn.GroupNorm, nn.PReLU)):
            tensors = {**module._parameters, **module._buffers}
            lines = [t for t in tensors.values() if t is not None and t.dim() == 1]
            if not lines:
                # There is nothing to cut in a batch norm then, and an instance norm complains.
                if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                    yield None
            elif len(lines[0]) > 1:
                yield from _lines(name, module, _units(held, len(lines[0])), "with")
        else:
            yield None


def _lines(
    name: str, module: nn.Module, units: tuple[int, ...], role: Literal["out", "with"]
) -> Iterator[Member]:
    """All tensors of a module along their first dimension, its weight before others."""
    held = {"weight": None, **module._parameters, **module._buffers}
    for key, tensor in held.items():
        if tensor is not None and tensor.dim():
            yield Member(f"{name}.{key}", 0, units, role)


def _units(held: dict[int, int], size: int) -> tuple[int, ...]:
    return tuple(held.get(index, NOBODY) for index in range(size))
