"""SoftThreshold in training: the exact sparsity, whatever the net, the optimizer or the scale."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from mtprune import (
    Cubic,
    Linear,
    MultitaskPruner,
    OneShot,
    Regrow,
    SoftThreshold,
    recipes,
)
from tests import checkpoints, nets
from tests.nets import Run, build, evaluate, expected, read, same, size, zeros
from tests.pairs import pairs
from tests.runs import record
from tests.test_resume import assert_ends_like, assert_same_end, load, save, through_a_file

SCHEDULE = Cubic(begin=1, end=7, every=2)
OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.5),
}
LEARNING = {"allocation": "learned", "weighting": "pruning_sensitivity", "grad_mode": "anneal"}


class Multitask(nn.Module):
    """A trunk and a head for each task."""

    def __init__(self, tasks, scale=1.0):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(30, 2) for task in tasks})
        with torch.no_grad():
            for parameter in self.parameters():
                parameter *= scale

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


class Loop:
    """A training loop as users write it."""

    def __init__(self, method, tasks=2, scale=1.0, optimizer="adam", lr=1e-2, device=None, **more):
        torch.manual_seed(0)
        self.tasks = [f"t{k}" for k in range(tasks)]
        self.model = Multitask(self.tasks, scale).to(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr)
        self.device = device
        self.at = 0
        self.pruner = MultitaskPruner(
            self.model, self.tasks, "trunk", method=method, optimizer=self.optimizer, **more
        )

    def losses(self):
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(self.at)).to(self.device)
        out = self.model(x)
        return {t: (out[t] - x[:, k : k + 1]).square().mean() for k, t in enumerate(self.tasks)}

    def step(self):
        self.optimizer.zero_grad()
        losses = self.pruner.observe_losses(self.losses())
        self.pruner.weigh(losses).backward()
        self.optimizer.step()
        self.at += 1
        return self.pruner.step()

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def weights(self):
        named = {n.removesuffix("_orig"): p for n, p in self.model.named_parameters()}
        return {n: p.detach() for n, p in named.items() if p.dim() == 2}

    def zeros(self):
        return sum(int((w == 0).sum()) for w in self.weights().values())

    def size(self):
        return sum(w.numel() for w in self.weights().values())


# The number one asks for is the number one gets.


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_the_sparsity_is_exact_whatever_trains(tasks, lr, optimizer, device):
    for target in (0.0, 0.5, 0.9, 0.97, 0.99):
        method = SoftThreshold(target, schedule=SCHEDULE)
        loop = Loop(method, tasks, optimizer=optimizer, lr=lr, device=device).train(8)
        assert loop.zeros() == round(target * loop.size()) == zeros(loop.pruner.masks)
        loop.train(3)
        assert loop.zeros() == round(target * loop.size())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_stay_for_a_thousand_steps(optimizer, backend, device):
    method = SoftThreshold(0.9, schedule=SCHEDULE)
    loop = Loop(method, optimizer=optimizer, backend=backend, device=device).train(8)
    masks = loop.pruner.masks
    loop.train(1000)
    assert same(loop.pruner.masks, masks)
    assert loop.zeros() == round(0.9 * loop.size())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_number_is_all_it_takes_at_any_scale_of_the_weights(scale, device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE), scale=scale, device=device).train(8)
    assert loop.zeros() == round(0.9 * loop.size())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"control": "pi"},
        {"per": "layer"},
        {"per": "layer", "control": "pi", "allocation": "learned"},
        {"grad_mode": "str"},
        {"grad_mode": "anneal"},
        {"allocation": "learned"},
        {"allocation": {"shared": 0.7, "t1": -1.0}},
        {"scale": "none"},
        {"schedule": OneShot(3)},
        {"debias": True},
        {"schedule": Linear(begin=0, end=7, every=3)},
        LEARNING,
    ],
    ids=str,
)
def test_every_option_ends_on_the_exact_sparsity(options, backend, device):
    method = SoftThreshold(0.9, **({"schedule": SCHEDULE} | options))
    loop = Loop(method, backend=backend, device=device)
    loop.train(12)
    assert loop.zeros() == round(0.9 * loop.size())
    assert all(bool(mask.any()) for mask in loop.pruner.masks.values())


OPTIONS = {"plain": {}, "learning": LEARNING}


@pytest.mark.parametrize(
    ("name", "options", "backend"), nets.each(pairs(nets.SHELF, OPTIONS, ["prune", "inplace"]))
)
def test_every_net_ends_on_the_exact_sparsity(name, options, backend, device):
    method = SoftThreshold(0.7, schedule=SCHEDULE, **OPTIONS[options])
    run = Run(build(name, device), method, backend)
    names = [(n, id(p)) for n, p in run.model.named_parameters(remove_duplicate=False)]
    for _ in range(7):
        soft_step(run)
        during = run.model.named_parameters(remove_duplicate=False)
        assert [(n.removesuffix("_orig"), id(p)) for n, p in during] == names
    masks = run.pruner.masks
    assert zeros(masks) == round(0.7 * size(masks)) > 0
    for _ in range(3):
        soft_step(run)
        assert same(run.pruner.masks, masks)
        for layer, mask in masks.items():
            for alias in run.named[layer]:
                assert bool((read(run.model, alias)[~mask] == 0).all()), alias
    batch = run.net.make_batch(99)
    before = evaluate(run.model, batch)
    run.pruner.finalize()
    after = evaluate(run.model, batch)
    assert all(map(torch.equal, before, after))
    assert [(n, id(p)) for n, p in run.model.named_parameters(remove_duplicate=False)] == names


def soft_step(run):
    """A step of a net of which some weights may be read behind their modules' backs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The weights \[.*are read without their")
        run.step()


