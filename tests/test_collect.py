"""Collecting: exact scores, taken without leaving a trace on training."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from mtprune import Cubic, Linear, MultitaskPruner, OneShot, Vote, recipes, saliency
from mtprune.model.graph import reachable
from tests import nets
from tests.checkpoints import discarded, observed, scores, shapes, steps
from tests.nets import Run, Scaled, build, expected, same, sgd, weights
from tests.runs import record
from tests.test_fold import gradually
from tests.test_resume import load

GRADUALLY = Vote(0.7, schedule=Cubic(1, 90, 1))  # an update is always near


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


# Observing leaves no trace.


@nets.EVERY_NET
def test_observe_leaves_gradients_randomness_and_buffers_alone(name, backend, device):
    run = Run(build(name, device), GRADUALLY, backend).train(4)
    before = None
    for _ in range(2):
        outputs, batch = run.forward()
        losses = [f(outputs, batch) for f in run.net.task_losses.values()]
        torch.stack(losses).sum().backward()  # .grad is pending, as in gradient accumulation
        outputs, batch = run.forward()
        buffers = {n: b.clone() for n, b in run.model.named_buffers()}
        random = torch.get_rng_state()
        before = gradients(run.model)
        run.pruner.observe(outputs, batch)
        after = gradients(run.model)
        assert torch.equal(torch.get_rng_state(), random)
        assert same(dict(run.model.named_buffers()), buffers)
        for key, grad in before.items():
            assert (grad is None) == (after[key] is None)
            assert grad is None or torch.equal(grad, after[key])
    assert before is not None
    assert scores(run.pruner)
    assert not any(p._backward_hooks for p in run.model.parameters())


@nets.EVERY_NET
def test_training_with_observation_is_bit_identical_to_training_without(name, device):
    """The pruner collects at every step, and never prunes."""
    plain = build(name, device)
    optimizer = sgd(plain.model)
    watched = Run(
        build(name, device), Vote(0.7, schedule=OneShot(5), observations=5), optimizer=sgd
    )
    for at in range(5):
        watched.optimizer.zero_grad()
        torch.stack(list(watched.losses().values())).sum().backward()
        watched.optimizer.step()
        watched.at += 1
        batch = plain.make_batch(at)
        torch.manual_seed(1000 + at)
        outputs = plain.model(batch["x"])
        optimizer.zero_grad()
        torch.stack([f(outputs, batch) for f in plain.task_losses.values()]).sum().backward()
        optimizer.step()
    assert set(observed(watched.pruner).values()) == {5}
    assert same(weights(watched), plain.model.state_dict())


def test_far_from_an_update_nothing_is_collected(backend, device):
    run = Run(build("plain", device), Vote(0.7, schedule=OneShot(6), observations=2), backend)
    counts = []
    for _ in range(7):
        run.losses()
        counts.append(observed(run.pruner).get("a", 0))
        run.step()
    # Two observations before the update of step 6 are those of the steps that end as 5 and 6.
    assert counts[:4] == [0, 0, 0, 0]
    assert nets.zeros(run.pruner.masks) > 0


def test_without_a_graph_losses_are_computed_and_nothing_is_collected(backend, device):
    run = Run(build("plain", device), backend=backend)
    with torch.no_grad():
        losses = run.losses()
    assert list(losses) == ["a", "b"]
    assert not scores(run.pruner)


# What is collected is exact.


@nets.EVERY_NET
def test_scores_are_weight_times_gradient_of_a_plain_computation(name, device):
    run = Run(build(name, device), Vote(0.7, observations=2))
    twin = build(name, device)
    named = dict(twin.model.named_parameters())
    outputs, batch = run.forward(0)
    run.pruner.observe(outputs, batch)
    found = scores(run.pruner)
    assert list(found) == [task for task in twin.task_losses if task in found]
    for task, loss in twin.task_losses.items():
        twin.model.load_state_dict(build(name, device).model.state_dict())
        twin.model.zero_grad()
        torch.manual_seed(1000)
        loss(twin.model(batch["x"]), batch).backward()
        assert found[task]
        for layer in shapes(run.pruner):
            parameter = named[layer]
            if layer not in found[task]:
                assert parameter.grad is None or not parameter.grad.any()
                continue
            want = (parameter.detach().float() * parameter.grad.float()).abs().reshape(-1)
            torch.testing.assert_close(found[task][layer], want, rtol=1e-5, atol=1e-7)


@nets.EVERY_NET
def test_scores_of_a_pruned_net_are_those_of_its_effective_weights(name, backend, device):
    state = record(gradually, name, backend, device).at(8).checkpoint
    run = load(gradually(name, backend, device), state)
    twin = build(name, device)
    twin.model.load_state_dict(weights(run))
    named = dict(twin.model.named_parameters())
    outputs, batch = run.forward(0)
    run.pruner.observe(outputs, batch)
    found = scores(run.pruner)
    before = twin.model.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    for task, loss in twin.task_losses.items():
        twin.model.load_state_dict(before)
        twin.model.zero_grad()
        torch.manual_seed(1000)
        loss(twin.model(batch["x"]), batch).backward()
        for layer in found[task]:
            parameter = named[layer]
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            want = (parameter.detach().float() * grad.float()).abs().reshape(-1)
            torch.testing.assert_close(found[task][layer], want, rtol=1e-4, atol=1e-6)


@nets.EVERY_NET
def test_one_forward_and_k_sweeps_are_k_forwards_and_k_backwards(name, device):
    def masks(at_once):
        run = Run(build(name, device), Vote(0.7, observations=2))
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for at in range(2):
            for tasks in [None] if at_once else [[task] for task in run.net.task_losses]:
                outputs, batch = run.forward(at)
                run.pruner.observe(outputs, batch, tasks=tasks)
        with expected(run.net):
            assert run.pruner.step()
        return run.pruner.masks

    assert same(masks(True), masks(False))


def test_a_layer_called_twice_is_scored_by_its_whole_gradient(backend, device):
    run = Run(build("called_twice", device), Vote(0.7, observations=2), backend)
    twin = build("called_twice", device).model
    outputs, batch = run.forward()
    run.pruner.observe(outputs, batch)
    run.net.task_losses["a"](twin(batch["x"]), batch).backward()
    want = (twin.trunk.inner.weight * twin.trunk.inner.weight.grad).abs().detach().reshape(-1)
    torch.testing.assert_close(scores(run.pruner)["a"]["trunk.inner.weight"], want)


def test_the_graph_walk_leads_to_leaves_and_nowhere_else(device):
    net = build("skipped_layer", device)
    batch = net.make_batch(0)
    loss = net.task_losses["b"](net.model(batch["x"]), batch)
    found = reachable(loss)
    leads = {n for n, p in net.model.named_parameters() if id(p) in found}
    assert leads == {"early.weight", "early.bias", "b.weight", "b.bias"}


# What must not matter.


class Renamed(nn.Module):
    """The plain net under other names, its heads registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Linear(8, 1)
        self.left = nn.Linear(8, 1)
        self.body = nn.Sequential(OrderedDict(one=nn.Linear(6, 8), two=nn.Linear(8, 8)))

    def forward(self, x):
        hidden = self.body.two(self.body.one(x).relu()).tanh()
        return {"a": self.left(hidden), "b": self.right(hidden)}


