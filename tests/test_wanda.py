"""Zero-shot scores: sizes of weights times those of each task's own inputs, and no backward."""

import copy

import pytest
import torch
from torch import nn

import mtprune
from mtprune import (
    Cubic,
    MultitaskPruner,
    Neuron,
    PerOutput,
    Regrow,
    Vote,
    recipes,
    saliency,
    votes,
)
from tests import nets


class Shared(nn.Module):
    """Two tasks share a trunk; each batch is of one task, or of both."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.trunk(x)
        return {"a": self.a(hidden), "b": self.b(hidden)}

    def skipping(self, x):
        """Layers are read, not called."""
        return {"a": self.a(nn.functional.linear(x, self.trunk[0].weight)[:, :8])}


LOSSES = {t: lambda out, batch, t=t: out[t].square().mean() for t in "ab"}


def batches(scales, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 8, generator=g) * scale for scale in scales]


def published(weight, inputs, sparsity):
    """Wanda as its paper states it: of each output the weights of lowest metric go."""
    metric = weight.abs() * inputs.norm(p=2, dim=0)
    pruned = metric.sort(dim=-1, stable=True).indices[:, : int(metric.shape[1] * sparsity)]
    return torch.ones_like(metric, dtype=torch.bool).scatter_(1, pruned, False)


def inputs_of(model, xs):
    """What each Linear is called with, on all batches together."""
    seen, handles = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            handles.append(
                layer.register_forward_pre_hook(
                    lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach())
                )
            )
    for x in xs:
        model(x)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("a backward was run")


def test_it_is_the_published_rule_for_one_task(backend):
    torch.manual_seed(0)
    model, xs = Shared(), batches([1.0, 1.0, 1.0])
    dense = copy.deepcopy(model)
    inputs = inputs_of(dense, xs)
    pruner = MultitaskPruner(
        model,
        {"a": LOSSES["a"]},
        method=recipes.wanda(0.5, observations=3),
        exclude="b",
        backend=backend,
    )
    pruner.prune(xs, progress=False)
    assert list(pruner.masks) == ["trunk.0.weight", "trunk.2.weight", "a.weight"]
    for name, mask in pruner.masks.items():
        layer = name.removesuffix(".weight")
        weight = dense.get_submodule(layer).weight.detach()
        assert torch.equal(mask, published(weight, inputs[layer], 0.5))


def test_each_task_votes_by_the_inputs_of_its_own_batches():
    """The first layer's vote is that of percentiles of each task's own published metric."""
    torch.manual_seed(0)
    model, xs = Shared(), batches([torch.arange(8.0), torch.arange(8.0).flip(0)])
    dense = copy.deepcopy(model)
    pruner = MultitaskPruner(model, LOSSES, "trunk", method=recipes.wanda(0.5))
    for task, x in zip("ab", xs, strict=True):
        pruner.observe(model(x), x, tasks=[task])
    inputs = {t: inputs_of(dense, [x]) for t, x in zip("ab", xs, strict=True)}
    percentiles = {}
    for task, own in inputs.items():
        layers = ["trunk.0", "trunk.2", task]
        metrics = {
            n: (dense.get_submodule(n).weight.abs() * own[n].norm(dim=0)).detach() for n in layers
        }
        every = torch.cat([m.flatten() for m in metrics.values()]).sort().values
        percentiles[task] = {
            n: torch.searchsorted(every, m) / len(every) for n, m in metrics.items()
        }
    assert pruner.step()
    for layer in ("trunk.0", "trunk.2"):
        worth = torch.maximum(percentiles["a"][layer], percentiles["b"][layer])
        cut = worth.sort(dim=1, descending=True).values[:, worth.shape[1] // 2 - 1]
        assert torch.equal(pruner.masks[f"{layer}.weight"], worth >= cut[:, None])
    alone = {t: pruner.task_masks[t]["trunk.0.weight"] for t in "ab"}
    for task, mask in alone.items():
        weight = dense.trunk[0].weight.detach()
        assert torch.equal(mask, published(weight, inputs[task]["trunk.0"], 0.5))
    assert not torch.equal(alone["a"], alone["b"])


def test_no_backward_is_run_and_no_activation_is_kept():
    torch.manual_seed(0)
    model, x = Shared(), batches([1.0])[0]
    losses = {t: lambda out, batch, t=t: NoBackward.apply(out[t]).mean() for t in "ab"}

    def differentiating(model, x):
        out = model(x)
        torch.autograd.grad(out["a"].sum(), model.trunk[0].weight, retain_graph=True)
        return out

    pruner = MultitaskPruner(model, losses, "trunk", method=recipes.wanda(0.5))
    with pytest.raises(RuntimeError, match=r"prune\(\) keeps nothing to differentiate"):
        pruner.prune([x], forward=differentiating, progress=False)
    pruner.prune([x], progress=False)
    assert pruner.sparsity == 0.5
    trunk = ["trunk.0.weight", "trunk.2.weight"]
    assert {task: list(own) for task, own in pruner.task_masks.items()} == {
        "a": [*trunk, "a.weight"],
        "b": [*trunk, "b.weight"],
    }


@pytest.mark.parametrize("sparsity", [0.31, 0.77])
def test_outputs_keep_alike_and_the_total_is_exact(sparsity):
    run = nets.Run(
        nets.build("conv_bn"),
        Vote(sparsity, saliency=saliency.wanda, allocation=PerOutput(), schedule=Cubic(1, 5, 2)),
    )
    before = {}
    for _ in range(3):
        run.train(2)
        for name, mask in run.pruner.masks.items():
            counts = mask.flatten(1).sum(1)
            assert int(counts.max() - counts.min()) <= 1
            assert not bool((mask & ~before.get(name, mask)).any())
            before[name] = mask
    total = nets.size(run.pruner.masks)
    assert nets.zeros(run.pruner.masks) == round(sparsity * total)


def test_errors():
    with pytest.raises(ValueError, match=r"PerOutput\(\) counts the single weights of each output"):
        Vote(0.5, granularity=Neuron(), allocation=PerOutput())
    with pytest.raises(ValueError, match="Regrow keeps the number of weights of every layer"):
        Vote(0.5, allocation=PerOutput(), schedule=Regrow(2, 9))
    with pytest.raises(TypeError, match="An allocation by output spreads single weights"):
        PerOutput().units(None, None)
    pruner = MultitaskPruner(Shared(), {"a": LOSSES["a"]}, method=recipes.wanda(0.5))
    with pytest.raises(RuntimeError, match=r"Inputs of 'trunk.0.weight' have not been seen"):
        pruner.prune([batches([1.0])[0]], forward=Shared.skipping, progress=False)
    infinite = batches([float("inf")])[0]
    with pytest.raises(RuntimeError, match="not finite"):
        MultitaskPruner(Shared(), LOSSES, "trunk", method=recipes.wanda(0.5)).prune([infinite])


def test_it_resumes_to_the_bit():
    method = Vote(
        0.7,
        saliency=saliency.wanda,
        vote=votes.mean,
        allocation=PerOutput(),
        schedule=Cubic(3, 7, 4),
        observations=2,
    )
    mtprune.testing.check_method(method, nets={"linear": mtprune.testing.NETS["tied"]})
