"""The pruner: the order of calls, and the fine print of what each of them does."""

import io
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtprune
from mtprune import (
    Cubic,
    Linear,
    MultitaskPruner,
    OneShot,
    PerTaskKeep,
    Regrow,
    Vote,
    recipes,
    saliency,
    votes,
)


class Net(nn.Module):
    """A trunk of two layers and one head per task: 96 shared weights, 8 private ones each."""

    def __init__(self, tasks=("a", "b")):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in tasks})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


class Loss:
    """Mean squared distance of one task's output to a function of the batch that is its own."""

    def __init__(self, index, task):
        self.index = index
        self.task = task

    def __call__(self, out, x):
        target = (x * (self.index + 1)).sin().sum(1, keepdim=True)
        return (out[self.task] - target).square().mean()


def losses_of(*tasks):
    return {task: Loss(i, task) for i, task in enumerate(tasks)}


class Loop:
    """A training loop as users write it."""

    def __init__(
        self, device, method, *, tasks=("a", "b"), given=False, names_only=False, **options
    ):
        torch.manual_seed(0)
        self.device = device
        self.tasks = tasks
        self.model = Net(tasks).to(device)
        self.losses = losses_of(*tasks)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.pruner = MultitaskPruner(
            self.model,
            list(tasks) if names_only else self.losses,
            options.pop("shared", "trunk"),
            method=method,
            optimizer=self.optimizer if given else None,
            **options,
        )

    def batch(self, size=16):
        return torch.randn(size, 4, device=self.device)

    def observe(self, x=None, tasks=None):
        x = self.batch() if x is None else x
        return self.pruner.observe(self.model(x), x, tasks=tasks)

    def step(self, x=None, tasks=None, optimize=True):
        losses = self.observe(x, tasks)
        sum(losses.values()).backward()
        if optimize:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.pruner.step()

    def updates(self, calls, **options):
        """The number of every call of step() in which an update was made, and that update."""
        found = []
        for call in range(1, calls + 1):
            before = self.pruner.report().step
            self.step(**options)
            after = self.pruner.report().step
            if after != before:
                found.append((call, after))
        return found


@pytest.fixture
def sweeps(monkeypatch):
    """The losses of all sweeps, as they are made."""
    seen = []
    real = torch.autograd.grad

    def counting(loss, *args, **options):
        seen.append(loss)
        return real(loss, *args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    return seen


def flat(masks):
    return torch.cat([mask.reshape(-1) for mask in masks.values()])


def zeros(masks):
    return int((~flat(masks)).sum())


def same(masks, others):
    return list(masks) == list(others) and all(torch.equal(masks[n], others[n]) for n in masks)


def weights(model):
    """Prunable weights of a `Net` under their original names."""
    named = {name.removesuffix("_orig"): p for name, p in model.named_parameters()}
    return {name: p for name, p in named.items() if p.dim() == 2}


# A slow and obvious version of what the pruner does, to compare with.


def scores_by_hand(model, losses, x, formula=lambda w, g: (w * g).abs()):
    """``{task: {name: saliency}}`` for the layers each task uses."""
    named = weights(model)
    result = {}
    for task, loss in losses.items():
        value = loss(model(x), x)
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        result[task] = {
            name: formula(w.detach(), g)
            for (name, w), g in zip(named.items(), grads, strict=True)
            if g is not None
        }
    return result


def percentiles_by_hand(scores):
    every = torch.cat([score.reshape(-1) for score in scores.values()])
    ordered = every.sort().values
    return {
        name: torch.searchsorted(ordered, score.contiguous()).to(torch.float64) / every.numel()
        for name, score in scores.items()
    }


def best_by_hand(worth, keep):
    """The ``keep`` highest of all, earlier position first among equals."""
    every = torch.cat([w.reshape(-1) for w in worth.values()])
    chosen = torch.zeros(every.numel(), dtype=torch.bool, device=every.device)
    chosen[every.sort(descending=True, stable=True).indices[:keep]] = True
    pieces = chosen.split([w.numel() for w in worth.values()])
    return {n: piece.view(w.shape) for (n, w), piece in zip(worth.items(), pieces, strict=True)}


def vote_by_hand(scores, names, keep, priority=()):
    """Masks of a unanimous vote under a global allocation."""
    ranked = {}
    for task, own in scores.items():
        factor = dict(priority).get(task, 1.0)
        ranked[task] = {n: 1 - (1 - p) / factor for n, p in percentiles_by_hand(own).items()}
    worth = {
        name: torch.stack([own[name] for own in ranked.values() if name in own]).amax(0)
        for name in names
    }
    return best_by_hand(worth, keep)


GLOBAL = {"allocation": "global", "min_keep": 0}


# The loop of the contract.


@pytest.mark.parametrize("given", [True, False], ids=["optimizer given", "step() counted"])
def test_the_loop_of_the_contract(given, backend, device):
    torch.manual_seed(0)
    model = Net(("seg", "depth")).to(device)
    keys = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    functions = losses_of("seg", "depth")
    loader = [{"image": torch.randn(16, 4, device=device)} for _ in range(12)]

    pruner = MultitaskPruner(
        model,
        task_losses={t: lambda out, b, t=t: functions[t](out, b["image"]) for t in functions},
        shared_modules=[model.trunk],
        method=Vote(sparsity=0.9, schedule=Cubic(begin=2, end=10, every=4)),
        optimizer=optimizer if given else None,
        backend=backend,
    )
    for batch in loader:
        optimizer.zero_grad()
        outputs = model(batch["image"])
        losses = pruner.observe(outputs, batch)
        assert list(losses) == ["seg", "depth"]
        sum(losses.values()).backward()
        optimizer.step()
        pruner.step()
    report = pruner.report()
    assert "seg" in str(report)
    assert "depth" in str(report)
    assert pruner.sparsity == report.sparsity == round(0.9 * 112) / 112
    x = torch.randn(16, 4, device=device)
    before = model(x)
    pruner.finalize()
    after = model(x)
    assert all(torch.equal(before[task], after[task]) for task in before)
    assert list(model.state_dict()) == keys
    assert sum(int((w == 0).sum()) for w in weights(model).values()) == round(0.9 * 112)


# Step numbers.


COUNTED = pytest.mark.parametrize("given", [True, False], ids=["optimizer given", "step() counted"])


@COUNTED
@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (OneShot(0), [(1, 0)]),
        (OneShot(1), [(1, 1)]),
        (OneShot(5), [(5, 5)]),
        (Linear(begin=2, end=8, every=3), [(2, 2), (5, 5), (8, 8)]),
        (Linear(begin=2, end=7, every=2), [(2, 2), (4, 4), (6, 6), (7, 7)]),
        (Cubic(begin=0, end=7, every=3), [(1, 0), (3, 3), (6, 6), (7, 7)]),
        (Cubic(begin=4, end=4, every=1), [(4, 4)]),
    ],
    ids=repr,
)
def test_updates_are_made_at_the_steps_of_the_schedule(schedule, expected, given, device):
    loop = Loop(device, Vote(0.5, schedule=schedule), given=given)
    assert loop.updates(10) == expected
    assert loop.pruner.sparsity == 0.5


