"""Movement pruning: scores that add up over the run, masks that may open again."""

import math
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mtprune import Cubic, Hold, Linear, MultitaskPruner, OneShot, Regrow, Vote, recipes, saliency
from tests import nets, oracles
from tests.nets import Run, build, evaluate, same, size, weights, zeros
from tests.test_resume import load, save, through_a_file

STEPS, RATE = 20, 0.1
ORDERS = [("model", "optimizer", "pruner"), ("pruner", "optimizer", "model")]


class Small(nn.Module):
    """Two shared layers and a head for each of two tasks: 24 + 36 + 6 + 6 weights."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in ("a", "b")})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


LOSSES = {
    "a": lambda out, x: (out["a"] - x.sin().sum(1, keepdim=True)).square().mean(),
    "b": lambda out, x: (out["b"] - x.cos().prod(1, keepdim=True)).square().mean(),
}
NAMES = ["trunk.0.weight", "trunk.2.weight", "heads.a.weight", "heads.b.weight"]
USERS = [("a", "b"), ("a", "b"), ("a",), ("b",)]
SIZES = [24, 36, 6, 6]


def start(device):
    torch.manual_seed(0)
    model = Small().to(device)
    return model, [torch.randn(16, 4, device=device) for _ in range(STEPS)]


def keep_by_hand(scores, sparsity, allocation):
    """The masks that keep the best by unanimous vote, as nested lists of bools."""
    order = oracles.ranking(scores, oracles.VOTES["unanimous"])
    total = sum(SIZES)
    keep = total - round(sparsity * total)
    if allocation == "global":
        kept = oracles.keep_best(order, range(4), keep, [1] * 4)
    else:
        assert keep * 24 % total == 0  # every layer's share is a whole number
        kept = set()
        for layer, n in enumerate(SIZES):
            kept |= oracles.keep_best(order, [layer], keep * n // total, [0])
    return oracles.as_masks(kept, SIZES)


def movement_by_hand(device, sparsity, disentangled, allocation, scale=1.0):
    """Straight-through movement pruning with plain gradient descent, as it is written down."""
    model, batches = start(device)
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {name: torch.ones_like(held[name]) for name in NAMES}
    scores = {task: {name: torch.zeros_like(held[name]) for name in NAMES} for task in LOSSES}
    came_back = 0
    for done, x in enumerate(batches, start=1):
        seen = {n: (w * masks[n] if n in masks else w).requires_grad_() for n, w in held.items()}
        out = functional_call(model, seen, (x,))
        total = {name: torch.zeros_like(w) for name, w in held.items()}
        for task, loss in LOSSES.items():
            grads = torch.autograd.grad(
                loss(out, x), list(seen.values()), retain_graph=True, allow_unused=True
            )
            for name, grad in zip(seen, grads, strict=True):
                if grad is not None:
                    total[name] += grad
                    if name in masks:
                        factor = scale if task == "a" else 1.0
                        scores[task][name] -= factor * grad * held[name].detach()
        for name in held:
            grad = total[name] * masks[name] if name in masks else total[name]
            held[name] = held[name].detach() - RATE * grad
        if done >= 2:  # warm for a tenth of the run, at the final sparsity for the last 3 tenths
            due = sparsity * (1 - (1 - min((done - 2) / 12, 1.0)) ** 3)
            if disentangled:
                asked = [
                    {task: scores[task][name].flatten() for task in users}
                    for name, users in zip(NAMES, USERS, strict=True)
                ]
            else:
                summed = [scores["a"][name] + scores["b"][name] for name in NAMES]
                asked = [{"both": score.flatten()} for score in summed]
            if allocation == "uniform" and done < 14:
                continue  # in between shares are not whole: compare the end only
            for name, kept in zip(NAMES, keep_by_hand(asked, due, allocation), strict=True):
                mask = torch.tensor(kept, device=device).view_as(masks[name]).float()
                came_back += int((mask > masks[name]).sum())
                masks[name] = mask
    return masks, {n: w * masks[n] if n in masks else w for n, w in held.items()}, came_back


def run(device, backend, method, **options):
    model, batches = start(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    pruner = MultitaskPruner(
        model, LOSSES, "trunk", method=method, optimizer=optimizer, backend=backend
    )
    for x in batches:
        optimizer.zero_grad()
        losses = pruner.observe(model(x), x, **options)
        if not options:
            sum(losses.values()).backward()
        optimizer.step()
        pruner.step()
    return model, pruner


@pytest.mark.parametrize("options", [{}, {"fold": True}], ids=["", "folded"])
@pytest.mark.parametrize("disentangled", [True, False])
def test_movement_is_the_formula(disentangled, options, backend, device):
    method = recipes.movement(0.75, STEPS, disentangled=disentangled)
    model, pruner = run(device, backend, method, **options)
    masks, held, came_back = movement_by_hand(device, 0.75, disentangled, "global")
    assert came_back > 0  # or this would not tell straight-through masks from others
    assert zeros(pruner.masks) == 54
    assert same(pruner.masks, {name: mask.bool() for name, mask in masks.items()})
    pruner.finalize()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), held[name])


def test_every_matrix_can_have_its_own_top(backend, device):
    # Masks are made once, at the end, where the shares of all layers are whole numbers.
    method = recipes.movement(0.75, STEPS, allocation="uniform", warmup=0.99, cooldown=0.0)
    _, pruner = run(device, backend, method)
    kept = [int(mask.sum()) for mask in pruner.masks.values()]
    assert sum(kept) == 18
    assert [abs(k - n / 4) < 1 for k, n in zip(kept, SIZES, strict=True)] == [True] * 4


def test_signs_count(device):
    """Weights that move away from zero stay, those that shrink go, however large they are."""
    model = nn.Linear(4, 1, bias=False).to(device)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 0.1, -3.0, -0.2]]))
    target = torch.tensor([[1.0, 3.0, -1.0, -2.0]], device=device)
    loss = {"t": lambda out, batch: (model.weight - target).square().sum() + 0 * out.sum()}
    method = Vote(0.5, saliency=saliency.movement, allocation="global", straight_through=True)
    pruner = MultitaskPruner(model, loss, model, method=method)
    x = torch.ones(1, 4, device=device)
    pruner.observe(model(x), x)
    pruner.step()
    assert pruner.masks["weight"].tolist() == [[False, True, False, True]]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0**20, 2.0**-20, 1e6, 1e-6])
def test_the_scale_of_a_loss_changes_nothing(factor, device):
    found = []
    for scale in (1.0, factor):
        model, batches = start(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        method = recipes.movement(0.75, STEPS)
        pruner = MultitaskPruner(
            model, ["a", "b"], "trunk", method=method, optimizer=optimizer, backend="inplace"
        )
        for x in batches:
            out = model(x)
            losses = {task: loss(out, x) for task, loss in LOSSES.items()}
            pruner.observe_losses({"a": scale * losses["a"], "b": losses["b"]})
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            pruner.step()
        found.append(pruner.masks)
    assert same(*found)


def test_a_scaler_leaves_no_trace(backend, device):
    class Scaler:
        def get_scale(self):
            return 2.0**12

    method = recipes.movement(0.75, STEPS)
    found = []
    for scaler in (None, Scaler()):
        model, batches = start(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        pruner = MultitaskPruner(
            model, LOSSES, "trunk", method=method, optimizer=optimizer, backend=backend
        )
        for x in batches:
            optimizer.zero_grad()
            sum(pruner.observe(model(x), x, scaler=scaler).values()).backward()
            optimizer.step()
            pruner.step()
        found.append(pruner.masks)
    assert same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("score", [saliency.magnitude, saliency.taylor, saliency.random])
def test_masks_of_any_saliency_may_open(score, backend, device):
    schedule = Hold(Cubic(begin=1, end=12, every=1), until=STEPS, every=1)
    method = Vote(0.75, saliency=score, schedule=schedule, straight_through=True)
    _, pruner = run(device, backend, method)
    assert zeros(pruner.masks) == 54


def test_what_is_hidden_keeps_its_value_and_is_zero_in_the_end(backend, device):
    model, batches = start(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    method = recipes.movement(0.75, 10, warmup=0.0, cooldown=0.5)
    pruner = MultitaskPruner(
        model, LOSSES, "trunk", method=method, optimizer=optimizer, backend=backend
    )
    seen = 0
    for at, x in enumerate(batches[:10], start=1):
        before = {n: w.clone() for n, w in nets.weights(_Named(model)).items()}
        hidden = {name: ~mask for name, mask in pruner.masks.items()}
        optimizer.zero_grad()
        sum(pruner.observe(model(x), x).values()).backward()
        optimizer.step()
        pruner.step()
        after = nets.weights(_Named(model))
        for name, where in hidden.items():
            seen += int((before[name][where] != 0).sum())
            if at < 10:
                assert torch.equal(before[name][where], after[name][where])
    assert seen > 0
    final = nets.weights(_Named(model))
    for name, mask in pruner.masks.items():
        assert bool((final[name][~mask] == 0).all())
        assert bool((final[name][mask] != 0).all())
    plain = hasattr(model.trunk[0], "weight_orig")
    assert plain is (backend == "prune")


class _Named:
    """What `nets.weights` asks of a run."""

    def __init__(self, model):
        self.model = model


def moving(backend, device, seed=0):
    return Run(build("plain", device, seed=seed), recipes.movement(0.7, 10), backend)


def test_a_checkpoint_from_before_the_end_opens_masks_again(backend, device):
    run = moving(backend, device).train(6)
    state, held = through_a_file(save(run)), weights(run)
    assert run.train(6).pruner.sparsity == pytest.approx(0.7, abs=0.01)
    load(run, state, ORDERS[1])
    assert same(weights(run), held)


@pytest.mark.parametrize("name", nets.each(sorted(set(nets.SHELF) - {"read_not_called"})))
def test_every_net_lands_exactly_and_finalizes_to_what_it_was(name, backend, device):
    for steps in (5, 12):  # while masks may open, and after
        net = build(name, device)
        run = Run(net, recipes.movement(0.7, 9), backend).train(steps)
        if steps == 12:
            assert zeros(run.pruner.masks) == round(0.7 * size(run.pruner.masks))
        before = [out.clone() for out in evaluate(run.model, net.make_batch(0))]
        run.pruner.finalize()
        after = evaluate(run.model, net.make_batch(0))
        assert all(map(torch.equal, before, after))


def test_weights_that_are_read_but_not_called_are_named(backend, device):
    net = build("read_not_called", device)
    run = Run(net, recipes.movement(0.7, 9), backend)
    run.train(1)
    with pytest.warns(UserWarning, match="read without their modules being called"):
        run.train(4)


def test_batches_of_single_tasks_do(backend, device):
    run = Run(build("plain", device), recipes.movement(0.7, 12), backend, singly=True).train(13)
    assert zeros(run.pruner.masks) == round(0.7 * size(run.pruner.masks))
    assert sum(run.pruner.report().observations.values()) == 12


def test_a_loss_that_is_not_finite_costs_the_scores_since_the_last_update_only(device):
    def go(poison):
        model, batches = start(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        method = recipes.movement(0.75, STEPS)
        pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=method, optimizer=optimizer)
        for at, x in enumerate(batches):
            out = model(x)
            losses = {task: loss(out, x) for task, loss in LOSSES.items()}
            if at != 9:
                pruner.observe_losses(losses)
            elif poison:
                pruner.observe_losses({**losses, "a": losses["a"] * math.nan})
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
            if at != 9:
                pruner.step()
            elif poison:
                masks = pruner.masks
                with pytest.raises(RuntimeError, match="task 'a' is not finite"):
                    pruner.step()
                assert same(masks, pruner.masks)
        return pruner.masks

    assert same(go(poison=True), go(poison=False))


def test_a_run_is_the_same_in_small_and_in_large():
    short, long = (recipes.movement(0.9, steps).schedule for steps in (200, 20_000))
    assert short == Hold(Cubic(begin=20, end=140, every=1), until=200, every=1)
    for step in (0, 20, 60, 100, 140, 200):
        assert short.progress(step) == long.progress(100 * step)
    assert recipes.movement(0.9, 1).schedule.next_update(-1) is not None


def test_the_recipe_is_the_published_method():
    assert recipes.movement(0.8, 1_000, disentangled=False, allocation="uniform") == Vote(
        0.8,
        saliency=saliency.movement,
        schedule=Hold(Cubic(begin=100, end=700, every=5), until=1_000, every=5),
        allocation="uniform",
        disentangled=False,
        straight_through=True,
    )


def test_hold_goes_on_at_the_full_sparsity():
    schedule = Hold(Linear(begin=2, end=6, every=2), until=9, every=2)
    steps, step = [], -1
    while (step := schedule.next_update(step)) is not None:
        steps.append((step, schedule.progress(step)))
    assert steps == [(2, 0.0), (4, 0.5), (6, 1.0), (8, 1.0), (9, 1.0)]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: recipes.movement(0.9, 0), ValueError, "`steps` must be a whole number"),
        (lambda: recipes.movement(0.9, 9, updates=0), ValueError, "`updates` must be a whole"),
        (lambda: recipes.movement(0.9, 9, warmup=-0.1), ValueError, "`warmup` is a share"),
        (lambda: recipes.movement(0.9, 9, cooldown=30), ValueError, "`cooldown` is a share"),
        (
            lambda: recipes.movement(0.9, 9, warmup=0.5, cooldown=0.5),
            ValueError,
            "`warmup` 0.5 and `cooldown` 0.5 leave nothing of the run to prune in",
        ),
        (
            lambda: Vote(
                0.9, schedule=Regrow(every=2, end=9), allocation="erk", straight_through=True
            ),
            ValueError,
            "with Regrow, leave `straight_through` out",
        ),
        (
            lambda: Vote(0.9, observations="auto", straight_through=True),
            ValueError,
            "leave out observations='auto'",
        ),
        (
            lambda: Hold(Regrow(every=2, end=9), until=9, every=2),  # type: ignore
            TypeError,
            "`schedule` must be OneShot(), Linear(...) or Cubic(...). Got Regrow",
        ),
        (
            lambda: Hold(OneShot(10), until=9, every=2),
            ValueError,
            "`until` must not come before the last update of `schedule`. Got 9, with One",
        ),
        (lambda: Hold(OneShot(), until=9, every=0), ValueError, "`every` must be a whole"),
        (
            lambda: MultitaskPruner(
                Small(), LOSSES, method=recipes.movement(0.9, 9), score_dtype=torch.bfloat16
            ),
            ValueError,
            "as straight_through=True asks, which torch.bfloat16 cannot hold",
        ),
    ],
)
def test_what_is_refused_says_what_to_do(build, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build()


def test_task_masks_after_loading_say_that_they_are_missing(backend, device):
    """Layers that are left alone have no mask while the others' may open."""
    run = Run(build("frozen_trunk", device), recipes.movement(0.7, 9), backend).train(5)
    assert run.pruner.report().left_alone
    resumed = Run(build("frozen_trunk", device), recipes.movement(0.7, 9), backend)
    resumed.model.load_state_dict(run.model.state_dict())
    resumed.pruner.load_state_dict(run.pruner.state_dict())
    with pytest.raises(RuntimeError, match="Checkpoints do not hold task masks"):
        _ = resumed.pruner.task_masks
    assert resumed.pruner.masks.keys() == run.pruner.masks.keys()
