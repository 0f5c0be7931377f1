from dataclasses import FrozenInstanceError, replace
from functools import partial

import pytest
import torch
from torch import nn

from mtprune import (
    NM,
    Channel,
    Cubic,
    Erk,
    Floor,
    Grouped,
    Linear,
    LowRank,
    MultitaskPruner,
    OneShot,
    PerTaskKeep,
    Regrow,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    saliency,
    votes,
)
from mtprune.allocation import Budget, parse_allocation
from mtprune.facts import Subject
from mtprune.methods import Ballot, Masks, Method, Needs, describe
from mtprune.statistics import JOINT
from mtprune.structure import Group, Member
from tests import oracles
from tests.oracles import EXACT, KINDS, ODD, sampler
from tests.test_votes import EVERY_VOTE, VOTES

SPARSITIES = [0.0, 0.1, 0.9, 0.999]
MAPPING = dict.fromkeys(["trunk", "neck", "a", "b"], 0.8)


def ballot(net, device, kind="random", seed=0, masks=None, scores=None):
    generator = torch.Generator().manual_seed(seed)
    masks = masks or [torch.ones(n, dtype=torch.bool, device=device) for n in net.sizes]
    # Quarters, so that many weights tie.
    weights = [
        (torch.randn(n, generator=generator) * 4).round().to(device) / 4 * mask
        for n, mask in zip(net.sizes, masks, strict=True)
    ]
    places = zip(net.shapes, net.components, strict=True)
    return Ballot(
        subjects=[Subject(str(i), c, tuple(s), ()) for i, (s, c) in enumerate(places)],
        statistics={"saliency": scores or net.scores(sampler(kind, device, seed))},
        masks=masks,
        weights=weights,
        generator=torch.Generator().manual_seed(seed),
    )


def counts(masks):
    return [int(mask.sum()) for mask in masks]


def listed(masks):
    return [mask.tolist() for mask in masks]


def is_subset(small, large):
    return all(bool((b | ~a).all()) for a, b in zip(small, large, strict=True))


# --- The published rule --------------------------------------------------------------------------


def closed_form(device):
    """Four shared weights, ranked in opposite order, and one private weight for each task."""

    def tensor(*values):
        return torch.tensor(values, dtype=torch.float32, device=device)

    return Ballot(
        subjects=[
            Subject("trunk.weight", "trunk", (2, 2), ("one", "two")),
            Subject("one.weight", "one", (1, 1), ("one",)),
            Subject("two.weight", "two", (1, 1), ("two",)),
        ],
        statistics={
            "saliency": [
                {"one": tensor(4, 3, 2, 1), "two": tensor(1, 2, 3, 4)},
                {"one": tensor(0.5)},
                {"two": tensor(0.5)},
            ]
        },
        masks=[torch.ones(n, dtype=torch.bool, device=device) for n in (4, 1, 1)],
        weights=[torch.ones(n, device=device) for n in (4, 1, 1)],
        generator=torch.Generator(),
    )


@pytest.mark.parametrize(
    ("vote", "expected"),
    [
        pytest.param(votes.unanimous, [[True] * 4, [False], [False]], id="all shared"),
        pytest.param(votes.intersection, [[False] * 4, [False], [False]], id="none"),
    ],
)
def test_closed_form_of_the_published_rule(vote, expected, device):
    decision = Vote(PerTaskKeep(0.4), vote=vote).decide(closed_form(device), 0)
    assert listed(decision.masks) == expected
    assert listed(decision.alone["one"].values()) == [[True, True, False, False], [False]]
    assert listed(decision.alone["two"].values()) == [[False, False, True, True], [False]]
    assert list(decision.alone["two"]) == [0, 2]


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.4, 0.7, 0.9, 1.0])
def test_a_task_that_uses_ten_weights_keeps_ten_times_its_ratio(ratio, device):
    net = oracles.Net(shapes=((2, 5),), components=("trunk",), tasks=("a",))
    masks = Vote(PerTaskKeep(ratio)).decide(ballot(net, device), 0).masks
    assert counts(masks) == [int(ratio * 10)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.37, 0.8, 1.0])
