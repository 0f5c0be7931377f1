"""From construction to `finalize()`: copies, whole models on disk, and what is left behind."""

import copy
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from mtprune import MultitaskPruner, Vote
from tests import nets
from tests.nets import Run, build, evaluate, read, same, sgd, weights
from tests.pairs import pairs

BACKENDS = ("prune", "inplace")
OTHERS = [name for name in nets.SHELF if name not in nets.TYPICAL]
FEW_NETS = pytest.mark.parametrize("name", nets.each(["plain", "tied", *nets.TYPICAL]))


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "averaged_model": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch_save": by_torch,
}


def assert_independent_copy(run, twin):
    """The copy does what the original does, and nothing it does reaches the original."""
    batch = run.net.make_batch(77)
    expected = evaluate(run.model, batch)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    twin.train(run.model.training)
    for out, want in zip(evaluate(twin, batch), expected, strict=True):
        assert torch.equal(out, want)
    ours = {id(p) for p in run.model.parameters()}
    assert not any(id(p) in ours for p in twin.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.5)
    twin(batch["x"])
    evaluate(twin, batch)
    assert same(run.model.state_dict(), before)
    for layer, mask in run.pruner.masks.items():
        assert bool((read(run.model, layer)[~mask] == 0).all())
    for out, want in zip(evaluate(run.model, batch), expected, strict=True):
        assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("name", "how", "backend"),
    nets.each(
        [
            *itertools.product(nets.TYPICAL, COPIES, BACKENDS),
            *((name, "deepcopy", BACKENDS[i % 2]) for i, name in enumerate(OTHERS)),
        ]
    ),
)
def test_a_copy_made_at_any_time_is_a_copy(name, how, backend, device):
    run = Run(build(name, device), backend=backend)
    duplicate = COPIES[how]
    assert_independent_copy(run, duplicate(run.model))  # a pruner is there, no masks yet
    run.train(3)
    assert_independent_copy(run, duplicate(run.model))  # after a step
    run.optimizer.zero_grad()
    run.forward()
    assert_independent_copy(run, duplicate(run.model))  # right after a forward
    losses = run.losses()
    assert_independent_copy(run, duplicate(run.model))  # between forward and backward
    torch.stack(list(losses.values())).sum().backward()
    assert_independent_copy(run, duplicate(run.model))  # after backward
    run.optimizer.step()
    run.at += 1
    run.pruner.step()
    run.train(1)


@pytest.mark.slow
@FEW_NETS
def test_copying_does_not_change_the_run(name, backend, device):
    run = Run(build(name, device), nets.dynamic(), backend)
    alone = Run(build(name, device), nets.dynamic(), backend).train(8)
    for _ in range(8):
        copy.deepcopy(run.model)
        run.step()
        pickle.dumps(run.model)
        AveragedModel(run.model)
    assert same(weights(run), weights(alone))
    assert same(run.pruner.masks, alone.pruner.masks)


def test_an_averaged_model_follows_a_pruned_one(backend, device):
    run = Run(build("conv_bn", device), backend=backend)
    averaged = AveragedModel(run.model)
    run.train(3)
    averaged = AveragedModel(run.model)
    for _ in range(3):
        run.step()
        averaged.update_parameters(run.model)
    for layer, mask in run.pruner.masks.items():
        assert bool((read(averaged.module, layer)[~mask] == 0).all())


@FEW_NETS
def test_a_copy_trains_with_its_own_masks(name, backend, device):
    run = Run(build(name, device), backend=backend).train(3)
    twin = copy.deepcopy(run.model)
    optimizer = sgd(twin)
    before = {k: v.clone() for k, v in weights(run).items()}
    for at in range(2):
        batch = run.net.make_batch(at)
        outputs = twin(batch["x"])
        optimizer.zero_grad()
        sum(loss(outputs, batch) for loss in run.net.task_losses.values()).backward()
        optimizer.step()
    assert same(weights(run), before)
    if backend == "prune":
        assert prune.is_pruned(twin)
        moved = [
            n
            for n, p in twin.named_parameters()
            if not torch.equal(p, dict(run.model.named_parameters())[n])
        ]
        assert moved


# finalize.


