"""Checkpoints: whatever is loaded in whatever order, the run goes on bit for bit."""

import copy
import io
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mtprune import MultitaskPruner, OneShot, Vote
from tests import checkpoints, nets
from tests.nets import Run, build, evaluate, read, same, sgd, weights
from tests.pairs import pairs
from tests.runs import record

ORDERS = list(itertools.permutations(("model", "optimizer", "pruner")))

RUNS = {
    "static": (nets.static(), {}),
    "gradual": (nets.gradual(), {}),
    "dynamic": (nets.dynamic(), {}),
    "accumulating": (Vote(0.7, schedule=OneShot(10), observations=3), {"singly": True}),
    "automatic": (Vote(0.7, schedule=OneShot(3), observations="auto"), {}),
    "without_optimizer": (nets.gradual(), {"given": False, "optimizer": sgd}),
}

HASTE = "ignore:Everything is pruned at the first step of this loop"  # here on purpose


def start(kind, backend, device, name="plain", seed=0):
    method, options = RUNS[kind]
    return Run(build(name, device, seed=seed), method, backend, **options)


def recorded(kind, backend, device, name="plain"):
    return record(start, kind, backend, device, name)


def save(run):
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "pruner": run.pruner.state_dict(),
        "at": run.at,
    }


def through_a_file(state):
    file = io.BytesIO()
    torch.save(dict(state), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load(run, state, order=ORDERS[0]):
    state = copy.deepcopy(dict(state))  # optimizers keep the tensors they are given
    for part in order:
        getattr(run, part).load_state_dict(state[part])
    run.at = state["at"]
    return run


def equal(a, b):
    """Nested containers of tensors and plain values are the same, in type and order too."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def assert_same_end(one, other):
    assert same(weights(one), weights(other))
    assert same(one.pruner.masks, other.pruner.masks)
    assert one.pruner.report() == other.pruner.report()
    assert equal(one.pruner.state_dict(), other.pruner.state_dict())


def assert_ends_like(run, moment):
    """`assert_same_end`, with a run that was trained before."""
    assert same(weights(run), moment.weights)
    assert same(run.pruner.masks, moment.masks)
    assert run.pruner.report() == moment.report
    assert equal(run.pruner.state_dict(), moment.checkpoint["pruner"])


@pytest.mark.parametrize(
    ("kind", "order", "backend"), pairs(RUNS, ORDERS, ["prune", "inplace"]), ids=str
)
def test_a_resumed_run_is_the_uninterrupted_run(kind, order, backend, device):
    straight = recorded(kind, backend, device)
    state = through_a_file(straight.at(5).checkpoint)
    assert nets.zeros(straight.at(14).masks) > 0 or kind == "automatic"
    resumed = load(start(kind, backend, device, seed=9), state, order).train(9)
    assert_ends_like(resumed, straight.at(14))


@nets.EVERY_NET
@pytest.mark.parametrize(("kind", "backend"), [("gradual", "inplace"), ("dynamic", "prune")])
def test_every_net_resumes(kind, name, backend, device):
    straight = record(nets.start, name, kind, backend, device)
    state = through_a_file(straight.at(3).checkpoint)
    resumed = load(start(kind, backend, device, name, seed=9), state, ORDERS[-1])
    assert_ends_like(resumed.train(6), straight.at(9))


@pytest.mark.parametrize("at", range(11))
def test_a_run_of_single_task_batches_resumes_anywhere(at, backend, device):
    straight = recorded("accumulating", backend, device, "skipped_layer")
    state = through_a_file(straight.at(at).checkpoint)
    assert nets.zeros(straight.at(22).masks) > 0
    fresh = start("accumulating", backend, device, "skipped_layer", seed=9)
    assert_ends_like(load(fresh, state).train(22 - at), straight.at(22))


@pytest.mark.parametrize("between", [1, 2, 3])
def test_a_checkpoint_between_observe_and_step_resumes(between, backend, device):
    straight = start("gradual", backend, device).train(between)
    outputs, batch = straight.forward()
    straight.pruner.observe(outputs, batch)
    state = through_a_file(save(straight))
    resumed = load(start("gradual", backend, device, seed=9), state)
    assert straight.pruner.step() == resumed.pruner.step()
    assert_same_end(resumed.train(8), straight.train(8))


SCRIPT = """
import sys, torch
from tests import nets, test_resume

kind, backend, device, path, out = sys.argv[1:]
run = test_resume.start(kind, backend, torch.device(device), seed=9)
test_resume.load(run, torch.load(path, weights_only=True)).train(9)
torch.save({"weights": nets.weights(run), "masks": run.pruner.masks}, out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "accumulating"])
def test_a_new_process_goes_on_where_this_one_stopped(kind, backend, device, tmp_path):
    straight = recorded(kind, backend, device)
    path, out = str(tmp_path / "checkpoint.pt"), str(tmp_path / "end.pt")
    torch.save(dict(straight.at(5).checkpoint), path)
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        HASTE,
        "-c",
        SCRIPT,
        kind,
        backend,
        str(device),
        path,
        out,
    ]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    end = torch.load(out, weights_only=True)
    assert same(end["weights"], straight.at(14).weights)
    assert same(end["masks"], straight.at(14).masks)


