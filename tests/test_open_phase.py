"""While weights may come back, each back-end keeps its word about names and state."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mtprune
from mtprune import (
    Cubic,
    MultitaskPruner,
    SigmoidThreshold,
    SoftThreshold,
    Vote,
    saliency,
)
from mtprune.holding.prune import plain_copy
from tests import nets
from tests.nets import build, evaluate, read

SCHEDULE = Cubic(begin=1, end=9, every=2)
METHODS = {
    "straight through": lambda: Vote(
        0.7, saliency=saliency.movement, straight_through=True, schedule=SCHEDULE
    ),
    "soft": lambda: SoftThreshold(0.7, schedule=SCHEDULE),
    "learned": lambda: SoftThreshold(0.7, schedule=SCHEDULE, allocation="learned", debias=True),
    "sigmoid": lambda: SigmoidThreshold(0.7, end=9, init=-2.0, weighting="uniform"),
}
NETS = (
    "plain",
    "called_twice",
    "tied",
    "conv_bn",
    "attention",
    "transformer_encoder",
    "lstm",
    "checkpointed",
)
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)
EVERY_NET = pytest.mark.parametrize("name", nets.each(NETS))


class Training:
    """A run that is looked at while weights may come back."""

    def __init__(self, name, method, backend, device):
        self.net = build(name, device)
        self.names = list(self.net.model.state_dict())
        self.optimizer = nets.sgd(self.net.model)
        self.pruner = MultitaskPruner(
            self.net.model,
            self.net.task_losses,
            self.net.shared_modules,
            method=METHODS[method](),
            optimizer=self.optimizer,
            include=self.net.include,
            backend=backend,
        )
        self.at = 0

    def train(self, steps):
        for _ in range(steps):
            torch.manual_seed(self.at)  # of dropout
            batch = self.net.make_batch(self.at)
            self.optimizer.zero_grad()
            losses = self.pruner.observe(self.net.model(batch["x"]), batch)
            self.pruner.weigh(losses).backward()
            self.optimizer.step()
            self.pruner.step()
            self.at += 1
        return self


@pytest.fixture
def training(device):
    return lambda name, method, backend: Training(name, method, backend, device)


@EVERY_METHOD
@EVERY_NET
def test_inplace_never_changes_a_name(name, method, training):
    run = training(name, method, "inplace")
    for _ in range(12):
        run.train(1)
        assert list(run.net.model.state_dict()) == run.names
        assert not prune.is_pruned(run.net.model)
        for parameter, shown in run.net.model.named_parameters():
            assert read(run.net.model, parameter) is shown
    run.pruner.finalize()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in run.net.model.modules())


@EVERY_METHOD
@EVERY_NET
def test_prune_holds_real_state_all_the_while(name, method, training):
    run = training(name, method, "prune").train(5)
    assert prune.is_pruned(run.net.model)
    held = list(run.net.model.state_dict())
    assert any(key.endswith("_orig") for key in held)
    assert any(key.endswith("_mask") for key in held)


@EVERY_METHOD
@EVERY_NET
def test_both_backends_train_alike(name, method, training):
    one, other = (training(name, method, backend) for backend in ("prune", "inplace"))
    for _ in range(12):
        one.train(1), other.train(1)
        masks = one.pruner.masks
        assert all(torch.equal(masks[key], mask) for key, mask in other.pruner.masks.items())
        trained = {key.removesuffix("_orig"): p for key, p in one.net.model.named_parameters()}
        for key, parameter in other.net.model.named_parameters():
            torch.testing.assert_close(parameter, trained[key])
    assert one.pruner.sparsity == other.pruner.sparsity
    batch = one.net.make_batch(99)
    for out, same in zip(
        evaluate(one.net.model, batch), evaluate(other.net.model, batch), strict=True
    ):
        torch.testing.assert_close(out, same)


@EVERY_METHOD
def test_a_copy_in_between_computes_the_same_and_is_plain_to_optimizers(method, backend, training):
    run = training("plain", method, backend).train(5)
    batch = run.net.make_batch(99)
    for other in (copy.deepcopy(run.net.model), pickle.loads(pickle.dumps(run.net.model))):
        assert list(other.state_dict()) == list(run.net.model.state_dict())
        pairs = zip(evaluate(run.net.model, batch), evaluate(other, batch), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@EVERY_METHOD
@pytest.mark.parametrize("name", ["conv_bn", "attention", "lstm", "tied"])
def test_a_plain_copy_has_the_weights_that_the_model_computes_with(name, method, backend, training):
    run = training(name, method, backend).train(5)
    plain, batch = plain_copy(run.net.model), run.net.make_batch(99)
    assert sorted(plain.state_dict()) == sorted(run.names)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in plain.modules())
    pairs = zip(evaluate(run.net.model, batch), evaluate(plain, batch), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@EVERY_METHOD
def test_a_guest_parameter_is_masked_like_the_host(method, backend, training):
    """`torch.func.functional_call` puts other tensors in the Parameters' place."""
    run = training("plain", method, backend).train(5)
    model, batch = run.net.model, run.net.make_batch(99)
    guests = {name: p.detach() * 2 for name, p in model.named_parameters()}
    for_real = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in for_real.named_parameters():
            parameter.copy_(guests[name])
    called = torch.func.functional_call(model, guests, (batch["x"],))
    expected = for_real(batch["x"])
    assert all(torch.equal(called[task], expected[task]) for task in expected)
    for name, parameter in model.named_parameters():
        assert isinstance(read(model, name.removesuffix("_orig")), nn.Parameter), name
        assert parameter is dict(model.named_parameters())[name]


@EVERY_METHOD
def test_a_model_that_is_not_finalized_is_not_compressed(method, backend, training):
    run = training("plain", method, backend).train(5)
    says = "still holds" if backend == "prune" else "still has a mask that may open again on its"
    with pytest.raises(ValueError, match=rf"'trunk\.0' {says} 'weight.*pruner\.finalize\(\) first"):
        mtprune.compress(run.net.model, run.net.make_batch(0)["x"])
