"""Packing: units by worth until the budget, against literals and against choosing one by one."""

from fractions import Fraction

import pytest
import torch

from mtprune import votes
from mtprune.allocation import Erk, Floor, Global, parse_allocation
from mtprune.granularity import Block, Grouped
from mtprune.model.covering import cover
from mtprune.model.layers import find_layers
from mtprune.model.units import Units
from mtprune.selection import Quota, fitting_units, rank, select, select_units, worths
from mtprune.structure import Group, Member


def rows(*sizes: tuple[int, int]) -> Units:
    """Groups of so many units of so many weights each: rows of layers of their own."""
    model = torch.nn.ModuleList([torch.nn.Linear(cost, n) for n, cost in sizes])
    groups = [
        Group(f"g{i}", n, (Member(f"{i}.weight", 0, tuple(range(n))),))
        for i, (n, _) in enumerate(sizes)
    ]
    units = cover(Grouped(groups), model, find_layers(model)).units
    assert units is not None
    return units


def chosen(worth, units, budget, allocation="global", eligible=None, **options):
    eligible = units.everything() if eligible is None else eligible
    masks = select_units(
        [torch.tensor(w, dtype=torch.float64) for w in worth],
        units,
        budget,
        parse_allocation(allocation).units,
        eligible=eligible,
        **options,
    )
    return [mask.nonzero().flatten().tolist() for mask in masks]


def test_by_worth_as_long_as_they_fit():
    """0.9 and 0.8 cost 5; 0.7 would make it 8, so it is passed over for the cheap 0.6."""
    units = rows((2, 4), (2, 1), (1, 3))
    worth = [[0.9, 0.1], [0.8, 0.6], [0.7]]
    assert chosen(worth, units, 7, min_keep=0) == [[0], [0, 1], []]
    assert chosen(worth, units, 8, min_keep=0) == [[0], [0], [0]]
    assert chosen(worth, units, 4, min_keep=0) == [[0], [], []]
    assert chosen(worth, units, 3, min_keep=0) == [[], [0, 1], []]


def crossing(layers=4, size=12, *, uneven=False):
    """Channels that are rows of one layer and columns of the next."""
    model = torch.nn.Sequential(*(torch.nn.Linear(size, size) for _ in range(layers)))
    units_of = tuple(range(size))
    if uneven:  # three channels to the first unit, two to the second
        units_of = (0, 0, 0, 1, 1, *range(2, size - 3))
    count = max(units_of) + 1
    groups = [
        Group(
            f"g{i}",
            count,
            (Member(f"{i}.weight", 0, units_of), Member(f"{i + 1}.weight", 1, units_of, "in")),
        )
        for i in range(layers - 1)
    ]
    units = cover(Grouped(groups), model, find_layers(model)).units
    assert units is not None
    return units


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["rows", "crossing", "uneven"])
def test_no_unit_is_left_that_would_fit(kind, seed):
    """As trying one after the other does it."""
    torch.manual_seed(seed)
    if kind == "rows":
        units = rows((7, 5), (9, 2), (4, 11), (1, 1))
    else:
        units = crossing(uneven=kind == "uneven")
    worth = [torch.rand(len(cost), dtype=torch.float64) for cost in units.costs]
    order = sorted(
        ((-float(w), g, i) for g, own in enumerate(worth) for i, w in enumerate(own)),
    )
    total = units.weigh(units.everything())
    for density in (0.1, 0.33, 0.6, 0.9):
        budget = round(density * total)
        expected = [torch.zeros(len(w), dtype=torch.bool) for w in worth]
        for _, group, unit in order:
            expected[group][unit] = True
            expected[group][unit] = units.weigh(expected) <= budget
        found = select_units(
            worth, units, budget, Global().units, eligible=units.everything(), min_keep=0
        )
        assert [m.tolist() for m in found] == [m.tolist() for m in expected]
        least = torch.cat(units.added(found))
        for place, (group, unit) in enumerate(
            (g, i) for g, own in enumerate(found) for i in range(len(own))
        ):
            if not found[group][unit]:
                more = [mask.clone() for mask in found]
                more[group][unit] = True
                assert units.weigh(more) - units.weigh(found) >= float(least[place])