@pytest.mark.parametrize("kind", RUNS)
def test_saving_and_loading_again_gives_the_same_state(kind, backend, device):
    first = through_a_file(recorded(kind, backend, device).at(5).checkpoint)
    second = through_a_file(save(load(start(kind, backend, device, seed=9), first)))
    third = through_a_file(save(load(start(kind, backend, device, seed=8), second)))
    assert equal(first["pruner"], second["pruner"])
    assert equal(first, second)
    assert equal(second, third)


@pytest.mark.parametrize("kind", RUNS)
def test_a_state_dict_is_a_snapshot(kind, backend, device):
    run = start(kind, backend, device).train(5)
    state = run.pruner.state_dict()
    kept = copy.deepcopy(state)
    run.train(6)
    assert equal(state, kept)
    other = start(kind, backend, device, seed=9)
    other.pruner.load_state_dict(state)
    load(other, save(run))
    other.train(2)
    assert equal(state, kept)


def test_loading_goes_back_in_time(backend, device):
    run = start("dynamic", backend, device).train(3)
    state = through_a_file(save(run))
    run.train(6)
    load(run, state).train(6)
    assert_ends_like(run, recorded("dynamic", backend, device).at(9))


@pytest.mark.parametrize("order", [ORDERS[0], ORDERS[-1]], ids="_".join)
def test_loading_a_state_from_before_the_first_masks_lifts_them(order, backend, device):
    run = start("gradual", backend, device).train(1)
    state = through_a_file(save(run))
    run.train(8)
    load(run, state, order)
    assert nets.zeros(run.pruner.masks) == 0
    run.train(8)
    assert_ends_like(run, recorded("gradual", backend, device).at(9))


@pytest.mark.parametrize(
    ("name", "kind", "backends"),
    pairs(
        ["plain", "attention", "lstm", "tied", "conv_bn"],
        ["gradual", "dynamic"],
        [("prune", "inplace"), ("inplace", "prune")],
    ),
)
def test_checkpoints_move_between_backends(name, kind, backends, device):
    source, target = backends
    straight = record(nets.start, name, kind, source, device)
    state, end = through_a_file(straight.at(5).checkpoint), straight.at(11)
    for order in (ORDERS[0], ORDERS[-1]):  # the model comes first, or the pruner
        resumed = load(start(kind, target, device, name, seed=9), state, order).train(6)
        assert same(resumed.pruner.masks, end.masks)
        one, other = weights(resumed), end.weights
        assert list(one) == list(other)
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-5)


