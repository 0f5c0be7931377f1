"""Likeness: how alike two tasks' scores of a layer are, besides where their masks overlap."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

from torch import Tensor

__all__ = ["Likeness"]

_MOST = 65_536
"""Of a larger layer as many weights are ranked, evenly spaced."""


@dataclass(frozen=True)
class Likeness:
    """How alike the scores of two tasks are in a layer, or in several.

    Attributes:
        ranks: Spearman's correlation of their saliencies, times the number of weights.
        weights: The number of weights that have one.
        product: The inner product of their gradients.
        squares: The squared norms of both.
        agreeing: Of the weights that both would keep, those that both would move the same way,
            less those that they would move in opposite ways.
        union: The weights that one of them would keep.
    """

    ranks: float
    weights: int
    product: float
    squares: tuple[float, float]
    agreeing: int
    union: int

    @classmethod
    def of(
        cls, scores: Sequence[Tensor], gradients: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> "Likeness":
        """Of one layer.

        Args:
            scores: The saliencies of two tasks, ``[n]`` each.
            gradients: Their gradients, ``[m]`` each.
            masks: What they would keep, bool ``[m]`` each.

        Example:
            >>> import torch
            >>> alike = Likeness.of(
            ...     [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0])],
            ...     [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([-2.0, 0.0, 0.0])],
            ...     [torch.tensor([True, True, False]), torch.tensor([True, False, False])],
            ... )
            >>> round(alike.rank, 6), alike.cosine, alike.agreement
            (1.0, -1.0, -0.5)
        """
        rank, size = _spearman(*scores), scores[0].numel()
        one, other = (gradient.double() for gradient in gradients)
        kept, wanted = masks
        known = 0 if isnan(rank) else size
        return cls(
            ranks=rank * size if known else 0.0,
            weights=known,
            product=float(one @ other),
            squares=(float(one @ one), float(other @ other)),
            agreeing=int((one.sign() * other.sign())[kept & wanted].sum()),
            union=int((kept | wanted).sum()),
        )

    @classmethod
    def sum(cls, layers: Sequence["Likeness"]) -> "Likeness":
        """Of several layers together."""
        return cls(
            ranks=sum(layer.ranks for layer in layers),
            weights=sum(layer.weights for layer in layers),
            product=sum(layer.product for layer in layers),
            squares=(
                sum(layer.squares[0] for layer in layers),
                sum(layer.squares[1] for layer in layers),
            ),
            agreeing=sum(layer.agreeing for layer in layers),
            union=sum(layer.union for layer in layers),
        )

    @property
    def rank(self) -> float:
        """The correlation, the mean over weights; NaN if there is none."""
        return self.ranks / self.weights if self.weights else nan

    @property
    def cosine(self) -> float:
        """The cosine of the gradients; NaN if one of them is zero."""
        norms = sqrt(self.squares[0]) * sqrt(self.squares[1])
        return self.product / norms if norms else nan

    @property
    def agreement(self) -> float:
        """The overlap of masks where tasks pull the same way, less that where they pull apart."""
        return self.agreeing / self.union if self.union else nan


def _spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of ranks, those of equals averaged; NaN where all are equal."""
    step = -(-one.numel() // _MOST)
    ranks = [_ranked(scores.reshape(-1)[::step]) for scores in (one, other)]
    centred = [rank - rank.mean() for rank in ranks]
    norms = float(centred[0].norm() * centred[1].norm())
    return float(centred[0] @ centred[1]) / norms if norms else nan


def _ranked(scores: Tensor) -> Tensor:
    _, places, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return ranks[places]
