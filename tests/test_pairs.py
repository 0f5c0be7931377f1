"""Every pair of choices is among the cases, and there are about as few cases as there can be."""

from itertools import combinations, product

import pytest

from tests.nets import SHELF
from tests.pairs import pairs

KINDS = [
    (range(2), range(2)),
    (range(1), range(5), range(1)),
    (range(2), range(3), range(4)),
    (range(3),) * 5,
    (SHELF, range(4), range(3)),
    (SHELF, range(2), range(2)),
    (SHELF, range(3), range(2), range(2)),
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "x".join(str(len(k)) for k in kinds))
def test_every_pair_occurs_and_no_case_twice(kinds):
    cases = pairs(*kinds)
    for one, other in combinations(range(len(kinds)), 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(product(kinds[one], kinds[other]))
    assert len(set(cases)) == len(cases)
    assert cases == pairs(*kinds)


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "x".join(str(len(k)) for k in kinds))
def test_hardly_more_than_the_two_longest_kinds_ask_for(kinds):
    longest = sorted((len(kind) for kind in kinds), reverse=True)
    assert longest[0] * longest[1] <= len(pairs(*kinds)) <= 1.7 * longest[0] * longest[1]
