"""Scoring folded into the training backward, and scores in other places and precisions."""

import itertools

import pytest
import torch

from mtprune import Cubic, MultitaskPruner, OneShot, Vote, saliency
from tests import nets
from tests.checkpoints import scores as scored
from tests.nets import Run, build, same
from tests.runs import record
from tests.test_resume import load

GRADUALLY = Vote(0.7, schedule=Cubic(1, 12, 1))


def gradients(run):
    return {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}


def gather(run, fold, batches=2, scaler=None):
    """Gradients accumulated over batches, and scores, of one observed pass."""
    run.model.zero_grad()
    for at in range(batches):
        outputs, batch = run.forward(at)
        losses = run.pruner.observe(outputs, batch, scaler=scaler, fold=fold)
        if not fold:
            total = torch.stack([x.float() for x in losses.values()]).sum()
            (total if scaler is None else scaler.scale(total)).backward()
    return gradients(run), scored(run.pruner)


def assert_alike(found, plain):
    assert set(found) == set(plain)
    for name, value in plain.items():
        rounding = 5e-2 if value.dtype in (torch.bfloat16, torch.float16) else 1e-4
        size = float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=rounding, atol=rounding * size + 1e-5)


def gradually(name, backend, device):
    return Run(build(name, device), GRADUALLY, backend)


@pytest.mark.parametrize(
    ("name", "steps", "backend"),
    nets.each(
        [
            *((name, 0, "prune") for name in nets.SHELF),  # no masks yet: back-ends are the same
            *itertools.product(nets.SHELF, [8], ["prune", "inplace"]),
        ]
    ),
)
def test_gradients_and_scores_are_those_of_an_ordinary_pass(name, steps, backend, device):
    """Also of a net that is pruned already, and with gradients accumulated over two batches."""
    plain, folded = (gradually(name, backend, device) for _ in range(2))
    if steps:
        state = record(gradually, name, backend, device).at(steps).checkpoint
        load(plain, state), load(folded, state)
    want, expected = gather(plain, fold=False)
    found, scores = gather(folded, fold=True)
    if backend == "prune":
        # Where a module's weight is read without a call of the module, an ordinary pass leaves a
        # gradient at pruned places, which no step keeps; a folded one may not.
        for layer, mask in plain.pruner.masks.items():
            for grads in (found, want):
                if layer + "_orig" in grads:
                    grads[layer + "_orig"] = grads[layer + "_orig"] * mask
    assert_alike(found, want)
    assert scores.keys() == expected.keys()
    for task in scores:
        assert_alike(scores[task], expected[task])


@pytest.mark.parametrize("name", ["plain", "skipped_layer", "conv_bn"])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Vote(0.7, schedule=OneShot(90)), id="far from an update"),
        pytest.param(Vote(0.7, observations=9, disentangled=False), id="joint"),
        pytest.param(Vote(0.7, saliency=saliency.magnitude, observations=9), id="no data"),
        pytest.param(Vote(0.7, schedule=OneShot(9), observations=9), id="near"),
    ],
)
def test_every_method_gets_its_gradients_near_an_update_and_far(name, method, backend, device):
    want, _ = gather(Run(build(name, device), method, backend), fold=False)
    found, _ = gather(Run(build(name, device), method, backend), fold=True)
    assert_alike(found, want)


def test_a_task_that_is_no_longer_wanted_still_trains(backend, device):
    """Of two tasks seen in different batches one has been observed, the other not."""
    runs = [Run(build("plain", device), Vote(0.7), backend) for _ in range(2)]
    for run in runs:
        outputs, batch = run.forward(0)
        run.pruner.observe(outputs, batch, tasks=["a"])
    want, _ = gather(runs[0], fold=False, batches=1)
    found, _ = gather(runs[1], fold=True, batches=1)
    assert_alike(found, want)


def test_a_scaled_gradient_arrives_scaled_and_an_overflow_is_seen(backend, device):
    def scaler():
        return torch.amp.GradScaler(device.type, init_scale=2.0**10)

    method = Vote(0.7, observations=3)
    want, expected = gather(Run(build("plain", device), method, backend), False, scaler=scaler())
    run = Run(build("plain", device), method, backend)
    found, scores = gather(run, True, scaler=scaler())
    assert_alike(found, want)
    for task in scores:
        assert_alike(scores[task], expected[task])
    before = {name: score.clone() for name, score in scores["a"].items()}
    outputs, batch = run.forward(2)
    losses = {t: loss(outputs, batch) * 1e38 for t, loss in run.net.task_losses.items()}
    run.pruner.observe_losses(losses, scaler=scaler(), fold=True)
    assert not all(bool(grad.isfinite().all()) for grad in gradients(run).values())
    assert same(scored(run.pruner)["a"], before)