class Behind(Multitask):
    """Reads the weight of a layer that it never calls."""

    def forward(self, x):
        first, act, second, _ = self.trunk
        hidden = second(act(nn.functional.linear(x, first.weight, first.bias))).relu()
        return {task: head(hidden) for task, head in self.heads.items()}


def test_weights_read_behind_their_modules_are_named_once_and_pruned_all_the_same(device):
    model = Behind(["a", "b"]).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    method = SoftThreshold(0.8, schedule=SCHEDULE)
    pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=method, optimizer=optimizer)

    def step():
        losses = {t: out.square().mean() for t, out in model(torch.ones(2, 10).to(device)).items()}
        sum(pruner.observe_losses(losses).values()).backward()
        optimizer.step()
        pruner.step()

    step(), step()
    with pytest.warns(UserWarning, match=r"\['trunk\.0\.weight'\] are read without their"):
        step()
    for _ in range(6):
        step()
    masks = pruner.masks
    assert zeros(masks) == round(0.8 * size(masks))
    assert bool((model.trunk[0].weight[~masks["trunk.0.weight"]] == 0).all())


# While thresholds are learned.


def test_the_model_sees_the_soft_weights(backend, device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE), backend=backend, device=device).train(5)
    taus = {row.name: row.threshold for row in loop.pruner.report().layers}
    x = torch.randn(4, 10, device=device)
    hidden = x
    for place in ("trunk.0", "trunk.2"):
        module = loop.model.get_submodule(place)
        weight = module.weight_orig if backend == "prune" else module.weight
        weight = weight.sign() * (weight.abs() - taus[f"{place}.weight"]).relu()
        hidden = nn.functional.linear(hidden, weight, module.bias).relu()
    torch.testing.assert_close(loop.model.trunk(x), hidden, rtol=0, atol=0)
    assert prune.is_pruned(loop.model) is (backend == "prune")