def test_ties_go_by_position():
    units = rows((3, 2), (2, 2))
    assert chosen([[0.5] * 3, [0.5] * 2], units, 6, min_keep=0) == [[0, 1, 2], []]


def test_every_group_is_sure_of_its_best():
    units = rows((3, 2), (2, 2))
    assert chosen([[0.9, 0.8, 0.7], [0.1, 0.2]], units, 4) == [[0], [1]]
    assert chosen([[0.9, 0.8, 0.7], [0.1, 0.2]], units, 2) == [[0], []]


def test_what_is_not_eligible_is_not_kept():
    units = rows((3, 2))
    eligible = [torch.tensor([False, True, True])]
    assert chosen([[0.9, 0.2, 0.3]], units, 2, eligible=eligible) == [[2]]
    assert chosen([[0.9, 0.2, 0.3]], units, 6, eligible=eligible) == [[1, 2]]


def test_uniform_keeps_the_same_share_of_each_group():
    units = rows((4, 2), (8, 3))
    worth = [[0.9] * 4, [0.1 * i for i in range(8)]]
    assert chosen(worth, units, 16, "uniform") == [[0, 1], [4, 5, 6, 7]]
    assert chosen(worth, units, 8, "uniform") == [[0], [6, 7]]


def test_erk_keeps_more_of_small_groups():
    """Raw densities are (4 + 2) / 8 and (8 + 8) / 64, that is 3 to 1."""
    units = rows((4, 2), (8, 8))
    worth = [[0.0] * 4, [0.1 * i for i in range(8)]]
    assert chosen(worth, units, 6 + 16, "erk") == [[0, 1, 2], [6, 7]]
    assert chosen(worth, units, 4 + 32, Erk(0.0)) == chosen(worth, units, 4 + 32, "uniform")


