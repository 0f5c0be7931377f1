"""Gradients that somebody else has computed: torchjd's ``.jac`` in place of sweeps."""

import pytest
import torch
from torch import nn

from mtprune import (
    Cubic,
    Linear,
    MultitaskPruner,
    OneShot,
    SoftThreshold,
    Vote,
    distributed,
    recipes,
    saliency,
)
from tests import checkpoints, nets
from tests.nets import Run, build, same

TASKS = ("a", "b", "c")
GRADUALLY = Vote(0.7, schedule=Cubic(1, 9, 2))


class Net(nn.Module):
    """A trunk, one more layer of two tasks, and heads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.late = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def forward(self, x):
        hidden = self.trunk(x)
        late = self.late(hidden).tanh()
        inner = {"a": hidden, "b": late, "c": late}
        return {task: head(inner[task]) for task, head in self.heads.items()}

    def losses(self, x):
        return {task: (out - i).square().mean() for i, (task, out) in enumerate(self(x).items())}


def backward(losses, parameters):
    """What ``torchjd.autojac.backward`` leaves: a row for each loss, zero where it does not lead.

    The graph is freed, as it is by torchjd.
    """
    parameters = [p for p in parameters if p.requires_grad]
    rows = [
        torch.autograd.grad(
            x,
            parameters,
            retain_graph=i + 1 < len(losses),
            allow_unused=True,
            materialize_grads=True,
        )
        for i, x in enumerate(losses)
    ]
    for parameter, *grads in zip(parameters, *rows, strict=True):
        jacobian = torch.stack(grads)
        parameter.jac = parameter.jac + jacobian if hasattr(parameter, "jac") else jacobian


def jac_to_grad(parameters):
    """The mean of the rows goes to ``.grad``, and ``.jac`` away."""
    for parameter in parameters:
        if hasattr(parameter, "jac"):
            parameter.grad = parameter.jac.mean(0)
            del parameter.jac


def batch(seed=1):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def ordered(tensors):
    return dict(sorted(tensors.items()))


def pruner_of(model, method=None, **options):
    method = method or Vote(0.5, schedule=OneShot(2))
    return MultitaskPruner(model, TASKS, method=method, **options)


@pytest.mark.parametrize("disentangled", [True, False])
@pytest.mark.parametrize("form", ["mapping", "another order", "list", "vector"])
def test_scores_are_those_of_sweeps(form, disentangled):
    found = []
    for given in (False, True):
        model = Net()
        pruner = pruner_of(model, Vote(0.5, observations=3, disentangled=disentangled))
        losses = model.losses(batch())
        if form == "another order":
            losses = {task: losses[task] for task in reversed(TASKS)}
        if form == "list":
            losses = list(losses.values())
        if form == "vector":
            losses = torch.stack(list(losses.values()))
        if given:
            rows = list(losses.values()) if isinstance(losses, dict) else list(losses)
            backward(rows, model.parameters())
            before = {name: p.jac.clone() for name, p in model.named_parameters()}
            assert pruner.observe_jacobian(losses) is losses
            assert same(before, {name: p.jac for name, p in model.named_parameters()})
            assert all(p.grad is None for p in model.parameters())
        else:
            pruner.observe_losses(losses)
        found.append((checkpoints.observed(pruner), checkpoints.scores(pruner)))
    assert found[0][0] == found[1][0] == dict.fromkeys(TASKS, 1)
    assert found[0][1].keys() == found[1][1].keys()
    for voter, swept in found[0][1].items():
        assert found[1][1][voter].keys() == swept.keys()
        for layer, score in swept.items():
            if disentangled:
                assert torch.equal(found[1][1][voter][layer], score)
            else:  # rows are added up, where a sweep adds up on its way
                torch.testing.assert_close(found[1][1][voter][layer], score)


def train(model, pruner, optimizer, given, steps=12):
    for step in range(steps):
        optimizer.zero_grad()
        losses = model.losses(batch(step))
        if not given:
            pruner.observe_losses(losses)
        backward(list(losses.values()), model.parameters())
        if given:
            pruner.observe_jacobian(losses)
        jac_to_grad(model.parameters())
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize(
    "method",
    [GRADUALLY, Vote(0.7, saliency=saliency.fisher, schedule=Linear(0, 6, 3), observations=2)],
    ids=["taylor", "fisher"],
)
def test_a_run_takes_the_same_masks(method, backend):
    ends = []
    for given in (False, True):
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        pruner = pruner_of(model, method, optimizer=optimizer, backend=backend)
        train(model, pruner, optimizer, given)
        ends.append((pruner.masks, pruner.task_masks, checkpoints.users(pruner)))
    assert same(ends[0][0], ends[1][0])
    assert all(same(ends[0][1][task], ends[1][1][task]) for task in TASKS)
    assert ends[0][2] == ends[1][2]
    assert ends[0][2]["late.weight"] == {"b", "c"}


def test_heads_may_have_their_gradient_as_grad():
    found = []
    for given in (False, True):
        model = Net()
        pruner = pruner_of(model, Vote(0.5, observations=3))
        losses = model.losses(batch())
        if given:
            inner = [*model.trunk.parameters(), *model.late.parameters()]
            for loss, head in zip(losses.values(), model.heads.values(), strict=True):
                grads = torch.autograd.grad(loss, list(head.parameters()), retain_graph=True)
                for parameter, grad in zip(head.parameters(), grads, strict=True):
                    parameter.grad = grad
            backward(list(losses.values()), inner)
            pruner.observe_jacobian(losses)
        else:
            pruner.observe_losses(losses)
        found.append(checkpoints.scores(pruner))
    assert all(same(ordered(found[0][task]), ordered(found[1][task])) for task in TASKS)


def test_a_task_that_sits_a_batch_out_has_no_row():
    found = []
    for given in (False, True):
        model = Net()
        pruner = pruner_of(model, Vote(0.5, observations=3))
        losses = model.losses(batch()) | {"a": 0.0}
        if given:
            backward([losses["b"], losses["c"]], model.parameters())
            pruner.observe_jacobian(losses)
        else:
            pruner.observe_losses(losses)
        found.append((checkpoints.observed(pruner), checkpoints.scores(pruner)))
    assert found[0][0] == found[1][0] == {"b": 1, "c": 1}
    for task in "bc":
        swept, given = (result[1][task] for result in found)
        for layer, score in swept.items():
            torch.testing.assert_close(given[layer], score)


def test_scaled_losses_are_scored_unscaled_and_an_overflow_is_discarded():
    model = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    pruner = pruner_of(model, Vote(0.5, observations=4))
    losses = model.losses(batch())
    pruner.observe_losses(losses)
    swept = checkpoints.scores(pruner)
    backward([scaler.scale(loss) for loss in losses.values()], model.parameters())
    pruner.observe_jacobian(losses, scaler=scaler)
    for task, layers in checkpoints.scores(pruner).items():
        for layer, score in layers.items():
            torch.testing.assert_close(score, 2 * swept[task][layer])
    model.trunk[0].weight.jac[1, 0, 0] = torch.inf
    pruner.observe_jacobian(losses, scaler=scaler)
    assert checkpoints.observed(pruner) == {"a": 3, "b": 2, "c": 3}
    assert checkpoints.discarded(pruner) == {"b": 1}


def test_far_from_an_update_nothing_is_asked_for():
    model = Net()
    pruner = pruner_of(model, Vote(0.5, schedule=OneShot(90)))
    pruner.observe_jacobian(model.losses(batch()))
    assert checkpoints.observed(pruner) == {}


def test_what_is_missing_or_of_other_losses_is_named():
    model = Net()
    pruner = pruner_of(model, Vote(0.5))
    losses = model.losses(batch())
    with pytest.raises(
        RuntimeError, match=r"'trunk\.0\.weight' has no Jacobian, though .*Call obs"
    ):
        pruner.observe_jacobian(losses)
    backward(list(losses.values())[:2], model.parameters())
    with pytest.raises(
        RuntimeError,
        match=r"Jacobian of 'trunk\.0\.weight' has shape \(2, 8, 6\)\. Of the losses "
        r"\['a', 'b', 'c'\] it would have \(3, 8, 6\): hand over",
    ):
        pruner.observe_jacobian(losses)
    for parameter in model.parameters():
        del parameter.jac
    backward(list(model.losses(batch()).values()), model.trunk.parameters())
    with pytest.raises(RuntimeError, match=r"'late\.weight' has no Jacobian"):
        pruner.observe_jacobian(losses)
    assert checkpoints.observed(pruner) == {}


@pytest.mark.parametrize(
    ("method", "backend"),
    [
        (recipes.disparse_dynamic(0.7, every=2, end=8), "prune"),
        (Vote(0.7, saliency=saliency.gradient, schedule=Cubic(1, 9, 2)), "prune"),
        (recipes.movement(0.7, 10), "inplace"),
    ],
    ids=["regrow", "gradient", "movement"],
)
def test_where_masks_hide_what_the_method_looks_at_it_is_refused(method, backend):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = pruner_of(model, method, optimizer=optimizer, backend=backend)
    with pytest.raises(RuntimeError, match=r"`\.jac` of 'trunk\.0\.weight' is zero where weights"):
        train(model, pruner, optimizer, given=True)
    assert 0 < pruner.sparsity < 1  # the first update was made


@pytest.mark.parametrize("given", [False, True])
def test_without_masks_in_between_regrowth_sees_all_of_it(given):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method = recipes.disparse_dynamic(0.7, every=2, end=8)
    pruner = pruner_of(model, method, optimizer=optimizer, backend="inplace")
    train(model, pruner, optimizer, given)
    other, second = Net(), None
    second = torch.optim.SGD(other.parameters(), lr=0.01)
    swept = pruner_of(other, method, optimizer=second, backend="inplace")
    train(other, swept, second, given=False)
    assert same(pruner.masks, swept.masks)


def test_thresholds_have_a_gradient_of_their_own():
    pruner = pruner_of(Net(), SoftThreshold(0.5, schedule=Cubic(1, 9, 2)))
    with pytest.raises(ValueError, match=r"cannot score weights behind thresholds.*Call observe"):
        pruner.observe_jacobian({})


def test_in_several_processes_it_is_refused(monkeypatch):
    pruner = pruner_of(Net())
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(RuntimeError, match=r"works in one process only: nothing averages `\.jac`"):
        pruner.observe_jacobian({})


def test_after_finalize_it_is_refused():
    pruner = pruner_of(Net())
    pruner.finalize()
    with pytest.raises(RuntimeError, match=r"observe_jacobian\(\) was called after finalize"):
        pruner.observe_jacobian({})


@nets.EVERY_NET
def test_awkward_nets_are_scored_alike(name, device):
    scores = []
    for given in (False, True):
        run = Run(build(name, device), Vote(0.7, observations=9))
        outputs, data = run.forward(0)
        losses = {task: loss(outputs, data) for task, loss in run.net.task_losses.items()}
        if given:
            backward(list(losses.values()), run.model.parameters())
            run.pruner.observe_jacobian(losses)
        else:
            run.pruner.observe_losses(losses)
        scores.append(checkpoints.scores(run.pruner))
    assert scores[0].keys() == scores[1].keys()
    for task, layers in scores[0].items():
        assert layers.keys() == scores[1][task].keys()
        for layer, score in layers.items():
            torch.testing.assert_close(scores[1][task][layer], score)


@pytest.mark.parametrize("way", ["backward", "mtl_backward"])
def test_torchjd_itself(way):
    autojac = pytest.importorskip("torchjd.autojac")
    aggregation = pytest.importorskip("torchjd.aggregation")
    ends = []
    for given in (False, True):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        pruner = pruner_of(model, GRADUALLY, optimizer=optimizer)
        for step in range(12):
            optimizer.zero_grad()
            features = model.late(model.trunk(batch(step))).tanh()
            losses = {t: (head(features) - 1).square().mean() for t, head in model.heads.items()}
            if not given:
                pruner.observe_losses(losses)
            if way == "mtl_backward":
                autojac.mtl_backward(list(losses.values()), features=features)
            else:
                autojac.backward(list(losses.values()))
            if given:
                pruner.observe_jacobian(losses)
            rows = [p for p in model.parameters() if hasattr(p, "jac")]
            autojac.jac_to_grad(rows, aggregation.MGDA())
            optimizer.step()
            pruner.step()
        ends.append(pruner.masks)
    assert nets.zeros(ends[0]) > 0
    assert same(ends[0], ends[1])
