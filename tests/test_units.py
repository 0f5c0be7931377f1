"""Units: found in a model, pooled from its layers, spread over them, weighed together."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from mtprune.granularity import NM, Block, Element, Grouped
from mtprune.model.covering import cover
from mtprune.model.layers import find_layers
from mtprune.structure import NOBODY, Group, Member
from tests.oracles import unit_masks, unit_sums


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


def between(name: str, size: int, up: str, down: str) -> Group:
    units = tuple(range(size))
    return Group(
        name,
        size,
        (
            Member(f"{up}.weight", 0, units),
            Member(f"{up}.bias", 0, units),
            Member(f"{down}.weight", 1, units, "in"),
        ),
    )


FIRST, SECOND = between("first", 3, "0", "2"), between("second", 4, "2", "4")


def covered(*groups: Group, model: nn.Module | None = None):
    model = chain() if model is None else model
    found = cover(Grouped(groups), model, find_layers(model))
    assert found.units is not None
    return found


def test_single_weights_need_no_units():
    layers = find_layers(chain())
    for granularity in (Element(), NM(1, 3), Block(1, 1)):
        assert cover(granularity, chain(), layers).units is None


def test_a_weight_in_two_units_is_counted_once():
    """4 of 12 weights of the middle layer are in a row and a column that go."""
    units = covered(FIRST, SECOND).units
    masks = [torch.tensor([True, True, False]), torch.tensor([True, False, True, False])]
    assert units.weigh(units.everything()) == 6 + 12 + 4
    assert units.weigh(masks) == 2 * 2 + 2 * 2 + 2
    assert units.weigh(masks, [1]) == 4
    zeros = sum(int((~mask).sum()) for mask in units.spread(masks))
    assert zeros == 22 - units.weigh(masks)


def test_a_unit_costs_what_goes_with_it():
    units = covered(FIRST, SECOND).units
    assert [cost.tolist() for cost in units.costs] == [[2 + 4] * 3, [3 + 1] * 4]
    dear = units.among([0, 1, 2], [Fraction(1, 2), Fraction(2), Fraction(1)])
    assert [cost.tolist() for cost in dear.costs] == [[1 + 8] * 3, [6 + 1] * 4]
    assert dear.weigh(dear.everything()) == 3 + 24 + 4


def test_a_unit_that_is_row_and_column_of_one_weight_counts_the_crossing_once():
    model = nn.Sequential(nn.Linear(3, 3))
    both = Group("g", 3, (Member("0.weight", 0, (0, 1, 2)), Member("0.weight", 1, (0, 1, 2), "in")))
    units = covered(both, model=model).units
    assert units.costs[0].tolist() == [5.0] * 3
    assert units.weigh([torch.tensor([True, False, True])]) == 4


def test_packed_members_share_a_dimension():
    """Query, key and value in one weight: three members along its rows."""
    rows = [(NOBODY,) * 2 * i + (0, 1) + (NOBODY,) * 2 * (2 - i) for i in range(3)]
    group = Group("heads", 2, tuple(Member("0.weight", 0, r) for r in rows))
    model = nn.Sequential(nn.Linear(5, 6))
    units = covered(group, model=model).units
    assert units.costs[0].tolist() == [15.0, 15.0]
    mask = units.spread([torch.tensor([True, False])])[0]
    assert mask[:, 0].tolist() == [True, False] * 3
    values = torch.arange(30.0).view(6, 5)
    summed = units.gather({0: units.pool(0, values)})[0]
    assert summed.tolist() == [values[::2].sum().item(), values[1::2].sum().item()]


def test_pooling_and_spreading_are_those_of_the_groups():
    """In two steps, layer by layer, and in one, entry by entry."""
    found = covered(FIRST, SECOND)
    values = {layer.name: torch.randn(layer.shape) for layer in found.layers}
    units = found.units
    pooled = {i: units.pool(i, values[layer.name]) for i, layer in enumerate(found.layers)}
    sums = units.gather(pooled)
    for number, group in enumerate((FIRST, SECOND)):
        torch.testing.assert_close(sums[number], unit_sums(group, values))
    masks = [torch.rand(3) > 0.5, torch.rand(4) > 0.5]
    whole = unit_masks([FIRST, SECOND], masks, {x.name: x.shape for x in found.layers})
    for layer, mask in zip(found.layers, units.spread(masks), strict=True):
        assert torch.equal(mask, whole[layer.name])


def test_units_stand_as_long_as_one_of_their_weights_does():
    units = covered(FIRST, SECOND).units
    masks = [torch.tensor([True, False, True]), torch.tensor([False, False, True, True])]
    standing = units.standing(units.spread(masks))
    assert [mask.tolist() for mask in standing] == [mask.tolist() for mask in masks]


def test_some_layers_only():
    """What lies outside is left as it is, and groups that lie nowhere are gone."""
    units = covered(FIRST, SECOND).units.among([2])
    assert units.names == ("second",)
    assert [cost.tolist() for cost in units.costs] == [[1.0] * 4]
    assert [tuple(mask.shape) for mask in units.spread([torch.ones(4, dtype=torch.bool)])] == [
        (1, 4)
    ]


def test_the_maker_of_a_group_comes_first():
    units = covered(Group("g", 3, FIRST.members[::-1])).units
    assert [units.layers[i].name for i in units.holding(0)] == ["0.weight", "2.weight"]
    reader = covered(Group("g", 3, (FIRST.members[2],))).units
    assert [reader.layers[i].name for i in reader.holding(0)] == ["2.weight"]


def test_layers_without_units_are_named():
    found = covered(FIRST)
    assert [layer.name for layer in found.layers] == ["0.weight", "2.weight"]
    assert found.dense == {"4.weight": "no unit lies in it"}


def test_tied_weights_are_found_by_any_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    found = covered(Group("g", 3, (Member("1.weight", 0, (0, 1, 2)),)), model=model)
    assert [layer.name for layer in found.layers] == ["0.weight"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        pytest.param(
            (Member("0.weigth", 0, (0, 1, 2)),),
            r"Group 'g' names '0\.weigth', which the model does not have\. Did you mean .*'0",
            id="unknown",
        ),
        pytest.param(
            (Member("0.weight", 0, (0, 1)),),
            r"Group 'g' gives 2 units along dimension 0 of '0\.weight', which has shape \(3, 2\)",
            id="length",
        ),
        pytest.param(
            (Member("0.weight", 2, (0, 1)),), "along dimension 2 of '0.weight'", id="dimension"
        ),
        pytest.param(
            (Member("0.bias", 0, (0, 1, 2)),),
            r"Group 'g' lies in nothing that is pruned: '0\.bias'\. Were its layers excluded",
            id="biases alone",
        ),
        pytest.param((), "Group 'g' lies in nothing that is pruned: no tensors", id="nothing"),
    ],
)
def test_groups_that_do_not_fit_the_model(members, message):
    with pytest.raises(ValueError, match=message):
        covered(Group("g", 3, members))


def test_names_of_groups_are_different():
    with pytest.raises(ValueError, match="Two groups are called 'first'"):
        covered(FIRST, FIRST)


def test_what_is_found_in_excluded_layers_is_passed_over():
    """Unlike groups that were named: those were asked for."""

    class Both:
        def groups(self, model, layers):
            return [FIRST, between("second", 4, "2", "4")]

    model = chain()
    layers = find_layers(model, exclude=["2", "4"])
    found = cover(Both(), model, layers)
    assert found.units is not None
    assert found.units.names == ("first",)
    assert [cost.tolist() for cost in found.units.costs] == [[2.0] * 3]
    with pytest.raises(ValueError, match="Group 'second' lies in nothing that is pruned"):
        cover(Grouped([FIRST, SECOND]), model, layers)
    with pytest.raises(ValueError, match="All layers in which units lie are excluded"):
        cover((Both(),), model, [])


def test_a_granularity_that_finds_nothing():
    class Nothing:
        def groups(self, model, layers):
            return []

    with pytest.raises(ValueError, match=r"Nothing.* finds no units in Sequential"):
        cover(Nothing(), chain(), find_layers(chain()))
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"NM\(n=2, m=4\) covers nothing .*: its 2 inputs are"):
        cover(NM(), model, find_layers(model))
