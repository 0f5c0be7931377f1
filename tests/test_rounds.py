"""Rounds: several re-scored updates inside one `prune`, against as many calls of one round each."""

from dataclasses import replace

import pytest
import torch

from mtprune import (
    NM,
    Block,
    Cubic,
    Hold,
    LowRank,
    MultitaskPruner,
    OneShot,
    PerTaskKeep,
    Rounds,
    SoftThreshold,
    Vote,
    saliency,
)
from mtprune.schedule import due
from tests import nets


def forward(model, batch):
    return model(batch["x"])


def pruner_of(net, method, **options):
    return MultitaskPruner(net.model, net.task_losses, net.shared_modules, method=method, **options)


class Loader:
    """Batches that can be begun again, and say which were taken."""

    def __init__(self, net, count):
        self.batches = [{**net.make_batch(i), "number": i} for i in range(count)]
        self.taken = []

    def __iter__(self):
        for batch in self.batches:
            self.taken.append(batch["number"])
            yield batch


def test_every_round_prunes_the_same_share_of_what_is_left():
    left = [1 - 0.9 * due(Rounds(3), step, 0.9) for step in range(3)]
    assert left == pytest.approx([10 ** (-1 / 3), 10 ** (-2 / 3), 0.1])
    assert due(Rounds(3), 2, 0.9) == 1.0
    assert [due(Rounds(2), step, 0.0) for step in (0, 1)] == [0.5, 1.0]
    assert due(Cubic(begin=0, end=4, every=1), 2, 0.9) == 0.875
    assert [Rounds(2).next_update(step) for step in (-1, 0, 1)] == [0, 1, None]


@pytest.mark.parametrize("backend", ["prune", "inplace"])
@pytest.mark.parametrize("name", ["plain", "conv_bn", "attention"])
def test_the_sparsity_after_every_round_is_exact_and_in_the_history(name, backend):
    net = nets.build(name)
    pruner = pruner_of(net, Vote(0.8, schedule=Rounds(3), observations=2), backend=backend)
    before = {n: b.clone() for n, b in net.model.named_buffers()}
    report = pruner.prune(Loader(net, 6), forward=forward, progress=False)
    total = report.parameters
    zeros = [round(moment.sparsity * total) for moment in report.history]
    assert zeros == [round(0.8 * due(Rounds(3), r, 0.8) * total) for r in range(3)]
    assert report.kept == total - round(0.8 * total)
    assert {n: b for n, b in net.model.named_buffers() if n in before}.keys() == before.keys()
    assert all(torch.equal(dict(net.model.named_buffers())[n], b) for n, b in before.items())
    with pytest.raises(RuntimeError, match="All updates of the schedule have been made already"):
        pruner.prune(Loader(net, 6), forward=forward, progress=False)


def test_rounds_are_as_many_prunings_of_the_pruned_network():
    """By hand: one pruner after the other, each on the masked weights, on the batches in turn."""
    net = nets.build("plain")
    method = Vote(0.8, schedule=Rounds(3), allocation="global", min_keep=0, observations=2)
    loader = Loader(net, 6)
    pruner = pruner_of(net, method)
    pruner.prune(loader, forward=forward, progress=False)
    assert loader.taken == [0, 1, 2, 3, 4, 5]
    other = nets.build("plain")
    for r in range(3):
        share = 0.8 * due(Rounds(3), r, 0.8)
        one = pruner_of(other, replace(method, sparsity=share, schedule=OneShot()))
        one.prune(loader.batches[2 * r : 2 * r + 2], forward=forward, progress=False)
        masks = one.masks
        one.finalize()
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())


def test_what_can_be_begun_again_is():
    net = nets.build("plain")
    loader = Loader(net, 3)
    pruner = pruner_of(net, Vote(0.8, schedule=Rounds(4), observations=2))
    pruner.prune(loader, forward=forward, progress=False)
    assert loader.taken == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_loader_is_begun_once_if_it_lasts(rounds):
    """To begin one starts its workers, and draws its order."""
    begun = []

    class Once(Loader):
        def __iter__(self):
            begun.append(len(begun))
            return iter(self.batches)

    net = nets.build("plain")
    method = Vote(0.8, schedule=Rounds(rounds) if rounds > 1 else OneShot(), observations=2)
    pruner_of(net, method).prune(Once(net, 4), forward=forward, progress=False)
    assert begun == [0]