def test_the_raw_density_of_a_group_is_that_of_its_layers():
    """Two groups in one layer, few units and many, keep the same share of theirs."""
    model = torch.nn.ModuleList([torch.nn.Linear(24, 24)])
    four = Group("four", 4, (Member("0.weight", 0, tuple(i // 3 for i in range(12)) + (-1,) * 12),))
    many = Group("many", 12, (Member("0.weight", 0, (-1,) * 12 + tuple(range(12))),))
    units = cover(Grouped([four, many]), model, find_layers(model)).units
    assert units is not None
    assert chosen([[0.1] * 4, [0.9] * 12], units, 12 * 24, "erk") == [[0, 1], [0, 1, 2, 3, 4, 5]]


def test_a_floor_is_a_fraction_of_the_layerwise_share_and_the_rest_goes_by_worth():
    units = rows((8, 1), (8, 1))
    worth = [[0.9 - 0.01 * i for i in range(8)], [0.1 * i for i in range(8)]]
    low = [[0.01 * i for i in range(8)], worth[0]]
    assert chosen(low, units, 8, Floor(0.5, of="uniform")) == [[6, 7], [0, 1, 2, 3, 4, 5]]
    assert chosen(low, units, 8, Floor(0.0)) == [[7], [0, 1, 2, 3, 4, 5, 6]]
    assert chosen(low, units, 8, Floor(1.0, of="uniform")) == [[4, 5, 6, 7], [0, 1, 2, 3]]


@pytest.mark.parametrize("of", ["erk", "uniform"])
def test_a_group_at_its_floor_stays_there(of):
    """Half of the share of the full group is promised, whatever earlier updates have left of it."""
    units = rows((40, 3), (40, 3), (20, 5))
    worth = [[-1.0] * 40, [0.1 * i for i in range(40)], [0.1 * i for i in range(20)]]
    eligible, total = units.everything(), units.weigh(units.everything())
    for density in (0.9, 0.7, 0.5, 0.3, 0.2, 0.2, 0.2):
        budget = round(density * total)
        fresh = chosen(worth, units, budget, of)
        kept = chosen(worth, units, budget, Floor(0.5, of), eligible=eligible)
        assert [len(k) >= len(f) // 2 for k, f in zip(kept, fresh, strict=True)] == [True] * 3
        eligible = [mask.clone().fill_(False) for mask in eligible]
        for mask, units_kept in zip(eligible, kept, strict=True):
            mask[units_kept] = True


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "floor", Floor(0.9, "uniform")])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.77, 1.0])
def test_what_is_left_over_is_less_than_the_next_unit(allocation, density):
    units = rows((7, 5), (30, 2), (4, 11), (1, 1), (9, 9))
    worth = [torch.rand(len(cost), dtype=torch.float64) for cost in units.costs]
    total = units.weigh(units.everything())
    budget = round(density * total)
    masks = select_units(
        worth, units, budget, parse_allocation(allocation).units, eligible=units.everything()
    )
    kept = units.weigh(masks)
    assert kept <= budget
    assert budget - kept < max(float(cost.max()) for cost in units.costs) or kept == total
    if density > 0.3:
        assert all(bool(mask.any()) for mask in masks)


def test_where_units_cross_what_is_left_over_is_still_less_than_one():
    """Rows and columns of the same weights: no count of units gives the count of weights."""
    units = crossing()
    worth = [torch.rand(12, dtype=torch.float64) for _ in range(3)]
    for density in (0.1, 0.25, 0.5, 0.9):
        budget = round(density * 4 * 144)
        masks = select_units(worth, units, budget, Global().units, eligible=units.everything())
        zeros = sum(int((~mask).sum()) for mask in units.spread(masks))
        assert 576 - zeros == units.weigh(masks)
        assert 0 <= budget - units.weigh(masks) < 24


@pytest.mark.parametrize("vote", [votes.unanimous, votes.mean, votes.intersection])
@pytest.mark.parametrize("floors", [(0, 0, 0), (1, 1, 1)])
def test_units_of_one_weight_are_what_selection_selects(vote, floors):
    """Two ways to the same masks: by sorting all, and by histograms of bits."""
    model = torch.nn.ModuleList([torch.nn.Linear(m, n) for n, m in ((5, 7), (3, 3), (8, 4))])
    units = cover(_One(), model, find_layers(model)).units
    assert units is not None
    scores = [
        {task: torch.randn(layer.parameter.numel()).mul(4).round() for task in ("a", "b", "c")}
        for layer in units.layers
    ]
    rankings = rank(scores, {"a": 2.0})
    for keep in (3, 20, 50, 76):
        expected = select(scores, vote, [Quota((0, 1, 2), keep, floors)], rankings=rankings)
        worth = worths(scores, vote, rankings)
        every = units.everything()
        masks = select_units(worth, units, keep, Global().units, eligible=every, min_keep=floors[0])
        assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


class _One(Block):
    """Blocks of one weight that are packed like any other."""

    def __init__(self) -> None:
        super().__init__(1, 1)


def test_one_voters_own_choice_leaves_the_others_units_alone():
    """Of 2 * 2 + 2 * 3 weights 5 may stay; the group it does not know is not asked."""
    units = rows((2, 2), (2, 3), (5, 7))
    worth = {0: torch.tensor([0.1, 0.2]), 1: torch.tensor([0.9, 0.0])}
    kept = fitting_units(worth, units, lambda cost: cost / 2, [0, 1])
    assert {group: mask.tolist() for group, mask in kept.items()} == {
        0: [False, True],
        1: [True, False],
    }


def test_a_worth_for_every_unit():
    scores = [{"a": torch.tensor([1.0, 2.0, 3.0])}]
    with pytest.raises(
        ValueError, match=r"A vote must turn percentiles .* Got \(\) for .*\(1, 3\)"
    ):
        worths(scores, lambda percentiles: percentiles.sum(), rank(scores))


def test_percentiles_are_shares_of_all_that_a_task_uses():
    scores = [
        {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([0.0, 1.0])},
        {"a": torch.tensor([2.0, 2.0])},
    ]
    first, second = worths(scores, votes.unanimous, rank(scores))
    assert first.tolist() == [0.75, 0.5]
    assert second.tolist() == [0.25, 0.25]


def test_a_budget_may_be_a_fraction():
    units = rows((3, 1)).among([0], [Fraction(1, 3)])
    assert chosen([[0.1, 0.3, 0.2]], units, Fraction(2, 3)) == [[1, 2]]
