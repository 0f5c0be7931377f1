"""Parts: the rows of a layer that are on this rank, where other ranks have the others.

``fully_shard`` (FSDP2) gives every rank a part of every weight, some of its rows. This file alone
knows how: a layer is asked for its values here, for its part, and for the leaf of autograd graphs,
and what works on layers works on what is here. Where all of a layer is here, its part is the whole.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from mtprune import distributed
from mtprune.census import HERE, Census, Scattered

__all__ = ["Part", "Sharding", "is_spread", "local", "why_not_rows"]


class Part:
    """A layer all of which is here.

    Args:
        shape: The shape of the layer.

    Attributes:
        shape: The shape of what is here.
        census: Counts over the parts of all ranks.
        is_whole: Whether that is everything.
    """

    is_whole = True
    census: Census = HERE

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def of(self, whole: Tensor) -> Tensor:
        """What is here of a tensor of the layer's shape."""
        return whole

    def whole(self, mine: Tensor) -> Tensor:
        """The parts of all ranks as one tensor; all of them must call."""
        return mine

    def placed(self, mine: Tensor) -> Tensor:
        """What is here in a tensor of the layer's shape, zero where other ranks have the rows."""
        return mine

    def averaged(self, grad: Tensor) -> Callable[[], Tensor]:
        """Begin to average a gradient of the layer's shape over ranks.

        Args:
            grad: The gradient; left alone until the mean is there.

        Returns:
            A function that waits for what is here of the mean. All ranks must call them in one
            order.
        """
        mean = distributed.mean_(grad)
        return lambda: mean

    def shown(self, mine: Tensor) -> Tensor:
        """What is here as a user sees it."""
        return mine

    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        """Refuse decisions that differ between ranks which have the same part.

        Raises:
            RuntimeError: If they do.
        """
        distributed.check_equal(tensors)