def test_each_task_marks_its_exact_share_and_the_vote_merges_marks(kind, ratio, device):
    given = ballot(ODD, device, kind)
    merged = {
        name: Vote(PerTaskKeep(ratio), vote=VOTES[name]).decide(given, 0)
        for name in ("unanimous", "majority", "intersection")
    }
    alone = merged["unanimous"].alone
    for task in "abc":
        layers = [i for i, users in enumerate(ODD.tasks) if task in users]
        values = [v for i in layers for v in given.scores[i][task].tolist()]
        marks = [m for i in layers for m in alone[task][i].tolist()]
        assert list(alone[task]) == layers
        assert {i for i, m in enumerate(marks) if m} == oracles.top(
            values, int(ratio * ODD.used_by(task))
        )
    for i, users in enumerate(ODD.tasks):
        marks = torch.stack([alone[task][i] for task in users]).sum(0)
        assert merged["unanimous"].masks[i].tolist() == (marks >= 1).tolist()
        assert merged["intersection"].masks[i].tolist() == (marks == len(users)).tolist()
        assert merged["majority"].masks[i].tolist() == (marks * 2 >= len(users)).tolist()
    assert is_subset(merged["intersection"].masks, merged["majority"].masks)
    assert is_subset(merged["majority"].masks, merged["unanimous"].masks)


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.37, 0.8])
def test_at_the_sparsity_it_lands_on_the_published_rule_and_the_exact_budget_agree(ratio, device):
    given = ballot(ODD, device)
    published = Vote(PerTaskKeep(ratio)).decide(given, 0).masks
    zeros = ODD.total - sum(counts(published))
    exact = Vote(zeros / ODD.total, allocation="global", min_keep=0).decide(given, 0).masks
    assert listed(exact) == listed(published)
    assert sum(counts(published)) > int(ratio * ODD.total)  # what tuning the ratio had to undo


def test_dead_filters_do_not_pass_the_published_rule_either(device):
    given = ballot(ODD, device)
    for layer in given.scores[:5]:
        for task in layer:
            layer[task].zero_()
    masks = Vote(PerTaskKeep(0.5)).decide(given, 0).masks
    assert sum(counts(masks)) <= sum(int(0.5 * ODD.used_by(task)) for task in "abc")


# --- One shot ------------------------------------------------------------------------------------


def test_eight_weights_lose_the_smallest_six(device):
    net = oracles.Net(shapes=((2, 4),), components=("trunk",), tasks=("a",))
    scores = [{"a": torch.arange(1.0, 9.0, device=device)}]
    decision = Vote(0.75).decide(ballot(net, device, scores=scores), 0)
    assert listed(decision.masks) == [[False] * 6 + [True] * 2]
    assert listed(decision.alone["a"].values()) == [[False] * 6 + [True] * 2]


@EVERY_VOTE
@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "floor", Floor(0.9), "mapping"])
def test_zeros_are_exact_whatever_the_vote_and_the_allocation(name, allocation, device):
    given = ballot(EXACT, device, "80 % zero")
    order = oracles.ranking(given.scores, oracles.VOTES[name]) if allocation == "global" else []
    for sparsity in SPARSITIES:
        where = dict.fromkeys(MAPPING, sparsity) if allocation == "mapping" else allocation
        masks = Vote(sparsity, vote=VOTES[name], allocation=where).decide(given, 0).masks
        keep = EXACT.total - round(sparsity * EXACT.total)
        assert sum(counts(masks)) == keep
        if allocation != "mapping" and keep >= len(EXACT.sizes):
            assert min(counts(masks)) >= 1
        if allocation == "global":
            least = [1 if keep >= len(EXACT.sizes) else 0] * len(EXACT.sizes)
            expected = oracles.keep_best(order, range(6), keep, least)
            assert listed(masks) == oracles.as_masks(expected, EXACT.sizes)