def test_an_iterator_must_hold_enough_and_nothing_is_changed_if_it_does_not():
    net = nets.build("plain")
    pruner = pruner_of(net, Vote(0.8, schedule=Rounds(3), observations=2))
    batches = Loader(net, 6).batches
    short = r"too few for 3 rounds\. It holds 5, of 6 that they score on\. Pass more, or a list"
    with pytest.raises(ValueError, match=short):
        pruner.prune(iter(batches[:5]), forward=forward, progress=False)
    assert pruner.sparsity == 0.0
    pruner.prune(iter(batches), forward=forward, progress=False)
    same = pruner_of(nets.build("plain"), Vote(0.8, schedule=Rounds(3), observations=2))
    same.prune(batches, forward=forward, progress=False)
    assert all(torch.equal(mask, same.masks[name]) for name, mask in pruner.masks.items())


def test_where_the_number_is_found_out_an_iterator_may_run_out():
    net = nets.build("plain")
    pruner = pruner_of(net, Vote(0.8, schedule=Rounds(3), observations="auto"))
    with pytest.raises(ValueError, match=r"too few for 3 rounds\. It ran out before round 2\."):
        pruner.prune(iter(Loader(net, 3).batches), forward=forward, progress=False)
    again = pruner_of(nets.build("plain"), Vote(0.8, schedule=Rounds(2), observations="auto"))
    assert again.prune(Loader(net, 3), forward=forward, progress=False).sparsity > 0.7


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batch_at_all(batches):
    pruner = pruner_of(nets.build("plain"), Vote(0.8, schedule=Rounds(3)))
    with pytest.raises((RuntimeError, ValueError), match=r"no observation of tasks|It holds 0"):
        pruner.prune(batches, forward=forward, progress=False)


@pytest.mark.parametrize(
    "method",
    [
        Vote(0.7, granularity=Block(1, 2), schedule=Rounds(3)),
        Vote(granularity=NM(2, 4), schedule=Rounds(2)),
        Vote(PerTaskKeep(0.2), schedule=Rounds(3)),
        Vote(0.7, voters=(saliency.magnitude,), schedule=Rounds(3)),
        Vote(0.7, disentangled=False, schedule=Rounds(3)),
        LowRank(0.5, schedule=Rounds(3)),
    ],
    ids=["block", "pattern", "per task", "voters", "joint", "rank"],
)
def test_rounds_shrink_to_the_end(method):
    net = nets.build("transformer_encoder")
    pruner = pruner_of(net, method)
    report = pruner.prune(Loader(net, 4), forward=forward, progress=False)
    gone = [moment.sparsity for moment in report.history]
    assert len(gone) == method.schedule.n
    assert gone == sorted(gone)
    assert gone[0] < gone[-1]


def test_in_a_loop_they_are_refused_until_they_have_been_made():
    net = nets.build("plain")
    pruner = pruner_of(net, Vote(0.8, schedule=Rounds(2)))
    batch = net.make_batch(0)
    outputs = forward(net.model, batch)
    message = r"Rounds\(n=2\) prunes before training: call pruner\.prune\(batches\)"
    for call in (
        pruner.step,
        lambda: pruner.observe(outputs, batch),
        lambda: pruner.observe_losses({t: f(outputs, batch) for t, f in net.task_losses.items()}),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    pruner.prune(Loader(net, 2), forward=forward, progress=False)
    pruner.observe(forward(net.model, batch), batch)
    assert pruner.step() is False


def test_a_checkpoint_after_the_rounds_goes_on_in_a_loop():
    net = nets.build("plain")
    method = Vote(0.8, schedule=Rounds(2))
    pruner = pruner_of(net, method)
    pruner.prune(Loader(net, 2), forward=forward, progress=False)
    other = nets.build("plain")
    again = pruner_of(other, method)
    again.load_state_dict(pruner.state_dict())
    other.model.load_state_dict(net.model.state_dict())
    assert again.step() is False
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruner.masks.items())


def test_what_rounds_do_not_go_with():
    with pytest.raises(ValueError, match="`n` must be a whole number, at least 1"):
        Rounds(0)
    with pytest.raises(TypeError, match="`schedule` must be OneShot"):
        Hold(Rounds(2), until=9, every=1)
    with pytest.raises(ValueError, match="Rounds prune before training, and thresholds rise"):
        SoftThreshold(0.5, schedule=Rounds(2))
    with pytest.raises(ValueError, match="straight_through=True adds up scores over training"):
        Vote(0.5, schedule=Rounds(2), straight_through=True)
    with pytest.raises(ValueError, match="gates='learned' needs time to learn"):
        LowRank(0.5, "learned", schedule=Rounds(2))
