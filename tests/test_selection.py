from itertools import permutations

import pytest
import torch

from mtprune import votes
from mtprune.allocation import Budget, Floor, Global, parse_allocation
from mtprune.selection import Best, Quota, Ranking, arrays, select
from tests import oracles
from tests.long import LONG
from tests.oracles import EXACT, KINDS, ODD, sampler
from tests.test_votes import EVERY_VOTE, VOTES

SPARSITIES = [0.0, 0.1, 0.5, 0.9, 0.99, 0.999]
ORDERED = [name for name in VOTES if name != "mean"]
TYPICAL = "80 % zero"  # what a pruned net scores: mostly ties
EVERY_KIND = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == TYPICAL else pytest.mark.slow) for kind in KINDS],
)


def listed(masks):
    return [mask.tolist() for mask in masks]


def count(masks):
    return sum(int(mask.sum()) for mask in masks)


def everything(net, keep, min_keep=1):
    budget = Budget(net.shapes, net.components, keep, net.sizes, min_keep)
    return Global().quotas(budget)


def on(device, *values):
    return torch.tensor(values, dtype=torch.float32, device=device)


# --- Literals ------------------------------------------------------------------------------------


def test_one_task_keeps_its_largest(device):
    scores = [{"a": on(device, 1, 2, 3, 4, 5, 6, 7, 8)}]
    [mask] = select(scores, votes.unanimous, [Quota((0,), 3, (0,))])
    assert mask.tolist() == [False] * 5 + [True] * 3
    assert mask.device == scores[0]["a"].device


@pytest.mark.parametrize(
    ("vote", "expected"),
    [
        # Percentiles of a: 0, 1, 2, 3 quarters; of b: 3, 2, 1, 0; of c: 0, 3, 2, 1.
        pytest.param(votes.unanimous, [1, 1, 0, 0], id="unanimous: 3 3 2 3, first two of three"),
        pytest.param(votes.intersection, [0, 1, 1, 0], id="intersection: 0 1 1 0"),
        pytest.param(votes.majority, [0, 1, 1, 0], id="majority: 0 2 2 1"),
        pytest.param(votes.mean, [0, 1, 1, 0], id="mean: 3 6 5 4 thirds"),
    ],
)
def test_three_tasks_share_four_weights_and_keep_two(vote, expected, device):
    shared = {
        "a": on(device, 1, 2, 3, 4),
        "b": on(device, 4, 3, 2, 1),
        "c": on(device, 1, 4, 3, 2),
    }
    [mask] = select([shared], vote, [Quota((0,), 2, (0,))])
    assert mask.int().tolist() == expected


def test_ties_share_the_lower_percentile(device):
    ranking = Ranking([on(device, 5, 1, 5, 3), on(device, 3, 5, 0, 5)])
    expected = [0.5, 0.125, 0.5, 0.25, 0.25, 0.5, 0.0, 0.5]
    assert ranking.exact(on(device, 5, 1, 5, 3, 3, 5, 0, 5)).tolist() == expected


def test_a_tie_inside_a_task_loses_to_a_unique_weight_of_another(device):
    # Three tied at a's top stand at 1/4 each, b's top at 3/4: one place goes to b's.
    scores = [{"a": on(device, 0, 9, 9, 9)}, {"b": on(device, 1, 2, 3, 4)}]
    masks = select(scores, votes.unanimous, [Quota((0, 1), 1, (0, 0))])
    assert listed(masks) == [[False] * 4, [False, False, False, True]]


def test_the_budget_breaks_ties_by_position_across_layers(device):
    scores = [{"a": on(device, 1, 1)}, {"a": on(device, 1, 1, 1)}]
    masks = select(scores, votes.unanimous, [Quota((0, 1), 3, (0, 0))])
    assert listed(masks) == [[True, True], [True, False, False]]


def test_both_zeros_are_one_number(device):
    [mask] = select([{"a": on(device, -0.0, 0.0, -0.0)}], votes.unanimous, [Quota((0,), 1, (0,))])
    assert mask.tolist() == [True, False, False]


