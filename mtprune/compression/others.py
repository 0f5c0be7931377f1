"""Other inputs: what a model may be called with besides its examples.

Examples hide what they do not vary: one row, one timestep for all rows, a mask without padding. So
whatever must hold for all inputs is also looked at on inputs of the same kinds with other values,
each input apart and all together, and of other sizes where the model runs on them.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from mtprune.compression.running import named_tensors, run

__all__ = ["Others", "other_inputs"]

_DRAWS = 2
_STRENGTHS = (1.0, 0.1, 0.01)
_MOST_DIMENSIONS = 4

_Ran = list[tuple[Any, Any]]
"""Batches, each with what the model gives for it."""


@dataclass
class Others:
    """Inputs besides the examples, on which the model runs.

    Attributes:
        batches: The inputs, made as the examples are.
        outputs: What the model gives for each of them.
        unvaried: The inputs for which the model takes no other values, as far as was tried.
    """

    batches: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    unvaried: list[str] = field(default_factory=list)

    def add(self, found: Iterable[tuple[Any, Any]]) -> None:
        """Add inputs, each with its outputs."""
        for batch, outputs in found:
            self.batches.append(batch)
            self.outputs.append(outputs)


def other_inputs(model: nn.Module, batches: Sequence[Any]) -> Others:
    """Other inputs for a model.

    Args:
        model: The model, in eval mode.
        batches: Its example inputs.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> [len(x) for x in other_inputs(model, [torch.ones(3, 2)]).batches]
        [3, 3, 6]
        >>> other_inputs(nn.Embedding(1, 4), [torch.zeros(3, dtype=torch.long)]).unvaried
        ['the input']
    """
    found = Others()
    random = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a model says of inputs that nobody gave it
        for batch in batches:
            example = _Example(model, batch, random)
            for place, name in example.varied.items():
                other = example.strongest(place)
                if other:
                    found.add(other)
                elif name not in found.unvaried:
                    found.unvaried.append(name)
            found.add(example.together())
    return found


class _Example:
    """One batch of examples, and what the model makes of changed ones.

    Args:
        model: The model.
        batch: The batch.
        random: Where changes come from.

    Attributes:
        varied: The parts of the batch that other values could stand for: their places and names.
    """

    def __init__(self, model: nn.Module, batch: Any, random: torch.Generator) -> None:
        paths, self._tree = tree_flatten_with_path(batch)
        self._leaves = [leaf for _, leaf in paths]
        self._model = model
        self._random = random
        self._strengths: dict[int, float] = {}
        self._finite = _is_finite(run(model, [batch])[0])
        self.varied = {i: _name(path) for i, (path, leaf) in enumerate(paths) if _varies(leaf)}

    def strongest(self, place: int) -> _Ran:
        """The batch with one part changed as much as the model takes it; none if it takes none."""
        for strength in _STRENGTHS:
            other = self._usable(self._leaves, {place: strength})
            if other:
                self._strengths[place] = strength
                return other
        return []

    def together(self) -> _Ran:
        """Batches with all parts changed, of the size of the example and of others."""
        found: _Ran = []
        for _ in range(_DRAWS if len(self._strengths) > 1 else _DRAWS - 1):
            found += self._usable(self._leaves, self._strengths)
        for dim in range(_MOST_DIMENSIONS):
            if longer := _longer(self._leaves, dim):
                found += self._usable(longer, self._strengths)
        return found

    def _usable(self, leaves: Sequence[Any], strengths: Mapping[int, float]) -> _Ran:
        """A changed batch, if the model runs on it, and is finite if it was for the example."""
        new = list(leaves)
        for place, strength in strengths.items():
            new[place] = _other(new[place], strength, self._random)
        other = tree_unflatten(new, self._tree)
        try:
            (outputs,) = run(self._model, [other])
        except ValueError:
            return []
        return [(other, outputs)] if not self._finite or _is_finite(outputs) else []


def _is_finite(outputs: Any) -> bool:
    """Whether all outputs for a batch are."""
    return all(bool(tensor.isfinite().all()) for _, tensor in named_tensors(outputs))


def _varies(leaf: object) -> bool:
    """Whether a part of the inputs is a value that others could stand for: no string, no flag."""
    if isinstance(leaf, Tensor):
        return leaf.numel() > 0 and not leaf.is_complex()
    return isinstance(leaf, (int, float)) and not isinstance(leaf, bool)


def _other(leaf: Any, strength: float, random: torch.Generator) -> Any:
    """Other values of the same kind and size."""
    if isinstance(leaf, float):
        return leaf + strength * (1.0 + abs(leaf)) * (0.5 + float(torch.rand(1, generator=random)))
    if isinstance(leaf, int):
        return leaf + 1
    if leaf.dtype == torch.bool:
        flips = torch.rand(leaf.shape, generator=random) < 0.3 * strength
        if leaf.dim():  # some stay as they are, so that no row of a mask is empty
            flips[..., 0] = False
        return leaf ^ flips.to(leaf.device)
    if leaf.is_floating_point():
        return _shifted(leaf, strength, random)
    return _drawn(leaf, strength, random)


def _shifted(leaf: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Numbers near those of a tensor, every row at another scale; infinite ones stay."""
    finite = torch.where(leaf.isfinite(), leaf, 0.0).double()
    size = float(finite.square().mean().sqrt()) or 1.0
    rows = (leaf.shape[0],) + (1,) * (leaf.dim() - 1) if leaf.dim() else ()
    scale = 2.0 ** (2.0 * torch.rand(rows, generator=random, dtype=torch.float64) - 1.0)
    noise = torch.randn(leaf.shape, generator=random, dtype=torch.float64) * size
    mixed = finite + strength * ((scale.to(leaf.device) - 1.0) * finite + noise.to(leaf.device))
    return torch.where(leaf.isfinite(), mixed.to(leaf.dtype), leaf)


def _drawn(leaf: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Whole numbers from the range of a tensor, or from a wider one if it has one value.

    What is out of range for a model is an error that can be caught on a CPU alone.
    """
    low, high = int(leaf.min()), int(leaf.max())
    if low == high:
        steps = {1.0: 8, 0.1: 2, 0.01: 1}[strength]
        low, high = (max(0, low - steps), low + steps) if leaf.device.type == "cpu" else (0, low)
        # Zero and one are often flags: others may be out of range.
        high = max(high, 1) if strength < 0.1 else high
    drawn = torch.randint(low, high + 1, leaf.shape, generator=random)
    if torch.equal(drawn.to(leaf), leaf):
        drawn = torch.full(leaf.shape, low if int(leaf.flatten()[0]) != low else high)
    return drawn.to(leaf)


def _longer(leaves: Sequence[Any], dim: int) -> list[Any]:
    """All tensors twice as long along a dimension, where they are as long as most; [] if none."""
    lengths = [leaf.shape[dim] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > dim]
    usual = max(set(lengths), key=lengths.count, default=0)
    doubled = [
        torch.cat([leaf, leaf], dim)
        if isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == usual
        else leaf
        for leaf in leaves
    ]
    return doubled if usual else []


def _name(path: Sequence[Any]) -> str:
    """What a part of the inputs is called."""
    keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    return f"'{'.'.join(keys)}'" if keys else "the input"
