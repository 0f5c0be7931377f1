"""What must hold for every net on the shelf, under both back-ends and every kind of schedule."""

from collections.abc import Mapping

import pytest
import torch

from tests import nets
from tests.checkpoints import users
from tests.nets import Run, build, read, same, size, zeros
from tests.runs import Moment, Record, record

BACKENDS = ("prune", "inplace")
EVERY_METHOD = pytest.mark.parametrize("method", nets.METHODS)


def by_step_alone(name: str, method: str, backend: str, device: torch.device) -> Run:
    method = nets.METHODS[method]()
    return Run(build(name, device), method, backend, nets.sgd, given=False)


# Static pruning is driven by step() alone, with momentum; the others follow AdamW's own steps.
STARTS = {"static": by_step_alone, "gradual": nets.start, "dynamic": nets.start}


def start(name: str, method: str, backend: str, device: torch.device) -> Run:
    return STARTS[method](name, method, backend, device)


def recorded(name: str, method: str, backend: str, device: torch.device) -> Record:
    return record(STARTS[method], name, method, backend, device)


def assert_masks_hold(moment: Moment, names: Mapping[str, list[str]]) -> None:
    """Whoever reads a pruned weight, under any of its names, reads exactly zero."""
    for name, mask in moment.masks.items():
        for alias in names[name]:
            weight = moment.read[alias]
            assert bool((weight[~mask] == 0).all()), alias
            assert bool(torch.isfinite(weight).all()), alias


@nets.EVERY_NET
@EVERY_METHOD
def test_zeros_are_exact_and_hold_after_every_step(name, method, backend, device):
    run = recorded(name, method, backend, device)
    schedule = nets.METHODS[method]().schedule
    updates = 0
    counts = None
    for moment in run.until(9):
        assert_masks_hold(moment, run.names)
        masks = moment.masks
        done = moment.report.step
        if done is not None:
            assert zeros(masks) == round(0.7 * schedule.progress(done) * size(masks))
            assert all(bool(mask.any()) for mask in masks.values())
        if moment.changed and method == "dynamic":
            now = [int(mask.sum()) for mask in masks.values()]
            counts = counts or now
            assert now == counts
        updates += moment.changed
    assert zeros(masks) == round(0.7 * size(masks)) > 0
    assert updates >= {"static": 1, "gradual": 2, "dynamic": 2}[method]


@nets.EVERY_NET
def test_no_parameter_is_replaced_or_moved(name, backend, device):
    run = start(name, "dynamic", backend, device)
    before = [(n, id(p)) for n, p in build_names(run)]
    run.train(4)
    during = [(n.removesuffix("_orig"), id(p)) for n, p in build_names(run)]
    run.pruner.finalize()
    after = [(n, id(p)) for n, p in build_names(run)]
    assert before == during == after


def build_names(run: Run) -> list[tuple[str, torch.nn.Parameter]]:
    return list(run.model.named_parameters(remove_duplicate=False))


@nets.EVERY_NET
@EVERY_METHOD
def test_both_backends_take_the_same_path(name, method, device):
    prune, inplace = (recorded(name, method, b, device).until(12) for b in BACKENDS)
    tolerance = {"rtol": 0.05, "atol": 0.02} if name == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    for one, other in zip(prune, inplace, strict=True):
        assert one.changed == other.changed
        assert same(one.masks, other.masks)
        assert list(one.weights) == list(other.weights)
        for key, weight in one.weights.items():
            torch.testing.assert_close(
                weight, other.weights[key], **tolerance, msg=lambda m, k=key: k + m
            )


def with_momentum(name: str, backend: str, device: torch.device) -> Run:
    return Run(build(name, device), nets.dynamic(), backend, nets.sgd)


@pytest.mark.parametrize("name", ["plain", "tied", "conv_bn", "lstm", "attention", "adapters"])
def test_sparse_training_with_momentum_keeps_every_layer_on_its_count(name, backend, device):
    run = record(with_momentum, name, backend, device)
    first = run.at(1).masks
    moved = False
    for moment in run.until(12)[1:]:
        assert_masks_hold(moment, run.names)
        now = moment.masks
        assert [int(m.sum()) for m in now.values()] == [int(m.sum()) for m in first.values()]
        moved = moved or not same(now, first)
    assert moved


@nets.EVERY_NET
def test_who_uses_what_is_observed(name, backend, device):
    run = start(name, "static", backend, device).train(3)
    named = users(run.pruner)
    for task, layers in run.net.private.items():
        for layer in layers:
            assert named[layer] == {task}
    for layer in run.net.alone:
        assert named[layer] == set()
        assert layer not in run.pruner.masks
        assert bool((read(run.model, layer) != 0).all())
    claimed = {n for layers in run.net.private.values() for n in layers} | set(run.net.alone)
    if run.net.private and run.net.shared_modules != "auto":
        assert all(len(named[n]) >= 2 for n in named if n not in claimed)


def test_a_layer_one_task_skips_is_voted_on_by_the_others(device):
    run = start("skipped_layer", "static", "prune", device).train(2)
    masks = run.pruner.task_masks
    assert "late.weight" in masks["a"]
    assert "late.weight" in masks["c"]
    assert "late.weight" not in masks["b"]
    assert "early.weight" in masks["b"]


def test_the_first_change_names_what_no_gradient_reached(backend, device):
    run = start("dead_relu", "static", backend, device)
    run.net.warns = ""
    assert run.step() is False  # graph and gradient disagree: one observation is not enough
    with pytest.warns(UserWarning, match=r"leads to 'trunk\.side\.weight'.*zero-initialised head"):
        assert run.step() is True


@pytest.mark.parametrize("name", ["stacked_losses", "loss_vector"])
def test_losses_from_a_stack_need_two_observations(name, backend, device):
    run = start(name, "static", backend, device)
    assert [run.step() for _ in range(3)] == [False, True, False]