def test_a_floor_is_filled_by_the_layers_own_best_and_the_rest_by_all(device):
    scores = [{"a": on(device, 1, 2, 3)}, {"a": on(device, 7, 8, 9, 6)}]
    masks = select(scores, votes.unanimous, [Quota((0, 1), 3, (1, 0))])
    assert listed(masks) == [[False, False, True], [False, True, True, False]]


def test_quotas_do_not_compete_with_each_other_and_unnamed_layers_keep_nothing(device):
    scores = [{"a": on(device, 9, 8)}, {"a": on(device, 1, 2)}, {"a": on(device, 7, 7)}]
    masks = select(scores, votes.unanimous, [Quota((1,), 1, (0,)), Quota((0,), 1, (0,))])
    assert listed(masks) == [[True, False], [False, True], [False, False]]


def test_what_is_not_eligible_counts_in_percentiles_but_is_not_kept(device):
    # Without a's two large ones, its 2 would stand at 1/2, level with b's 3, and come first.
    scores = [{"a": on(device, 1, 2, 8, 9)}, {"b": on(device, 3, 4, 1, 2)}]
    eligible = [on(device, 1, 1, 0, 0).bool(), on(device, 1, 0, 1, 1).bool()]
    masks = select(scores, votes.unanimous, [Quota((0, 1), 1, (0, 0))], eligible=eligible)
    assert listed(masks) == [[False] * 4, [True, False, False, False]]


def test_weights_of_equal_mean_are_kept_by_position(device):
    # Opposite rankings of ten weights: every mean is 9/20, so the first four stay.
    ranks = torch.arange(10.0, device=device)
    [mask] = select([{"a": ranks, "b": ranks.flip(0)}], votes.mean, [Quota((0,), 4, (0,))])
    assert mask.tolist() == [True] * 4 + [False] * 6


# --- Against the oracle --------------------------------------------------------------------------


PAIRS = [
    pytest.param(
        name,
        kind,
        marks=()
        if kind == TYPICAL
        else pytest.mark.slow
        if (i - j) % len(KINDS) in (0, 3)
        else LONG,
    )
    for i, name in enumerate(VOTES)
    for j, kind in enumerate(KINDS)
]
"""Every run tries each vote with three kinds of scores, the long run with all."""


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_mask_is_the_oracles_weight_by_weight(name, kind, device):
    net, total = EXACT, EXACT.total
    scores = net.scores(sampler(kind, device))
    order = oracles.ranking(scores, oracles.VOTES[name])
    for sparsity in SPARSITIES:
        keep = total - round(sparsity * total)
        allocations = ["global", "uniform", "erk", "floor"]
        if 0 < sparsity < 0.9:
            allocations.append({"trunk": sparsity / 2, "b": sparsity})
        for spread in allocations:
            budget = Budget(net.shapes, net.components, keep, net.sizes)
            plan = parse_allocation(spread).quotas(budget)
            expected = set().union(
                *(oracles.keep_best(order, q.layers, q.keep, q.floors) for q in plan)
            )
            masks = select(scores, VOTES[name], plan)
            assert count(masks) == keep, (sparsity, spread)
            assert listed(masks) == oracles.as_masks(expected, net.sizes), (sparsity, spread)