@pytest.mark.parametrize(
    ("mode", "leak"), [("str", 0.0), ("ste", 1.0), ("anneal", 1 - SCHEDULE.progress(5))]
)
def test_the_gradient_below_the_threshold_is_what_the_mode_says(mode, leak, device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE, grad_mode=mode), device=device).train(5)
    module = loop.model.trunk[2]
    below = ~loop.pruner.masks["trunk.2.weight"]
    loop.optimizer.zero_grad()
    module.register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    seen = []
    loss = sum(loop.losses().values())
    [(inputs, outputs)] = seen
    [grad] = torch.autograd.grad(loss, outputs, retain_graph=True)
    loss.backward()
    dense = grad.T @ inputs
    torch.testing.assert_close(module.weight_orig.grad[below], leak * dense[below])
    torch.testing.assert_close(module.weight_orig.grad[~below], dense[~below])


@pytest.mark.slow
def test_under_ste_weights_come_back_and_under_str_none_gets_a_gradient(device):
    def returned(mode):
        schedule = Linear(begin=0, end=60, every=1)
        method = SoftThreshold(0.8, schedule=schedule, grad_mode=mode)
        loop = Loop(method, lr=3e-2, device=device)
        ever, back = None, 0
        for _ in range(60):
            loop.step()
            masks = torch.cat([m.flatten() for m in loop.pruner.masks.values()])
            back += 0 if ever is None else int((masks & ever).sum())
            ever = ~masks if ever is None else ever | ~masks
        return back

    assert returned("ste") > returned("str")


def test_sweeps_for_the_weights_of_tasks_leave_gradients_and_the_run_as_they_are(backend, device):
    def run(weighted):
        method = SoftThreshold(0.8, schedule=SCHEDULE, weighting=weighted)
        return Loop(method, backend=backend, device=device)

    swept, plain = run("pruning_sensitivity"), run("uniform")
    for step in range(9):
        for loop in (swept, plain):
            torch.manual_seed(step)
            loop.optimizer.zero_grad()
            losses = loop.pruner.observe_losses(loop.losses())
            torch.stack(list(losses.values())).sum().backward()
            loop.optimizer.step()
            loop.pruner.step()
    assert swept.pruner.report().weights["t0"] != 1.0
    assert same(swept.weights(), plain.weights())


@pytest.mark.parametrize("per", ["component", "layer"])
def test_thresholds_are_in_units_of_the_root_mean_square(per, device):
    method = SoftThreshold(0.5, schedule=SCHEDULE, per=per)
    loop = Loop(method, device=device).train(5)
    weights = loop.weights()
    report = loop.pruner.report()
    taus = {row.name: row.threshold for row in report.layers}
    groups = {"shared": ["trunk.0.weight", "trunk.2.weight"], "t0": ["heads.t0.weight"]}
    if per == "layer":
        groups = {name: [name] for name in taus}
    units = [
        taus[members[0]] / torch.cat([weights[n].flatten() for n in members]).square().mean().sqrt()
        for members in groups.values()
    ]
    for unit in units:
        torch.testing.assert_close(unit, units[0], rtol=2e-2, atol=0)


def test_offsets_given_by_the_user_are_ratios_of_thresholds(device):
    method = SoftThreshold(
        0.6, schedule=SCHEDULE, scale="none", allocation={"shared": 0.0, "t0": 0.5}
    )
    loop = Loop(method, device=device).train(5)
    taus = {row.name: row.threshold for row in loop.pruner.report().components}
    assert taus["t0"] / taus["shared"] == pytest.approx(1.6487, rel=0.05)


@pytest.mark.slow
def test_learned_offsets_leave_the_total_and_go_where_losses_mind_less(device):
    method = SoftThreshold(0.8, schedule=Cubic(begin=0, end=200, every=2), allocation="learned")
    loop = Loop(method, device=device)
    for _ in range(200):
        loop.optimizer.zero_grad()
        losses = loop.losses()
        losses["t1"] = losses["t1"] * 1e-4  # its head hardly matters
        loop.pruner.observe_losses(losses)
        loop.pruner.weigh(losses).backward()
        loop.optimizer.step()
        loop.pruner.step()
    assert loop.zeros() == round(0.8 * loop.size())
    offsets = checkpoints.memory(loop.pruner)["offsets"]
    assert offsets["t0"] < offsets["t1"]
    assert all(abs(value) <= 2.5 for value in offsets.values())
    for moment in loop.pruner.report().history:
        due = round(0.8 * method.schedule.progress(moment.step) * loop.size())
        assert round(moment.sparsity * loop.size()) == due


