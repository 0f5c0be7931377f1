"""Voters that are no tasks: against literals, and against a task that stands for them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from mtprune import (
    NM,
    Block,
    Cubic,
    Erk,
    MultitaskPruner,
    OneShot,
    PerTaskKeep,
    Regrow,
    Vote,
    saliency,
    votes,
)
from mtprune.methods import describe
from mtprune.testing import check_backends_agree, check_finalize, check_method, check_resume
from tests import nets
from tests.long import few

VOTERS = (saliency.magnitude,)


class Two(nn.Module):
    """Two tasks on four shared weights, and a head of one weight each."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 1, bias=False)
        self.a = nn.Linear(1, 1, bias=False)
        self.b = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.trunk.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
            self.a.weight.fill_(5.0)
            self.b.weight.fill_(6.0)

    def forward(self, x):
        return x


def scores(model, x):
    """Losses whose |w g| are 4, 3, 2, 1 for a and 1, 2, 4, 3 for b; in the heads 5 and 0.5."""
    w = model.trunk.weight[0]
    a = (w * torch.tensor([4.0, 1.5, 2 / 3, 0.25])).sum() + model.a.weight.sum()
    b = (w * torch.tensor([1.0, 1.0, 4 / 3, 0.75])).sum() + model.b.weight.sum() / 12
    return {"a": a, "b": b}


def kept(method):
    model = Two()
    pruner = MultitaskPruner(
        model,
        {task: partial(lambda out, x, task: scores(model, x)[task], task=task) for task in "ab"},
        "trunk",
        method=method,
    )
    for _ in range(2):
        pruner.observe(model(torch.ones(1)), None)
    assert pruner.step()
    report = pruner.report()
    masks = [bool(x) for mask in pruner.masks.values() for x in mask.flatten()]
    return masks, report


LITERAL = {"saliency": saliency.taylor, "allocation": "global", "min_keep": 0, "observations": 2}


@pytest.mark.parametrize(
    ("vote", "sparsity", "expected"),
    [
        # Percentiles of a: .6 .4 .2 0 and .8; of b: .2 .4 .8 .6 and 0; of |w|: 0 1 2 3 4 5 sixths.
        pytest.param(votes.unanimous, 1 / 3, [0, 0, 1, 1, 1, 1], id="unanimous"),
        pytest.param(votes.intersection, 2 / 3, [0, 1, 0, 0, 1, 0], id="intersection"),
        pytest.param(votes.majority, 2 / 3, [0, 0, 0, 0, 1, 1], id="majority, .8 and 5/6 above .5"),
        pytest.param(votes.at_least(1), 2 / 3, [0, 1, 0, 0, 1, 0], id="at least one"),
        pytest.param(votes.at_least(2), 1 / 2, [0, 1, 0, 1, 1, 0], id="at least two"),
        pytest.param(votes.mean, 1 / 2, [0, 0, 1, 0, 1, 1], id="mean"),
    ],
)
def test_a_voter_is_one_more_row(vote, sparsity, expected):
    worth = {
        "a": [0.6, 0.4, 0.2, 0.0, 0.8, None],
        "b": [0.2, 0.4, 0.8, 0.6, None, 0.0],
        "w": [i / 6 for i in range(6)],
    }
    rows = [torch.tensor([[v[i]] for v in worth.values() if v[i] is not None]) for i in range(6)]
    order = sorted(range(6), key=lambda i: (-round(float(vote(rows[i].double())), 9), i))
    best = set(order[: 6 - round(6 * sparsity)])
    masks, _ = kept(Vote(sparsity, vote=vote, voters=VOTERS, **LITERAL))
    assert masks == [i in best for i in range(6)]


def test_it_votes_in_heads_too_and_has_a_column_in_the_report():
    """Task b needs its head least of all it uses, and magnitude most."""
    assert kept(Vote(1 / 3, **LITERAL))[0] == [True, False, True, True, True, False]
    masks, report = kept(Vote(1 / 3, voters=VOTERS, **LITERAL))
    assert masks == [True, False, True, False, True, True]
    head = next(row for row in report.layers if row.name == "b.weight")
    assert head.tasks == ("b",)
    assert head.want == {"b": 0.0, "magnitude": 1.0}
    assert head.unanimity == 0.0
    assert "want magnitude" in str(report)
    assert report.tasks == ("a", "b")
    assert "voters=(magnitude,)" in report.method


