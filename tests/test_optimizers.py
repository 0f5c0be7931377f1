"""Optimizers that are wrapped: whose steps are counted, and after whose masks hold."""

import pytest
import torch
from torch import nn

from mtprune import Cubic, MultitaskPruner, Vote
from tests import checkpoints, nets

METHOD = Vote(0.7, schedule=Cubic(1, 7, 2))


class Wrapper:
    """Holds an optimizer under that name, and steps it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


class Prepared(torch.optim.Optimizer):
    """A wrapper that is of the class, as accelerate's: it has none of its base class's hooks."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Ahead(torch.optim.Optimizer):
    """An optimizer with another inside, which moves weights on after each of its steps."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        fast = [p for group in self.param_groups for p in group["params"]]
        for slow, parameter in zip(self.slow, fast, strict=True):
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)


class Named(torch.optim.SGD):
    """Has an attribute of that name for another reason."""

    optimizer = "sgd"


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, Prepared, lambda x: Wrapper(Prepared(x)), Ahead],
    ids=["wrapper", "prepared", "both", "ahead"],
)
def test_masks_hold_after_the_steps_of_a_wrapped_optimizer(wrap, backend, device):
    net = nets.build("plain", device)
    optimizer = wrap(torch.optim.SGD(net.model.parameters(), lr=0.05, momentum=0.9))
    pruner = MultitaskPruner(
        net.model,
        net.task_losses,
        net.shared_modules,
        method=METHOD,
        optimizer=optimizer,
        backend=backend,
    )
    for at in range(9):
        net.model.zero_grad()
        data = net.make_batch(at)
        sum(pruner.observe(net.model(data["x"]), data).values()).backward()
        optimizer.step()
        for name, mask in pruner.masks.items():
            assert bool((nets.read(net.model, name)[~mask] == 0).all())
        pruner.step()
    assert checkpoints.steps(pruner) == 9
    assert round(pruner.sparsity, 2) == 0.7
    pruner.finalize()


def test_an_attribute_called_optimizer_may_be_anything():
    model = nn.Linear(4, 4)
    optimizer = Named(model.parameters(), lr=0.1)
    pruner = MultitaskPruner(model, ["a"], optimizer=optimizer)
    optimizer.step()
    assert checkpoints.steps(pruner) == 1


def test_accelerate_itself():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = nets.build("plain")
    optimizer = torch.optim.AdamW(net.model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, scheduler = accelerator.prepare(net.model, optimizer, scheduler)
    pruner = MultitaskPruner(
        model, net.task_losses, net.shared_modules, method=METHOD, optimizer=optimizer
    )
    for at in range(8):
        data = net.make_batch(at)
        optimizer.zero_grad()
        accelerator.backward(sum(pruner.observe(model(data["x"]), data).values()))
        optimizer.step()
        scheduler.step()
        pruner.step()
    assert checkpoints.steps(pruner) == 8
    assert round(pruner.sparsity, 2) == 0.7
    pruner.finalize()