def test_the_scale_of_the_losses_does_not_move_offsets_or_weights(device):
    def offsets(scale):
        method = SoftThreshold(
            0.8,
            schedule=Cubic(begin=0, end=20, every=2),
            allocation="learned",
            weighting="pruning_sensitivity",
        )
        torch.manual_seed(0)
        loop = Loop(method, optimizer="sgd", lr=0.0, device=device)
        torch.manual_seed(1)
        for _ in range(15):
            losses = {task: loss * scale for task, loss in loop.losses().items()}
            loop.pruner.observe_losses(losses)
            sum(losses.values()).backward()
            loop.optimizer.step()
            loop.pruner.step()
        return checkpoints.memory(loop.pruner)["offsets"], loop.pruner.report().weights

    (one, weights), (other, scaled) = offsets(1.0), offsets(1024.0)
    assert one == pytest.approx(other, rel=1e-3)
    assert weights == pytest.approx(scaled, rel=1e-3)


def test_the_controller_is_near_before_the_last_update_and_exact_after(device):
    schedule = Cubic(begin=0, end=150, every=1)
    loop = Loop(SoftThreshold(0.9, schedule=schedule, control="pi"), device=device).train(151)
    history = loop.pruner.report().history
    for moment in history[10:-1]:
        assert abs(moment.sparsity - 0.9 * schedule.progress(moment.step)) < 0.02
    assert abs(history[-2].sparsity - 0.9) < 0.005
    assert round(history[-1].sparsity * loop.size()) == round(0.9 * loop.size())


# Caps and budgets.


@pytest.mark.parametrize("control", ["exact", "pi"])
@pytest.mark.parametrize("target", [0.97, 0.99])
def test_no_component_goes_beyond_its_cap(target, control, device):
    method = SoftThreshold(
        target,
        schedule=Cubic(begin=0, end=12, every=1),
        control=control,
        allocation={"t0": 6.0, "t1": 6.0},
        max_sparsity={"t0": 0.95, "t1": 0.97, "shared": 0.999},
    )
    loop = Loop(method, device=device)
    for _ in range(14):
        loop.step()
        masks = loop.pruner.masks
        if loop.pruner.report().step is not None:
            for name, cap in (("t0", 0.95), ("t1", 0.97)):
                rows = {r.name: r for r in loop.pruner.report().components}
                assert rows[name].sparsity <= cap
    assert zeros(masks) == round(target * size(masks))


def test_without_caps_every_component_keeps_a_tenth_of_the_overall_density(device):
    method = SoftThreshold(0.9, schedule=SCHEDULE, allocation={"t0": 15.0})
    loop = Loop(method, device=device).train(9)
    rows = {row.name: row for row in loop.pruner.report().components}
    assert rows["t0"].kept == 60 - 59  # floor(0.99 * 60) may go
    assert loop.zeros() == round(0.9 * loop.size())


def test_a_component_can_have_a_sparsity_of_its_own(backend, device):
    method = SoftThreshold(0.9, schedule=SCHEDULE, budget_unit={"t0": 0.5, "t1": 0.75})
    loop = Loop(method, backend=backend, device=device).train(9)
    rows = {row.name: row for row in loop.pruner.report().components}
    assert (rows["t0"].kept, rows["t1"].kept) == (30, 15)
    assert loop.zeros() == round(0.9 * loop.size())