def test_regrow_draws_at_the_first_step_and_updates_below_its_end(device):
    method = Vote(0.5, schedule=Regrow(every=3, end=9), allocation="erk")
    loop = Loop(device, method, given=True)
    assert loop.updates(10) == [(1, 0), (3, 3), (6, 6)]
    assert loop.pruner.sparsity == 0.5


def test_accumulation_counts_real_optimizer_steps(device):
    loop = Loop(device, Vote(0.5, schedule=Linear(begin=1, end=3, every=1)), given=True)
    found = []
    for call in range(1, 17):
        loop.observe()["a"].backward()
        if call % 4 == 0:
            loop.optimizer.step()
        if loop.pruner.step() or loop.pruner.report().step not in (None, *[u for _, u in found]):
            found.append((call, loop.pruner.report().step))
    assert found == [(4, 1), (8, 2), (12, 3)]


def test_a_skipped_optimizer_step_is_none(device):
    loop = Loop(device, Vote(0.5, schedule=OneShot(2)), given=True)
    assert [loop.step(optimize=i > 3) for i in range(6)] == [False] * 5 + [True]
    other = Loop(device, Vote(0.5, schedule=OneShot(2)))
    assert [other.step(optimize=i > 3) for i in range(6)] == [False, True] + [False] * 4


def test_late_updates_coalesce(device):
    loop = Loop(device, Vote(0.5, schedule=Linear(begin=2, end=10, every=2)), given=True)
    for _ in range(7):
        sum(loop.observe().values()).backward()
        loop.optimizer.step()
    assert loop.pruner.step() is True
    assert loop.pruner.report().step == 6
    assert zeros(loop.pruner.masks) == round(0.5 * 0.5 * 112)
    assert loop.pruner.step() is False
    assert loop.updates(5) == [(1, 8), (3, 10)]


def test_an_update_that_is_due_is_made_once(device):
    loop = Loop(device, Vote(0.5, schedule=OneShot(3)), given=True)
    for _ in range(3):
        sum(loop.observe().values()).backward()
        loop.optimizer.step()
    assert [loop.pruner.step() for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (Vote(0.75, schedule=Cubic(begin=1, end=9, every=2)), True),
        (Vote(0.75, schedule=Cubic(begin=1, end=9, every=2)), False),
        (Vote(0.75, schedule=Linear(begin=0, end=9, every=4)), False),
        (Vote(0.75, schedule=OneShot(4)), True),
        (recipes.rigl(0.75, every=3, end=9, fraction=0.5), True),
    ],
    ids=["cubic, optimizer given", "cubic", "linear", "one-shot, optimizer given", "regrow"],
)
def test_step_says_exactly_when_masks_have_changed(method, given, backend, device):
    loop = Loop(device, method, given=given, backend=backend)
    before = loop.pruner.masks
    said = []
    for _ in range(11):
        changed = loop.step()
        said.append(changed)
        after = loop.pruner.masks
        assert changed is not same(before, after)
        if not method.regrows:
            assert all(not bool((after[name] & ~before[name]).any()) for name in after)
        before = after
    assert any(said)
    assert not all(said)
    assert zeros(before) == round(0.75 * 112)


@pytest.mark.parametrize("kind", [Linear, Cubic])
def test_every_update_is_exactly_as_far_as_the_schedule(kind, device):
    schedule = kind(begin=1, end=9, every=2)
    loop = Loop(device, Vote(0.77, schedule=schedule))
    seen = []
    for _ in range(10):
        loop.step()
        done = loop.pruner.report().step
        if done is not None:
            assert zeros(loop.pruner.masks) == round(0.77 * schedule.progress(done) * 112)
            seen.append(done)
    assert sorted(set(seen)) == [1, 3, 5, 7, 9]
    assert loop.pruner.sparsity == round(0.77 * 112) / 112


# When observe collects.


