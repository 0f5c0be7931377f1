"""Together: encoder layers that run as one block of native code instead of layer by layer.

Such a layer keeps its parts under their names, and its class tells it from others: whenever the
native code cannot run, it is called part by part, as it was.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from typing_extensions import override

from mtprune.compression.anatomy import Anatomy, Family, family_of
from mtprune.compression.forms import Form, building, products
from mtprune.compression.forms.base import linear_of
from mtprune.compression.forms.block import Block
from mtprune.compression.forms.packed import Matrix, dense_matrix, norm_of, sparse_matrix
from mtprune.compression.forms.sparse import Sparse

__all__ = ["Together", "can_join", "join", "separate", "unpack"]

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
"""Where torch keeps hooks of all modules, in all its versions."""

SPARSE_BELOW = 0.35
"""The share of weights that are not zero below which a block multiplies them as a sparse matrix."""


class Together(nn.Module):
    """An encoder layer that runs as one block. Made by `join`, of the layer's class and this one.

    The block is packed at the first call and again when a weight has changed, unless it was
    changed in place behind autograd's back, through ``.data``. With a mask of queries, gradients,
    hooks on a part, another type or device, in training, while it is traced or compiled, or without
    native code, its parts are called one by one.
    """

    apart: type[nn.Module]
    """The class of the layer before."""

    family: Family

    _packed: "_Packed | None" = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the layer's class."""
        y = None
        if not (torch.compiler.is_compiling() or self.training):
            y = self._run(args, kwargs)
        return self.apart.forward(self, *args, **kwargs) if y is None else y

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What the layer returns, made by the block; None if it cannot run."""
        tensors = [t for t in (*args, *kwargs.values()) if t is not None and t is not False]
        if not all(isinstance(t, Tensor) and _is_native(t) for t in tensors) or not _is_free():
            return None
        call = self.family.call(self, args, kwargs)
        if call is None or call.x.dtype != torch.float32:
            return None
        packed = self._packed
        if packed is None or not packed.is_current(self):
            packed = self._packed = _Packed(self)
        if packed.block is None or (packed.trains and torch.is_grad_enabled()):
            return None
        return self.family.result(self, packed.block(*call))

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_packed"}

    @override
    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Its class is made at run time, and so again where it is unpickled.
        return _empty, (self.apart,), self.__getstate__()


_classes: dict[type[nn.Module], type[Together]] = {}


def _class_of(cls: type[nn.Module], family: Family) -> type[Together]:
    """The class of joined layers of a class."""
    if cls not in _classes:
        name = f"Together{cls.__name__}"
        members = {"apart": cls, "family": family, "__doc__": cls.__doc__}
        _classes[cls] = type(name, (Together, cls), members)
    return _classes[cls]


def _empty(cls: type[nn.Module]) -> Together:
    """A joined layer without anything in it, for what unpickles it."""
    family = family_of(cls)
    if family is None:
        raise ValueError(f"A {cls.__name__} cannot run as one block here.")
    joined: type[Together] = _class_of(cls, family)
    return joined.__new__(joined)


def can_join(layer: nn.Module) -> bool:
    """Whether a layer can run as one block, if the machine has native code.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16)
        >>> can_join(layer), can_join(nn.TransformerEncoderLayer(8, 2, 16, activation=torch.sin))
        (True, False)
    """
    family = family_of(_class(layer))
    return family is not None and _anatomy(layer, family) is not None


def _class(layer: nn.Module) -> type[nn.Module]:
    return layer.apart if isinstance(layer, Together) else type(layer)


def _anatomy(layer: nn.Module, family: Family) -> Anatomy | None:
    """The parts of a layer, if native code knows all of them."""
    found = family.anatomy(layer)
    if found is None or not found.is_known:
        return None
    # Those on the meta device are filled later.
    plain = all(p.dtype == torch.float32 and (p.is_cpu or p.is_meta) for p in layer.parameters())
    return found if plain and all(type(p.data) is Tensor for p in layer.parameters()) else None


def join(layer: nn.Module) -> None:
    """Let a layer run as one block, in place: the object gets another class.

    Raises:
        ValueError: If it cannot.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        >>> x = torch.randn(2, 3, 8)
        >>> before = layer(x)
        >>> join(layer)
        >>> with torch.no_grad():
        ...     torch.allclose(layer(x), before, atol=1e-5)
        True
    """
    cls, family = _class(layer), family_of(_class(layer))
    if family is None or not can_join(layer):
        raise ValueError(f"A {cls.__name__} of this kind cannot run as one block.")
    layer.__class__ = _class_of(cls, family)


def separate(layer: nn.Module) -> None:
    """Undo `join`, until the layer is joined again: its packed weights are kept."""
    layer.__class__ = _class(layer)


def unpack(layer: nn.Module) -> None:
    """Drop the packed weights of a separated layer: pointers must not go with copies of it."""
    layer.__dict__.pop("_packed", None)


class _Packed:
    """The block of a layer, and what it was made of.

    Attributes:
        block: None if the layer cannot run as one as it is now.
        trains: Whether a part of the layer requires gradients.
    """

    def __init__(self, layer: Together) -> None:
        modules = list(layer.modules())
        self._children = [(m._modules, dict(m._modules)) for m in modules]
        self._hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in modules[1:]]
        self._tensors = [
            (holder, name, tensor, tensor.data_ptr(), _version(tensor))
            for m in modules
            for holder in (m._parameters, m._buffers)
            for name, tensor in holder.items()
            if tensor is not None
        ]
        self._settings = layer.family.settings(layer)
        self._hooked = self._count_hooks()
        self.trains = any(parameter.requires_grad for parameter in layer.parameters())
        forms = sum(isinstance(m, Form) for m in modules)
        here = all(parameter.is_cpu for parameter in layer.parameters())
        anatomy = _anatomy(layer, layer.family) if here else None
        # Each form has a hook of its own.
        self.block = _block_of(anatomy) if anatomy and self._hooked == forms else None

    def is_current(self, layer: Together) -> bool:
        """Whether the layer still is what the block was made of."""
        return (
            all(
                holder.get(name) is tensor
                and tensor.data_ptr() == address
                and _version(tensor) == version
                for holder, name, tensor, address, version in self._tensors
            )
            and all(now == before for now, before in self._children)
            and self._count_hooks() == self._hooked
            and layer.family.settings(layer) == self._settings
        )

    def _count_hooks(self) -> int:
        return sum(len(after) + len(before) for after, before in self._hooks)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; those made for inference do not say."""
    return 0 if tensor.is_inference() else tensor._version