@EVERY_KIND
@pytest.mark.parametrize("name", ORDERED)
def test_awkward_sizes_floors_and_ineligible_weights_are_the_oracles(name, kind, device):
    scores = ODD.scores(sampler(kind, device, seed=1))
    generator = torch.Generator().manual_seed(2)
    eligible = [torch.rand(n, generator=generator) < 0.6 for n in ODD.sizes]
    eligible[-1][:] = True
    upper = [int(e.sum()) for e in eligible]
    order = oracles.ranking(scores, oracles.VOTES[name])
    order = [(i, j) for i, j in order if eligible[i][j]]
    for keep in (0, 1, 7, 60, sum(upper)):
        floors = [min(n // 3, keep // 6) for n in upper]
        masks = select(
            scores,
            VOTES[name],
            [Quota(tuple(range(6)), keep, tuple(floors))],
            eligible=[e.to(device) for e in eligible],
        )
        expected = oracles.keep_best(order, range(6), keep, floors)
        assert len(expected) == keep
        assert listed(masks) == oracles.as_masks(expected, ODD.sizes)


@EVERY_KIND
def test_percentiles_are_the_oracles_and_inside_their_bounds(kind, device):
    scores = ODD.scores(sampler(kind, device))
    table = oracles.percentiles([{"a": layer["a"]} for layer in scores if "a" in layer])
    mine = [layer["a"] for layer in scores if "a" in layer]
    ranking = Ranking(mine)
    exact = ranking.exact(torch.cat(mine))
    assert exact.tolist() == [float(shares[0]) for layer in table for shares in layer]
    low, high = ranking.bounds(torch.cat(mine))
    assert bool((low <= exact).all())
    assert bool((exact <= high).all())


@pytest.mark.parametrize("name", ["unanimous", "majority", "mean"])
@pytest.mark.parametrize("kind", ["random", "80 % zero", "crowded"])
def test_the_size_of_chunks_changes_nothing(name, kind, device, monkeypatch):
    scores = EXACT.scores(sampler(kind, device))
    plan = Floor().quotas(Budget(EXACT.shapes, EXACT.components, 333, EXACT.sizes))
    whole = select(scores, VOTES[name], plan)
    monkeypatch.setattr(arrays, "CHUNK", 64)
    assert listed(select(scores, VOTES[name], plan)) == listed(whole)


# --- Properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.013, 0.03, 0.1, 0.37, 0.8, 0.97])
@pytest.mark.parametrize("kind", ["random", "signed", "crowded"])
def test_unanimous_keeps_the_union_of_the_tasks_own_best_at_any_budget(kind, share, device):
    scores = ODD.scores(sampler(kind, device))
    table = oracles.percentiles(scores)
    # Best of its task: fewer than share * N_k of the task's weights are at least as salient ...
    union = {
        (i, j)
        for i, layer in enumerate(table)
        for j, shares in enumerate(layer)
        if any(1 - s <= share for s in shares)
    }
    # ... which a tied group shares by its lower percentile. So no group is cut in two.
    masks = select(scores, votes.unanimous, everything(ODD, len(union), min_keep=0))
    assert listed(masks) == oracles.as_masks(union, ODD.sizes)


@EVERY_VOTE
@pytest.mark.parametrize("kind", ["random", "80 % zero"])
@pytest.mark.parametrize("min_keep", [0, 1])
def test_a_smaller_budget_keeps_a_subset(name, kind, min_keep, device):
    scores = ODD.scores(sampler(kind, device))
    # Below one weight per layer the guard cannot hold, so budgets start there if there is one.
    budgets = [6, 7, 20, 21, 90, ODD.total - 1] if min_keep else [0, 1, 2, 5, 20, 90]
    larger = None
    for keep in reversed(budgets):
        masks = select(scores, VOTES[name], everything(ODD, keep, min_keep))
        assert count(masks) == keep
        if larger is not None:
            assert all(bool((big | ~small).all()) for small, big in zip(masks, larger, strict=True))
        larger = masks


@EVERY_VOTE
@pytest.mark.parametrize("kind", ["random", "signed", "80 % zero"])
def test_with_one_task_every_vote_is_plain_top_k(name, kind, device):
    sample = sampler(kind, device)
    scores = [{"a": sample(n)} for n in ODD.sizes]
    values = torch.cat([layer["a"] for layer in scores]).tolist()
    for keep in (1, 10, 100):
        masks = select(scores, VOTES[name], everything(ODD, keep, min_keep=0))
        kept = torch.cat(masks).nonzero().squeeze(1).tolist()
        assert set(kept) == oracles.top(values, keep)


@EVERY_VOTE
def test_identical_tasks_agree_whatever_the_vote(name, device):
    sample = sampler("random", device)
    layers = [sample(n) for n in ODD.sizes]
    alone = [{"a": x} for x in layers]
    # Powers of two, so that the votes' own rounding cannot differ.
    together = [{"a": x, "b": x * 0.5, "c": x * 4, "d": x} for x in layers]
    plan = everything(ODD, 60)
    assert listed(select(together, VOTES[name], plan)) == listed(
        select(alone, votes.unanimous, plan)
    )


@EVERY_VOTE
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20, 1e-6, 1e-3, 30.0, 1e6])
def test_the_scale_of_a_tasks_scores_changes_no_mask(name, factor, device):
    # Distinct integers, far enough apart to stay distinct under any of the factors.
    generator = torch.Generator().manual_seed(0)

    def sample(n):
        return torch.randint(1, 5_000, (n,), generator=generator).float().to(device)

    scores = ODD.scores(sample)
    scaled = [{t: s * (factor if t == "b" else 1) for t, s in layer.items()} for layer in scores]
    for keep in (6, 24, 120):
        plan = everything(ODD, keep)
        assert listed(select(scaled, VOTES[name], plan)) == listed(
            select(scores, VOTES[name], plan)
        )