@pytest.mark.parametrize(
    ("name", "method", "backend"), nets.each(pairs(nets.SHELF, ["static", "dynamic"], BACKENDS))
)
def test_finalize_gives_back_the_same_function_under_the_original_names(
    name, method, backend, device
):
    original = list(build(name).model.state_dict())
    kinds = [type(m) for m in build(name).model.modules()]
    run = Run(build(name, device), nets.METHODS[method](), backend).train(5)
    batch = run.net.make_batch(77)
    expected = evaluate(run.model, batch)
    masks, sparsity = run.pruner.masks, run.pruner.sparsity
    report = run.pruner.report()
    run.pruner.finalize()
    for out, want in zip(evaluate(run.model, batch), expected, strict=True):
        assert torch.equal(out, want)
    assert list(run.model.state_dict()) == original
    assert [type(m) for m in run.model.modules()] == kinds
    assert not prune.is_pruned(run.model)
    plain = build(name, device, seed=3).model
    plain.load_state_dict(run.model.state_dict(), strict=True)
    for out, want in zip(evaluate(plain, batch), expected, strict=True):
        assert torch.equal(out, want)
    assert same(run.pruner.masks, masks)
    assert run.pruner.sparsity == sparsity
    assert run.pruner.report() == report
    for layer, mask in masks.items():
        assert bool((read(plain, layer)[~mask] == 0).all())


HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def hooks(model, optimizer):
    held = [
        (path, kind, len(getattr(module, kind)))
        for path, module in model.named_modules()
        for kind in HOOKS
    ]
    held += [(n, "tensor", len(p._backward_hooks or ())) for n, p in model.named_parameters()]
    ours = ("_optimizer_step_post_hooks", "_optimizer_step_pre_hooks")
    return held + [("optimizer", kind, len(getattr(optimizer, kind))) for kind in ours]


def attributes(model):
    """Names of everything modules hold, but for hooks."""
    return [(path, sorted(vars(module))) for path, module in model.named_modules()]


@nets.EVERY_NET
def test_finalize_leaves_nothing_of_ours_behind(name, backend, device):
    net = build(name, device)
    optimizer = nets.adamw(net.model)
    before = hooks(net.model, optimizer)
    held = attributes(net.model)
    run = Run(net, nets.dynamic(), backend, lambda _: optimizer).train(4)
    assert hooks(net.model, optimizer) != before
    run.pruner.finalize()
    assert hooks(net.model, optimizer) == before
    assert attributes(net.model) == held


def test_hooks_of_the_user_survive(backend, device):
    net = build("attention", device)
    called = []
    net.model.trunk.attention.register_forward_hook(lambda *_: called.append("forward"))
    net.model.a.register_forward_pre_hook(lambda *_: called.append("pre"))
    run = Run(net, backend=backend).train(3)
    run.pruner.finalize()
    called.clear()
    run.forward()
    assert called == ["forward", "pre"]


@FEW_NETS
def test_training_goes_on_after_finalize(name, backend, device):
    run = Run(build(name, device), backend=backend, optimizer=sgd).train(3)
    run.pruner.finalize()
    before = weights(run)
    for at in range(3):
        outputs, batch = run.forward(at)
        run.optimizer.zero_grad()
        sum(loss(outputs, batch) for loss in run.net.task_losses.values()).backward()
        run.optimizer.step()
    assert not same(weights(run), before)


def test_finalize_twice_is_finalize_once(backend, device):
    run = Run(build("plain", device), backend=backend).train(2)
    run.pruner.finalize()
    run.pruner.finalize()
    assert nets.zeros(run.pruner.masks) > 0


def test_finalize_before_any_update_changes_nothing(backend, device):
    run = Run(build("lstm", device), backend=backend)
    before = weights(run)
    run.pruner.finalize()
    assert same(run.model.state_dict(), before)


@pytest.mark.parametrize("call", ["observe", "step", "load_state_dict", "observe_losses"])
def test_after_finalize_the_verbs_refuse(call, backend, device):
    run = Run(build("plain", device), backend=backend).train(2)
    state = run.pruner.state_dict()
    outputs, batch = run.forward()
    run.pruner.finalize()
    arguments = {
        "observe": (outputs, batch),
        "step": (),
        "load_state_dict": (state,),
        "observe_losses": ({},),
    }
    with pytest.raises(RuntimeError, match=rf"{call}\(\) was called after finalize\(\)"):
        getattr(run.pruner, call)(*arguments[call])


# One live pruner per model, and no longer than that.


@pytest.mark.parametrize(
    ("name", "finalized", "backend"),
    pairs(["plain", "attention", "lstm", "stacked_losses"], [False, True], BACKENDS),
)
def test_nothing_keeps_a_pruner_alive(name, finalized, backend, device):
    run = Run(build(name, device), nets.dynamic(), backend).train(4)
    model, optimizer = run.model, run.optimizer
    if finalized:
        run.pruner.finalize()
    gone = weakref.ref(run.pruner)
    run.pruner = None
    gc.collect()
    assert gone() is None
    # Masks hold without it.
    assert len(optimizer._optimizer_step_post_hooks) == (0 if finalized else 1)
    assert not any(m._load_state_dict_pre_hooks for m in model.modules())
    model(run.net.make_batch(0)["x"])


def test_nothing_keeps_a_model_alive(backend, device):
    run = Run(build("attention", device), nets.dynamic(), backend).train(4)
    gone = weakref.ref(run.model)
    del run
    gc.collect()
    assert gone() is None