def test_a_scaler_that_nobody_else_starts_steps_as_without_folding(backend, device):
    runs = [Run(build("plain", device), Vote(0.7, schedule=OneShot(1)), backend) for _ in range(2)]
    for run, fold in zip(runs, (False, True), strict=True):
        scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
        for at in range(3):  # nothing is observed in the last step
            run.optimizer.zero_grad()
            outputs, batch = run.forward(at)
            losses = run.pruner.observe(outputs, batch, scaler=scaler, fold=fold)
            if not fold:
                scaler.scale(torch.stack(list(losses.values())).sum()).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.pruner.step()
    plain, folded = (nets.weights(run) for run in runs)
    assert_alike(folded, plain)
    assert same(runs[0].pruner.masks, runs[1].pruner.masks)


def test_folded_training_ends_with_the_same_masks(backend, device):
    plain = Run(build("plain", device), GRADUALLY, backend).train(14)
    run = Run(build("plain", device), GRADUALLY, backend)
    for _ in range(14):
        run.optimizer.zero_grad()
        outputs, batch = run.forward()
        run.pruner.observe(outputs, batch, fold=True)
        run.optimizer.step()
        run.at += 1
        run.pruner.step()
    assert same(run.pruner.masks, plain.pruner.masks)


@pytest.mark.parametrize("at", [0, 50])
def test_a_second_backward_fails(at, device):
    run = Run(build("plain", device), Vote(0.7, schedule=OneShot(at)))
    outputs, batch = run.forward()
    losses = run.pruner.observe(outputs, batch, fold=True)
    with pytest.raises(RuntimeError, match="second time"):
        sum(losses.values()).backward()


def test_several_processes_are_refused(device, monkeypatch):
    run = Run(build("plain", device))
    outputs, batch = run.forward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    with pytest.raises(RuntimeError, match=r"fold=True works in one process only.*then backward"):
        run.pruner.observe(outputs, batch, fold=True)


# Where scores are, and how precise.


def pruned(device, backend, **options):
    run = Run(build("conv_bn", device), Vote(0.7, observations=3), backend, **options)
    for at in range(3):
        outputs, batch = run.forward(at)
        run.pruner.observe(outputs, batch)
    assert run.pruner.step()
    return run


def test_scores_in_bfloat16_give_the_exact_count_and_nearly_the_same_masks(backend, device):
    exact = pruned(device, backend).pruner
    rough = pruned(device, backend, score_dtype=torch.bfloat16).pruner
    assert rough.sparsity == exact.sparsity
    ours, theirs = (torch.cat([m.flatten() for m in p.masks.values()]) for p in (exact, rough))
    assert int((ours & theirs).sum()) > 0.9 * int((ours | theirs).sum())


def test_scores_on_the_cpu_change_nothing(backend, device):
    elsewhere = pruned(device, backend, score_device="cpu").pruner
    assert same(elsewhere.masks, pruned(device, backend).pruner.masks)
    assert all(mask.device.type == device.type for mask in elsewhere.masks.values())
    assert elsewhere.report().kept


def test_bfloat16_scores_are_kept_and_saved_as_such(device):
    run = Run(build("plain", device), Vote(0.7, observations=3), score_dtype=torch.bfloat16)
    outputs, batch = run.forward()
    run.pruner.observe(outputs, batch)
    state = run.pruner.state_dict()
    assert {s.dtype for s in scored(run.pruner)["a"].values()} == {torch.bfloat16}
    other = Run(build("plain", device), Vote(0.7, observations=3), score_dtype=torch.bfloat16)
    other.pruner.load_state_dict(state)
    assert same(scored(other.pruner)["a"], scored(run.pruner)["a"])


def test_other_precisions_are_refused(device):
    net = build("plain", device)
    with pytest.raises(ValueError, match=r"`score_dtype` must be torch.float32 or torch.bfloat16"):
        MultitaskPruner(net.model, net.task_losses, score_dtype=torch.float16)
