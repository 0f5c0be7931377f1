r"""Factors: matrices as sums of directions.

A weight ``[out, in]`` is a sum of rank-one directions, its singular triples,

.. math:: W = U S V^T = \sum_k s_k\, u_k v_k^T .

With r of them it can be stored as two matrices of ``r (in + out)`` parameters together, which is
less than ``in * out`` below the break-even rank ``in * out / (in + out)``. Above it the matrix
stays one, and keeps all its directions.

The matrix of a convolution is its weight ``[out, in, *kernel]`` with all that an output reads in
one row, ``[out, in * prod(kernel)]``. Of rank r it is a convolution with that kernel to r channels,
and after it one with a kernel of size 1. Below, ``in`` is the number of columns of the matrix, and
weights and their shapes may be those of convolutions.
"""

from math import prod

import torch
from torch import Tensor

__all__ = [
    "along",
    "directions",
    "factors",
    "full",
    "matrix",
    "most",
    "numerical_rank",
    "parameters",
    "per_direction",
    "price",
    "rotate",
    "rounding",
    "spread",
]

Shape = tuple[int, ...]


def matrix(shape: Shape) -> tuple[int, int]:
    """The shape ``(out, in)`` of a weight's matrix.

    Example:
        >>> matrix((8, 4)), matrix((8, 4, 3, 3))
        ((8, 4), (8, 36))
    """
    return shape[0], prod(shape[1:])


def full(shape: Shape) -> int:
    """How many directions a weight of that shape has, ``min(out, in)``."""
    return min(matrix(shape))


def price(shape: Shape) -> int:
    """How many parameters each direction takes in two factors, ``out + in``."""
    return sum(matrix(shape))


def parameters(shape: Shape, rank: int) -> int:
    """How many parameters a weight of that rank needs, ``min(r (in + out), in * out)``.

    Example:
        >>> [parameters((8, 4), rank) for rank in (0, 1, 2, 3, 4)]
        [0, 12, 24, 32, 32]
        >>> parameters((8, 4, 3, 3), 2)
        88
    """
    return min(rank * price(shape), prod(shape))


def most(shape: Shape) -> int:
    """The highest rank below break-even, at which two factors are smaller than the matrix.

    Example:
        >>> most((384, 384)), most((8, 4)), most((1, 4))
        (191, 2, 0)
    """
    return (prod(shape) - 1) // price(shape)


def directions(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The singular values of a weight, and its singular vectors on the smaller side.

    From the eigenvalues of the smaller Gram matrix in float64, which takes a fraction of the time
    of a singular value decomposition. What is below 1e-8 of the largest value is noise in both.

    Args:
        weight: ``[out, in]``.

    Returns:
        The values ``[m]`` with ``m = min(out, in)``, falling, and the vectors as columns
        ``[m, m]``: of the inputs if there are no more of them than outputs, else of the outputs.
        Both float64.

    Raises:
        ValueError: If the matrix is not finite.

    Example:
        >>> values, vectors = directions(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]))
        >>> values, vectors.abs()
        (tensor([4., 3.], dtype=torch.float64), tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64))
    """
    tall = _tall(weight.detach().flatten(1).to(torch.float64))
    if not bool(tall.isfinite().all()):
        raise ValueError("The matrix is not finite.")
    values, vectors = torch.linalg.eigh(tall.t() @ tall)
    return values.flip(0).clamp(min=0.0).sqrt(), vectors.flip(1)


def rotate(weight: Tensor, vectors: Tensor) -> Tensor:
    """A matrix in the basis of `directions`: each direction is a column, or a row of a wide one.

    Args:
        weight: ``[out, in]``, a weight or its gradient, or a stack of these.
        vectors: Orthonormal columns ``[m, k]``, or a stack of them for a stack of weights.

    Returns:
        ``[out, k]``, or ``[k, in]`` if there are more inputs than outputs; or a stack of these.

    Example:
        >>> rotate(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]]))
        tensor([[1., 2.]])
    """
    flat = weight.flatten(vectors.dim() - 1)
    return flat @ vectors if _is_tall(flat.shape[-2:]) else vectors.mT @ flat


def spread(rotated: Tensor, vectors: Tensor, shape: Shape) -> Tensor:
    """The inverse of `rotate`, for a weight of that shape."""
    flat = rotated @ vectors.t() if _is_tall(shape) else vectors @ rotated
    return flat.view(shape)


def along(rotated: Tensor) -> Tensor:
    """The sum over each direction's column or row of what `rotate` has given, ``[m]``."""
    return rotated.flatten(1).sum(0 if _is_tall(rotated.shape) else 1)


def per_direction(values: Tensor, shape: Shape) -> Tensor:
    """Values ``[m]`` shaped to multiply a rotated weight of that shape."""
    return values if _is_tall(shape) else values.unsqueeze(1)


def rounding(dtype: torch.dtype) -> float:
    r"""How much of the Frobenius norm of a matrix of that type may be rounding.

    The :math:`\epsilon` of the type it is stored in, and eight times that of the type it was
    computed in: float64 for float64, else float32.
    """
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps + 8 * torch.finfo(computed).eps


def numerical_rank(weight: Tensor) -> int:
    """The lowest rank of a weight that differs from this one by no more than `rounding`.

    From the singular values left out, of a decomposition in float64: the norm of these is the
    difference in Frobenius norm.

    Args:
        weight: ``[out, in]``.

    Example:
        >>> numerical_rank(torch.ones(3, 4)), numerical_rank(torch.zeros(3, 4))
        (1, 0)
    """
    values = torch.linalg.svdvals(weight.detach().flatten(1).to(torch.float64))
    left_out = values.square().flip(0).cumsum(0).flip(0).sqrt()
    return int((left_out > rounding(weight.dtype) * values.norm()).sum())


def factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    r"""The best approximation of a matrix by a product of two, :math:`W \approx P Q`.

    Eckart & Young, "The approximation of one matrix by another of lower rank", 1936: the error in
    Frobenius norm is that of the singular values left out. Both factors are of one size,
    :math:`P = U \sqrt S` and :math:`Q = \sqrt S V^T`. Computed in float64.

    Args:
        weight: ``[out, in]``.
        rank: From 0 to ``min(out, in)``.

    Returns:
        ``[out, rank]`` and ``[rank, in]``, of the weight's type.

    Example:
        >>> left, right = factors(torch.tensor([[4.0, 4.0], [4.0, 4.0], [4.0, 4.0]]), 1)
        >>> left.shape, right.shape, torch.allclose(left @ right, torch.tensor(4.0))
        (torch.Size([3, 1]), torch.Size([1, 2]), True)
    """
    flat = weight.detach().flatten(1).to(torch.float64)
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    root = values[:rank].sqrt()
    return (
        (left[:, :rank] * root).to(weight.dtype).contiguous(),
        (root.unsqueeze(1) * right[:rank]).to(weight.dtype).contiguous(),
    )


def _is_tall(shape: Shape) -> bool:
    rows, columns = matrix(shape)
    return rows >= columns


def _tall(matrix: Tensor) -> Tensor:
    return matrix if _is_tall(matrix.shape) else matrix.t()