class _Rows(Part):
    """Some rows of a layer.

    Args:
        like: A sharded parameter, a ``DTensor``.
    """

    is_whole = False

    def __init__(self, like: Any) -> None:
        mesh, placements = like.device_mesh, like.placements
        along = next(i for i, placement in enumerate(placements) if placement.is_shard())
        self._like = like
        self._whole_shape = tuple(like.shape)
        self._group = mesh.get_group(along)
        self._ranks = mesh.size(along)
        self._world = mesh.size()
        self._others = [mesh.get_group(i) for i in range(mesh.ndim) if i != along]
        self._each = -(-self._whole_shape[0] // self._ranks)
        start = min(self._each * mesh.get_local_rank(along), self._whole_shape[0])
        stop = min(start + self._each, self._whole_shape[0])
        self._rows = slice(start, stop)
        self.census = Scattered(self._group)
        super().__init__((stop - start, *self._whole_shape[1:]))

    @override
    def of(self, whole: Tensor) -> Tensor:
        return whole.view(self._whole_shape)[self._rows].clone()  # the rest may go

    @override
    def whole(self, mine: Tensor) -> Tensor:
        kind = mine.dtype
        mine = mine.reshape(self.shape)
        padded = mine.new_zeros(self._each, *self.shape[1:])
        padded[: len(mine)] = mine
        padded = padded.view(torch.uint8) if kind == torch.bool else padded
        rows = padded.new_empty(self._ranks * self._each, *self.shape[1:])
        dist.all_gather(list(rows.chunk(self._ranks)), padded, group=self._group)
        return rows[: self._whole_shape[0]].view(kind)

    @override
    def placed(self, mine: Tensor) -> Tensor:
        whole = mine.new_zeros(self._whole_shape)
        whole[self._rows] = mine
        return whole

    @override
    def averaged(self, grad: Tensor) -> Callable[[], Tensor]:
        rows = self._padded(grad)
        mine = rows.new_empty(self._each, *self.shape[1:])
        # The first is the name from torch 2.13 on.
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        on_its_way = scatter(mine, rows, group=self._group, async_op=True)

        def arrived() -> Tensor:
            nonlocal rows
            on_its_way.wait()
            rows = mine  # what was sent may go
            for group in self._others:
                dist.all_reduce(mine, group=group)
            mine.div_(self._world)
            return mine[: self.shape[0]].to(self._like.device)

        return arrived

    def _padded(self, grad: Tensor) -> Tensor:
        """A gradient with as many rows for every rank; it may be the same tensor."""
        # In the type of the weights, which with mixed precision is wider than that of gradients.
        kind = self._like.dtype
        length = self._whole_shape[0]
        if length == self._ranks * self._each:
            return grad.to(kind).contiguous()
        rows = grad.new_empty(self._ranks * self._each, *self.shape[1:], dtype=kind)
        rows[:length] = grad
        rows[length:] = 0
        return rows

    @override
    def shown(self, mine: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self._like
        shown: Tensor = DTensor.from_local(
            mine.view(self.shape),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )
        return shown

    @override
    def check_equal(self, tensors: Iterable[Tensor]) -> None:
        kept = list(tensors)
        for group in self._others:
            distributed.check_equal(kept, group)


class Sharding:
    """How ``fully_shard`` has spread the weights of a model, be it before or after we look.

    Args:
        model: The model; None for one that is not spread.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = model
        self._known: dict[tuple[nn.Module, str], Any] = {}
        self._parts: dict[tuple[nn.Module, str], tuple[nn.Parameter, Part]] = {}

    def part(self, module: nn.Module, attribute: str, parameter: nn.Parameter) -> Part:
        """The part of a Parameter that is here."""
        if not is_spread(parameter):
            return Part(tuple(parameter.shape))
        found = self._parts.get((module, attribute))
        if found is None or found[0] is not parameter:
            found = self._parts[module, attribute] = parameter, _Rows(parameter)
        return found[1]

    def parameter(self, module: nn.Module, attribute: str, found: nn.Parameter) -> nn.Parameter:
        """The Parameter that an optimizer has: the sharded one, also while it is gathered."""
        kept = None if is_spread(found) else self._kept(module, attribute)
        return found if kept is None else kept.sharded_param

    def leaf(self, module: nn.Module, attribute: str, found: nn.Parameter) -> nn.Parameter:
        """What graphs lead to: the gathered Parameter, which a forward computes with."""
        kept = self._kept(module, attribute)
        leaf: nn.Parameter = found if kept is None else getattr(kept, "_unsharded_param", found)
        return leaf

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Let backwards send no gradient: some may wait for those of batches to come."""
        groups = list(self._groups())
        before = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
        for group in groups:
            group.reduce_grads = group.all_reduce_grads = False
        try:
            yield
        finally:
            for group, (reduce, everywhere) in zip(groups, before, strict=True):
                group.reduce_grads, group.all_reduce_grads = reduce, everywhere

    def reshard(self) -> None:
        """Let go of gathered weights, before those here change."""
        for group in self._groups():
            group.reshard()

    def _kept(self, module: nn.Module, attribute: str) -> Any:
        """What ``fully_shard`` keeps of a Parameter; None if it is not spread."""
        if "_is_fsdp_managed_module" not in module.__dict__:
            return None
        if (module, attribute) not in self._known:
            self._known = {
                place: kept
                for group in self._groups()
                for kept in group.fsdp_params
                for place in _places(kept._module_info)
            }
        return self._known.get((module, attribute))

    def _groups(self) -> Iterator[Any]:
        """What ``fully_shard`` keeps of the modules that it was applied to."""
        for module in () if self._model is None else self._model.modules():
            state_of: Any = getattr(module, "_get_fsdp_state", None)
            if state_of is None:
                continue
            state = state_of()
            if hasattr(state, "_fsdp_param_groups"):
                yield from state._fsdp_param_groups
            elif state._fsdp_param_group is not None:  # before torch 2.11
                yield state._fsdp_param_group


def is_spread(parameter: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, of which every rank has a part, or a copy."""
    return hasattr(parameter, "placements")


def local(tensor: Tensor) -> Tensor:
    """What is here of a tensor, without a graph: its memory, not a copy."""
    tensor = tensor.detach()
    if not is_spread(tensor):
        return tensor
    spread: Any = tensor
    mine: Tensor = spread.to_local()
    return mine


def why_not_rows(parameter: Tensor) -> str:
    """What is wrong with a ``DTensor`` that is to have its rows spread over all ranks."""
    spread: Any = parameter
    kinds = [type(placement).__name__ for placement in spread.placements]
    sharded = [p for p in spread.placements if p.is_shard()]
    if kinds.count("Shard") != 1 or len(sharded) != 1 or set(kinds) > {"Shard", "Replicate"}:
        return f"is placed as {spread.placements}, and not in rows along one dimension of its mesh"
    if sharded[0].dim != 0:
        return f"is split along dimension {sharded[0].dim}, and not in rows"
    if spread.device_mesh.size() != distributed.world():
        return f"is spread over {spread.device_mesh.size()} of {distributed.world()} ranks"
    return ""


def _places(info: Any) -> Iterator[tuple[nn.Module, str]]:
    """The modules that have a Parameter, and its name in each."""
    yield info.module, info.param_name
    yield from zip(info.shared_modules, info.shared_param_names, strict=True)