def _is_native(x: Tensor) -> bool:
    """Whether native code can read a tensor now."""
    return x.is_cpu and products.is_eager(x) and products.is_plain(x)


def _is_free() -> bool:
    """Whether native code may run now, and nobody looks on."""
    return not (
        torch.is_autocast_enabled("cpu")
        or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS)
        or building.unavailable()
    )


def _block_of(anatomy: Anatomy) -> Block:
    return Block(
        [_matrix(*anatomy.project), *map(_matrix, (anatomy.out, anatomy.up, anatomy.down))],
        [norm_of(norm.weight, norm.bias, norm.eps) for norm in anatomy.norms],
        anatomy.heads,
        norm_first=anatomy.norm_first,
        activation=anatomy.activation,
    )


def _matrix(*layers: Any) -> Matrix:
    """Layers with the same inputs, as the native code is best at: dense, or sparse."""
    for layer in layers:
        if isinstance(layer, Form):
            layer.check()
    weight = torch.cat([layer.weight.detach() for layer in layers])
    bias = None
    if any(layer.bias is not None for layer in layers):
        biases = (
            weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
            for layer in layers
        )
        bias = torch.cat(list(biases))
    if int(weight.count_nonzero()) >= SPARSE_BELOW * weight.numel():
        return dense_matrix(weight, bias)
    parts = Sparse.parts(linear_of(nn.Parameter(weight, requires_grad=False), None))
    assert parts is not None
    start, column, value = (parts[f"weight_{name}"] for name in ("start", "column", "values"))
    return sparse_matrix(start, column, value, bias, *weight.shape)