@nets.EVERY_NET
def test_a_model_accepts_keys_from_before_during_and_after_pruning(name, backend, device):
    run = Run(build(name, device), backend=backend)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train(3)
    during = {k: v.clone() for k, v in run.model.state_dict().items()}
    expected = evaluate(run.model, run.net.make_batch(0))
    run.model.load_state_dict(during, strict=True)  # masked, into masked
    for out, want in zip(evaluate(run.model, run.net.make_batch(0)), expected, strict=True):
        assert torch.equal(out, want)
    early = Run(build(name, device, seed=9), backend=backend)
    early.model.load_state_dict(during, strict=True)  # masked, into one without masks yet
    for out, want in zip(evaluate(early.model, run.net.make_batch(0)), expected, strict=True):
        assert torch.equal(out, want)
    run.model.load_state_dict(before, strict=True)  # from before, into masked
    run.pruner.finalize()
    after = {k: v.clone() for k, v in run.model.state_dict().items()}
    late = Run(build(name, device, seed=9), backend=backend).train(3)
    late.model.load_state_dict(after, strict=True)


def test_a_dense_checkpoint_loaded_over_masks_is_masked_from_the_next_step(backend, device):
    run = Run(build("plain", device), backend=backend, given=False)
    dense = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train(3)
    run.model.load_state_dict(dense)
    run.pruner.step()
    for layer, mask in run.pruner.masks.items():
        assert torch.equal(read(run.model, layer), dense[layer] * mask)


@pytest.mark.slow
def test_observing_until_masks_are_stable_resumes_to_the_end(backend, device):
    straight = start("automatic", backend, device).train(75)
    assert nets.zeros(straight.pruner.masks) > 0
    state = through_a_file(recorded("automatic", backend, device).at(5).checkpoint)
    assert_same_end(load(start("automatic", backend, device, seed=9), state).train(70), straight)


def test_missing_and_unexpected_keys_are_still_reported(backend, device):
    run = Run(build("plain", device), backend=backend).train(3)
    state = dict(run.model.state_dict())
    state.pop("a.bias")
    state["nonsense"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*a\.bias.*Unexpected key.*nonsense"):
        run.model.load_state_dict(state)
    key = "trunk.0.weight" + ("_orig" if backend == "prune" else "")
    del state["nonsense"]
    state["a.bias"] = torch.zeros(1, device=device)
    state.pop(key)
    with pytest.raises(RuntimeError, match=r"Missing key.*trunk\.0\.weight"):
        run.model.load_state_dict(state)


def test_a_compact_checkpoint_holds_masks_as_bits(device):
    run = start("gradual", "prune", device).train(5)
    masks = checkpoints.bits(run.pruner)
    assert {name: bits.numel() for name, bits in masks.items()} == {
        name: -(-mask.numel() // 8) for name, mask in run.pruner.masks.items()
    }


REFUSED = {
    "tasks": lambda net, method: (dict(list(net.task_losses.items())[:1]), method),
    "method": lambda net, method: (net.task_losses, replace(method, sparsity=0.6)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_checkpoint_of_another_pruner_is_refused_and_nothing_changes(what, backend, device):
    run = start("gradual", backend, device).train(6)
    state = run.pruner.state_dict()
    net = build("plain", device)
    tasks, method = REFUSED[what](net, nets.gradual())
    other = MultitaskPruner(net.model, tasks, "auto", method=method, backend=backend)
    before = other.state_dict()
    with pytest.raises(ValueError, match=f"a pruner with other {what}"):
        other.load_state_dict(state)
    assert equal(other.state_dict(), before)


def test_a_checkpoint_of_another_shape_is_refused(backend, device):
    state = start("gradual", backend, device).train(6).pruner.state_dict()
    other = start("gradual", backend, device, "twelve_tasks")
    with pytest.raises(ValueError, match="a pruner with other tasks"):
        other.pruner.load_state_dict(state)
    skipped = start("gradual", backend, device, "tied")
    with pytest.raises(ValueError, match="a pruner with other shapes"):
        skipped.pruner.load_state_dict(state)


def test_a_state_dict_of_something_else_is_refused(backend, device):
    run = start("gradual", backend, device)
    with pytest.raises(ValueError, match="not a state_dict of a MultitaskPruner"):
        run.pruner.load_state_dict(run.optimizer.state_dict())