def test_observe_outside_the_window_makes_no_sweep(sweeps, device):
    loop = Loop(device, Vote(0.5, schedule=Linear(begin=4, end=12, every=4)))
    made = []
    for _ in range(15):
        before = len(sweeps)
        loop.step()
        made.append(len(sweeps) - before)
    assert made == [0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("observations", [1, 3])
def test_the_window_is_as_long_as_the_observations_asked_for(observations, sweeps, device):
    method = Vote(0.5, schedule=Linear(begin=5, end=10, every=5), observations=observations)
    loop = Loop(device, method)
    made = []
    for _ in range(12):
        before = len(sweeps)
        loop.step()
        made.append(len(sweeps) - before)
    window = [0] * (5 - observations) + [2] * observations
    assert made == [*window, *window, 0, 0]
    assert loop.pruner.report().observations == {"a": observations, "b": observations}


def test_one_observation_is_of_the_last_batch_before_the_update(device):
    loop = Loop(device, Vote(0.5, schedule=OneShot(4), **GLOBAL))
    batches = [loop.batch() for _ in range(4)]
    for x in batches[:3]:
        assert loop.step(x) is False
    # The last step does not train, so that what is scored is what is there afterwards.
    scores = scores_by_hand(loop.model, loop.losses, batches[3])
    assert loop.step(batches[3], optimize=False) is True
    assert loop.pruner.report().observations == {"a": 1, "b": 1}
    assert same(loop.pruner.masks, vote_by_hand(scores, list(loop.pruner.masks), 56))


@pytest.mark.parametrize("observations", [1, 3])
@pytest.mark.parametrize("tasks", [("a", "b"), ("a", "b", "c")], ids=len)
def test_the_window_begins_in_time_when_batches_hold_one_task_each(
    tasks, observations, sweeps, device
):
    method = Vote(0.5, schedule=OneShot(12), observations=observations)
    loop = Loop(device, method, tasks=tasks)
    changed, made = [], []
    for i in range(13):
        before = len(sweeps)
        changed.append(loop.step(tasks=[tasks[i % len(tasks)]]))
        made.append(len(sweeps) - before)
    assert changed.index(True) == 11
    window = observations * len(tasks)
    assert made == [0] * (12 - window) + [1] * window + [0]
    assert loop.pruner.report().observations == dict.fromkeys(tasks, observations)


def test_tasks_seen_in_different_batches_add_up_to_the_same_masks(device):
    apart, together = (Loop(device, Vote(0.5)) for _ in range(2))
    x = apart.batch()
    apart.observe(x, tasks=["b"])
    assert apart.pruner.step() is False
    apart.observe(x, tasks=["a"])
    assert apart.pruner.step() is True
    together.observe(x)
    together.pruner.step()
    assert same(apart.pruner.masks, together.pruner.masks)


def test_a_single_task_may_be_named_without_a_list(device):
    loop = Loop(device, Vote(0.5))
    assert list(loop.observe(tasks="b")) == ["b"]


def test_an_update_that_waits_returns_false_and_is_made_when_it_can_be(device):
    loop = Loop(device, Vote(0.5, schedule=OneShot(3)))
    waited = [loop.step(tasks=["a"]) for _ in range(8)]
    assert waited == [False] * 8
    assert all(bool(mask.all()) for mask in loop.pruner.masks.values())
    assert loop.step(tasks=["b"]) is True
    assert loop.pruner.report().step == 3


def test_a_task_already_seen_often_enough_is_not_swept_again(sweeps, device):
    loop = Loop(device, Vote(0.5, schedule=OneShot(3)))
    for _ in range(6):
        loop.step(tasks=["a"])
    assert len(sweeps) == 1
    loop.step()
    assert len(sweeps) == 2
    assert loop.pruner.report().observations == {"a": 1, "b": 1}


def test_evaluation_without_gradients_only_computes_losses(sweeps, device):
    loop = Loop(device, Vote(0.5))
    x = loop.batch()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            losses = loop.observe(x)
            assert loop.pruner.observe_losses(losses) is losses
        assert torch.equal(losses["a"], loop.losses["a"](loop.model(x), x))
    assert sweeps == []
    # Not even that some tasks were missing there is held against the training loop.
    other = Loop(device, Vote(0.5, schedule=OneShot(6)))
    with torch.no_grad():
        other.observe(tasks=["a"])
    for _ in range(6):
        other.step()
    assert len(sweeps) == 2
    assert other.pruner.sparsity == 0.5


def test_a_hidden_layer_asks_for_a_second_observation_of_that_task_alone(sweeps, device):
    class Gated(Net):
        def __init__(self):
            super().__init__()
            self.side, self.gate = nn.Linear(4, 4), nn.Linear(4, 1, bias=False)
            nn.init.zeros_(self.gate.weight)

        def forward(self, x):
            out = super().forward(x)
            out["b"] = out["b"] + self.gate(self.side(x))
            return out

    model = Gated().to(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5))
    x = torch.randn(16, 4, device=device)
    pruner.observe(model(x), x)
    assert pruner.step() is False
    pruner.observe(model(x), x)
    with pytest.warns(UserWarning, match=r"'side\.weight'"):
        assert pruner.step() is True
    assert pruner.report().observations == {"a": 1, "b": 2}
    assert len(sweeps) == 3


# observations="auto".


class Still(Loop):
    """A loop that sees the same batch again and again, and does not train."""

    def step(self, x=None, tasks=None, optimize=False):
        torch.manual_seed(1)
        return super().step(self.batch() if x is None else x, tasks, optimize)


def test_auto_takes_at_least_four_observations_and_stops_when_masks_are_stable(device):
    loop = Still(device, Vote(0.5, observations="auto"))
    assert [loop.step() for _ in range(5)] == [False, False, False, True, False]
    report = loop.pruner.report()
    assert report.observations == {"a": 4, "b": 4}
    assert report.stable is True
    assert "4 observation(s) per task, until masks were stable." in str(report)