@EVERY_VOTE
@pytest.mark.parametrize("kind", ["random", "80 % zero"])
def test_the_order_of_tasks_changes_nothing(name, kind, device):
    scores = ODD.scores(sampler(kind, device))
    plan = everything(ODD, 75)
    masks = listed(select(scores, VOTES[name], plan))
    for order in permutations("abc"):
        shuffled = [{t: layer[t] for t in order if t in layer} for layer in scores]
        assert listed(select(shuffled, VOTES[name], plan)) == masks


def test_renaming_the_tasks_changes_nothing(device):
    scores = ODD.scores(sampler("random", device))
    names = {"a": "task1", "b": "task10", "c": "backbone"}
    renamed = [{names[t]: s for t, s in layer.items()} for layer in scores]
    plan = everything(ODD, 75)
    assert listed(select(renamed, votes.unanimous, plan)) == listed(
        select(scores, votes.unanimous, plan)
    )


@EVERY_VOTE
@pytest.mark.parametrize("keep", [1, 6, 100, 180])
def test_dead_filters_are_not_kept_beyond_the_budget(name, keep, device):
    # The trunk's second layer is dead for all, and more than half of the budget goes begging.
    scores = ODD.scores(sampler("random", device))
    for task in scores[1]:
        scores[1][task] = torch.zeros_like(scores[1][task])
    masks = select(scores, VOTES[name], everything(ODD, keep, min_keep=0))
    assert count(masks) == keep
    alive = ODD.total - ODD.sizes[1]
    assert int(masks[1].sum()) == max(0, keep - alive)


# --- Priority ------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 2.0, 3.0, 7.5])
@pytest.mark.parametrize("share", [0.0317, 0.1234, 0.2718])
def test_a_priority_multiplies_the_share_a_task_is_sure_of(factor, share, device):
    scores = ODD.scores(sampler("random", device))
    table = oracles.percentiles(scores)
    sure = {"a": min(1.0, factor * share), "b": share, "c": share}
    union = {
        (i, j)
        for i, layer in enumerate(table)
        for j, shares in enumerate(layer)
        if any(1 - s <= sure[t] for t, s in zip(scores[i], shares, strict=True))
    }
    plan = everything(ODD, len(union), min_keep=0)
    masks = select(scores, votes.unanimous, plan, priority={"a": factor})
    assert listed(masks) == oracles.as_masks(union, ODD.sizes)


@EVERY_VOTE
def test_priorities_with_ties_are_the_oracles(name, device):
    priority = {"a": 2.0, "c": 0.5}
    scores = EXACT.scores(sampler("bfloat16", device))
    order = oracles.ranking(scores, oracles.VOTES[name], priority)
    for keep in (3, 200, 1500):
        plan = everything(EXACT, keep, min_keep=0)
        masks = select(scores, VOTES[name], plan, priority=priority)
        expected = oracles.keep_best(order, range(6), keep, [0] * 6)
        assert listed(masks) == oracles.as_masks(expected, EXACT.sizes)


@EVERY_VOTE
def test_equal_priorities_change_nothing(name, device):
    scores = EXACT.scores(sampler("bfloat16", device))  # so many ties that rounding would show
    plan = everything(EXACT, 500)
    without = listed(select(scores, VOTES[name], plan))
    for factor in (0.3, 1.0, 3.0):
        equal = dict.fromkeys("abc", factor)
        assert listed(select(scores, VOTES[name], plan, priority=equal)) == without