def test_a_budget_of_multiply_adds(backend, device):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3)),
            "a": nn.Linear(8, 4),
            "b": nn.Conv2d(8, 3, 1),
        }
    ).to(device)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            hidden = self.parts["trunk"](x).relu()
            return self.parts["a"](hidden.mean((2, 3))), self.parts["b"](hidden)

    whole = Whole()
    x = torch.randn(2, 2, 9, 9, device=device)
    method = SoftThreshold(0.8, schedule=SCHEDULE, budget_unit="macs", example_inputs=x)
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-2)
    pruner = MultitaskPruner(
        whole, ["a", "b"], whole.parts["trunk"], method=method, optimizer=optimizer, backend=backend
    )
    for _ in range(9):
        optimizer.zero_grad()
        one, other = whole(x)
        losses = pruner.observe_losses([(one - 1).square().mean(), (other + 1).square().mean()])
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()
    cost = {"trunk.0": 2 * 81, "trunk.2": 2 * 49, "a": 2, "b": 2 * 49}
    masks = {n.removeprefix("parts.").removesuffix(".weight"): m for n, m in pruner.masks.items()}
    total = sum(cost[n] * m.numel() for n, m in masks.items())
    pruned = sum(cost[n] * int((~m).sum()) for n, m in masks.items())
    assert round(0.8 * total) - max(cost.values()) < pruned <= round(0.8 * total)
    report = pruner.report()
    assert report.macs_sparsity == pytest.approx(pruned / total)
    assert "of the multiply-adds fall on pruned weights" in str(report)


# Life and travel.


def learning(control, backend, device):
    method = SoftThreshold(0.8, schedule=SCHEDULE, control=control, **LEARNING)
    return Loop(method, backend=backend, device=device)


@pytest.mark.parametrize(
    ("at", "control", "backend"),
    pairs([1, 2, 4, 6, 8, 9], ["exact", "pi"], ["prune", "inplace"]),
)
def test_a_resumed_run_is_the_uninterrupted_run(at, control, backend, device):
    straight = record(learning, control, backend, device)
    for order in (("model", "optimizer", "pruner"), ("pruner", "optimizer", "model")):
        state = through_a_file(straight.at(at).checkpoint)
        resumed = load(learning(control, backend, device), state, order).train(11 - at)
        assert_ends_like(resumed, straight.at(11))


@nets.EVERY_NET
def test_every_net_resumes(name, backend, device):
    def fresh(seed):
        net = build(name, device, seed=seed)
        return Run(net, SoftThreshold(0.7, schedule=SCHEDULE, **LEARNING), backend)

    straight = fresh(0)
    for _ in range(4):
        soft_step(straight)
    state = through_a_file(save(straight))
    resumed = load(fresh(9), state, ("pruner", "model", "optimizer"))
    for run in (straight, resumed):
        for _ in range(5):
            soft_step(run)
    assert_same_end(resumed, straight)


@pytest.mark.parametrize("at", [3, 9])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same(how, at, backend, device):
    loop = Loop(SoftThreshold(0.8, schedule=SCHEDULE, **LEARNING), backend=backend, device=device)
    loop.train(at)
    x = torch.randn(4, 10, device=device)
    twin = how(loop.model)
    for task, out in loop.model(x).items():
        assert torch.equal(twin(x)[task], out)


@pytest.mark.parametrize("at", [1, 3, 5, 9])
def test_finalize_at_any_time_keeps_the_function(at, backend, device):
    loop = Loop(SoftThreshold(0.8, schedule=SCHEDULE, **LEARNING), backend=backend, device=device)
    keys = list(loop.model.state_dict())
    loop.train(at)
    x = torch.randn(4, 10, device=device)
    before, masks = loop.model(x), loop.pruner.masks
    loop.pruner.finalize()
    after = loop.model(x)
    for task, out in before.items():
        assert torch.equal(after[task], out)
    assert list(loop.model.state_dict()) == keys
    assert same(loop.pruner.masks, masks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loop.model.modules())
    for name, weight in loop.weights().items():
        assert torch.equal(weight != 0, masks[name])