def test_auto_takes_more_observations_while_masks_still_change(device):
    loop = Loop(device, Vote(0.5, observations="auto"))
    with torch.no_grad():
        loop.model.trunk[0].weight.mul_(0.1)
    seen = 0
    while not loop.step(loop.batch(2), optimize=False):
        seen += 1
        assert seen < 64
    report = loop.pruner.report()
    assert report.observations == {"a": seen + 1, "b": seen + 1}
    assert seen + 1 > 4
    assert f"{seen + 1} observation(s) per task" in str(report)


def test_auto_begins_early_enough_to_make_its_update_in_time(device):
    loop = Still(device, Vote(0.5, schedule=OneShot(10), observations="auto"))
    changed = [loop.step() for _ in range(20)]
    assert changed.index(True) == 9
    assert loop.pruner.report().observations == {"a": 4, "b": 4}


def test_auto_asks_a_saliency_without_data_once(device):
    loop = Loop(device, Vote(0.5, saliency=saliency.magnitude, observations="auto"))
    assert loop.step() is True
    assert loop.pruner.report().stable is None


def test_a_number_of_observations_says_nothing_of_stability(device):
    loop = Loop(device, Vote(0.5, observations=3))
    assert [loop.step() for _ in range(3)] == [False, False, True]
    assert loop.pruner.report().stable is None
    assert "3 observation(s) per task." in str(loop.pruner.report())


# prune().


def test_prune_takes_as_many_batches_as_it_needs(device):
    loop = Loop(device, Vote(0.5, observations=2))
    pulled = []

    def stream():
        for i in range(9):
            pulled.append(i)
            yield loop.batch()

    report = loop.pruner.prune(stream(), progress=False)
    assert pulled == [0, 1]
    assert report.observations == {"a": 2, "b": 2}
    assert report == loop.pruner.report()
    assert loop.pruner.sparsity == report.sparsity == 0.5


def test_prune_makes_do_with_fewer_batches_than_asked_for(device):
    loop = Loop(device, Vote(0.5, observations=9))
    report = loop.pruner.prune([loop.batch(), loop.batch()], progress=False)
    assert report.observations == {"a": 2, "b": 2}
    assert report.sparsity == 0.5


def test_prune_hands_model_and_batch_to_forward(device):
    plain, other = Loop(device, Vote(0.5)), Loop(device, Vote(0.5))
    x = plain.batch()
    plain.pruner.prune([x], progress=False)
    functions = {t: lambda out, b, t=t: plain.losses[t](out, b["x"]) for t in ("a", "b")}
    other.pruner.finalize()
    pruner = MultitaskPruner(other.model, functions, "trunk", method=Vote(0.5))
    pruner.prune([{"x": x}], forward=lambda model, batch: model(batch["x"]), progress=False)
    assert same(pruner.masks, plain.pruner.masks)


def test_prune_does_what_observe_and_step_do(backend, device):
    one, other = (Loop(device, Vote(0.7), backend=backend) for _ in range(2))
    x = one.batch()
    one.pruner.prune([x], progress=True)
    other.observe(x)
    other.pruner.step()
    assert same(one.pruner.masks, other.pruner.masks)


def test_prune_works_without_gradients_around_it(device):
    loop = Loop(device, Vote(0.5))
    with torch.no_grad():
        loop.pruner.prune([loop.batch()], progress=False)
    assert loop.pruner.sparsity == 0.5


def test_prune_goes_to_the_final_sparsity_of_a_schedule_and_no_further(device):
    loop = Loop(device, Vote(0.75, schedule=Cubic(begin=2, end=6, every=2)))
    report = loop.pruner.prune([loop.batch()], progress=False)
    assert report.sparsity == 0.75
    assert report.step == 6
    assert [loop.step() for _ in range(8)] == [False] * 8
    with pytest.raises(RuntimeError, match="All updates of the schedule have been made already"):
        loop.pruner.prune([loop.batch()], progress=False)


