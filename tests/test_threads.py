"""Other threads: what they draw is theirs, and each may have a pruner."""

import threading

import torch
from torch import nn

import mtprune
from mtprune import Cubic, OneShot, Regrow, SoftThreshold, Vote
from tests.nets import same, zeros


class Waits(torch.autograd.Function):
    """A backward that lets another thread draw in its midst."""

    turn = threading.Event()
    done = threading.Event()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Waits.turn.set()
        assert Waits.done.wait(60)
        return grad


def test_what_another_thread_draws_meanwhile_does_not_come_twice():
    model = nn.Linear(4, 3)
    pruner = mtprune.MultitaskPruner(model, ["a"], method=Vote(0.5, schedule=OneShot(0)))
    drawn = []

    def other():
        assert Waits.turn.wait(60)
        drawn.append(torch.rand(4))
        Waits.done.set()

    torch.manual_seed(0)
    loss = Waits.apply(model(torch.ones(2, 4))).square().mean()
    torch.manual_seed(1)
    expected = torch.rand(8)
    torch.manual_seed(1)
    thread = threading.Thread(target=other)
    thread.start()
    pruner.observe_losses({"a": loss})
    drawn.append(torch.rand(4))
    thread.join()
    assert torch.equal(torch.cat(drawn), expected)


METHODS = {
    "regrow": Vote(0.6, allocation="erk", schedule=Regrow(every=2, end=12)),
    "soft": SoftThreshold(0.6, schedule=Cubic(begin=2, end=12, every=2)),
}


def train(net, method):
    """Masks and weights in the end; nothing in here draws from torch's own generator."""
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    pruner = mtprune.MultitaskPruner(net, ["a", "b"], method=method, optimizer=optimizer)
    inputs = torch.linspace(-1, 1, 48).view(8, 6)
    for step in range(16):
        output = net(inputs.roll(step, 0))
        found = {"a": (output - 1).square().mean(), "b": output.abs().mean()}
        pruner.observe_losses(found)
        optimizer.zero_grad()
        pruner.weigh(found).backward()
        optimizer.step()
        pruner.step()
    return pruner.masks, {name: p.detach().clone() for name, p in net.named_parameters()}


def nets():
    torch.manual_seed(0)
    return {name: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)) for name in METHODS}


def test_two_pruners_in_two_threads_are_two_pruners_one_after_the_other():
    alone = {name: train(net, METHODS[name]) for name, net in nets().items()}
    found, together = {}, threading.Barrier(3)

    def run(name, net):
        together.wait(60)
        found[name] = train(net, METHODS[name])

    threads = [threading.Thread(target=run, args=pair) for pair in nets().items()]
    torch.manual_seed(1)
    expected = torch.rand(100_000)
    torch.manual_seed(1)
    for thread in threads:
        thread.start()
    together.wait(60)
    drawn = []
    while len(drawn) < 1000 or (len(drawn) < 100_000 and any(t.is_alive() for t in threads)):
        drawn.append(torch.rand(1))
    for thread in threads:
        thread.join(60)
    assert torch.equal(torch.cat(drawn), expected[: len(drawn)])
    for name, (masks, weights) in alone.items():
        assert zeros(masks) > 0
        assert same(found[name][0], masks)
        assert same(found[name][1], weights)
