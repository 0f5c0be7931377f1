"""Refit: the weights that stay make up for those that go."""

import copy
import re
from itertools import count

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import mtprune
from mtprune import Channel, Cubic, MultitaskPruner, Refit, Regrow, Vote, saliency
from mtprune.testing import check_method
from tests.ranks import on_ranks

EXACT = Refit(samples=4096, damping=0.0, steps=60)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def rows_of(x, bias=False):
    """Inputs as a sample: with keys, and ones for a bias."""
    return torch.cat([torch.zeros(len(x), 1), x, torch.full((len(x), 1), float(bias))], 1)


def masked(module, share=0.5, seed=3):
    """Prune one module with ``torch.nn.utils.prune`` at random; its mask."""
    mask = torch.rand(module.weight.shape, generator=generator(seed)) >= share
    prune.custom_from_mask(module, "weight", mask)
    return mask


def direct(x, weight, kept, damping, bias):
    """The normal equations of every row, in float64: new weight, and what the bias gains."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double() if bias else x.double()
    gram, new, gains = x.T @ x, weight.double().clone(), torch.zeros(len(weight)).double()
    for row in range(len(weight)):
        free = torch.cat([kept[row], torch.ones(int(bias)).bool()])
        gone = (~kept[row]).nonzero().flatten()
        system = gram[free][:, free]
        if len(system):
            system = system + damping * system.diagonal().mean() * torch.eye(len(system))
            delta = torch.linalg.lstsq(system, gram[free][:, gone] @ new[row, gone]).solution
            new[row, kept[row]] += delta[: int(kept[row].sum())]
            gains[row] = delta[-1] if bias else 0.0
        new[row, gone] = 0.0
    return new.float(), gains.float()


# The arithmetic.


def test_a_copy_of_an_input_takes_over():
    """Inputs 1 and 2 are the same, so the weight of 1 takes that of 2."""
    x = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [2.0, 2.0, 1.0]])
    lost = torch.tensor([[0.0, 3.0, 0.0]])
    kept = torch.tensor([[True, False, True]])
    delta, bias = Refit(damping=0.0).change(rows_of(x), lost, kept)
    torch.testing.assert_close(delta, torch.tensor([[3.0, 0.0, 0.0]]), atol=1e-5, rtol=0)
    assert bias.tolist() == [0.0]


def test_a_bias_takes_over_an_input_that_never_changes():
    lost, kept = torch.tensor([[5.0]]), torch.tensor([[False]])
    delta, bias = Refit(damping=0.0).change(rows_of(torch.full((4, 1), 2.0), True), lost, kept)
    assert delta.tolist() == [[0.0]]
    torch.testing.assert_close(bias, torch.tensor([10.0]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_enough_steps_give_the_direct_solution(damping, bias):
    x = normal(200, 12) @ normal(12, 12, seed=1) + 0.5
    weight, kept = normal(7, 12, seed=2), torch.rand(7, 12, generator=generator(4)) > 0.5
    kept[0] = False  # a row that goes as a whole
    kept[1] = True
    refit = Refit(damping=damping, steps=100)
    delta, gain = refit.change(rows_of(x, bias), weight.masked_fill(kept, 0), kept)
    new, gains = direct(x, weight, kept, damping, bias)
    torch.testing.assert_close(weight * kept + delta, new, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gain, gains, atol=1e-4, rtol=1e-4)
    assert not delta[~kept].any()


@pytest.mark.parametrize("steps", [1, 3, 12, 200])
@pytest.mark.parametrize("damping", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_the_error_of_the_outputs_does_not_grow(steps, damping, size):
    x = size * torch.cat([normal(20, 30), normal(20, 1) * 1e3, torch.zeros(20, 5)], 1)
    lost = normal(9, 36, seed=1)
    kept = torch.rand(9, 36, generator=generator(2)) > 0.7
    lost = lost.masked_fill(kept, 0)
    delta, _ = Refit(damping=damping, steps=steps).change(rows_of(x), lost, kept)
    assert delta.isfinite().all()
    before = (x.double() @ lost.double().T).square().sum(0)
    after = (x.double() @ (lost - delta).double().T).square().sum(0)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < before.sum()


def test_inputs_that_are_dead_move_nothing():
    lost, kept = torch.tensor([[0.0, 1.0]]), torch.tensor([[True, False]])
    for x in (torch.zeros(3, 2), torch.tensor([[0.0, 1.0]])):
        assert Refit().change(rows_of(x), lost, kept)[0].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 0}, "`samples` must be a whole number, at least 1. Got 0."),
        ({"damping": -1.0}, "`damping` must be a number, at least 0. Got -1.0."),
        ({"steps": 1.5}, "`steps` must be a whole number, at least 1. Got 1.5."),
    ],
)
def test_what_makes_no_refit_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Refit(**given)


def test_a_vote_refuses_what_is_no_refit():
    with pytest.raises(TypeError, match=r"`refit` must be mtprune.Refit\(...\) or None. Got True."):
        Vote(0.5, refit=True)


@pytest.mark.parametrize(
    ("given", "how"),
    [
        ({"straight_through": True}, "straight_through=True"),
        ({"schedule": Regrow(every=2, end=9), "allocation": "erk"}, "Regrow"),
    ],
)
def test_weights_that_may_come_back_are_not_made_up_for(given, how):
    with pytest.raises(ValueError, match=f"gone for good; with {how} they may come back"):
        Vote(0.5, refit=Refit(), **given)


# A model that is sparse already.

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (40, 6)),
    "linear on three dimensions": (lambda: nn.Linear(6, 5, bias=False), (8, 5, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 6)),
    "strided": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), bias=False), (3, 3, 9, 7)),
    "dilated": (lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2), (2, 2, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (3, 4, 5, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 5, groups=4), (6, 4, 16)),
    "circular": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (6, 3, 12)),
    "3-D": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
}


def fitted_by_groups(layer, x, weight, kept):
    """The outputs' positions one by one: windows by `unfold`, and a direct solution per group."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, nn.Linear):
        patches = x.reshape(-1, x.shape[-1])
    else:  # what a convolution with a one-hot kernel gives is a column of the windows
        columns = weight[0].numel() * groups
        size = (columns, x.shape[1], *layer.kernel_size)
        eye = torch.eye(columns).view(size)
        padding = layer._reversed_padding_repeated_twice
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layer.kernel_size)]
        patches = conv(
            F.pad(x, padding, mode=mode), eye, stride=layer.stride, dilation=layer.dilation
        )
        patches = patches.movedim(1, -1).reshape(-1, columns)
    parts = zip(
        patches.chunk(groups, 1),
        weight.flatten(1).chunk(groups),
        kept.flatten(1).chunk(groups),
        strict=True,
    )
    found = [direct(p, w, k, 0.1, layer.bias is not None) for p, w, k in parts]
    return torch.cat([w for w, _ in found]).view_as(weight), torch.cat([b for _, b in found])


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_of_layer_is_fitted_to_its_own_windows(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    x, weight = normal(*shape), layer.weight.detach().clone()
    bias = None if layer.bias is None else layer.bias.detach().clone()
    kept = masked(layer)
    done = mtprune.refit(nn.Sequential(layer), [x], how=Refit(samples=10_000, steps=200))
    assert done.layers == ("0.weight",)
    assert not done.left_alone
    new, gains = fitted_by_groups(layer, x, weight, kept)
    torch.testing.assert_close(layer.weight, new, atol=2e-4, rtol=2e-3)
    if bias is not None:
        torch.testing.assert_close(layer.bias, bias + gains, atol=2e-4, rtol=2e-3)


class Twice(nn.Module):
    """A layer called twice, a weight used in two places, and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.other.weight
        self.lstm = nn.LSTM(6, 3)
        self.never = nn.Linear(6, 6)

    def forward(self, x):
        x = self.twice(self.twice(x).relu()).relu()
        x = self.tied(self.other(x).relu())
        return self.lstm(x)[0]


def zeroed(model, share=0.5):
    """Plain zeros in all weights of a copy."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for seed, parameter in enumerate(copied.parameters()):
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape, generator=generator(seed)) < share] = 0.0
    return copied


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_has_one_solution_for_all_its_calls_and_others_are_left_alone(sequential):
    torch.manual_seed(0)
    dense = Twice()
    sparse = zeroed(dense)
    before = copy.deepcopy(sparse.state_dict())
    x = normal(50, 6)
    done = mtprune.refit(sparse, [x], dense, how=EXACT, sequential=sequential)
    assert done.layers == ("twice.weight", "other.weight")
    assert done.left_alone == {
        "lstm.weight_ih_l0": "inputs are not gathered for LSTM",
        "lstm.weight_hh_l0": "inputs are not gathered for LSTM",
        "never.weight": "its module is not called",
    }
    assert sparse.tied.weight is sparse.other.weight
    after = sparse.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name] == 0, value == 0)
        moves = name in ("twice.weight", "twice.bias", "other.weight", "tied.weight")
        assert torch.equal(after[name], value) != moves, name
    # The layer's own two calls on the inputs it had.
    first = x
    second = F.linear(first, before["twice.weight"], before["twice.bias"]).relu()
    inputs = torch.cat([first, second])
    want = F.linear(inputs, dense.twice.weight)
    gap = (F.linear(inputs, before["twice.weight"]) - want).square().sum()
    moved = after["twice.bias"] - before["twice.bias"]
    left = (F.linear(inputs, after["twice.weight"], moved) - want).square().sum()
    assert left < 0.9 * gap


