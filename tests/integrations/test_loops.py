"""Loops as other people write them, line by line: LibMTL's, torchvision's and timm's references.

They are written out here, without their packages; the lines of the pruner are those of our pages.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from mtprune import MultitaskPruner
from tests.checkpoints import steps
from tests.integrations.clients import GRADUAL, SCORING, STEPS, Net, batches, losses, pruner_of
from tests.integrations.clients import weights as weights_of
from tests.nets import same, zeros

TASKS = ["a", "b"]


@dataclass
class Trained:
    """What a loop leaves: the model, and its average if it keeps one."""

    model: nn.Module
    pruner: MultitaskPruner | None = None
    average: nn.Module | None = None
    steps: int = STEPS


def start(method, backend):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = None if method is None else pruner_of(model, optimizer, method, backend=backend)
    return model, optimizer, pruner


def observe(pruner, found, **options):
    if pruner is not None:
        pruner.observe_losses(found, **options)


def step(pruner):
    if pruner is not None:
        pruner.step()


class LibMTL:
    """Its trainer: one vector of losses filled in place, and a weighting's ``backward`` of it."""

    def __init__(self, backward, rep_grad=False):
        self.backward = backward
        self.rep_grad = rep_grad

    def __call__(self, method, backend):
        model, optimizer, pruner = start(method, backend)
        for batch in batches():
            hidden = model.trunk(batch).tanh()
            if self.rep_grad:
                hidden = hidden.detach().requires_grad_()
            predictions = {task: head(hidden) for task, head in model.heads.items()}
            train_losses = torch.zeros(len(TASKS))
            for number, task in enumerate(TASKS):
                train_losses[number] = losses(predictions, batch)[task]
            observe(pruner, train_losses)
            optimizer.zero_grad(set_to_none=False)
            self.backward(model, train_losses)
            optimizer.step()
            step(pruner)
        return Trained(model, pruner)


def equal_weights(model, train_losses):
    torch.mul(train_losses, torch.ones(len(TASKS))).sum().backward()


def pcgrad(model, train_losses):
    """Gradients of what is shared, by task, are projected and put in place of ``.grad``."""
    shared = list(model.trunk.parameters())
    grads = []
    for loss in train_losses:
        model.trunk.zero_grad()
        loss.backward(retain_graph=True)
        grads.append(torch.cat([p.grad.reshape(-1) for p in shared]))
    projected = [grad.clone() for grad in grads]
    for mine, other in ((0, 1), (1, 0)):
        overlap = projected[mine] @ grads[other]
        if overlap < 0:
            projected[mine] -= overlap * grads[other] / grads[other].norm().square()
    new = torch.stack(projected).sum(0)
    for parameter, grad in zip(shared, new.split([p.numel() for p in shared]), strict=True):
        parameter.grad.data = grad.view(parameter.shape).clone()