def test_task_masks_are_those_of_the_layers_a_task_uses(device):
    loop = Loop(SoftThreshold(0.8, schedule=SCHEDULE), device=device).train(9)
    masks = loop.pruner.task_masks["t0"]
    assert sorted(masks) == ["heads.t0.weight", "trunk.0.weight", "trunk.2.weight"]
    assert all(torch.equal(masks[name], loop.pruner.masks[name]) for name in masks)


def test_one_shot_over_a_loader(backend, device):
    torch.manual_seed(0)
    model = Multitask(["a", "b"]).to(device)
    losses = {t: (lambda out, x, t=t: out[t].square().mean()) for t in ("a", "b")}
    pruner = MultitaskPruner(
        model, losses, "trunk", method=SoftThreshold(0.9, schedule=SCHEDULE), backend=backend
    )
    report = pruner.prune([torch.randn(8, 10, device=device)], progress=False)
    assert report.kept == report.parameters - round(0.9 * report.parameters)
    weights = [p for n, p in model.named_parameters() if p.dim() == 2]
    assert sum(int((w != 0).sum()) for w in weights) == report.kept


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16"])
def test_weights_in_half_precision_land_on_the_count(weights, device):
    dtype = getattr(torch, weights)
    torch.manual_seed(0)
    model = Multitask(["a", "b"]).to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    method = SoftThreshold(0.9, schedule=SCHEDULE)
    pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=method, optimizer=optimizer)
    for _ in range(9):
        optimizer.zero_grad()
        out = model(torch.randn(8, 10, device=device).to(dtype))
        losses = pruner.observe_losses({t: out[t].float().square().mean() for t in out})
        pruner.weigh(losses).backward()
        optimizer.step()
        pruner.step()
    found = [p for n, p in model.named_parameters() if n.endswith(("weight", "weight_orig"))]
    assert sum(int((w == 0).sum()) for w in found) == round(0.9 * sum(w.numel() for w in found))


def test_mixed_precision_with_a_scaler(backend, device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE, **LEARNING), backend=backend, device=device)
    scaler = torch.amp.GradScaler(loop.device.type if loop.device else "cpu", init_scale=2.0**14)
    for _ in range(10):
        loop.optimizer.zero_grad()
        losses = loop.pruner.observe_losses(loop.losses(), scaler=scaler)
        scaler.scale(loop.pruner.weigh(losses)).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.pruner.step()
    assert loop.zeros() == round(0.9 * loop.size())
    assert all(torch.isfinite(w).all() for w in loop.weights().values())


def test_an_overflow_does_not_spoil_what_was_noted(device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE, allocation="learned"), device=device)
    loop.train(4)
    before = checkpoints.noted(loop.pruner)
    assert bool(before.any())
    (torch.stack(list(loop.losses().values())).sum() * float("inf")).backward()
    loop.optimizer.zero_grad()
    loop.optimizer.step()
    assert torch.equal(checkpoints.noted(loop.pruner), before)


def test_the_report_tells_thresholds_shares_and_their_history(device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE, **LEARNING), device=device).train(8)
    report = loop.pruner.report()
    assert [moment.step for moment in report.history] == [1, 3, 5, 7]
    for moment in report.history:
        assert sum(row["share"] for row in moment.components.values()) == pytest.approx(1.0)
        assert set(moment.components) == {"shared", "t0", "t1"}
        assert set(moment.weights) == {"t0", "t1"}
        assert sum(moment.weights.values()) == pytest.approx(2.0)
    taus = [moment.components["shared"]["threshold"] for moment in report.history]
    assert taus[0] == 0.0 < taus[1]
    assert "threshold" in str(report).splitlines()[0]
    assert "want" not in str(report)
    assert "Losses count t0 " in str(report)
    assert report.to_dict()["history"][0]["step"] == 1


@pytest.mark.slow
def test_the_recipe_runs_in_a_loop(backend, device):
    loop = Loop(recipes.adapmtl(0.9, 40), backend=backend, device=device).train(40)
    assert loop.zeros() == round(0.9 * loop.size())
    assert loop.pruner.report().step == 30