NAMES = {"trunk.0": "body.one", "trunk.2": "body.two", "a": "left", "b": "right"}


@pytest.mark.parametrize("method", ["static", "gradual"])
def test_names_and_registration_order_do_not_matter(method, backend, device):
    plain = Run(build("plain", device), nets.METHODS[method](), backend)
    net = build("plain", device)
    net.model = Renamed().to(device)
    net.shared_modules = "body"
    mapped = {}
    for key, value in plain.model.state_dict().items():
        path, _, attribute = key.rpartition(".")
        mapped[f"{NAMES[path]}.{attribute}"] = value.clone()
    net.model.load_state_dict(mapped)
    renamed = Run(net, nets.METHODS[method](), backend)
    plain.train(10)
    renamed.train(10)
    theirs = renamed.pruner.masks
    assert nets.zeros(theirs) > 0
    for name, mask in plain.pruner.masks.items():
        path, _, attribute = name.rpartition(".")
        assert torch.equal(mask, theirs[f"{NAMES[path]}.{attribute}"])


@pytest.mark.parametrize("method", nets.METHODS)
@pytest.mark.parametrize(
    "name",
    ["skipped_layer", "stacked_losses", pytest.param("twelve_tasks", marks=pytest.mark.slow)],
)
def test_the_order_of_tasks_does_not_matter(name, method, device):
    def train(reverse):
        net = build(name, device)
        if reverse:
            net.task_losses = dict(reversed(net.task_losses.items()))
        run = Run(net, nets.METHODS[method]())
        for _ in range(8):
            run.optimizer.zero_grad()
            losses = run.losses()
            torch.stack([losses[task] for task in sorted(losses)]).sum().backward()
            run.optimizer.step()
            run.at += 1
            run.pruner.step()
        return run

    one, other = train(False), train(True)
    assert same(one.pruner.masks, other.pruner.masks)
    assert same(weights(one), weights(other))