def test_a_second_pruner_is_refused_until_finalize(backend, device):
    run = Run(build("plain", device), backend=backend).train(2)
    tasks = run.net.task_losses
    with pytest.raises(ValueError, match=r"already has a live pruner. Call its finalize\(\)"):
        MultitaskPruner(run.model, tasks, "trunk", backend=backend)
    with pytest.raises(ValueError, match="already has a live pruner"):
        MultitaskPruner(torch.compile(run.model, backend="eager"), tasks, "trunk", backend=backend)
    run.train(1)
    run.pruner.finalize()
    again = MultitaskPruner(run.model, tasks, "trunk", backend=backend)
    assert again.sparsity == 0


def test_a_failed_construction_does_not_block_the_next(backend, device):
    net = build("plain", device)
    with pytest.raises(ValueError, match="matches no module"):
        MultitaskPruner(net.model, net.task_losses, "trunc", backend=backend)
    assert not any(m._load_state_dict_pre_hooks for m in net.model.modules())
    Run(net, backend=backend).train(2)


def test_a_forgotten_pruner_does_not_block_the_next(backend, device):
    net = build("plain", device)
    pruner = MultitaskPruner(net.model, net.task_losses, "trunk", backend=backend)
    del pruner
    gc.collect()
    Run(net, backend=backend).train(2)


@pytest.mark.parametrize("trained", [0, 3])
def test_a_deepcopy_may_have_its_own_pruner(trained, backend, device):
    run = Run(build("plain", device), backend=backend).train(trained)
    if trained:
        run.pruner.finalize()
    twin = copy.deepcopy(run.model)
    net = build("plain", device)
    net.model = twin
    other = Run(net, Vote(0.9), backend).train(2)
    assert nets.zeros(other.pruner.masks) == round(0.9 * nets.size(other.pruner.masks))
    if not trained:
        run.train(2)
        assert nets.zeros(run.pruner.masks) == round(0.7 * nets.size(run.pruner.masks))


def test_a_deepcopy_of_a_pruned_model_names_the_way_out(device):
    run = Run(build("plain", device)).train(2)
    twin = copy.deepcopy(run.model)
    with pytest.raises(ValueError, match=r"pruned already: it has 'weight_orig'.*prune\.remove"):
        MultitaskPruner(twin, run.net.task_losses, "trunk")
    for module in list(twin.modules()):
        if isinstance(module, nn.Linear):
            prune.remove(module, "weight")
    MultitaskPruner(twin, run.net.task_losses, "trunk")


def test_a_deepcopy_of_a_model_pruned_in_place_may_have_its_own_pruner(device):
    run = Run(build("plain", device), backend="inplace").train(2)
    net = build("plain", device)
    net.model = copy.deepcopy(run.model)
    other = Run(net, Vote(0.7), "inplace").train(2)
    assert nets.zeros(other.pruner.masks) == nets.zeros(run.pruner.masks)


def test_a_model_moved_to_another_dtype_stays_masked(backend, device):
    run = Run(build("plain", device), backend=backend, optimizer=sgd).train(3)
    masks = run.pruner.masks
    run.model.double()
    run.net.make_batch, make = (
        lambda i: {k: v.double() for k, v in make(i).items()},
        run.net.make_batch,
    )
    for layer, mask in masks.items():
        weight = read(run.model, layer)
        assert weight.dtype == torch.float64
        assert bool((weight[~mask] == 0).all())
    evaluate(run.model, run.net.make_batch(0))
    run.pruner.finalize()
    assert all(p.dtype == torch.float64 for p in run.model.parameters())


@pytest.mark.parametrize("method", ["gradual", "static"])
def test_masks_hold_when_the_pruner_is_dropped(method, backend, device):
    run = Run(build("plain", device), getattr(nets, method)(), backend).train(8)
    masks = run.pruner.masks
    assert nets.zeros(masks) > 0
    del run.pruner
    gc.collect()
    for at in range(3):
        outputs, batch = run.forward(at)
        run.optimizer.zero_grad()
        sum(loss(outputs, batch) for loss in run.net.task_losses.values()).backward()
        run.optimizer.step()
        for name, mask in masks.items():
            assert bool((read(run.model, name)[~mask] == 0).all())


def test_another_pruner_takes_over_from_one_that_was_dropped(device):
    run = Run(build("plain", device), nets.static(), "inplace").train(3)
    assert len(run.optimizer._optimizer_step_post_hooks) == 1
    del run.pruner
    gc.collect()
    pruner = MultitaskPruner(
        run.model,
        run.net.task_losses,
        run.net.shared_modules,
        method=Vote(0.5),
        optimizer=run.optimizer,
        backend="inplace",
    )
    assert len(run.optimizer._optimizer_step_post_hooks) == 1
    pruner.finalize()
    assert len(run.optimizer._optimizer_step_post_hooks) == 0