@pytest.mark.parametrize("kind", ["random", "80 % zero", "signed"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_alone_is_what_each_task_would_keep_of_its_own(sparsity, kind, device):
    given = ballot(ODD, device, kind)
    alone = Vote(sparsity, vote=votes.mean, allocation="erk").decide(given, 0).alone
    assert sorted(alone) == ["a", "b", "c"]
    for task, own in alone.items():
        values = [v for i in own for v in given.scores[i][task].tolist()]
        kept = {i for i, m in enumerate(m for i in own for m in own[i].tolist()) if m}
        assert kept == oracles.top(values, round((1 - sparsity) * ODD.used_by(task)))


def test_the_joint_baseline_is_a_ballot_with_one_voter(device):
    sample = sampler("random", device)
    scores = [{JOINT: sample(n)} for n in ODD.sizes]
    decision = Vote(0.9, allocation="global", disentangled=False).decide(
        ballot(ODD, device, scores=scores), 0
    )
    values = torch.cat([layer[JOINT] for layer in scores]).tolist()
    best = oracles.top(values, ODD.total - round(0.9 * ODD.total))
    kept = {i for i, m in enumerate(m for mask in decision.masks for m in mask.tolist()) if m}
    assert len(kept) == len(best)
    assert len(kept & best) >= len(best) - 6  # but for the guard's one weight per layer
    assert list(decision.alone) == [JOINT]


def test_priority_and_min_keep_reach_the_selection(device):
    given = ballot(ODD, device)
    plain = counts(Vote(0.9, allocation="global").decide(given, 0).masks)
    preferred = counts(Vote(0.9, allocation="global", priority={"a": 8.0}).decide(given, 0).masks)
    assert sum(preferred) == sum(plain)
    assert preferred[3] > plain[3]
    wide = Vote(0.9, allocation="global", min_keep=3).decide(given, 0).masks
    assert all(c >= min(3, n) for c, n in zip(counts(wide), ODD.sizes, strict=True))


def test_deciding_changes_neither_scores_nor_masks_nor_the_global_generator(device):
    given = ballot(ODD, device)
    scores = [{t: s.clone() for t, s in layer.items()} for layer in given.scores]
    state = torch.get_rng_state()
    for method in (Vote(0.9), Vote(0.9, schedule=Regrow(10, 100)), Vote(PerTaskKeep(0.1))):
        first, again = (listed(method.decide(given, 10).masks) for _ in range(2))
        assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool(mask.all()) for mask in given.masks)
    for before, after in zip(scores, given.scores, strict=True):
        assert all(torch.equal(before[task], after[task]) for task in before)


# --- Gradual -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "allocation", ["global", "uniform", "erk", "floor", MAPPING, {"trunk": 0.85, "b": 0.5}], ids=str
)
@pytest.mark.parametrize("kind", [Linear, Cubic])
def test_masks_only_shrink_and_every_update_is_exact(kind, allocation, device):
    schedule = kind(begin=5, end=45, every=10)
    method = Vote(0.8, schedule=schedule, allocation=allocation)
    masks, step, seen = None, -1, 0
    while (step := schedule.next_update(step)) is not None:
        given = ballot(ODD, device, seed=step, masks=masks)  # every update sees other scores
        decision = method.decide(given, step)
        zeros = round(0.8 * schedule.progress(step) * ODD.total)
        assert sum(counts(decision.masks)) == ODD.total - zeros
        assert min(counts(decision.masks)) >= 1
        assert is_subset(decision.masks, given.masks)
        masks, seen = decision.masks, seen + 1
    assert seen == 5
    assert sum(counts(masks)) == ODD.total - round(0.8 * ODD.total)


def test_nothing_is_pruned_at_begin(device):
    method = Vote(0.9, schedule=Cubic(begin=100, end=200, every=10))
    assert all(bool(mask.all()) for mask in method.decide(ballot(ODD, device), 100).masks)