# Mistakes.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 90}, ValueError, r"`sparsity` must be in \[0, 1\)\. Got 90\. Did you mean"),
        ({"sparsity": 1.0}, ValueError, r"`sparsity` must be in \[0, 1\)"),
        ({"schedule": Cubic}, TypeError, "`schedule` must be a schedule"),
        ({"schedule": Regrow(every=2, end=9)}, ValueError, "Thresholds need a schedule that ends"),
        ({"per": "weight"}, ValueError, r"`per` must be one of \('component', 'layer'\)"),
        ({"grad_mode": "none"}, ValueError, "`grad_mode` must be one of"),
        ({"control": "p"}, ValueError, "`control` must be one of"),
        ({"scale": "std"}, ValueError, "`scale` must be one of"),
        ({"allocation": "erk"}, ValueError, "`allocation` must be 'uniform', 'learned' or a map"),
        ({"allocation": {"t0": "x"}}, TypeError, "`allocation` of 't0' must be a number"),
        ({"allocation": {"t0": 50.0}}, ValueError, r"`allocation` of 't0' must be in \[-20, 20\]"),
        ({"budget_unit": "flops"}, ValueError, "`budget_unit` must be 'params', 'macs' or a map"),
        ({"budget_unit": {"t0": 90}}, ValueError, r"budget_unit\['t0'\]"),
        ({"budget_unit": "macs"}, ValueError, "needs `example_inputs`"),
        ({"max_sparsity": 0.8}, ValueError, "out of reach with this `max_sparsity`: at most 0.8"),
        ({"max_sparsity": {"t0": 1.5}}, ValueError, r"`max_sparsity`\['t0'\] must be in \(0, 1\]"),
        ({"max_sparsity": 0.0}, ValueError, r"`max_sparsity` must be in \(0, 1\]"),
        ({"weighting": "loud"}, ValueError, "`weighting` must be one of"),
        ({"weighting": 3}, TypeError, "`weighting` must be one of .* a function of the losses"),
        ({"rate": 0.0}, ValueError, r"`rate` must be in \(0, 1\)"),
        ({"observations": 0}, ValueError, "`observations` must be at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_named_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        SoftThreshold(**({"sparsity": 0.9} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": {"t9": 0.1}}, r"`allocation` names \['t9'\]"),
        ({"budget_unit": {"t9": 0.1}}, r"`budget_unit` names \['t9'\]"),
        ({"max_sparsity": {"t9": 0.1}}, r"`max_sparsity` names \['t9'\]"),
        (
            {"max_sparsity": {"shared": 0.5}},
            "sparsity=0.9 is out of reach with this `max_sparsity`: at most 0.53",
        ),
    ],
    ids=str,
)
def test_what_the_model_lacks_is_named_when_the_pruner_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        Loop(SoftThreshold(0.9, **options))


def test_caps_that_only_observation_shows_to_be_too_low(device):
    method = SoftThreshold(0.9, schedule=OneShot(0), max_sparsity={"t0": 0.1, "shared": 0.9})
    loop = Loop(method, tasks=2, device=device)
    with pytest.raises(RuntimeError, match=r"out of reach with this `max_sparsity`: at most 0\.87"):
        loop.step()
    assert zeros(loop.pruner.masks) == 0


def test_an_only_update_goes_on_from_a_checkpoint_though_no_controller_steered(device):
    method = SoftThreshold(0.5, schedule=OneShot(2), control="pi")
    straight = Run(build("plain", device), method).train(3)
    state = through_a_file(save(straight))
    resumed = load(Run(build("plain", device, seed=1), method), state)
    assert_same_end(straight.train(2), resumed.train(2))


def test_folding_the_backward_into_the_scoring_is_refused(device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE), device=device)
    with pytest.raises(ValueError, match="fold=True cannot train thresholds"):
        loop.pruner.observe_losses(loop.losses(), fold=True)


