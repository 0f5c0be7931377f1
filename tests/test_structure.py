"""Groups of units are plain data, and checked."""

import pytest

from mtprune.structure import NOBODY, Group, Member


def test_units_must_exist() -> None:
    """A unit that is not in the group is named."""
    with pytest.raises(ValueError, match="Group 'g' has 2 units, and 'w' names unit 2"):
        Group("g", 2, (Member("w", 0, (0, 2)),))
    with pytest.raises(ValueError, match="Group 'g' has 2 units, and 'w' names unit -2"):
        Group("g", 2, (Member("w", 0, (0, NOBODY - 1)),))


def test_groups_are_values() -> None:
    """Equal if they name equal entries."""
    one, other = (Group("g", 2, (Member("w", 0, (0, NOBODY, 1)),)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one.members[0].index().tolist() == [0, -1, 1]