@EVERY_VOTE
def test_midway_the_best_of_what_is_left_is_kept(name, device):
    method = Vote(0.9, vote=VOTES[name], schedule=Cubic(0, 100, 25), allocation="global")
    earlier = method.decide(ballot(EXACT, device, seed=1), 25).masks
    given = ballot(EXACT, device, "signed", seed=2, masks=earlier)
    order = oracles.ranking(given.scores, oracles.VOTES[name])
    still = listed(earlier)
    keep = EXACT.total - round(0.9 * 0.875 * EXACT.total)
    expected = oracles.keep_best([(i, j) for i, j in order if still[i][j]], range(6), keep, [1] * 6)
    masks = method.decide(given, 50).masks
    assert sum(counts(masks)) == keep
    assert listed(masks) == oracles.as_masks(expected, EXACT.sizes)


# --- Regrow --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allocation", "of"),
    [
        ("erk", "erk"),
        ("uniform", "uniform"),
        (Erk(0.9), Erk(0.9)),
        ("floor", "erk"),
        (Floor(0.5, "uniform"), "uniform"),
    ],
    ids=str,
)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_the_first_draw_has_the_allocations_count_in_every_layer(allocation, of, sparsity, device):
    method = Vote(sparsity, schedule=Regrow(10, 100), allocation=allocation)
    masks = method.decide(ballot(ODD, device), 0).masks
    keep = ODD.total - round(sparsity * ODD.total)
    assert sum(counts(masks)) == keep
    budget = Budget(ODD.shapes, ODD.components, keep, ODD.sizes)
    assert counts(masks) == parse_allocation(of).counts(budget)
    assert min(counts(masks)) >= 1


def test_the_first_draw_under_a_mapping_is_exact_in_each_component(device):
    method = Vote(0.8, schedule=Regrow(10, 100), allocation=MAPPING)
    kept = counts(method.decide(ballot(ODD, device), 0).masks)
    assert sum(kept) == ODD.total - round(0.8 * ODD.total)
    for component in MAPPING:
        mine = [i for i, name in enumerate(ODD.components) if name == component]
        assert abs(sum(kept[i] for i in mine) - 0.2 * sum(ODD.sizes[i] for i in mine)) <= 1.5


def test_the_first_draw_depends_on_the_generator_alone(device):
    method = Vote(0.8, schedule=Regrow(10, 100))
    one = method.decide(ballot(ODD, device), 0).masks
    other_scores = ballot(ODD, device, "80 % zero")
    assert listed(method.decide(other_scores, 0).masks) == listed(one)
    other_seed = replace(ballot(ODD, device), generator=torch.Generator().manual_seed(99))
    assert listed(method.decide(other_seed, 0).masks) != listed(one)


def draw(device, seed=0, share=0.4):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(n, generator=generator) < share).to(device) for n in ODD.sizes]


@pytest.mark.parametrize("step", [10, 50, 90])
@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize("name", ["unanimous", "majority", "intersection"])
def test_an_exchange_drops_by_magnitude_grows_by_vote_and_keeps_every_count(
    name, fraction, step, device
):
    schedule = Regrow(every=10, end=100, fraction=fraction)
    method = Vote(0.6, saliency.gradient, VOTES[name], schedule, allocation="erk")
    given = ballot(ODD, device, "80 % zero", masks=draw(device))
    masks = method.decide(given, step).masks
    assert counts(masks) == counts(given.masks)
    order = oracles.ranking(given.scores, oracles.VOTES[name])
    for i, before in enumerate(listed(given.masks)):
        kept = [j for j, m in enumerate(before) if m]
        exchanged = min(round(schedule.fraction_at(step) * len(kept)), len(before) - len(kept))
        sizes = given.weights[i].abs().tolist()
        by_size = oracles.top([sizes[j] for j in kept], len(kept) - exchanged)
        survivors = {kept[j] for j in by_size}
        free = [j for layer, j in order if layer == i and j not in survivors]
        expected = survivors | set(free[:exchanged])
        assert {j for j, m in enumerate(masks[i].tolist()) if m} == expected