def test_weights_that_are_all_zero_have_no_threshold(device):
    loop = Loop(SoftThreshold(0.9, schedule=OneShot(0)), device=device)
    loop.pruner.observe_losses(loop.losses())
    nn.init.zeros_(loop.model.heads["t1"].weight)
    with pytest.raises(RuntimeError, match="Weights of 't1' are all zero"):
        loop.pruner.step()


def test_weights_that_are_not_finite_have_no_threshold(device):
    loop = Loop(SoftThreshold(0.9, schedule=SCHEDULE), device=device).train(2)
    with torch.no_grad():
        loop.model.heads["t0"].weight_orig[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"Weights of 't0' are not finite|is not finite"):
        loop.train(2)


def test_example_inputs_that_miss_a_layer_are_refused():
    class Half(Multitask):
        def forward(self, x):
            return {"t0": self.heads["t0"](self.trunk(x))}

    model = Half(["t0", "t1"])
    method = SoftThreshold(0.9, budget_unit="macs", example_inputs=torch.zeros(1, 10))
    with pytest.raises(ValueError, match=r"No multiply-adds of \['heads\.t1\.weight'\]"):
        MultitaskPruner(model, ["t0", "t1"], "trunk", method=method)


def test_a_checkpoint_of_another_method_is_refused(device):
    state = Loop(SoftThreshold(0.9), device=device).pruner.state_dict()
    with pytest.raises(ValueError, match="of a pruner with other method"):
        Loop(SoftThreshold(0.8), device=device).pruner.load_state_dict(state)


def test_the_warning_of_the_shelf_is_still_due(device):
    run = Run(build("dead_relu", device), SoftThreshold(0.7, schedule=SCHEDULE))
    with expected(run.net):
        for _ in range(3):
            soft_step(run)
    assert "trunk.side.weight" in run.pruner.report().left_alone


@pytest.mark.parametrize("at", [3, 5, 9])
def test_what_is_left_can_be_made_as_large_as_before(at, backend, device):
    method = SoftThreshold(0.8, schedule=SCHEDULE, debias=True)
    loop = Loop(method, optimizer="sgd", lr=0.0, backend=backend, device=device)
    dense = {name: weight.clone() for name, weight in loop.weights().items()}
    loop.train(at)
    x = torch.randn(4, 10, device=device)
    before, masks = loop.model(x), loop.pruner.masks
    loop.pruner.finalize()
    for name, weight in loop.weights().items():
        kept = dense[name][masks[name]]
        torch.testing.assert_close(weight.norm(), kept.norm())
        assert torch.equal(weight != 0, masks[name])
    for task, out in loop.model(x).items():
        torch.testing.assert_close(out, before[task])


def gaining(backend, device):
    method = SoftThreshold(0.8, schedule=SCHEDULE, debias=True)
    return Loop(method, backend=backend, device=device)


@pytest.mark.parametrize("at", [2, 4, 8])
def test_gains_travel_in_the_checkpoint(at, backend, device):
    straight = record(gaining, backend, device)
    state = through_a_file(straight.at(at).checkpoint)
    resumed = load(gaining(backend, device), state, ("pruner", "model", "optimizer"))
    assert_ends_like(resumed.train(11 - at), straight.at(11))


def test_fewer_weights_than_components_are_within_reach_of_caps_that_nobody_asked_for():
    torch.manual_seed(0)
    model = nn.ModuleDict({"t": nn.Linear(20, 20), "a": nn.Linear(20, 1), "b": nn.Linear(20, 1)})
    method = SoftThreshold(0.995, schedule=Cubic(0, 10, 2))
    pruner = MultitaskPruner(model, ["a", "b"], "t", method=method)
    for _ in range(12):
        hidden = model["t"](torch.randn(8, 20)).relu()
        pruner.observe_losses({k: model[k](hidden).square().mean() for k in "ab"})
        pruner.step()
    assert pruner.report().kept == 2