def test_priority_of_a_voter_by_its_name():
    """At a third of the say of a task magnitude has none at the top."""
    quiet = Vote(1 / 3, voters=VOTERS, priority={"magnitude": 0.1}, **LITERAL)
    assert kept(quiet)[0] == kept(Vote(1 / 3, **LITERAL))[0]
    joint = Vote(0.5, voters=VOTERS, disentangled=False, priority={"magnitude": 1e6}, **LITERAL)
    assert kept(joint)[0] == [False, False, False, True, True, True]
    with pytest.raises(ValueError, match=r"`priority` names \['size'\]. Known here: .*magnitude"):
        kept(Vote(0.5, voters=VOTERS, priority={"size": 2.0}))
    with pytest.raises(ValueError, match=r"`priority` names \['a'\]. Known here: \['magnitude'\]"):
        kept(Vote(0.5, voters=VOTERS, disentangled=False, priority={"a": 2.0}))


def test_with_per_task_keep_a_voter_keeps_its_share_too():
    masks, _ = kept(Vote(PerTaskKeep(0.2), **{**LITERAL, "allocation": "floor"}))
    assert masks == [False, False, True, False, True, False]
    more, _ = kept(Vote(PerTaskKeep(0.2), voters=VOTERS, **{**LITERAL, "allocation": "floor"}))
    assert more == [False, False, True, False, True, True]


def test_a_voter_is_asked_at_the_update():
    model = Two()
    method = Vote(0.5, voters=VOTERS, vote=votes.mean, priority={"magnitude": 1e-6}, **LITERAL)
    pruner = MultitaskPruner(
        model,
        {task: partial(lambda out, x, task: scores(model, x)[task], task=task) for task in "ab"},
        "trunk",
        method=replace(method, vote=votes.intersection),
    )
    for _ in range(2):
        pruner.observe(None, None)
    with torch.no_grad():  # the largest are now the smallest
        for p in model.parameters():
            p.copy_(1 / p)
    pruner.step()
    assert pruner.masks["trunk.weight"].tolist() == [[True, True, True, False]]


def by_inputs(weight, grad=None, *, inputs):
    return weight.abs()


def by_task(weight, grad=None, *, task):
    return weight.abs()


@pytest.mark.parametrize(
    ("voter", "asks"),
    [
        (saliency.taylor, "'taylor' asks for grad"),
        (by_inputs, "'by_inputs' asks for inputs"),
        (by_task, "'by_task' asks for task"),
    ],
)
def test_voters_that_look_at_data_are_refused(voter, asks):
    with pytest.raises(ValueError, match=rf"`voters` look at no data: .*{asks}\. Pass it as"):
        Vote(0.5, voters=(voter,))