def test_an_exchange_by_hand(device):
    net = oracles.Net(shapes=((1, 8),), components=("trunk",), tasks=("a",))
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool, device=device)
    given = replace(
        ballot(net, device, masks=[mask]),
        weights=[torch.tensor([-4.0, 0.1, 3.0, -0.2, 0, 0, 0, 0], device=device)],
        statistics={"saliency": [{"a": torch.tensor([0.0, 0, 0, 6, 1, 2, 9, 3], device=device)}]},
    )
    # Half of four are dropped, the second and the fourth. Of what is free the seventh is best, and
    # then the fourth, which returns.
    masks = Vote(0.5, schedule=Regrow(1, 10**9, fraction=0.5)).decide(given, 1).masks
    assert masks[0].int().tolist() == [1, 0, 1, 1, 0, 0, 1, 0]


def test_growing_nothing_changes_nothing(device):
    # Near the end less than half a weight of any layer is to be exchanged.
    given = ballot(ODD, device, masks=draw(device))
    schedule = Regrow(every=1, end=100, fraction=0.3)
    assert 0 < schedule.fraction_at(96) * max(counts(given.masks)) < 0.5
    masks = Vote(0.6, schedule=schedule).decide(given, 96).masks
    assert listed(masks) == listed(given.masks)


def test_dense_and_empty_layers_stay_as_they_are(device):
    given_masks = draw(device)
    given_masks[0][:] = True
    given_masks[2][:] = False
    given = ballot(ODD, device, masks=given_masks)
    masks = Vote(0.5, schedule=Regrow(10, 100, fraction=1.0)).decide(given, 10).masks
    assert bool(masks[0].all())
    assert not bool(masks[2].any())
    assert counts(masks) == counts(given_masks)


