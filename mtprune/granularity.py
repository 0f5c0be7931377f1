"""Granularity: the units that are kept or pruned as a whole.

A granularity is a frozen value of one of two kinds. A `Spanning` one finds units that may span
several layers: a neuron, a head, a channel. `Pieces` cut every layer on its own: into single
weights, blocks, patterns. Several spanning ones, in a tuple, share one budget.
"""

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtprune import checks
from mtprune.model.layers import Layer
from mtprune.model.layout import PLAIN
from mtprune.structure import Group

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Element",
    "Expert",
    "Granularity",
    "Grouped",
    "Head",
    "Neuron",
    "Pieces",
    "Spanning",
]


class Spanning(Protocol):
    """A granularity whose units may span several layers."""

    def groups(self, model: nn.Module, layers: Sequence[Layer]) -> Sequence[Group]:
        """The units of a model.

        Args:
            model: The model, unwrapped.
            layers: Its layers that may be pruned.
        """
        ...


class Pieces(Protocol):
    """A granularity that cuts every layer on its own.

    A stack of experts' matrices is cut matrix by matrix, and each of them, as that of transformers'
    Conv1D, is shown as ``[outputs, inputs]``, however it lies in memory.
    """

    def left_out(self, layer: Layer) -> str:
        """Why a layer cannot be cut; empty if it can."""
        ...

    def pool(self, saliency: Tensor) -> Tensor:
        """The saliency of a layer's units, flat, from that of its weights, any shape."""
        ...

    def spread(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The mask of a layer's weights from that of its units, flat."""
        ...


Granularity = Spanning | Pieces | tuple[Spanning, ...]
"""Units that span layers, pieces that lie inside one, or several of the former."""


@dataclass(frozen=True)
class Element:
    """Every weight on its own."""

    def left_out(self, layer: Layer) -> str:
        """See `Pieces`."""
        return ""

    def pool(self, saliency: Tensor) -> Tensor:
        """See `Pieces`."""
        return saliency.reshape(-1)

    def spread(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """See `Pieces`."""
        return mask.view(shape)


@dataclass(frozen=True)
class Block:
    """Blocks of a weight seen as the matrix ``[first dimension, all others]``.

    That is ``[outputs, inputs]`` for a Linear and ``[outputs, inputs * kernel]`` for a convolution.
    Stacks have such a matrix for each expert, with blocks of its own. Blocks at the right and lower
    edge may be smaller.

    Attributes:
        rows: Rows of a block.
        columns: Columns of a block.

    Example:
        >>> block = Block(2, 2)
        >>> block.pool(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
        tensor([12.,  9.])
        >>> block.spread(torch.tensor([True, False]), (2, 3))
        tensor([[ True,  True, False],
                [ True,  True, False]])
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        """Validate."""
        checks.whole("rows", self.rows, least=1)
        checks.whole("columns", self.columns, least=1)

    def left_out(self, layer: Layer) -> str:
        """See `Pieces`."""
        return ""

    def pool(self, saliency: Tensor) -> Tensor:
        """See `Pieces`."""
        height, width = _matrix(tuple(saliency.shape))
        down, across = -(-height // self.rows), -(-width // self.columns)
        edge = (0, across * self.columns - width, 0, down * self.rows - height)
        padded = F.pad(saliency.reshape(height, width), edge)
        return padded.view(down, self.rows, across, self.columns).sum((1, 3)).reshape(-1)

    def spread(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """See `Pieces`."""
        height, width = _matrix(shape)
        blocks = mask.view(-(-height // self.rows), -(-width // self.columns))
        padded = blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return padded[:height, :width].reshape(shape)


@dataclass(frozen=True)
class NM:
    """Of every m consecutive inputs of an output, n are kept: GPUs run 2 of 4 faster.

    The vote decides which n. Inputs are those of Linear layers, of transformers' Conv1D and of each
    expert in a stack, and input channels of convolutions, at each place of the kernel. Layers whose
    inputs are not a multiple of m, depthwise ones among them, and layers of other kinds stay dense.

    Attributes:
        n: How many of m inputs are kept.
        m: How many consecutive inputs compete.

    Example:
        >>> NM(2, 4).best(torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0]]), 2)
        tensor([[False,  True,  True, False,  True,  True, False, False]])
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        """Validate."""
        checks.whole("n", self.n, least=1)
        checks.whole("m", self.m, least=2)
        if self.m > 255:
            raise ValueError(f"`m` must be at most 255. Got {self.m}.")
        if self.n >= self.m:
            raise ValueError(f"`n` must be less than `m`. Got {self.n} of {self.m}.")

    @property
    def sparsity(self) -> float:
        """The share of zeros, which the pattern fixes."""
        return (self.m - self.n) / self.m

    def left_out(self, layer: Layer) -> str:
        """See `Pieces`."""
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
        layout = layer.layout
        for module, _ in layer.places:
            if layout == PLAIN and not isinstance(module, kinds):
                return f"{self.n} of {self.m} inputs is not for {type(module).__name__}"
        inputs = layer.shape[layout.inputs]
        if inputs % self.m:
            return f"its {inputs} inputs are not a multiple of {self.m}"
        return ""

    def pool(self, saliency: Tensor) -> Tensor:
        """See `Pieces`."""
        return saliency.reshape(-1)

    def spread(self, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
        """See `Pieces`."""
        return mask.view(shape)

    def best(self, worth: Tensor, keep: int) -> Tensor:
        """The ``keep`` highest of every m consecutive inputs, earlier ones first among equals.

        Args:
            worth: The worth of a layer's weights, in its shape.
            keep: How many of every m inputs are kept.
        """
        places = worth.movedim(1, -1)
        columns = torch.stack(places.reshape(-1, self.m).unbind(1))
        # How many come before each input: comparing m columns is faster than sorting short rows.
        before = torch.zeros_like(columns, dtype=torch.uint8)
        for one in range(self.m):
            for other in range(one):
                behind = columns[one] > columns[other]
                before[other] += behind
                before[one] += ~behind
        best = torch.stack((before < keep).unbind(), 1)
        return best.reshape(places.shape).movedim(-1, 1).contiguous()


@dataclass(frozen=True, eq=False, repr=False)
class Grouped:
    """The units you name: your own groups.

    Attributes:
        given: One group, or several.

    Example:
        >>> from mtprune.structure import Member
        >>> hidden = Group("hidden", 3, (Member("0.weight", 0, (0, 1, 2)),
        ...                              Member("2.weight", 1, (0, 1, 2), "in")))
        >>> Grouped([hidden])
        Grouped(names=('hidden',))
    """

    given: Group | Collection[Group]

    def __post_init__(self) -> None:
        """Validate."""
        groups = self._groups if isinstance(self.given, (Group, Collection)) else (self.given,)
        if not groups or not all(isinstance(group, Group) for group in groups):
            must = "must be groups (mtprune.structure.Group)"
            raise TypeError(checks.message("given", groups, must))

    @property
    def names(self) -> tuple[str, ...]:
        """The groups' names."""
        return tuple(group.name for group in self._groups)

    @property
    def _groups(self) -> tuple[Group, ...]:
        return (self.given,) if isinstance(self.given, Group) else tuple(self.given)

    def groups(self, model: nn.Module, layers: Sequence[Layer]) -> Sequence[Group]:
        """See `Spanning`."""
        return self._groups

    def gates(self, model: nn.Module) -> Sequence[str]:
        """The names of tensors that decide which units are used; they are pruned with them."""
        return [group.gate.tensor for group in self._groups if group.gate is not None]

    def __eq__(self, other: object) -> bool:
        """Whether the groups are the same, in the same order."""
        return isinstance(other, Grouped) and self._groups == other._groups

    def __hash__(self) -> int:
        """The same for equal groups."""
        return hash(self._groups)

    def __repr__(self) -> str:
        """The groups by name."""
        return f"Grouped(names={self.names!r})"


@dataclass(frozen=True)
class Neuron:
    """Neurons between the two layers of a transformer's feed-forward blocks.

    Attributes:
        patterns: Where to look (`mtprune.patterns`); all known places unless given.
        example_inputs: What the model is called with when units are removed on trial: a tensor, a
            tuple of arguments, or a dict of keyword arguments. Models of transformers are tried
            without, as long as they are not large.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(16, 4, 32)
        >>> [(group.name, group.size) for group in Neuron().groups(encoder, [])]
        [('neurons', 32)]
    """

    patterns: Any = None
    example_inputs: Any = field(default=None, repr=False, compare=False)

    def groups(self, model: nn.Module, layers: Sequence[Layer]) -> Sequence[Group]:
        """See `Spanning`."""
        from mtprune.patterns import PATTERNS, neurons  # most runs do without

        known = PATTERNS if self.patterns is None else self.patterns
        return neurons(model, known, self.example_inputs)


@dataclass(frozen=True)
class Head:
    """Heads of a transformer's attention blocks.

    Attributes:
        patterns: Where to look (`mtprune.patterns`); all known places unless given.
        example_inputs: What the model is called with when units are removed on trial: a tensor, a
            tuple of arguments, or a dict of keyword arguments. Models of transformers are tried
            without, as long as they are not large.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(16, 4, 32)
        >>> [(group.name, group.size) for group in Head().groups(encoder, [])]
        [('self_attn.heads', 4)]
    """

    patterns: Any = None
    example_inputs: Any = field(default=None, repr=False, compare=False)

    def groups(self, model: nn.Module, layers: Sequence[Layer]) -> Sequence[Group]:
        """See `Spanning`."""
        from mtprune.patterns import PATTERNS, heads  # most runs do without

        known = PATTERNS if self.patterns is None else self.patterns
        return heads(model, known, self.example_inputs)


@dataclass(frozen=True)
class Expert:
    """Experts of a mixture, each with its row of the router.

    As many stay in each block as a token is sent to. Closed experts get no token, while the model
    is pruned and after it: they are as good as gone.

    Attributes:
        patterns: Where to look (`mtprune.patterns`); all known places unless given.
        example_inputs: What the model is called with when units are removed on trial: a tensor, a
            tuple of arguments, or a dict of keyword arguments. Models of transformers are tried
            without, as long as they are not large.
    """

    patterns: Any = None
    example_inputs: Any = field(default=None, repr=False, compare=False)

    def groups(self, model: nn.Module, layers: Sequence[Layer]) -> Sequence[Group]:
        """See `Spanning`."""
        from mtprune.patterns import experts  # most runs do without

        return experts(model, self._known, self.example_inputs)

    def gates(self, model: nn.Module) -> Sequence[str]:
        """The names of the routers' weights, which are pruned with the experts."""
        from mtprune.patterns import candidates

        groups, _ = candidates(model, [p for p in self._known if hasattr(p, "gate")])
        return [group.gate.tensor for group in groups if group.gate is not None]

    @property
    def _known(self) -> Any:
        from mtprune.patterns import PATTERNS

        return PATTERNS if self.patterns is None else self.patterns


@dataclass(frozen=True)
class Channel:
    """Channels of convolutional networks, with all entries that must go with a channel.

    torch-pruning (extra ``[structured]``) finds these dependencies by running the model, and each
    group of channels is tried on a copy. Groups that do not pass stay whole, and a warning names
    them. Of images a corner of 64 pixels is looked at, if the model runs on it.

    Attributes:
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments.

    Example:
        >>> Channel(torch.zeros(1, 3, 8, 8))
        Channel()
    """

    example_inputs: Any = field(repr=False, compare=False)

    def groups(self, model: nn.Module, layers: Sequence[Layer]) -> Sequence[Group]:
        """See `Spanning`."""
        from mtprune.integrations.torch_pruning import found  # needs an extra

        groups, refused = found(model, self.example_inputs)
        if refused:
            names = "; ".join(f"'{name}': {why}" for name, why in refused.items())
            if not groups:
                raise ValueError(
                    f"{type(model).__name__} has channels that cannot be removed: {names}. Prune "
                    "its weights one by one, or in blocks."
                )
            warnings.warn(f"Left out: {names}.", stacklevel=2)
        return groups


def check_granularity(granularity: object) -> None:
    """Refuse an object that is no granularity.

    Raises:
        TypeError: With what to give instead.
    """
    several = granularity if isinstance(granularity, tuple) else (granularity,)
    for one in several:
        spans = checks.has_methods(one, "groups")
        if not spans and not checks.has_methods(one, "left_out", "pool", "spread"):
            must = (
                "must be a granularity such as Element() or Block(4, 4), or a tuple of some that "
                "span layers"
            )
            raise TypeError(checks.message("granularity", granularity, must))
        if isinstance(granularity, tuple) and not spans:
            raise TypeError(
                f"In a tuple, `granularity` must span layers, such as Head(). Got {one!r}."
            )
    if not several:
        raise TypeError("`granularity` is empty.")


def gates_of(granularity: Granularity, model: nn.Module) -> list[str]:
    """The names of tensors that decide which units are used, and are pruned with them."""
    several = granularity if isinstance(granularity, tuple) else (granularity,)
    having = [one for one in several if checks.has_methods(one, "gates")]
    return [name for one in having for name in one.gates(model)]  # type: ignore[union-attr]


def example_inputs_of(granularity: Granularity) -> Any:
    """The inputs that a granularity calls the model with; None if it does not call it."""
    several = granularity if isinstance(granularity, tuple) else (granularity,)
    inputs = (getattr(one, "example_inputs", None) for one in several)
    return next((example for example in inputs if example is not None), None)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a weight seen as a matrix."""
    return shape[0], prod(shape[1:])