def test_voters_that_cannot_be_told_apart_or_are_none_are_refused():
    with pytest.raises(ValueError, match="Two of `voters` are called 'magnitude'"):
        Vote(0.5, voters=(saliency.magnitude, saliency.magnitude))
    with pytest.raises(TypeError, match="`voters` must be a tuple of saliencies"):
        Vote(0.5, voters=saliency.magnitude)
    with pytest.raises(TypeError, match="`voters` must be a function"):
        Vote(0.5, voters=(0.5,))
    with pytest.raises(
        ValueError, match="`voters` look at weights, and those that Regrow may grow"
    ):
        Vote(0.5, voters=VOTERS, allocation="erk", schedule=Regrow(every=2, end=9))
    net = nn.ModuleDict({"trunk": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="Voter 'magnitude' has the name of a task"):
        MultitaskPruner(net, ["magnitude", "b"], method=Vote(0.5, voters=VOTERS))


def test_random_may_vote_and_functions_of_ones_own_by_their_names():
    def by_depth(weight, grad=None, *, layer):
        return torch.full_like(weight, float(layer.name == "trunk.weight"))

    _, report = kept(Vote(0.5, voters=(saliency.random, by_depth), **LITERAL))
    assert [*report.components[0].want] == ["a", "b", "random", "by_depth"]


class Sizes:
    """A task that stands for magnitude: its loss is the sum of |w|, so w^2 |g| is w^2."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __call__(self, outputs, batch):
        return torch.stack([p.abs().sum() for p in self.parameters]).sum()


@pytest.mark.parametrize("name", ["plain", "conv_bn", "tied", "skipped_layer", "attention"])
@pytest.mark.parametrize(
    "options",
    [
        {"vote": votes.unanimous},
        {"vote": votes.majority, "allocation": "global"},
        {"vote": votes.mean, "allocation": Erk(0.9)},
        {"vote": votes.at_least(2), "allocation": "uniform"},
        {"vote": votes.unanimous, "granularity": Block(1, 2)},
    ],
    ids=["unanimous", "majority", "mean", "at_least", "blocks"],
)
def test_it_votes_as_a_task_would_whose_loss_is_the_sum_of_sizes(name, options):
    def masks(emulated):
        net = nets.build(name)
        with torch.no_grad():
            for p in net.model.parameters():
                p.copy_((p * 256).round() / 256)  # so that their squares are exact
        squared = isinstance(options.get("granularity"), Block)
        voter = squares if squared else saliency.magnitude
        losses = dict(net.task_losses)
        if emulated:
            prunable = MultitaskPruner(net.model, losses, net.shared_modules)
            names = list(prunable.masks)
            prunable.finalize()
            found = dict(net.model.named_parameters())
            losses["magnitude"] = Sizes([found[n] for n in names if found[n].requires_grad])
        method = Vote(
            0.7,
            saliency=saliency.taylor_magnitude,
            voters=() if emulated else (voter,),
            observations=2,
            **options,
        )
        pruner = MultitaskPruner(net.model, losses, net.shared_modules, method=method)
        batches = [net.make_batch(i) for i in range(2)]
        torch.manual_seed(1)
        pruner.prune(batches, forward=lambda model, b: model(b["x"]), progress=False)
        return pruner.masks

    expected, found = masks(True), masks(False)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[layer], found[layer]) for layer in found)


def squares(weight, grad=None):
    """As the task's score is: sums of squares, where units are blocks."""
    return weight.square()


GRADUAL = Vote(
    0.5,
    saliency=saliency.taylor_magnitude,
    voters=VOTERS,
    schedule=Cubic(begin=1, end=5, every=2),
)


@pytest.mark.slow
@pytest.mark.parametrize("options", few([{}, {"disentangled": False}, {"straight_through": True}]))
def test_whatever_must_be_true_of_a_method_is_true_with_voters(options):
    check_method(replace(GRADUAL, **options), nested="straight_through" not in options)


@pytest.mark.slow
@pytest.mark.parametrize("check", few([check_backends_agree, check_resume, check_finalize]))
def test_blocks_have_voters(check):
    check(replace(GRADUAL, granularity=Block(1, 2)))


def test_scores_may_be_kept_in_bfloat16():
    def masks(**options):
        net = nets.build("conv_bn")
        method = replace(GRADUAL, schedule=OneShot(), priority={"magnitude": 1e9})
        pruner = MultitaskPruner(
            net.model, net.task_losses, net.shared_modules, method=method, **options
        )
        batches = [net.make_batch(i) for i in range(2)]
        pruner.prune(batches, forward=lambda model, b: model(b["x"]), progress=False)
        return pruner.masks

    wide, short = masks(), masks(score_dtype=torch.bfloat16, score_device="cpu")
    assert all(torch.equal(wide[name], short[name]) for name in wide)


def test_a_pattern_has_voters():
    net = nets.build("conv_bn")
    method = Vote(granularity=NM(2, 4), voters=VOTERS, priority={"magnitude": 1e9})
    pruner = MultitaskPruner(net.model, net.task_losses, net.shared_modules, method=method)
    weights = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    batches = [net.make_batch(i) for i in range(2)]
    pruner.prune(batches, forward=lambda model, b: model(b["x"]), progress=False)
    for name, mask in pruner.masks.items():
        assert torch.equal(mask.flatten(), NM(2, 4).best(weights[name].abs(), 2).flatten()), name


def test_a_method_without_voters_is_described_as_before():
    """So that checkpoints of before still load."""
    assert "voters" not in describe(Vote(0.5))
    assert "voters=(magnitude,)" in describe(Vote(0.5, voters=VOTERS))
    assert replace(Vote(0.5, voters=VOTERS), voters=()) == Vote(0.5)