def scored(net, method, backend):
    run = Run(net, method, backend)
    for at in range(2):
        outputs, batch = run.forward(at)
        run.pruner.observe(outputs, batch)
    with expected(run.net):
        run.pruner.step()
    return run.pruner.masks


@nets.EVERY_NET
def test_the_scale_of_a_loss_does_not_matter(name, device):
    plain = scored(build(name, device), Vote(0.7, observations=2), "prune")
    for factor in (1e-6, 1e6):
        net = build(name, device)
        first = next(iter(net.task_losses))
        net.task_losses[first] = Scaled(net.task_losses[first], factor)
        assert same(scored(net, Vote(0.7, observations=2), "prune"), plain)


def test_joint_scores_do_depend_on_the_scale_of_a_loss(device):
    joint = Vote(0.7, observations=2, disentangled=False)
    plain = scored(build("plain", device), joint, "prune")
    net = build("plain", device)
    net.task_losses["a"] = Scaled(net.task_losses["a"], 1e3)
    assert not same(scored(net, joint, "prune"), plain)


def test_joint_scores_are_those_of_the_summed_losses(backend, device):
    run = Run(build("plain", device), Vote(0.7, observations=2, disentangled=False), backend)
    twin = build("plain", device)
    outputs, batch = run.forward()
    run.pruner.observe(outputs, batch)
    outputs = twin.model(batch["x"])
    sum(loss(outputs, batch) for loss in twin.task_losses.values()).backward()
    [found] = scores(run.pruner).values()
    for name, parameter in twin.model.named_parameters():
        if name in found:
            want = (parameter * parameter.grad).abs().detach().reshape(-1)
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-7)
    assert len(found) == 4


# Mixed precision.


def test_autocast_to_bfloat16_trains_and_prunes(backend, device):
    run = Run(build("conv_bn", device), nets.gradual(), backend)
    for _ in range(10):
        run.optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            outputs, batch = run.forward()
            losses = run.pruner.observe(outputs, batch)
        sum(losses.values()).backward()
        run.optimizer.step()
        run.at += 1
        run.pruner.step()
    assert nets.zeros(run.pruner.masks) == round(0.7 * nets.size(run.pruner.masks))
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def amp_step(run, scaler, factor=1.0, dtype=torch.float32):
    run.optimizer.zero_grad()
    with torch.autocast(run.net.make_batch(0)["x"].device.type, dtype, dtype != torch.float32):
        outputs, batch = run.forward()
        losses = {t: loss(outputs, batch) * factor for t, loss in run.net.task_losses.items()}
        run.pruner.observe_losses(losses, scaler=scaler)
    scaler.scale(sum(losses.values())).backward()
    scaler.step(run.optimizer)
    scaler.update()
    run.at += 1
    return run.pruner.step()


def test_an_overflow_is_discarded_and_no_step(backend, device):
    run = Run(build("plain", device), Vote(0.7, schedule=OneShot(1)), backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**120)
    seen = []
    while not nets.zeros(run.pruner.masks) and run.at < 40:
        before = steps(run.pruner)
        scale = scaler.get_scale()
        amp_step(run, scaler, factor=2.0**20)
        overflowed = scaler.get_scale() < scale
        seen.append(overflowed)
        assert steps(run.pruner) == before + (not overflowed)
    assert seen[0]
    assert not seen[-1]
    assert steps(run.pruner) == 1
    assert nets.zeros(run.pruner.masks) == round(0.7 * nets.size(run.pruner.masks))
    assert sum(run.pruner.report().discarded.values()) > 0