def test_one_after_the_other_sees_what_those_before_give():
    """Two layers in a row whose inputs are copies: in turn, both are put right."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    with torch.no_grad():
        dense[0].weight[4:] = dense[0].weight[:4]
    sparse = copy.deepcopy(dense)
    with torch.no_grad():
        sparse[0].weight[:, 4:] = 0
        sparse[1].weight[:, 4:] = 0
    half = normal(64, 4)
    x = torch.cat([half, half], 1)
    mtprune.refit(sparse, [x[:32], x[32:]], dense, how=EXACT, sequential=True)
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["prune", "inplace"])
@pytest.mark.parametrize("finalized", [False, True])
def test_what_a_pruner_has_pruned(backend, finalized):
    model, losses, x = two_tasks()
    dense = copy.deepcopy(model)
    pruner = MultitaskPruner(model, losses, [model["trunk"]], method=Vote(0.6), backend=backend)
    pruner.prune([x], forward=two_outputs, progress=False)
    if finalized:
        pruner.finalize()
    masks = pruner.masks
    off = loss_of(model, dense, x)
    mtprune.refit(model, [x], dense, how=EXACT, sequential=True, forward=two_outputs)
    assert loss_of(model, dense, x) < off
    pruner.finalize()
    weights = dict(model.named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in masks.items())


def test_a_bias_that_is_frozen_stays_and_one_that_is_not_moves():
    for frozen in (True, False):
        layer = nn.Linear(4, 2)
        layer.bias.requires_grad_(not frozen)
        before = layer.bias.detach().clone()
        masked(layer)
        mtprune.refit(layer, [normal(30, 4) + 1])
        assert torch.equal(layer.bias, before) == frozen


def test_the_model_is_run_without_a_trace():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    masked(model[3])
    mean, random = model[1].running_mean.clone(), torch.get_rng_state()
    mtprune.refit(model, [normal(30, 4)])
    assert torch.equal(model[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in (model[0], model[1], model[2]))


def test_weights_in_bfloat16_are_solved_in_float32():
    torch.manual_seed(0)
    layer = nn.Linear(8, 4).to(torch.bfloat16)
    wide = copy.deepcopy(layer).float()
    x = normal(64, 8).to(torch.bfloat16)
    for module, inputs in ((layer, x), (wide, x.float())):
        masked(module)
        mtprune.refit(module, [inputs])
    assert layer.weight_orig.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight_orig, wide.weight_orig.to(torch.bfloat16))


def test_what_cannot_be_refitted_is_refused_and_nothing_changes():
    layer = nn.Linear(3, 2)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight[:, 0] = 0
    model = nn.Sequential(layer)
    before = copy.deepcopy(model.state_dict())
    x = normal(4, 3)
    with pytest.raises(ValueError, match=r"`batches` is empty\. Give at least one batch."):
        mtprune.refit(model, [], nn.Sequential(dense))
    with pytest.raises(ValueError, match=r"pruned weights of '0.weight' are zero.*Pass dense="):
        mtprune.refit(model, [x])
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(2, 3\). Got no such weight."):
        mtprune.refit(model, [x], dense)
    with pytest.raises(ValueError, match=r"of shape \(2, 3\). Got shape \(3, 3\)."):
        mtprune.refit(model, [x], nn.Sequential(nn.Linear(3, 3)))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


# In a pruner.


def two_tasks():
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
    model = nn.ModuleDict({"trunk": trunk, "a": nn.Linear(16, 3), "b": nn.Linear(16, 2)})
    losses = {t: lambda out, _, t=t: (out[t] - 1).square().mean() for t in ("a", "b")}
    return model, losses, normal(64, 8) @ normal(8, 8, seed=1)


def two_outputs(model, x):
    hidden = model["trunk"](x)
    return {task: model[task](hidden) for task in ("a", "b")}


@torch.no_grad()
def loss_of(model, dense, x):
    ours, theirs = two_outputs(model, x), two_outputs(dense, x)
    return float(sum((ours[t] - theirs[t]).square().mean() for t in ours))


@pytest.mark.parametrize("backend", ["prune", "inplace"])
def test_a_vote_refits_each_layer_on_what_it_was_given(backend):
    model, losses, x = two_tasks()
    dense = copy.deepcopy(model)
    method = Vote(0.6, refit=Refit(samples=10_000, steps=200))
    pruner = MultitaskPruner(model, losses, [model["trunk"]], method=method, backend=backend)
    pruner.prune([x], forward=two_outputs, progress=False)
    masks = pruner.masks
    pruner.finalize()
    inputs = {"trunk.0": x, "trunk.2": dense["trunk"][:2](x), "a": dense["trunk"](x)}
    for name, given in inputs.items():
        old, layer = dense.get_submodule(name), model.get_submodule(name)
        kept = masks[f"{name}.weight"]
        new, gains = direct(given.detach(), old.weight.detach(), kept, 0.1, True)
        torch.testing.assert_close(layer.weight, new, atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(layer.bias, old.bias + gains, atol=1e-3, rtol=1e-2)


def test_masks_are_those_without_it_and_the_outputs_are_closer():
    found = {}
    for refit in (None, Refit()):
        model, losses, x = two_tasks()
        dense = copy.deepcopy(model)
        pruner = MultitaskPruner(model, losses, [model["trunk"]], method=Vote(0.6, refit=refit))
        pruner.prune([x], forward=two_outputs, progress=False)
        found[refit] = pruner.masks, loss_of(model, dense, x)
    (plain, off), (fitted, less) = found.values()
    assert all(torch.equal(plain[name], fitted[name]) for name in plain)
    assert less < 0.7 * off


def test_a_layer_of_another_kind_is_pruned_and_left_as_it_is():
    torch.manual_seed(0)
    model = Twice()
    before = copy.deepcopy(model.state_dict())
    losses = {"a": lambda out, _: out.square().mean()}
    method = Vote(0.5, saliency=saliency.magnitude, refit=Refit())
    pruner = MultitaskPruner(model, losses, [model], method=method)
    pruner.prune([normal(30, 6)], progress=False)
    pruner.finalize()
    kept = pruner.masks["lstm.weight_ih_l0"]
    assert not kept.all()
    assert torch.equal(model.lstm.weight_ih_l0, before["lstm.weight_ih_l0"] * kept)
    kept = pruner.masks["twice.weight"]
    assert not torch.equal(model.twice.weight, before["twice.weight"] * kept)


def training(backend="prune", refit=None):
    """A gradual run in which weights move at each update; a function that goes on with it."""
    model, losses, x = two_tasks()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    method = Vote(
        0.7,
        schedule=Cubic(begin=1, end=7, every=3),
        observations=2,
        refit=refit or Refit(samples=40),
    )
    pruner = MultitaskPruner(
        model, losses, [model["trunk"]], method=method, optimizer=optimizer, backend=backend
    )

    def go(steps):
        for step in steps:
            optimizer.zero_grad()
            batch = x[torch.randperm(64, generator=generator(step))[:32]]
            found = pruner.observe(two_outputs(model, batch), batch)
            sum(found.values()).backward()
            optimizer.step()
            pruner.step()

    return (model, optimizer, pruner), go


@pytest.mark.parametrize("backend", ["prune", "inplace"])
def test_a_run_that_stops_anywhere_goes_on_bitwise(backend):
    whole, go = training(backend)
    go(range(10))
    for stop in range(1, 9):
        parts, go = training(backend)
        go(range(stop))
        saved = [copy.deepcopy(part.state_dict()) for part in parts]
        fresh, go = training(backend)
        for part, state in zip(fresh, saved, strict=True):
            part.load_state_dict(state)
        go(range(stop, 10))
        for name, value in whole[0].state_dict().items():
            assert torch.equal(fresh[0].state_dict()[name], value), (stop, name)


def test_moments_of_the_optimizer_are_kept():
    (_, optimizer, pruner), go = training()
    go(range(3))
    take, seen = pruner._hold.take, []

    def spy(layers, decision):
        before = copy.deepcopy(optimizer.state_dict()["state"])
        changed = take(layers, decision)
        after = optimizer.state_dict()["state"]
        seen.extend(
            torch.equal(after[i][key], value) for i in before for key, value in before[i].items()
        )
        return changed

    pruner._hold.take = spy
    go(range(3, 8))
    assert seen
    assert all(seen)


def test_a_forward_that_nobody_observes_changes_no_sample():
    runs = []
    for extra in (False, True):
        (model, _, _), go = training()
        for step in range(9):
            if extra:
                two_outputs(model, normal(5, 8))
            go([step])
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_sample_is_of_all_batches():
    """Each batch shows another input alone; the fit has seen them all."""
    model, losses, _ = two_tasks()
    method = Vote(0.5, observations=8, refit=Refit(samples=64))
    pruner = MultitaskPruner(model, losses, [model["trunk"]], method=method)
    kept = []
    decide = method.decide
    object.__setattr__(
        method, "decide", lambda b, step: kept.append(b.shared("rows of inputs")) or decide(b, step)
    )
    numbers = count(1)
    batches = [torch.full((40, 8), float(next(numbers))) for _ in range(8)]
    pruner.prune(batches, forward=two_outputs, progress=False)
    rows = kept[0][0]
    assert rows.shape == (64, 1 + 8 + 1)
    assert set(rows[:, 1].tolist()) == set(range(1, 9))


def test_old_descriptions_of_votes_do_not_name_it():
    from mtprune.methods.base import describe

    assert "refit" not in describe(Vote(0.5))
    assert "refit=Refit(samples=9, damping=0.1, steps=12)" in describe(Vote(0.5, refit=Refit(9)))


@pytest.mark.long
@pytest.mark.slow
def test_a_vote_with_refit_is_a_method():
    check_method(Vote(0.7, schedule=Cubic(begin=1, end=5, every=2), refit=Refit(samples=64)))


def test_channels_are_refitted_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    dense = copy.deepcopy(model)
    found = {}
    x = normal(4, 3, 8, 8)
    for refit in (None, Refit()):
        model = copy.deepcopy(dense)
        losses = {"a": lambda out, _: out.square().mean()}
        method = Vote(0.4, granularity=Channel(x), refit=refit)
        pruner = MultitaskPruner(model, losses, [model], method=method)
        pruner.prune([x], progress=False)
        found[refit] = float((model(x) - dense(x)).detach().square().mean())
    assert found[Refit()] < found[None]


# Many processes.


def work(rank, world):
    dense, _, _ = two_tasks()
    x = normal(64, 8, seed=10 + rank)
    pruner = MultitaskPruner(
        dense,
        {t: lambda out, _, t=t: (out[t] - 1).square().mean() for t in ("a", "b")},
        [dense["trunk"]],
        method=Vote(0.6, refit=Refit(samples=48)),
    )
    # Ranks see batches of other sizes.
    pruner.prune([x[: 20 + 10 * rank]], forward=two_outputs, progress=False)
    return {"weights": dict(dense.state_dict())}


@pytest.mark.slow
def test_ranks_have_the_same_weights(tmp_path):
    first, second = on_ranks("tests.test_refit", "work", tmp_path)
    for name, value in first["weights"].items():
        assert torch.equal(second["weights"][name], value), name


def test_batches_that_lack_a_task_show_inputs_before_an_update():
    """How early observing begins depends on what batches hold: their inputs are seen from there."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("trunk", "a", "b")})
    method = Vote(0.5, schedule=mtprune.OneShot(2), refit=Refit(samples=16))
    pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=method)
    for tasks in ("b", "a", "b"):
        hidden = model["trunk"](normal(6, 4)).tanh()
        losses = {task: model[task](hidden).square().mean() for task in tasks}
        pruner.observe_losses(losses)
        changed = pruner.step()
    assert changed or pruner.step()
    assert pruner.sparsity == 0.5
