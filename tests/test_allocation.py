from math import floor, prod

import pytest
import torch

from mtprune import Block, Cubic, Element, Linear, MultitaskPruner, Vote, votes
from mtprune.allocation import Budget, Erk, Floor, apportion, guard, parse_allocation
from mtprune.selection import Quota, select
from tests import nets, oracles
from tests.oracles import EXACT, ODD, sampler

RESNET = oracles.resnet_like()
DENSITIES = [0.5, 0.3, 0.1, 0.05, 0.01, 0.001]


def plan(allocation, net, keep, min_keep=1, upper=None):
    budget = Budget(net.shapes, net.components, keep, upper or net.sizes, min_keep)
    return parse_allocation(allocation).quotas(budget)


def layer_counts(of, shapes, keep, upper, min_keep=1):
    budget = Budget(shapes, ["trunk"] * len(shapes), keep, upper, min_keep)
    return parse_allocation(of).counts(budget)


def erk_densities(shapes, density, power=1.0):
    return Erk(power).densities(shapes, density)


# --- ERK -----------------------------------------------------------------------------------------


def test_two_square_layers_share_a_tenth():
    # Raw densities 0.2 and 0.02, sizes 100 and 10,000: the scale is 1010 / 220.
    first, second = erk_densities([(10, 10), (100, 100)], density=0.1)
    assert first == pytest.approx(0.2 * 1010 / 220, rel=1e-12)
    assert second == pytest.approx(0.02 * 1010 / 220, rel=1e-12)


def test_a_layer_that_would_exceed_one_is_dense_and_the_others_pay():
    # At the first scale the small layer would have density 2.3; the large one gets 500 - 4 ones.
    assert erk_densities([(2, 2), (100, 100)], density=500 / 10_004) == [1.0, 0.0496]


@pytest.mark.parametrize("power", [1.0, 0.9, 0.5], ids=lambda p: f"power {p}")
@pytest.mark.parametrize("density", DENSITIES)
def test_densities_are_those_of_the_published_iteration(density, power):
    assert erk_densities(RESNET, density, power) == pytest.approx(
        oracles.erk(RESNET, density, power), rel=1e-9
    )


@pytest.mark.parametrize("shapes", [RESNET, list(EXACT.shapes), list(ODD.shapes)])
@pytest.mark.parametrize("power", [1.0, 0.9])
@pytest.mark.parametrize("density", [0.0, 1.0, *DENSITIES])
def test_densities_spend_the_budget_and_none_exceeds_one(density, power, shapes):
    densities = erk_densities(shapes, density, power)
    sizes = [prod(shape) for shape in shapes]
    spent = sum(d * n for d, n in zip(densities, sizes, strict=True))
    assert spent == pytest.approx(density * sum(sizes), rel=1e-9)
    assert all(0.0 <= d <= 1.0 for d in densities)


def test_power_zero_is_uniform_and_rank_by_raw_density_is_kept():
    assert erk_densities(RESNET, 0.1, 0.0) == pytest.approx([0.1] * len(RESNET))
    raw = [sum(shape) / prod(shape) for shape in RESNET]
    by_raw = sorted(range(len(raw)), key=lambda i: raw[i])
    densities = erk_densities(RESNET, 0.05)
    in_order = [densities[i] for i in by_raw]
    assert in_order == sorted(in_order)
    assert in_order[0] < 0.05 < in_order[-1]


# --- Whole numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ideal", "total", "lower", "upper", "expected"),
    [
        pytest.param([1.5, 1.5, 7.0], 10, [0] * 3, [9] * 3, [2, 1, 7], id="first of equals"),
        pytest.param([1.2, 1.7, 7.1], 10, [0] * 3, [9] * 3, [1, 2, 7], id="largest remainder"),
        pytest.param([0.1, 0.1, 9.8], 10, [1] * 3, [9] * 3, [1, 1, 8], id="lower bounds"),
        pytest.param([0.5, 0.5, 9.0], 10, [0] * 3, [9, 9, 4], [3, 3, 4], id="upper bounds"),
        pytest.param([3.0, 6.0, 1.0], 28, [0] * 3, [99, 99, 1], [9, 18, 1], id="in proportion"),
        pytest.param([0.0, 0.0], 7, [0, 0], [9, 9], [4, 3], id="nothing to go by"),
        pytest.param([5.0, 5.0], 0, [0, 0], [9, 9], [0, 0], id="nothing to give"),
    ],
)
def test_shares_become_whole_numbers(ideal, total, lower, upper, expected):
    assert apportion(ideal, total, lower, upper) == expected