def test_an_overflow_in_an_observation_does_not_spoil_those_before(backend, device):
    run = Run(build("plain", device), Vote(0.7, observations=2), backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    outputs, batch = run.forward(0)
    run.pruner.observe(outputs, batch, scaler=scaler)
    before = copy.deepcopy(scores(run.pruner))
    outputs, batch = run.forward(1)
    losses = {t: loss(outputs, batch) * torch.inf for t, loss in run.net.task_losses.items()}
    run.pruner.observe_losses(losses, scaler=scaler)
    assert observed(run.pruner) == {"a": 1, "b": 1}
    assert discarded(run.pruner) == {"a": 1, "b": 1}
    assert not run.pruner.step()
    assert all(same(scores(run.pruner)[t], before[t]) for t in before)
    outputs, batch = run.forward(2)
    run.pruner.observe(outputs, batch, scaler=scaler)
    assert run.pruner.step()


def test_without_a_scaler_what_is_not_finite_raises_and_names_the_task(backend, device):
    run = Run(build("plain", device), backend=backend)
    outputs, batch = run.forward()
    losses = {t: loss(outputs, batch) for t, loss in run.net.task_losses.items()}
    losses["b"] = losses["b"] * torch.inf
    run.pruner.observe_losses(losses)
    with pytest.raises(RuntimeError, match="task 'b' is not finite"):
        run.pruner.step()
    assert nets.zeros(run.pruner.masks) == 0
    run.step()
    assert nets.zeros(run.pruner.masks) > 0


@pytest.mark.parametrize("factor", [1.0, 2.0**-100, 1e-30])
def test_scores_do_not_depend_on_the_scaler_or_on_tiny_losses(factor, backend, device):
    plain = scored(build("plain", device), Vote(0.7, observations=2), backend)
    run = Run(build("plain", device), Vote(0.7, observations=2), backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16)
    for at in range(2):
        outputs, batch = run.forward(at)
        losses = {t: loss(outputs, batch) * factor for t, loss in run.net.task_losses.items()}
        run.pruner.observe_losses(losses, scaler=scaler)
    assert run.pruner.step()
    assert same(run.pruner.masks, plain)


def test_a_scaler_saves_small_gradients_in_float16(device):
    """Without it every gradient in the trunk underflows to zero."""

    def found(scale):
        run = Run(build("plain", device), Vote(0.7, observations=3))
        scaler = torch.amp.GradScaler(device.type, init_scale=scale)
        with torch.autocast(device.type, torch.float16):
            outputs, batch = run.forward(0)
            losses = {t: loss(outputs, batch) * 1e-7 for t, loss in run.net.task_losses.items()}
            run.pruner.observe_losses(losses, scaler=scaler)
        return scores(run.pruner)["a"]["trunk.0.weight"]

    assert not bool(found(1.0).any())
    assert bool(found(2.0**16).any())


# Gradient accumulation, and one task per batch.


def test_micro_batches_of_one_optimizer_step_count_as_one(backend, device):
    run = Run(build("plain", device), nets.gradual(), backend)
    changes = []
    for micro in range(40):
        outputs, batch = run.forward(micro)
        losses = run.pruner.observe(outputs, batch)
        (sum(losses.values()) / 4).backward()
        if micro % 4 == 3:
            run.optimizer.step()
            run.optimizer.zero_grad()
        if run.pruner.step():
            changes.append(micro // 4 + 1)
        assert steps(run.pruner) == (micro + 1) // 4
    assert changes
    assert set(changes) <= {2, 4, 6, 8}
    assert nets.zeros(run.pruner.masks) == round(0.7 * nets.size(run.pruner.masks))


@pytest.mark.parametrize("method", nets.METHODS)
def test_tasks_in_separate_batches_accumulate_until_all_are_seen(method, backend, device):
    slowly = {"dynamic": recipes.disparse_dynamic(0.7, every=4, end=12)}
    vote = slowly.get(method, nets.METHODS[method]())
    run = Run(build("skipped_layer", device), vote, backend, singly=True)
    changed = [run.step() for _ in range(20)]
    assert nets.zeros(run.pruner.masks) == round(0.7 * nets.size(run.pruner.masks))
    assert changed[:2] == [False, False]
    if method == "static":
        assert changed[2]
        assert run.pruner.report().observations == {"a": 1, "b": 1, "c": 1}


def test_observing_after_backward_is_explained(backend, device):
    run = Run(build("plain", device), backend=backend)
    outputs, batch = run.forward()
    losses = {t: loss(outputs, batch) for t, loss in run.net.task_losses.items()}
    sum(losses.values()).backward()
    with pytest.raises(RuntimeError, match=r"Call observe\(\) before backward\(\)"):
        run.pruner.observe_losses(losses)


def test_observing_after_the_optimizer_is_explained(backend, device):
    run = Run(build("plain", device), backend=backend)
    outputs, batch = run.forward()
    losses = {t: loss(outputs, batch) for t, loss in run.net.task_losses.items()}
    sum(losses.values()).backward(retain_graph=True)
    run.optimizer.step()
    with pytest.raises(RuntimeError, match=r"Call observe\(\) before optimizer.step\(\)"):
        run.pruner.observe_losses(losses)


def test_reentrant_checkpointing_is_refused_with_advice(backend, device):
    class Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(6, 8)
            self.block = nn.Linear(8, 8)

        def forward(self, x):
            hidden = self.stem(x)
            return torch.utils.checkpoint.checkpoint(self.block, hidden, use_reentrant=True)

    net = build("plain", device)
    net.model.trunk = Reentrant().to(device)
    run = Run(net, backend=backend)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run.step()


def test_an_error_in_a_saliency_leaves_no_hooks_and_no_gate_open(backend, device):
    def broken(weight, grad):
        raise ZeroDivisionError

    run = Run(build("plain", device), Vote(0.7, saliency=broken), backend)
    with pytest.raises(ZeroDivisionError):
        run.step()
    assert not any(p._backward_hooks for p in run.model.parameters())


def test_a_saliency_sees_weight_and_gradient_of_one_task_at_a_time(backend, device):
    calls = []

    def spy(weight, grad):
        calls.append((tuple(weight.shape), weight.dtype, grad.dtype))
        return saliency.taylor(weight, grad)

    run = Run(build("bfloat16", device), Vote(0.7, saliency=spy), backend)
    run.losses()
    assert len(calls) == 6  # two trunk layers and a head, for each of two tasks
    assert all(call[1:] == (torch.float32, torch.float32) for call in calls)


def test_two_pruners_on_two_models_do_not_meet(backend, device):
    one, other = (Run(build("plain", device), nets.dynamic(), backend) for _ in range(2))
    alone = Run(build("plain", device), nets.dynamic(), backend).train(8)
    for _ in range(8):
        one.step()
        other.step()
    assert same(one.pruner.masks, alone.pruner.masks)
    assert same(weights(one), weights(alone))
    assert same(weights(other), weights(alone))


def test_a_pruner_given_task_names_is_fed_losses(backend, device):
    net = build("plain", device)
    pruner = MultitaskPruner(net.model, ["a", "b"], "trunk", method=Vote(0.7), backend=backend)
    batch = net.make_batch(0)
    outputs = net.model(batch["x"])
    pruner.observe_losses([loss(outputs, batch) for loss in net.task_losses.values()])
    assert pruner.step()
    twin = Run(build("plain", device), Vote(0.7), backend)
    outputs, batch = twin.forward(0)
    twin.pruner.observe(outputs, batch)
    twin.pruner.step()
    assert same(pruner.masks, twin.pruner.masks)


def steep(factor, device):
    """A trunk and two heads of ones, and losses whose gradients in the trunk are ``factor``."""
    model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("trunk", "a", "b")})
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    model.to(device)
    hidden = model["trunk"](torch.ones(1, 1, device=device))
    return model, {task: factor * model[task](hidden).sum() for task in ("a", "b")}


def test_a_sum_of_losses_that_overflows_is_discarded_for_every_task(device):
    # Either gradient is a float32, their sum is not.
    model, losses = steep(2.5e38, device)
    method = Vote(0.5, disentangled=False, min_keep=0)
    pruner = MultitaskPruner(model, ["a", "b"], method=method)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0)
    pruner.observe_losses(losses, scaler=scaler)
    assert discarded(pruner) == {"a": 1, "b": 1}
    assert not pruner.step()


def test_with_a_scaler_a_loss_that_is_not_finite_is_discarded_by_saliencies_without_data(device):
    method = Vote(0.5, saliency=saliency.magnitude, schedule=Linear(1, 2, 1), min_keep=0)
    model, losses = steep(1.0, device)
    pruner = MultitaskPruner(model, ["a", "b"], method=method)
    scaler = torch.amp.GradScaler(device.type)
    pruner.observe_losses(losses, scaler=scaler)
    pruner.step()
    pruner.observe_losses({task: loss * torch.nan for task, loss in losses.items()}, scaler=scaler)
    assert discarded(pruner) == {"a": 1, "b": 1}
    assert not pruner.step()
    pruner.observe_losses(losses, scaler=scaler)
    assert pruner.step()