class Noisy(Net):
    """With BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh()
        )


def test_prune_leaves_buffers_gradients_mode_and_randomness_as_they_were(backend, device):
    model = Noisy().to(device)
    pruner = MultitaskPruner(
        model, losses_of("a", "b"), "trunk", method=Vote(0.5, observations=2), backend=backend
    )
    batches = [torch.randn(16, 4, device=device) for _ in range(3)]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    pruner.prune(batches, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(model.named_buffers())
    assert [name for name, b in buffers.items() if not torch.equal(after[name], b)] == []
    assert all(p.grad is None for p in model.parameters())
    assert model.training


class Recomputed(Noisy):
    """Whose trunk runs again inside every sweep: activation checkpointing."""

    def forward(self, x):
        hidden = checkpoint(self.trunk, x, use_reentrant=False)
        return {task: head(hidden) for task, head in self.heads.items()}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", [Noisy, Recomputed])
def test_observe_leaves_buffers_gradients_and_randomness_as_they_were(kind, train, sweeps, device):
    model = kind().to(device).train(train)
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5))
    x = torch.randn(16, 4, device=device)
    out = model(x)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    losses = pruner.observe(out, x)
    assert len(sweeps) == 2
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(model.named_buffers())
    assert [name for name, b in buffers.items() if not torch.equal(after[name], b)] == []
    assert all(p.grad is None for p in model.parameters())
    assert not any(p._backward_hooks for p in model.parameters())
    sum(losses.values()).backward()  # nor is anything lost that the backward pass needs


# What there is to read.


def test_before_the_first_change_everything_is_kept(backend, device):
    loop = Loop(device, Vote(0.5, schedule=OneShot(3)), backend=backend)
    shapes = {name: w.shape for name, w in weights(loop.model).items()}
    for _ in range(3):
        masks = loop.pruner.masks
        assert {name: mask.shape for name, mask in masks.items()} == shapes
        assert all(mask.dtype == torch.bool and bool(mask.all()) for mask in masks.values())
        assert list(loop.pruner.task_masks) == ["a", "b"]
        for own in loop.pruner.task_masks.values():
            assert all(bool(mask.all()) for mask in own.values())
        assert loop.pruner.sparsity == 0.0
        report = loop.pruner.report()
        assert report.step is None
        assert str(report) == "Nothing pruned yet: 112 weights in 4 layers, 2 tasks."
        changed = loop.step()
    assert changed is True
    assert loop.pruner.sparsity == 0.5


def test_masks_are_copies(backend, device):
    loop = Loop(device, Vote(0.5), backend=backend)
    loop.step()
    taken = loop.pruner.masks
    for mask in taken.values():
        mask.fill_(False)
    assert loop.pruner.sparsity == 0.5


@pytest.mark.parametrize("sparsity", [0.5, 0.77, 0.9])
def test_task_masks_keep_what_each_task_alone_would(sparsity, device):
    loop = Loop(device, Vote(sparsity), tasks=("a", "b", "c"))
    x = loop.batch()
    scores = scores_by_hand(loop.model, loop.losses, x)
    loop.step(x, optimize=False)
    for task, masks in loop.pruner.task_masks.items():
        assert list(masks) == ["trunk.0.weight", "trunk.2.weight", f"heads.{task}.weight"]
        assert int(flat(masks).sum()) == round((1 - sparsity) * 104)
        assert same(masks, best_by_hand(scores[task], round((1 - sparsity) * 104)))


def test_task_masks_of_a_gradual_schedule_are_as_dense_as_the_masks(device):
    loop = Loop(device, Vote(0.8, schedule=Linear(begin=0, end=4, every=2)))
    for _ in range(2):
        loop.step()
    assert loop.pruner.report().step == 2
    for masks in loop.pruner.task_masks.values():
        assert int(flat(masks).sum()) == round((1 - 0.4) * 104)


def test_everything_stays_readable_after_finalize(backend, device):
    loop = Loop(device, Vote(0.7), backend=backend)
    loop.step()
    masks, own = loop.pruner.masks, loop.pruner.task_masks
    sparsity, report = loop.pruner.sparsity, loop.pruner.report()
    loop.pruner.finalize()
    loop.pruner.finalize()  # again, which does nothing
    for p in weights(loop.model).values():
        nn.init.ones_(p)
    assert same(loop.pruner.masks, masks)
    assert all(same(loop.pruner.task_masks[task], own[task]) for task in own)
    assert loop.pruner.sparsity == sparsity
    assert loop.pruner.report() == report


def test_a_pruner_that_never_pruned_can_be_finalized_and_read(backend, device):
    loop = Loop(device, Vote(0.7), backend=backend)
    before = {name: w.clone() for name, w in weights(loop.model).items()}
    loop.pruner.finalize()
    assert loop.pruner.sparsity == 0.0
    assert all(bool(mask.all()) for mask in loop.pruner.masks.values())
    assert "Nothing pruned yet" in str(loop.pruner.report())
    assert all(torch.equal(w, before[name]) for name, w in weights(loop.model).items())


def test_zeros_that_were_there_by_themselves_do_not_count_as_pruned(backend, device):
    loop = Loop(device, Vote(0.25), backend=backend)
    with torch.no_grad():
        loop.model.trunk[2].weight[:, :4] = 0
    loop.step(optimize=False)
    assert loop.pruner.sparsity == 0.25
    assert zeros(loop.pruner.masks) == loop.pruner.report().parameters * 0.25 == 28
    assert loop.pruner.report().sparsity == 0.25
    other = Loop(device, Vote(0.25, schedule=OneShot(5)), backend=backend)
    with torch.no_grad():
        other.model.trunk[2].weight.zero_()
    assert other.pruner.sparsity == 0.0


def test_the_report_counts_what_a_count_by_hand_gives(backend, device):
    loop = Loop(device, Vote(0.7), tasks=("a", "b", "c"), backend=backend)
    loop.step()
    masks, own = loop.pruner.masks, loop.pruner.task_masks
    report = loop.pruner.report()

    def count(names, tasks):
        kept = sum(int(masks[n].sum()) for n in names)
        want = {}
        for task in tasks:
            mine = [n for n in names if n in own[task]]
            both = sum(int((masks[n] & own[task][n]).sum()) for n in mine)
            want[task] = both / sum(int(masks[n].sum()) for n in mine)
        every = 0
        for n in names:
            agreed = masks[n].clone()
            for task in tasks:
                agreed &= own[task].get(n, agreed)
            every += int(agreed.sum())
        return kept, want, every / kept

    groups = {
        "shared": (["trunk.0.weight", "trunk.2.weight"], ("a", "b", "c")),
        **{task: ([f"heads.{task}.weight"], (task,)) for task in ("a", "b", "c")},
    }
    assert [row.name for row in report.components] == list(groups)
    for row in report.components:
        names, tasks = groups[row.name]
        kept, want, unanimity = count(names, tasks)
        parameters = sum(masks[n].numel() for n in names)
        assert (row.parameters, row.kept, row.tasks) == (parameters, kept, tasks)
        assert row.sparsity == (parameters - kept) / parameters
        assert row.want == want
        assert row.unanimity == unanimity
    for row in report.layers:
        kept, want, unanimity = count([row.name], row.tasks)
        assert (row.kept, row.want, row.unanimity) == (kept, want, unanimity)
    assert (report.parameters, report.kept) == (120, 120 - round(0.7 * 120))
    assert report.head_share == 24 / 120
    assert report.tasks == ("a", "b", "c")
    assert report.step == 0
    assert report.to_dict()["kept"] == report.kept
    lines = str(report).splitlines()
    assert lines[0].split() == [
        *("component", "weights", "kept", "sparsity"),
        *("want", "a", "want", "b", "want", "c", "unanimity"),
    ]
    assert lines[5].split() == ["total", "120", "36", "70.00%"]
    assert "20.0% of the weights are private to one task." in lines


# Losses in, losses out.


def test_observe_returns_the_very_objects_the_losses_made(device):
    made = {}

    def keep(task):
        def loss(out, x):
            made[task] = losses_of("a", "b")[task](out, x)
            return [made[task], made[task] * 2] if task == "b" else made[task]

        return loss

    model = Net().to(device)
    pruner = MultitaskPruner(model, {t: keep(t) for t in ("a", "b")}, "trunk", method=Vote(0.5))
    x = torch.randn(16, 4, device=device)
    losses = pruner.observe(model(x), x)
    assert losses["a"] is made["a"]
    assert losses["b"][0] is made["b"]
    assert isinstance(losses["b"], list)
    losses["a"].backward()  # the graph is still there
    assert model.trunk[0].weight.grad is not None


FORMS = {
    "mapping": lambda a, b: {"b": b, "a": a},
    "ordered mapping with other keys": lambda a, b: OrderedDict(total=a + b, a=a, lr=0.1, b=b),
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "1-D tensor": lambda a, b: torch.stack([a, b]),
    "lists of tensors": lambda a, b: {"a": [a / 2, a / 2], "b": (b * 0.25, b * 0.75)},
    "tensors of one element": lambda a, b: {"a": a.reshape(1), "b": b.reshape(1, 1)},
    "a constant among the parts": lambda a, b: {"a": [a, torch.zeros((), device=a.device)], "b": b},
}


@pytest.mark.parametrize("form", FORMS)
def test_observe_losses_takes_every_form_and_gives_it_back(form, device):
    expected = Loop(device, Vote(0.5, **GLOBAL))
    loop = Loop(device, Vote(0.5, **GLOBAL), names_only=True)
    x = expected.batch()
    while not expected.pruner.report().observations:
        expected.observe(x)
        expected.pruner.step()
    for _ in range(2):  # a stack asks for a second observation
        out = loop.model(x)
        losses = FORMS[form](*(loss(out, x) for loss in loop.losses.values()))
        assert loop.pruner.observe_losses(losses) is losses
        if loop.pruner.step():
            break
    assert loop.pruner.sparsity == 0.5
    assert same(loop.pruner.masks, expected.pruner.masks)


@pytest.mark.parametrize(
    "rest",
    [{}, {"b": 0.0}, {"b": torch.zeros(())}, {"b": []}],
    ids=["missing", "a number", "without a graph", "no parts"],
)
def test_a_task_without_a_loss_sits_this_one_out(rest, device):
    loop = Loop(device, Vote(0.5), names_only=True)
    x = loop.batch()
    loop.pruner.observe_losses({"a": loop.losses["a"](loop.model(x), x), **rest})
    assert loop.pruner.step() is False
    loop.pruner.observe_losses({"b": loop.losses["b"](loop.model(x), x)})
    assert loop.pruner.step() is True
    assert loop.pruner.report().observations == {"a": 1, "b": 1}


def test_weigh_is_the_plain_sum(device):
    loop = Loop(device, Vote(0.5))
    losses = loop.observe()
    assert torch.equal(loop.pruner.weigh(losses), losses["a"] + losses["b"])
    parts = {"a": [losses["a"], losses["a"]], "b": losses["b"]}
    torch.testing.assert_close(loop.pruner.weigh(parts), 2 * losses["a"] + losses["b"])
    assert loop.pruner.weigh({"b": losses["b"], "a": 0.0}) == losses["b"]
    loop.pruner.weigh(losses).backward()
    assert loop.model.heads["a"].weight.grad is not None
    assert loop.model.heads["b"].weight.grad is not None


# Methods through the pruner.


def test_the_vote_is_what_a_vote_by_hand_gives(backend, device):
    loop = Loop(device, Vote(0.8, **GLOBAL), tasks=("a", "b", "c"), backend=backend)
    x = loop.batch()
    scores = scores_by_hand(loop.model, loop.losses, x)
    loop.step(x, optimize=False)
    assert same(loop.pruner.masks, vote_by_hand(scores, list(loop.pruner.masks), 24))


@pytest.mark.parametrize("factor", [0.25, 2.0, 8.0])
def test_priority_divides_the_distance_from_the_top(factor, device):
    loop = Loop(device, Vote(0.7, priority={"b": factor}, **GLOBAL))
    x = loop.batch()
    scores = scores_by_hand(loop.model, loop.losses, x)
    loop.step(x, optimize=False)
    keep = 112 - round(0.7 * 112)
    names = list(loop.pruner.masks)
    assert same(loop.pruner.masks, vote_by_hand(scores, names, keep, {"b": factor}.items()))
    assert not same(loop.pruner.masks, vote_by_hand(scores, names, keep))


def test_the_same_priority_for_all_changes_nothing(device):
    plain, other = (Loop(device, Vote(0.7, priority=p)) for p in ({}, {"a": 3.0, "b": 3.0}))
    x = plain.batch()
    plain.step(x)
    other.step(x)
    assert same(plain.pruner.masks, other.pruner.masks)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_a_loss_changes_no_mask(scale, device):
    plain = Loop(device, Vote(0.7))
    loop = Loop(device, Vote(0.7), names_only=True)
    x = plain.batch()
    plain.step(x)
    out = loop.model(x)
    loop.pruner.observe_losses([loop.losses["a"](out, x) * scale, loop.losses["b"](out, x)])
    loop.pruner.step()
    assert same(plain.pruner.masks, loop.pruner.masks)


@pytest.mark.parametrize(("vote", "merge"), [(votes.unanimous, any), (votes.intersection, all)])
def test_per_task_keep_is_the_top_of_every_task_merged(vote, merge, device):
    loop = Loop(device, Vote(PerTaskKeep(0.1234), vote=vote))
    x = loop.batch()
    scores = scores_by_hand(loop.model, loop.losses, x)
    loop.step(x, optimize=False)
    alone = {t: best_by_hand(own, int(0.1234 * 104)) for t, own in scores.items()}
    for task in alone:
        assert same(loop.pruner.task_masks[task], alone[task])
    for name, mask in loop.pruner.masks.items():
        wishes = torch.stack([own[name] for own in alone.values() if name in own])
        assert torch.equal(mask, wishes.any(0) if merge is any else wishes.all(0))
    assert loop.pruner.sparsity == zeros(loop.pruner.masks) / 112


def test_joint_saliency_is_the_score_of_the_summed_loss(backend, device):
    loop = Loop(device, recipes.snip(0.7), backend=backend)
    x = loop.batch()
    total = {"sum": lambda out, b: sum(loss(out, b) for loss in loop.losses.values())}
    worth = scores_by_hand(loop.model, total, x)["sum"]
    loop.step(x, optimize=False)
    expected = best_by_hand(worth, 112 - round(0.7 * 112))
    assert all(bool(mask.any()) for mask in expected.values())  # the guard has no part in this
    assert same(loop.pruner.masks, expected)
    apart = Loop(device, recipes.disparse_static(0.7), backend=backend)
    apart.step(x, optimize=False)
    assert not same(loop.pruner.masks, apart.pruner.masks)


def test_joint_saliency_is_one_sweep_once_it_is_known_who_uses_what(sweeps, device):
    method = Vote(0.5, schedule=Linear(begin=1, end=5, every=2), disentangled=False)
    loop = Loop(device, method)
    made = []
    for _ in range(5):
        before = len(sweeps)
        loop.step()
        made.append(len(sweeps) - before)
    assert made == [3, 0, 1, 0, 1]


def test_with_one_task_joint_and_disentangled_are_the_same(backend, device):
    loops = [
        Loop(device, Vote(0.7, disentangled=d), tasks=("a",), backend=backend)
        for d in (True, False)
    ]
    x = loops[0].batch()
    for loop in loops:
        loop.step(x)
    assert loops[0].pruner.sparsity == round(0.7 * 104) / 104
    assert same(loops[0].pruner.masks, loops[1].pruner.masks)


def random_masks(device, seed, global_seed):
    loop = Loop(device, recipes.random(0.5), seed=seed)
    x = loop.batch()
    torch.manual_seed(global_seed)
    loop.observe(x)
    state = torch.get_rng_state()
    loop.pruner.step()
    assert torch.equal(torch.get_rng_state(), state)
    return loop.pruner.masks


def test_the_seed_alone_decides_what_is_random(device):
    first = random_masks(device, seed=0, global_seed=1)
    assert same(first, random_masks(device, seed=0, global_seed=2))
    assert not same(first, random_masks(device, seed=1, global_seed=1))


def test_no_global_randomness_is_used_by_a_whole_run(device):
    loop = Loop(device, recipes.disparse_dynamic(0.5, every=2, end=8), given=True)
    batches = [loop.batch() for _ in range(6)]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for x in batches:
        loop.step(x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


RECIPES = {
    "disparse_static": lambda: recipes.disparse_static(0.8),
    "disparse_pretrained": lambda: recipes.disparse_pretrained(0.8),
    "disparse_pretrained, gradual": lambda: recipes.disparse_pretrained(
        0.8, schedule=Cubic(begin=1, end=7, every=3)
    ),
    "disparse_dynamic": lambda: recipes.disparse_dynamic(0.8, every=3, end=9),
    "snip": lambda: recipes.snip(0.8),
    "rigl": lambda: recipes.rigl(0.8, every=3, end=9),
    "set_": lambda: recipes.set_(0.8, every=3, end=9),
    "magnitude": lambda: recipes.magnitude(0.8),
    "lamp": lambda: recipes.lamp(0.8),
    "random": lambda: recipes.random(0.8),
    "movement": lambda: recipes.movement(0.8, 9),
    "movement, joint": lambda: recipes.movement(
        0.8, 9, disentangled=False, allocation="uniform", warmup=0.0, cooldown=0.0
    ),
    "adapmtl": lambda: recipes.adapmtl(0.8, 9),
    "gradual_magnitude": lambda: recipes.gradual_magnitude(0.8, begin=1, end=7, every=3),
    "best": lambda: recipes.best(0.8, 9),
    "best, elsewhere": lambda: recipes.best(0.8, 9, trained="elsewhere"),
    "best, from scratch": lambda: recipes.best(0.8, 9, trained=False),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_lands_on_its_exact_sparsity(recipe, backend, device):
    method = RECIPES[recipe]()
    loop = Loop(device, method, given=True, backend=backend)
    for _ in range(9):
        loop.step()
        if method.regrows:
            assert zeros(loop.pruner.masks) == round(0.8 * 112)
    assert zeros(loop.pruner.masks) == round(0.8 * 112)
    assert all(bool(mask.any()) for mask in loop.pruner.masks.values())
    loop.pruner.finalize()
    masks = loop.pruner.masks
    for name, weight in weights(loop.model).items():
        assert bool((weight[~masks[name]] == 0).all())
        assert bool((weight[masks[name]] != 0).any())


def test_every_recipe_is_tried():
    # See test_sigmoid_threshold.py, test_low_rank.py and test_wanda.py.
    others = {"adapmtl_published", "flop", "wanda"}
    assert {name.split(",")[0] for name in RECIPES} == set(recipes.__all__) - others


@pytest.mark.parametrize("given", [True, False], ids=["optimizer given", "step() counted"])
def test_magnitude_looks_at_the_weights_at_step_time(given, device):
    loop = Loop(device, recipes.magnitude(0.5), given=given)
    loop.observe()["a"].backward()
    loop.optimizer.step()
    with torch.no_grad():
        for weight in weights(loop.model).values():
            weight.copy_(weight.flip(0) * torch.rand_like(weight))
    expected = best_by_hand({n: w.detach().abs() for n, w in weights(loop.model).items()}, 56)
    assert loop.pruner.step() is True
    assert all(bool(mask.any()) for mask in expected.values())  # the guard has no part in this
    assert same(loop.pruner.masks, expected)


@pytest.mark.parametrize("recipe", ["magnitude", "random", "gradual_magnitude"])
def test_a_saliency_without_data_costs_no_sweep_once_reach_is_known(recipe, sweeps, device):
    loop = Loop(device, RECIPES[recipe]())
    loop.step()
    assert len(sweeps) == 2
    for _ in range(8):
        loop.step()
    assert len(sweeps) == 2
    assert loop.pruner.sparsity == round(0.8 * 112) / 112


def test_a_saliency_and_a_vote_of_ones_own_are_functions(device):
    def energy(weight, grad):
        return (weight * grad).square()

    def softest(percentiles):
        return percentiles.amin(0) + percentiles.amax(0)

    loop = Loop(device, Vote(0.6, saliency=energy, vote=softest, **GLOBAL))
    x = loop.batch()
    scores = scores_by_hand(loop.model, loop.losses, x, energy)
    ranked = {task: percentiles_by_hand(own) for task, own in scores.items()}
    loop.step(x, optimize=False)
    worth = {}
    for name in loop.pruner.masks:
        worth[name] = softest(torch.stack([own[name] for own in ranked.values() if name in own]))
    assert same(loop.pruner.masks, best_by_hand(worth, 112 - round(0.6 * 112)))


def test_scores_of_several_observations_are_summed(device):
    loop = Loop(device, Vote(0.7, observations=2, saliency=saliency.movement, **GLOBAL))
    batches = [loop.batch(), loop.batch()]
    parts = [scores_by_hand(loop.model, loop.losses, x, lambda w, g: -w * g) for x in batches]
    total = {t: {n: own[n] + parts[1][t][n] for n in own} for t, own in parts[0].items()}
    assert [loop.step(x, optimize=False) for x in batches] == [False, True]
    keep = 112 - round(0.7 * 112)
    assert same(loop.pruner.masks, vote_by_hand(total, list(loop.pruner.masks), keep))


# State.


def tensor_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def test_a_checkpoint_takes_about_a_bit_per_weight(backend, device):
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256)).to(device)
    losses = {
        "a": lambda out, x: (out - x).square().mean(),
        "b": lambda out, x: (out - 2 * x).square().mean(),
    }
    method = Vote(0.9, schedule=Linear(begin=1, end=9, every=4))
    pruner = MultitaskPruner(model, losses, method=method, backend=backend)
    fixed = 8192  # the generator's state, and a few numbers
    assert tensor_bytes(pruner.state_dict()) < fixed
    for _ in range(5):
        x = torch.randn(8, 256, device=device)
        pruner.observe(model(x), x)
        pruner.step()
    assert pruner.sparsity == round(0.45 * 2 * 256 * 512) / (2 * 256 * 512)
    assert tensor_bytes(pruner.state_dict()) < 2 * 256 * 512 / 8 + fixed
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    assert file.tell() < 1.1 * 2 * 256 * 512 / 8 + 2 * fixed


def test_the_defaults_of_the_contract(device):
    model = Net().to(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"))
    x = torch.randn(16, 4, device=device)
    pruner.observe(model(x), x)
    assert pruner.step() is True
    assert pruner.sparsity == round(0.9 * 112) / 112
    assert torch.nn.utils.prune.is_pruned(model)
    assert [row.name for row in pruner.report().components] == ["shared", "a", "b"]
    assert mtprune.MultitaskPruner is MultitaskPruner


def test_prune_asks_for_stable_masks_of_the_final_sparsity_whatever_the_schedule(device):
    schedule = mtprune.Cubic(begin=0, end=100, every=10)
    counts = set()
    for when in (schedule, mtprune.OneShot()):
        torch.manual_seed(0)
        model = nn.ModuleDict({"trunk": nn.Linear(32, 32), "a": nn.Linear(32, 2)}).to(device)
        pruner = MultitaskPruner(
            model,
            {"a": lambda outputs, batch: outputs.square().mean()},
            method=Vote(0.5, schedule=when, observations="auto"),
        )
        batches = [torch.randn(2, 32, device=device) for _ in range(64)]
        report = pruner.prune(batches, forward=lambda m, x: m["a"](m["trunk"](x)), progress=False)
        counts.add(report.observations["a"])
    assert len(counts) == 1
    assert counts.pop() > 4