@pytest.mark.parametrize("seed", range(20))
def test_any_ideal_is_met_exactly_and_within_bounds(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return torch.randint(0, high, (9,), generator=generator).tolist()

    lower = draw(5)
    upper = [low + extra for low, extra in zip(lower, draw(1 + 20 * seed), strict=True)]
    ideal = (torch.rand(9, generator=generator) ** 4 * 50 * seed).tolist()
    for total in {sum(lower), (sum(lower) + sum(upper)) // 2, sum(upper)}:
        counts = apportion(ideal, total, lower, upper)
        assert sum(counts) == total
        assert all(a <= c <= b for a, c, b in zip(lower, counts, upper, strict=True))


@pytest.mark.parametrize("total", [-1, 3, 31])
def test_totals_beyond_the_bounds_are_refused(total):
    with pytest.raises(ValueError, match=rf"{total} lies outside the bounds 4\.\.30"):
        apportion([1.0, 1.0], total, lower=[2, 2], upper=[10, 20])


@pytest.mark.parametrize("of", ["uniform", "erk", Erk(0.9)])
@pytest.mark.parametrize("keep", [0, 1, 5, 13, 14, 100, 5_000, 1_000_003])
def test_layer_counts_add_up_and_leave_no_layer_empty(of, keep):
    sizes = [prod(shape) for shape in RESNET]
    counts = layer_counts(of, RESNET, keep, sizes)
    assert sum(counts) == keep
    assert all(0 <= c <= n for c, n in zip(counts, sizes, strict=True))
    assert (min(counts) >= 1) == (keep >= len(sizes))
    empty_allowed = layer_counts(of, RESNET, keep, sizes, min_keep=0)
    assert sum(empty_allowed) == keep


@pytest.mark.parametrize(("of", "power"), [("uniform", 0.0), ("erk", 1.0), (Erk(0.9), 0.9)])
def test_layer_counts_are_the_densities_within_one_weight(of, power):
    sizes = [prod(shape) for shape in RESNET]
    keep = sum(sizes) // 10
    counts = layer_counts(of, RESNET, keep, sizes)
    ideal = oracles.erk(RESNET, keep / sum(sizes), power)
    for shape, size, got, density in zip(RESNET, sizes, counts, ideal, strict=True):
        # The one-weight layer is lifted to 1 by the guard; that weight is taken from another.
        assert abs(got - max(1.0, density * size)) < 2, shape


def test_layers_that_have_already_lost_weights_keep_no_more_than_they_have():
    upper = [10, 63, 35, 2, 9, 1]
    for of in ("uniform", "erk"):
        counts = layer_counts(of, ODD.shapes, 100, upper)
        assert sum(counts) == 100
        assert all(c <= most for c, most in zip(counts, upper, strict=True))


@pytest.mark.parametrize(
    ("keep", "upper", "min_keep", "expected"),
    [
        pytest.param(3, [5, 5, 5], 1, [1, 1, 1], id="just enough"),
        pytest.param(2, [5, 5, 5], 1, [0, 0, 0], id="too few for all"),
        pytest.param(9, [5, 0, 5], 1, [1, 0, 1], id="a layer with nothing left"),
        pytest.param(9, [5, 2, 5], 3, [3, 2, 3], id="more than a layer has"),
        pytest.param(9, [5, 5, 5], 0, [0, 0, 0], id="none asked for"),
    ],
)
def test_the_guard(keep, upper, min_keep, expected):
    assert guard(keep, upper, min_keep) == expected


# --- Quotas --------------------------------------------------------------------------------------


def test_global_is_one_quota_with_a_guard():
    assert plan("global", ODD, 50) == [Quota(tuple(range(6)), 50, (1,) * 6)]
    assert plan("global", ODD, 5) == [Quota(tuple(range(6)), 5, (0,) * 6)]
    assert plan("global", ODD, 50, min_keep=0) == [Quota(tuple(range(6)), 50, (0,) * 6)]


@pytest.mark.parametrize("allocation", ["uniform", "erk", Erk(0.5)])
def test_layerwise_allocations_are_a_quota_per_layer(allocation):
    counts = layer_counts(allocation, ODD.shapes, 50, ODD.sizes)
    assert plan(allocation, ODD, 50) == [Quota((i,), c, (c,)) for i, c in enumerate(counts)]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("of", ["erk", "uniform", Erk(0.9)])
@pytest.mark.parametrize("keep", [8, 21, 60, 150])
def test_a_floor_is_that_fraction_of_the_layerwise_count(fraction, of, keep):
    counts = layer_counts(of, ODD.shapes, keep, ODD.sizes)
    [quota] = plan(Floor(fraction, of), ODD, keep)
    assert quota.keep == keep
    assert quota.layers == tuple(range(6))
    assert list(quota.floors) == [max(1, floor(fraction * c + 1e-9)) for c in counts]


def test_floor_by_name_is_half_of_erk():
    assert plan("floor", ODD, 60) == plan(Floor(0.5, "erk"), ODD, 60)


def test_a_floor_is_not_lost_to_rounding():
    # In floats 0.29 * 100 is 28.999999999999996.
    budget = Budget([(200, 1)] * 2, ["a", "b"], 200, [200, 200])
    [quota] = Floor(0.29, "uniform").quotas(budget)
    assert quota.floors == (29, 29)


@pytest.mark.parametrize("keep", [6, 20, 100])
@pytest.mark.parametrize("of", ["erk", "uniform"])
def test_every_layer_has_its_floor_however_worthless_it_is(keep, of, device):
    scores = ODD.scores(sampler("random", device))
    for i in (1, 4, 5):  # worth nothing to anyone
        scores[i] = {task: torch.zeros_like(s) for task, s in scores[i].items()}
    masks = select(scores, votes.unanimous, plan(Floor(0.5, of), ODD, keep))
    counts = layer_counts(of, ODD.shapes, keep, ODD.sizes)
    kept = [int(mask.sum()) for mask in masks]
    assert sum(kept) == keep
    assert all(k >= max(1, c // 2) for k, c in zip(kept, counts, strict=True))


@pytest.mark.parametrize("keep", [6, 7, 30])
def test_global_leaves_no_layer_empty_unless_asked(keep, device):
    scores = ODD.scores(sampler("random", device))
    for i in (1, 4, 5):
        scores[i] = {task: torch.zeros_like(s) for task, s in scores[i].items()}
    guarded = select(scores, votes.unanimous, plan("global", ODD, keep))
    assert sum(int(mask.sum()) for mask in guarded) == keep
    assert all(bool(mask.any()) for mask in guarded)
    free = select(scores, votes.unanimous, plan("global", ODD, keep, min_keep=0))
    assert sum(int(mask.sum()) for mask in free) == keep
    assert [bool(free[i].any()) for i in (1, 4, 5)] == [False, False, False]


# --- A mapping component -> sparsity -------------------------------------------------------------


def by_component(net, some_quotas):
    return {
        tuple(sorted({net.components[i] for i in quota.layers})): quota.keep
        for quota in some_quotas
    }


def test_named_components_are_exact_and_the_others_share_the_rest():
    # Sizes: trunk 896, neck 128, a 1024, b 128.
    keep = EXACT.total // 4  # 544
    some_quotas = plan({"trunk": 0.9, "b": 0.25}, EXACT, keep)
    assert by_component(EXACT, some_quotas) == {("trunk",): 90, ("b",): 96, ("a", "neck"): 358}
    assert sum(quota.keep for quota in some_quotas) == keep


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77, 0.9])
def test_a_mapping_of_all_components_is_exact_in_each_and_in_all(sparsity, device):
    total = ODD.total
    keep = total - round(sparsity * total)
    some_quotas = plan(dict.fromkeys(["trunk", "neck", "a", "b"], sparsity), ODD, keep)
    assert sum(quota.keep for quota in some_quotas) == keep
    for quota in some_quotas:
        size = sum(ODD.sizes[i] for i in quota.layers)
        assert abs(quota.keep - (1 - sparsity) * size) <= 1.5  # its own rounding, and the total's
    masks = select(ODD.scores(sampler("random", device)), votes.unanimous, some_quotas)
    for quota in some_quotas:
        assert sum(int(masks[i].sum()) for i in quota.layers) == quota.keep
        assert all(bool(masks[i].any()) for i in quota.layers) == (quota.keep >= len(quota.layers))


def test_a_mapping_that_leaves_nothing_for_the_other_layers_is_a_contradiction():
    # 448 and 96 of trunk and b are all of the budget, which has room for one weight in each layer.
    with pytest.raises(ValueError, match="cannot give the sparsity asked for"):
        plan({"trunk": 0.5, "b": 0.25}, EXACT, 544)


def test_an_unknown_component_is_named_with_those_there_are():
    with pytest.raises(
        ValueError,
        match=r"names components \['head', 'stem'\], which do not exist\. "
        r"Components: \['a', 'b', 'neck', 'trunk'\]",
    ):
        plan({"trunk": 0.5, "stem": 0.5, "head": 0.1}, ODD, 100)


@pytest.mark.parametrize(
    ("allocation", "keep"),
    [
        pytest.param({"trunk": 0.0, "a": 0.0}, 150, id="the named ones keep more than all may"),
        pytest.param({"trunk": 0.9, "a": 0.9}, 190, id="the rest is too small for what is left"),
        pytest.param(dict.fromkeys(ODD.components, 0.5), 20, id="all named, another total"),
    ],
)
def test_contradictory_totals_say_what_the_mapping_amounts_to(allocation, keep):
    with pytest.raises(ValueError, match=r"`allocation` keeps \d+ of 202 weights, .* cannot give"):
        plan(allocation, ODD, keep)


def test_the_sparsity_a_contradiction_proposes_is_accepted():
    mapping = dict.fromkeys(ODD.components, 0.5)
    with pytest.raises(ValueError, match="ask for sparsity=") as error:
        plan(mapping, ODD, 20)
    proposed = float(str(error.value).rsplit("=", 1)[1].rstrip("."))
    keep = ODD.total - round(proposed * ODD.total)
    assert sum(quota.keep for quota in plan(mapping, ODD, keep)) == keep


# --- Validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_the_fraction_of_a_floor_is_a_share(fraction):
    with pytest.raises(ValueError, match=r"`fraction` must be in \[0, 1\]\. Got"):
        Floor(fraction)


@pytest.mark.parametrize("of", ["global", "floor", 0.9, None])
def test_a_floor_is_of_a_layerwise_allocation(of):
    with pytest.raises(ValueError, match=r"`of` must be 'erk', 'uniform' or Erk\(power\)\. Got"):
        Floor(0.5, of)


@pytest.mark.parametrize("power", [-1.0, float("inf"), float("nan")])
def test_the_power_of_erk_is_not_negative(power):
    with pytest.raises(ValueError, match=r"`power` must be at least 0\. Got"):
        Erk(power)


def test_an_allocation_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"`allocation` must be one of .* Got \('erk', 1\)"):
        plan(("erk", 1), ODD, 100)


# --- Floors from update to update ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv_bn", "transformer_encoder"])
@pytest.mark.parametrize("of", ["erk", "uniform", Erk(0.5)], ids=str)
@pytest.mark.parametrize("granularity", [Element(), Block(1, 2)], ids=str)
@pytest.mark.parametrize(
    "schedule", [Cubic(begin=0, end=9, every=1), Linear(begin=0, end=8, every=3)], ids=str
)
def test_no_layer_ever_falls_below_what_is_promised(name, of, granularity, schedule):
    """Though its weights are the least of all: at every update, and when updates are many."""
    net = nets.SHELF[name]()

    def by_layer(weight, grad=None, *, layer):
        return weight.abs() + 10.0 * order[layer.name]

    method = Vote(
        0.9,
        saliency=by_layer,
        schedule=schedule,
        allocation=Floor(0.5, of),
        granularity=granularity,
    )
    pruner = MultitaskPruner(net.model, net.task_losses, net.shared_modules, method=method)
    order = {layer: place for place, layer in enumerate(pruner.masks)}
    sizes = {layer: mask.numel() for layer, mask in pruner.masks.items()}
    shapes = [tuple(mask.shape) for mask in pruner.masks.values()]
    promised = dict(sizes)
    for at in range(schedule.end + 2):
        batch = net.make_batch(at)
        pruner.observe(net.model(batch["x"]), batch)
        pruner.step()
        total = sum(sizes.values())
        keep = total - round(0.9 * schedule.progress(pruner.report().step or 0) * total)
        counts = layer_counts(of, shapes, keep, list(sizes.values()))
        for (layer, mask), count in zip(pruner.masks.items(), counts, strict=True):
            unit = 1 if isinstance(granularity, Element) else 2
            promised[layer] = min(promised[layer], count // 2)
            assert int(mask.sum()) >= promised[layer] - 2 * (unit - 1), layer
    assert pruner.report().step == schedule.end


def test_a_floor_is_of_the_full_layer():
    """An ERK count of 20 of 100 promises 10, also when 12 are left, or 8."""
    shapes = [(10, 10), (10, 10)]
    for alive, least in ((100, 10), (20, 10), (12, 10), (8, 8)):
        budget = Budget(shapes, ["a", "b"], 40, [alive, 100])
        floors = [quota.floors for quota in Floor().quotas(budget)]
        assert floors == [(least, 10)]