def test_the_higher_its_priority_the_more_a_task_keeps_of_its_own(device):
    scores = ODD.scores(sampler("random", device))
    own, others = [], []
    for factor in (0.1, 0.5, 1.0, 1.5, 2.0, 4.0, 50.0):
        plan = everything(ODD, 70, min_keep=0)
        masks = select(scores, votes.unanimous, plan, priority={"a": factor})
        assert count(masks) == 70
        own.append(int(masks[3].sum()))
        others.append(int(masks[4].sum()) + int(masks[5].sum()))
    assert own == sorted(own)
    assert own[0] < own[-1]
    assert others == sorted(others, reverse=True)


# --- Votes of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vote",
    [
        pytest.param(lambda p: p.square().mean(dim=0), id="mean of squares"),
        pytest.param(lambda p: 0.5 * (p.amax(dim=0) + p.amin(dim=0)), id="midrange"),
        pytest.param(lambda p: p.prod(dim=0), id="product"),
        pytest.param(lambda p: p.median(dim=0).values, id="median"),
        pytest.param(lambda p: p.quantile(0.75, dim=0), id="quantile"),
        pytest.param(lambda p: p.mean(dim=0).float(), id="in single precision"),
        pytest.param(lambda p: (p > 0.9).sum(dim=0), id="counts of high percentiles"),
        pytest.param(lambda p: p.log().mean(dim=0), id="geometric mean, -inf at the bottom"),
        pytest.param(lambda p: p.amax(dim=0) * 0, id="constant"),
    ],
)
@pytest.mark.parametrize("kind", ["random", "80 % zero", "crowded"])
def test_a_vote_of_one_line_keeps_the_exact_number_of_highest_worth(vote, kind, device):
    scores = ODD.scores(sampler(kind, device))
    table = oracles.percentiles(scores)
    worth = torch.cat(
        [
            vote(torch.tensor([[float(s) for s in shares] for shares in layer]).double().T)
            for layer in table
        ]
    )
    for keep in (1, 6, 60, 190):
        masks = select(scores, vote, everything(ODD, keep, min_keep=0))
        kept = torch.cat(masks).cpu()
        assert int(kept.sum()) == keep
        assert float(worth[kept].min()) >= float(worth[~kept].max()) - 1e-6


FALLING = {
    "negated": lambda p: -p.amax(dim=0),
    "complement": lambda p: 1 - p.mean(dim=0),
    "agreement": lambda p: p.amin(dim=0) - p.amax(dim=0),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in FALLING for kind in ("random", "crowded")),
        *((name, kind) for name in ("negated", "complement") for kind in ("all equal", "tiny")),
    ],
)
def test_what_falls_when_a_percentile_rises_is_no_vote(name, kind, device):
    scores = ODD.scores(sampler(kind, device))
    with pytest.raises(ValueError, match=r"The vote is not one.*must be non-decreasing"):
        select(scores, FALLING[name], everything(ODD, 60))


# --- Ways that must agree ------------------------------------------------------------------------


def unknown(vote):
    """The same vote, but nobody knows that it picks by rank."""
    return lambda percentiles: vote(percentiles)


LARGE = oracles.Net(
    shapes=((40, 50), (30, 7, 3, 3), (1, 1), (30, 30)),
    components=("trunk", "trunk", "a", "b"),
    tasks=("abc", "ac", "a", "b"),
)

MIXED = {
    **{kind: kind for kind in KINDS},
    "tied": lambda n, g: torch.randint(0, 40, (n,), generator=g) / 8.0,
    "negative": lambda n, g: -torch.rand(n, generator=g) - 1e-3,
    "subnormal": lambda n, g: torch.randint(-5, 2000, (n,), generator=g).int().abs() * 1e-45,
    "around zero": lambda n, g: torch.randn(n, generator=g).mul(1e-39).bfloat16().float(),
    "infinite range": lambda n, g: torch.randn(n, generator=g).mul(80).clamp(-87, 87).exp(),
}


def drawn(kind, device):
    generator = torch.Generator().manual_seed(3)
    if isinstance(MIXED[kind], str):
        return LARGE.scores(sampler(kind, device, seed=3))
    return LARGE.scores(lambda n: MIXED[kind](n, generator).float().to(device))


