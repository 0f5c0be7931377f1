"""A first run: `sparsity` and `steps` in place of a method, and a warning against haste."""

import warnings

import pytest

from mtprune import METHODS, Cubic, MultitaskPruner, OneShot, Rounds, Vote, recipes, saliency
from mtprune.methods import describe
from tests import nets

HASTE = r"Everything is pruned at the first step of this loop.*pruner\.prune\(batches\)"


def pruner_of(net, **options):
    return MultitaskPruner(net.model, net.task_losses, net.shared_modules, **options)


def test_a_sparsity_and_steps_are_the_best_method():
    by_hand, short = (
        pruner_of(nets.build("plain"), **options)
        for options in ({"method": recipes.best(0.7, 8)}, {"sparsity": 0.7, "steps": 8})
    )
    assert by_hand.state_dict()["method"] == short.state_dict()["method"]
    net = nets.build("plain")
    optimizer = nets.sgd(net.model)
    pruner = pruner_of(net, sparsity=0.7, steps=8, optimizer=optimizer)
    for at in range(8):
        batch = net.make_batch(at)
        optimizer.zero_grad()
        sum(pruner.observe(net.model(batch["x"]), batch).values()).backward()
        optimizer.step()
        pruner.step()
    total = pruner.report().parameters
    assert pruner.report().kept == total - round(0.7 * total)


def test_a_sparsity_alone_is_for_prune():
    net = nets.build("plain")
    pruner = pruner_of(net, sparsity=0.7)
    assert pruner.state_dict()["method"] == describe(recipes.best(0.7))
    batches = [net.make_batch(i) for i in range(4)]
    report = pruner.prune(batches, forward=lambda model, b: model(b["x"]), progress=False)
    assert report.kept == report.parameters - round(0.7 * report.parameters)


def test_a_method_says_by_itself_how_much_and_when():
    for more in ({"sparsity": 0.9}, {"steps": 10}, {"sparsity": 0.9, "steps": 10}):
        with pytest.raises(ValueError, match="`method` says by itself how much is pruned and when"):
            pruner_of(nets.build("plain"), method=Vote(0.9), **more)
    with pytest.raises(ValueError, match="`steps` goes with `sparsity`"):
        pruner_of(nets.build("plain"), steps=10)
    with pytest.raises(ValueError, match=r"Got 90\. Did you mean 0\.9\?"):
        pruner_of(nets.build("plain"), sparsity=90, steps=10)


def loop(method):
    net = nets.build("plain")
    optimizer = nets.sgd(net.model)
    pruner = pruner_of(net, method=method, optimizer=optimizer)
    for at in range(3):
        batch = net.make_batch(at)
        optimizer.zero_grad()
        sum(pruner.observe(net.model(batch["x"]), batch).values()).backward()
        optimizer.step()
        pruner.step()
    assert pruner.sparsity > 0.4


@pytest.mark.parametrize(
    "method",
    [None, Vote(0.5), Vote(0.5, saliency=saliency.fisher), recipes.disparse_pretrained(0.5)],
)
def test_all_at_once_at_the_first_step_warns_once(method):
    with pytest.warns(UserWarning, match=HASTE) as caught:
        loop(method)
    assert len(caught) == 1


@pytest.mark.parametrize(
    "method",
    [
        recipes.disparse_static(0.5),
        recipes.snip(0.5),
        recipes.random(0.5),
        recipes.magnitude(0.5),
        Vote(0.5, schedule=OneShot(1)),
        Vote(0.5, schedule=Cubic(begin=0, end=2, every=1)),
    ],
    ids=["disparse_static", "snip", "random", "magnitude", "later", "gradual"],
)
def test_on_purpose_or_later_does_not_warn(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(method)


@pytest.mark.parametrize(
    "method", [Vote(0.5), Vote(0.5, schedule=Rounds(1))], ids=["once", "rounds"]
)
def test_prune_does_not_warn(method):
    net = nets.build("plain")
    pruner = pruner_of(net, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = [net.make_batch(i) for i in range(2)]
        pruner.prune(batches, forward=lambda model, b: model(b["x"]), progress=False)


REST = r"finalize\(\) was called at step 3, before the last update of the schedule at step 5"


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_what_was_not_pruned_yet_is_told_at_the_end(steps):
    """A run that ends early, and one in which `step` was left out."""
    net = nets.build("plain")
    optimizer = nets.sgd(net.model)
    method = Vote(0.5, schedule=Cubic(begin=0, end=5, every=1))
    pruner = pruner_of(net, method=method, optimizer=optimizer)
    for at in range(max(3, steps)):
        batch = net.make_batch(at)
        optimizer.zero_grad()
        sum(pruner.observe(net.model(batch["x"]), batch).values()).backward()
        optimizer.step()
        if steps:
            pruner.step()
    if steps == 6:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pruner.finalize()
        return
    with pytest.warns(UserWarning, match=REST) as told:
        pruner.finalize()
    share = f"{pruner.report().sparsity:.2%} of the weights are zero"
    assert share in str(told[0].message)
    assert ("0.00%" in share) == (not steps)


def test_who_asks_for_no_zeros_is_not_told_that_there_are_none():
    net = nets.build("plain")
    pruner = pruner_of(net, method=METHODS["dense"](0.9, 100), optimizer=None)
    batch = net.make_batch(0)
    sum(pruner.observe(net.model(batch["x"]), batch).values()).backward()
    pruner.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.finalize()
    assert pruner.report().sparsity == 0.0


def test_sparse_training_may_end_at_any_step():
    net = nets.build("plain")
    optimizer = nets.sgd(net.model)
    method = recipes.disparse_dynamic(0.5, every=2, end=100)
    pruner = pruner_of(net, method=method, optimizer=optimizer)
    batch = net.make_batch(0)
    sum(pruner.observe(net.model(batch["x"]), batch).values()).backward()
    optimizer.step()
    pruner.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.finalize()