# --- Validation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param(
            {"sparsity": 90},
            ValueError,
            r"`sparsity` must be in \[0, 1\)\. Got 90\. Did you mean 0\.9\?",
            id="sparsity 90",
        ),
        pytest.param({"sparsity": 99.5}, ValueError, r"Did you mean 0\.995\?", id="sparsity 99.5"),
        pytest.param({"sparsity": -0.1}, ValueError, r"Got -0\.1\.$", id="sparsity -0.1"),
        pytest.param({"sparsity": float("nan")}, ValueError, r"Got nan\.$", id="sparsity NaN"),
        pytest.param({"sparsity": 1.0}, ValueError, r"Got 1\.0\.$", id="sparsity 1.0"),
        pytest.param({"sparsity": 100}, ValueError, r"Got 100\.$", id="sparsity 100"),
        pytest.param(
            {"sparsity": True}, TypeError, r"`sparsity` must be a number.* Got True", id="True"
        ),
        pytest.param({"sparsity": "0.9"}, TypeError, r"must be a number.* Got '0\.9'", id="'0.9'"),
        pytest.param(
            {"saliency": "taylor"}, TypeError, "`saliency` must be a function. Got 'taylor'", id="s"
        ),
        pytest.param(
            {"vote": None},
            TypeError,
            "`vote` must be a function. Got None",
            id="vote None",
        ),
        pytest.param(
            {"saliency": lambda weight: weight},
            ValueError,
            r"`saliency` must be a function of \(weight, grad\)",
            id="saliency of the weight alone",
        ),
        pytest.param(
            {"vote": "majority"}, TypeError, "`vote` must be a function. Got 'majority'", id="vote"
        ),
        pytest.param(
            {"schedule": "cubic"},
            TypeError,
            r"`schedule` must be a schedule such as OneShot\(\).* Got 'cubic'",
            id="schedule name",
        ),
        pytest.param({"granularity": "row"}, TypeError, "`granularity` must be", id="granularity"),
        pytest.param({"schedule": None}, TypeError, "`schedule` must be", id="schedule None"),
        pytest.param(
            {"schedule": OneShot}, TypeError, "`schedule` must be", id="schedule not called"
        ),
        pytest.param(
            {"allocation": "ERK"},
            ValueError,
            r"`allocation` must be one of \('floor', 'global', 'uniform', 'erk'\)\. Got 'ERK'",
            id="allocation name",
        ),
        pytest.param(
            {"allocation": 0.5}, TypeError, "`allocation` must be one of .* Got 0.5", id="number"
        ),
        pytest.param(
            {"allocation": {"trunk": 90}},
            ValueError,
            r"`allocation\['trunk'\]` must be in \[0, 1\)\. Got 90\. Did you mean 0\.9\?",
            id="allocation of a component",
        ),
        pytest.param(
            {"observations": 0}, ValueError, "`observations` must be at least 1.* Got 0", id="0 obs"
        ),
        pytest.param({"observations": -1}, ValueError, "`observations` must", id="-1 obs"),
        pytest.param({"observations": 2.0}, ValueError, "`observations` must", id="2.0 obs"),
        pytest.param({"observations": True}, ValueError, "`observations` must", id="True obs"),
        pytest.param({"observations": "all"}, ValueError, "or 'auto'. Got 'all'", id="all obs"),
        pytest.param(
            {"min_keep": -1}, ValueError, "`min_keep` must be a whole number. Got -1", id="keep -1"
        ),
        pytest.param({"min_keep": 0.5}, ValueError, "`min_keep` must be", id="keep 0.5"),
        pytest.param(
            {"priority": {"seg": 0.0}},
            ValueError,
            r"`priority` of task 'seg' must be positive\. Got 0\.0",
            id="priority 0",
        ),
        pytest.param({"priority": {"seg": -2}}, ValueError, "must be positive", id="priority -2"),
        pytest.param(
            {"priority": {"seg": float("inf")}}, ValueError, "must be positive", id="priority inf"
        ),
        pytest.param(
            {"priority": {"seg": float("nan")}}, ValueError, "must be positive", id="priority NaN"
        ),
        pytest.param(
            {"priority": {"seg": "2"}}, TypeError, "`priority` of task 'seg'", id="priority '2'"
        ),
        pytest.param(
            {"priority": 2.0},
            TypeError,
            "`priority` must be a mapping task",
            id="priority of nobody",
        ),
        pytest.param(
            {"schedule": Regrow(10, 100), "allocation": "global"},
            ValueError,
            "Regrow keeps the number of weights of every layer, .*allocation='erk' or 'uniform'",
            id="Regrow with global",
        ),
        pytest.param(
            {"schedule": Regrow(10, 100), "sparsity": PerTaskKeep(0.1)},
            ValueError,
            "Regrow keeps the number .* with a number for `sparsity`",
            id="Regrow with PerTaskKeep",
        ),
    ],
)
def test_bad_options_are_refused_when_the_method_is_built(options, error, message):
    with pytest.raises(error, match=message):
        Vote(**({"sparsity": 0.9} | options))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_a_task_keeps_a_positive_share(ratio):
    with pytest.raises(ValueError, match=r"`ratio` must be in \(0, 1\]\. Got"):
        PerTaskKeep(ratio)


def test_methods_are_frozen_values():
    assert Vote(0.9) == Vote(0.9)
    assert Vote(0.9) != Vote(0.8)
    with pytest.raises(FrozenInstanceError):
        Vote(0.9).sparsity = 0.5
    assert not Vote(0.9).regrows
    assert Vote(0.9, schedule=Regrow(10, 100)).regrows