def cases(scores, device):
    """Quotas over everything and over single layers, with floors and eligible weights."""
    generator = torch.Generator().manual_seed(4)
    able = [(torch.rand(n, generator=generator) < 0.5).to(device) for n in LARGE.sizes]
    able[2][:] = True
    for eligible, upper in ((None, LARGE.sizes), (able, [int(e.sum()) for e in able])):
        keep = sum(upper) // 3
        floors = tuple(min(n // 7, keep // 5) for n in upper)
        yield [Quota((0, 1, 2, 3), keep, floors)], eligible
    yield [Quota((i,), n // 3, (n // 3,)) for i, n in enumerate(upper)], able


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("name", ORDERED)
def test_votes_that_pick_by_rank_give_what_any_vote_of_these_values_gives(name, kind, device):
    scores = drawn(kind, device)
    for plan, eligible in cases(scores, device):
        priority = {"a": 2.0, "c": 0.5} if eligible is None else None
        fast = select(scores, VOTES[name], plan, eligible=eligible, priority=priority)
        slow = select(scores, unknown(VOTES[name]), plan, eligible=eligible, priority=priority)
        assert all(torch.equal(f, s) for f, s in zip(fast, slow, strict=True))
        assert count(fast) == sum(quota.keep for quota in plan)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("name", ["unanimous", "majority", "mean"])
def test_without_numpy_masks_are_the_same(name, kind, device, monkeypatch):
    """The way taken on a GPU."""
    scores = drawn(kind, device)
    plans = list(cases(scores, device))
    usual = [select(scores, VOTES[name], plan, eligible=may) for plan, may in plans]
    best = Best({0: scores[0]["a"]}, Ranking([scores[0]["a"]]), 777)[0]
    monkeypatch.setattr(arrays, "uses_numpy", lambda values: False)
    for (plan, eligible), masks in zip(plans, usual, strict=True):
        again = select(scores, VOTES[name], plan, eligible=eligible)
        assert all(torch.equal(a, m) for a, m in zip(again, masks, strict=True))
    assert torch.equal(Best({0: scores[0]["a"]}, Ranking([scores[0]["a"]]), 777)[0], best)


@pytest.mark.parametrize("name", ["unanimous", "majority", "mean"])
@pytest.mark.parametrize("kind", ["random", "signed", "80 % zero"])
def test_scores_in_bfloat16_are_ranked_as_the_numbers_they_are(name, kind, device):
    halves = [{t: s.bfloat16() for t, s in layer.items()} for layer in drawn(kind, device)]
    wide = [{t: s.float() for t, s in layer.items()} for layer in halves]
    for plan, eligible in cases(wide, device):
        masks = select(halves, VOTES[name], plan, eligible=eligible)
        expected = select(wide, VOTES[name], plan, eligible=eligible)
        assert all(torch.equal(m, e) for m, e in zip(masks, expected, strict=True))


@pytest.mark.parametrize("kind", MIXED)
def test_a_tasks_own_best_are_the_highest_and_earlier_ones_of_equals(kind, device):
    scores = drawn(kind, device)
    pieces = {i: layer["a"] for i, layer in enumerate(scores) if "a" in layer}
    flat = torch.cat(list(pieces.values())).cpu()
    order = torch.sort(flat, descending=True, stable=True).indices
    ranking = Ranking(list(pieces.values()))
    for keep in (0, 1, 17, flat.numel() // 3, flat.numel() - 1, flat.numel()):
        best = Best(pieces, ranking, keep)
        expected = torch.zeros_like(flat, dtype=torch.bool)
        expected[order[:keep]] = True
        assert list(best) == list(pieces)
        assert len(best) == len(pieces)
        assert torch.equal(torch.cat([best[i] for i in best]).cpu(), expected)


@pytest.mark.parametrize("name", ["unanimous", "intersection"])
def test_flushed_subnormal_numbers_do_not_mislead_comparisons(name, device):
    """What is 0 stays apart from what is the next larger number, also for a CPU that flushes it."""
    values = on(device, *([0.0] * 80 + [float(i) for i in range(1, 21)]))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush")
    try:
        [mask] = select([{"a": values, "b": values}], VOTES[name], [Quota((0,), 20, (0,))])
    finally:
        torch.set_flush_denormal(False)
    assert mask.tolist() == [False] * 80 + [True] * 20