def torchvision(method, backend):
    """``train_one_epoch`` of its references: scaler, clipping, an average with buffers."""
    model, optimizer, pruner = start(method, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for number, image in enumerate(batches()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(image)
            found = losses({task: x.float() for task, x in output.items()}, image)
        observe(pruner, found, scaler=scaler)
        optimizer.zero_grad()
        scaler.scale(sum(found.values())).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        step(pruner)
        if number % 2 == 0:
            ema.update_parameters(model)
            if number < 4:
                ema.n_averaged.fill_(0)
    return Trained(model, pruner, ema.module)


class Ema(nn.Module):
    """timm's: a copy of the model, whose state moves towards the model's, entry by entry."""

    def __init__(self, model, decay):
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model):
        mine, theirs = self.module.state_dict().values(), model.state_dict().values()
        for ema, value in zip(mine, theirs, strict=True):
            if ema.is_floating_point():
                ema.lerp_(value, 1.0 - self.decay)
            else:
                ema.copy_(value)


def timm(method, backend):
    """``train_one_epoch`` of its script: an update for several batches, and then the average."""
    model, optimizer, pruner = start(method, backend)
    ema = Ema(model, 0.9)
    accum_steps = 2
    for number, image in enumerate(batches()):
        found = losses(model(image), image)
        observe(pruner, found)
        (sum(found.values()) / accum_steps).backward()
        if (number + 1) % accum_steps:
            continue
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        step(pruner)
        ema.update(model)
        optimizer.zero_grad()
    return Trained(model, pruner, ema.module, STEPS // accum_steps)


def swa(method, backend):
    """Stochastic weight averaging as torch's page has it, but copied when masks are final.

    It copies buffers by position, so a copy of before lacks the masks of ``backend="prune"``.
    """
    model, optimizer, pruner = start(method, backend)
    average, schedule = None, SWALR(optimizer, swa_lr=0.005)
    for number, batch in enumerate(batches()):
        found = losses(model(batch), batch)
        observe(pruner, found)
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
        step(pruner)
        if number >= 9:
            average = average or AveragedModel(model)
            average.update_parameters(model)
            schedule.step()
    update_bn(batches(), average)
    return Trained(model, pruner, average.module)


LOOPS = {
    "LibMTL, equal weights": LibMTL(equal_weights),
    "LibMTL, PCGrad": LibMTL(pcgrad),
    "torchvision": torchvision,
    "timm": timm,
    "swa": swa,
}
EVERY_LOOP = pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
BY_BUFFERS = (torchvision, timm)
"""What averages by position in the state, where ``backend="prune"`` puts masks."""


def parameter(model, name):
    """A parameter by its own name, also where it is masked."""
    found = dict(model.named_parameters())
    return found[name] if name in found else found[f"{name}_orig"]


def fits(loop, backend):
    if backend == "prune" and loop in BY_BUFFERS:
        pytest.skip("the average is taken over buffers by position")


@EVERY_LOOP
def test_scoring_leaves_training_as_it_is(loop, backend):
    fits(loop, backend)
    plain, scored = loop(None, backend), loop(SCORING, backend)
    assert scored.pruner.report().step == (6 if scored.steps < STEPS else 9)
    scored.pruner.finalize()
    assert same(weights_of(plain.model), weights_of(scored.model))
    if plain.average is not None:
        assert same(weights_of(plain.average), weights_of(scored.average))


@EVERY_LOOP
def test_a_loop_prunes(loop, backend):
    fits(loop, backend)
    run = loop(GRADUAL, backend)
    masks = run.pruner.masks
    total = sum(mask.numel() for mask in masks.values())
    assert steps(run.pruner) == run.steps
    assert zeros(masks) == round((0.75 if run.steps == STEPS else run.pruner.sparsity) * total)
    assert zeros(masks) > 0.6 * total
    run.pruner.finalize()
    for name, mask in masks.items():
        assert not run.model.get_parameter(name)[~mask].any()
    if run.average is not None:  # of the time before as well, so it is masked once, in the end
        for name, mask in masks.items():
            parameter(run.average, name).data.mul_(mask)
        assert all(torch.isfinite(x).all() for x in weights_of(run.average).values())
        assert set(weights_of(run.average)) == set(weights_of(run.model))


def test_the_average_over_weights_that_no_longer_change_has_their_zeros(backend):
    """Masks are final before averaging begins, as the page advises."""
    run = swa(GRADUAL, backend)
    masks = run.pruner.masks
    run.pruner.finalize()
    for name, mask in masks.items():
        weight = parameter(run.average, name)
        assert not weight[~mask].any()
        assert weight[mask].any()


def test_representations_that_are_detached_are_an_error():
    """LibMTL's ``rep_grad=True``: the graph of a loss ends before what is shared."""
    with pytest.raises(RuntimeError, match="detached"):
        LibMTL(lambda model, vector: vector.sum().backward(), rep_grad=True)(GRADUAL, "prune")


def test_a_step_that_the_scaler_skips_is_no_step_of_the_schedule(backend):
    model, optimizer, pruner = start(GRADUAL, backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    found_steps = []
    for number, batch in enumerate(batches()):
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(batch)
        found = losses({task: x.float() for task, x in output.items()}, batch)
        observe(pruner, found, scaler=scaler)
        optimizer.zero_grad()
        scaler.scale(sum(found.values())).backward()
        if number in (2, 3, 7):
            next(model.parameters()).grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        step(pruner)
        found_steps.append(steps(pruner))
    assert found_steps == [1, 2, 2, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert pruner.sparsity == pytest.approx(0.75, abs=5e-3)