GROUP = Group("hidden", 2, (Member("0.weight", 0, (0, 1)),))
X = torch.zeros(1, 3)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        pytest.param(Vote(0.9), {"sparsity": 0.5, "allocation": Erk(0.5)}, id="vote"),
        pytest.param(Vote(PerTaskKeep(0.5)), {"sparsity": PerTaskKeep(0.25)}, id="per task"),
        pytest.param(Vote(granularity=NM(2, 4)), {"granularity": NM(1, 4)}, id="pattern"),
        pytest.param(Vote(0.5, granularity=Grouped(GROUP)), {"sparsity": 0.75}, id="groups"),
        pytest.param(
            Vote(macs=0.5, granularity=Channel(X)), {"macs": None, "speedup": 4.0}, id="macs"
        ),
        pytest.param(SoftThreshold(0.9), {"per": "layer", "weighting": "noise"}, id="soft"),
        pytest.param(SigmoidThreshold(0.9, end=10), {"end": 20}, id="sigmoid"),
        pytest.param(LowRank(0.5), {"min_rank": 2}, id="low rank"),
    ],
)
def test_a_method_with_another_value_is_another_method(method, change):
    assert replace(method) == method
    assert describe(replace(method)) == describe(method)
    other = replace(method, **change)
    assert other != method
    assert {name: getattr(other, name) for name in change} == change
    assert replace(other, **{name: getattr(method, name) for name in change}) == method


def test_a_saliency_and_a_vote_of_one_line_are_all_it_takes(device):
    method = Vote(
        0.9,
        saliency=lambda weight, grad: (weight - grad).abs(),
        vote=lambda percentiles: percentiles.square().sum(dim=0),
    )
    sample = sampler("signed", device)
    scores = [
        {task: method.saliency(sample(n), sample(n)) for task in users}
        for n, users in zip(ODD.sizes, ODD.tasks, strict=True)
    ]
    masks = method.decide(ballot(ODD, device, scores=scores), 0).masks
    assert sum(counts(masks)) == ODD.total - round(0.9 * ODD.total)


# --- Names of values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(votes.majority, "majority", id="function"),
        pytest.param(OneShot(3), "OneShot(at=3)", id="frozen value"),
        pytest.param(votes.at_least(2), "partial(mth_smallest, m=2)", id="partial"),
        pytest.param(partial(max, 1, key=abs), "partial(max, 1, key=abs)", id="nested"),
        pytest.param({"b": 1.5, "a": abs}, "{'a': abs, 'b': 1.5}", id="mapping, sorted"),
        pytest.param("floor", "'floor'", id="string"),
    ],
)
def test_values_are_described(value, expected):
    assert describe(value) == expected


def test_equal_methods_have_equal_descriptions_without_addresses():
    def build(m):
        return Vote(0.9, vote=votes.at_least(m), priority={"a": 2.0}, schedule=Cubic(0, 10, 5))

    assert describe(build(2)) == describe(build(2))
    assert describe(build(2)) != describe(build(3))
    assert "0x" not in describe(build(2))
    assert "Cubic(begin=0, end=10, every=5)" in describe(build(2))


# --- What is no method ---------------------------------------------------------------------------


class DecidesOnly:
    def decide(self, ballot, step):
        return Masks(ballot.masks)


class NamesNothing(Method[Masks]):
    def needs(self, inventory):
        return Needs()

    def decide(self, ballot, step):
        return Masks(ballot.masks)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Vote, r"`method` must be a method such as Vote\(sparsity=0\.9\).* Got <class"),
        (3, r"`method` must be a method such as .* Got 3\."),
        (
            DecidesOnly(),
            r"`method` DecidesOnly lacks sparsity, schedule, needs, granularity, .*hold",
        ),
        (
            NamesNothing(),
            r"NamesNothing lacks sparsity, schedule\. Subclass mtprune\.methods\.Method, which "
            r"brings all but sparsity, schedule, needs, decide\.",
        ),
    ],
)
def test_what_is_no_method_is_refused_by_name(made, message):
    model = nn.ModuleDict({"trunk": nn.Linear(2, 2)})
    with pytest.raises(TypeError, match=message):
        MultitaskPruner(model, ["a"], "trunk", method=made)
    MultitaskPruner(model, ["a"], "trunk").finalize()
