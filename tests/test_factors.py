"""Ranks: literals, closed forms, and a budget that is spent to the last component."""

import itertools
from fractions import Fraction

import pytest
import torch

from mtprune.model import factors
from mtprune.selection import select_directions

SHAPES = pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1)])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_rank(rank, *shape):
    """A matrix with that many singular values, none of them small; float64."""
    left, right = (torch.linalg.qr(random(n, rank, seed=n).double())[0] for n in shape)
    return left * torch.linspace(1, 3, rank).double() @ right.t()


@SHAPES
def test_parameters_stop_at_those_of_the_matrix(shape):
    counts = [factors.parameters(shape, rank) for rank in range(min(shape) + 1)]
    assert counts == [
        min(r * (shape[0] + shape[1]), shape[0] * shape[1]) for r in range(len(counts))
    ]
    below = factors.most(shape)
    assert below * sum(shape) < shape[0] * shape[1] <= (below + 1) * sum(shape)


def test_break_even_of_an_encoder():
    assert factors.most((384, 384)) == 191
    assert factors.most((1536, 384)) == 307


@SHAPES
def test_components_are_singular_triples(shape):
    weight = random(*shape)
    values, vectors = factors.directions(weight)
    expected = torch.linalg.svdvals(weight.double())
    assert torch.allclose(values, expected, atol=1e-7)
    assert torch.allclose(vectors.t() @ vectors, torch.eye(min(shape)).double(), atol=1e-12)
    rotated = factors.rotate(weight.double(), vectors)
    assert torch.allclose(factors.along(rotated.square()).sqrt(), expected, atol=1e-7)
    assert torch.allclose(factors.spread(rotated, vectors, shape), weight.double(), atol=1e-12)


@SHAPES
def test_the_first_components_are_the_best_approximation(shape):
    """Eckart-Young, for the basis that pruning uses and for the factors of the export."""
    weight = random(*shape).double()
    values, vectors = factors.directions(weight)
    for rank in range(min(shape) + 1):
        expected = values[rank:].norm()
        first = vectors[:, :rank]
        near = factors.spread(factors.rotate(weight, first), first, shape)
        assert torch.allclose((weight - near).norm(), expected, atol=1e-7)
        left, right = factors.factors(weight, rank)
        assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
        assert torch.allclose((weight - left @ right).norm(), expected, atol=1e-7)
        diagonal = values[:rank].diag()
        assert torch.allclose(left.t() @ left, diagonal, atol=1e-7)
        assert torch.allclose(right @ right.t(), diagonal, atol=1e-7)


def test_full_rank_factors_reproduce_the_matrix():
    weight = random(64, 48)
    left, right = factors.factors(weight, 48)
    assert left.dtype == torch.float32
    assert float((left @ right - weight).norm() / weight.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 1, 5, 24])
def test_numerical_rank_sees_through_rounding(rank, dtype):
    weight = of_rank(rank, 48, 24).to(dtype)
    assert factors.numerical_rank(weight) == rank


def test_what_is_not_finite_has_no_components():
    with pytest.raises(ValueError, match="not finite"):
        factors.directions(torch.tensor([[1.0, float("nan")]]))


def test_the_budget_goes_to_the_highest_worth():
    worths = [torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([0.8, 0.2, 0.7, 0.3])]
    kept = select_directions(worths, [(9, 4), (9, 4)], 39)
    assert [mask.tolist() for mask in kept] == [
        [True, False, False, False],
        [True, False, True, False],
    ]


def test_equals_go_to_earlier_layers_and_larger_singular_values():
    kept = select_directions([torch.zeros(4), torch.zeros(4)], [(9, 4), (9, 4)], 26)
    assert [mask.tolist() for mask in kept] == [[True, True, False, False], [False] * 4]


def test_above_break_even_the_matrix_is_whole():
    worth = torch.tensor([0.9, 0.8, 0.7, 0.1])
    (kept,) = select_directions([worth], [(4, 4)], 16)
    assert kept.all()
    (kept,) = select_directions([worth], [(4, 4)], 15)
    assert kept.tolist() == [True, False, False, False]


def test_a_component_that_does_not_fit_leaves_room_for_a_cheaper_one():
    worths = [torch.tensor([0.9, 0.8, 0.7, 0.0]), torch.tensor([0.2, 0.1])]
    kept = select_directions(worths, [(20, 4), (5, 2)], 55)
    assert [int(mask.sum()) for mask in kept] == [2, 1]


