"""Groups of units: pooled from their places, spread back over them."""

import pytest
import torch

from mtprune.structure import NOBODY, Group, Member, pool, spread


def test_pool_adds_what_belongs_to_a_unit() -> None:
    """Rows of one tensor, columns of another, a bias; what nobody owns counts nothing."""
    group = Group(
        "g",
        2,
        (
            Member("up", 0, (0, 0, 1)),
            Member("bias", 0, (0, 0, 1)),
            Member("down", 1, (1, NOBODY, 0), "in"),
        ),
    )
    up = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    down = torch.tensor([[10.0, 99.0, 20.0]])
    bias = torch.tensor([100.0, 200.0, 300.0])
    assert pool(group, {"up": up, "down": down, "bias": bias}).tolist() == [330.0, 321.0]
    assert pool(group, {"up": up}).tolist() == [10.0, 11.0]


def test_spread_keeps_what_all_its_units_keep() -> None:
    """Two groups meet in one tensor."""
    rows = Group("rows", 2, (Member("w", 0, (0, 1)),))
    columns = Group("columns", 2, (Member("w", 1, (0, 1, NOBODY), "in"),))
    found = spread(
        [rows, columns],
        [torch.tensor([True, False]), torch.tensor([False, True])],
        {"w": (2, 3)},
    )
    assert found["w"].tolist() == [[False, True, True], [False, False, False]]


def test_pool_needs_a_tensor() -> None:
    """Nothing to add up is a mistake."""
    with pytest.raises(ValueError, match="None of the tensors of group 'g'"):
        pool(Group("g", 1, (Member("w", 0, (0,)),)), {})


def test_units_must_exist() -> None:
    """A unit that is not in the group is named."""
    with pytest.raises(ValueError, match="Group 'g' has 2 units, and 'w' names unit 2"):
        Group("g", 2, (Member("w", 0, (0, 2)),))
