"""Other threads: what they draw is theirs."""

import threading

import torch
from torch import nn

import mtprune
from mtprune import OneShot, Vote


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