def test_least_is_sure_if_the_budget_allows():
    worths = [torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0.1, 0.2, 0.3, 0.0])]
    shapes = [(9, 4), (9, 4)]
    kept = select_directions(worths, shapes, 26, least=[1, 1])
    assert [mask.nonzero().flatten().tolist() for mask in kept] == [[0], [2]]
    kept = select_directions(worths, shapes, 25, least=[1, 1])
    assert [mask.nonzero().flatten().tolist() for mask in kept] == [[0], []]


def test_a_budget_of_what_parameters_cost():
    worths = [torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([0.8, 0.2, 0.7, 0.3])]
    kept = select_directions(worths, [(9, 4), (9, 2, 2)], 39, rates=[1, 2])
    assert [mask.nonzero().flatten().tolist() for mask in kept] == [[0], [0]]
    kept = select_directions(worths, [(9, 4), (9, 2, 2)], 39, rates=[Fraction(1, 2), 3])
    assert [mask.tolist() for mask in kept] == [[True] * 4, [False] * 4]  # 18, and not 39 more
    least = [0, 1]
    kept = select_directions(worths, [(9, 4), (9, 2, 2)], 39, rates=[1, 3], least=least)
    assert [mask.nonzero().flatten().tolist() for mask in kept] == [[], [0]]


@pytest.mark.parametrize("shape", [(6, 4, 3), (30, 2, 3, 3), (4, 2, 2, 1, 2), (8, 8, 1, 1)])
def test_of_a_convolution_what_an_output_reads_is_a_row(shape):
    weight = random(*shape)
    flat = weight.flatten(1)
    assert factors.matrix(shape) == tuple(flat.shape)
    assert (factors.full(shape), factors.price(shape)) == (min(flat.shape), sum(flat.shape))
    assert factors.most(shape) == factors.most(tuple(flat.shape))
    for rank in range(factors.full(shape) + 1):
        assert factors.parameters(shape, rank) == factors.parameters(tuple(flat.shape), rank)
    for one, other in zip(factors.directions(weight), factors.directions(flat), strict=True):
        assert torch.equal(one, other)
    _, vectors = factors.directions(weight)
    rotated = factors.rotate(weight.double(), vectors)
    assert torch.equal(rotated, factors.rotate(flat.double(), vectors))
    assert torch.equal(factors.along(rotated.view(shape)), factors.along(rotated))
    assert torch.allclose(factors.spread(rotated, vectors, shape), weight.double(), atol=1e-12)
    left, right = factors.factors(weight.double(), 2)
    low = (left @ right).view(shape)
    assert factors.numerical_rank(low) == 2
    strided = low.transpose(0, 1).contiguous().transpose(0, 1)  # as channels_last has it
    assert factors.numerical_rank(strided) == 2
    assert torch.allclose(factors.directions(strided)[0], factors.directions(low)[0], atol=1e-6)


def test_what_is_gone_is_not_kept():
    kept = select_directions([torch.tensor([0.1, 0.2, 0.9, 0.9])], [(9, 4)], 1_000, alive=[2])
    assert kept[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_met_to_less_than_a_component(seed):
    shapes = [(12, 8), (8, 12), (10, 10), (1, 10), (30, 3)]
    generator = torch.Generator().manual_seed(seed)
    worths = [torch.rand(min(s), generator=generator) for s in shapes]
    total = sum(a * b for a, b in shapes)
    before = None
    for budget in range(0, total + 1, 7):
        kept = select_directions(worths, shapes, budget)
        counts = [int(mask.sum()) for mask in kept]
        spent = sum(factors.parameters(s, n) for s, n in zip(shapes, counts, strict=True))
        assert spent <= budget
        prices = [
            factors.parameters(s, n + 1) - factors.parameters(s, n)
            for s, n in zip(shapes, counts, strict=True)
            if n < min(s)
        ]
        assert all(budget - spent < price for price in prices)
        before = kept
    assert all(bool(mask.all()) for mask in before)


def test_selection_is_that_of_brute_force_where_costs_are_equal():
    shapes = [(9, 3), (9, 3)]
    worths = [torch.tensor([0.9, 0.3, 0.2]), torch.tensor([0.8, 0.5, 0.4])]
    for count in range(4):
        kept = torch.cat(select_directions(worths, shapes, count * 12))
        flat = torch.cat(worths)
        best = max(itertools.combinations(range(6), count), key=lambda c: flat[list(c)].sum())
        assert kept.nonzero().flatten().tolist() == sorted(best)
