"""torchjd itself: its Jacobians in place of sweeps, and its scalarizers as weightings."""

from dataclasses import replace

import pytest
import torch

from mtprune import recipes
from tests.integrations.clients import GRADUAL, SCORING, STEPS, Net, batches, losses, pruner_of
from tests.integrations.clients import weights as weights_of
from tests.nets import same, zeros

torchjd = pytest.importorskip("torchjd")

from torchjd import aggregation, scalarization  # noqa: E402
from torchjd.autojac import backward, jac_to_grad, mtl_backward  # noqa: E402


def by_backward(model, features, found):
    backward(found)


def by_mtl_backward(model, features, found):
    mtl_backward(found, features)


def train(aggregator, differentiate, method=None, backend="prune", sweeps=False):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = None
    if method is not None:
        pruner = pruner_of(model, optimizer, method, backend=backend)
    for batch in batches():
        optimizer.zero_grad()
        features = model.trunk(batch).tanh()
        outputs = {task: head(features) for task, head in model.heads.items()}
        found = list(losses(outputs, batch).values())
        if pruner is not None and sweeps:
            pruner.observe_losses(found)
        differentiate(model, features, found)
        if pruner is not None and not sweeps:
            pruner.observe_jacobian(found)
        jac_to_grad([p for p in model.parameters() if hasattr(p, "jac")], aggregator)
        optimizer.step()
        if pruner is not None:
            pruner.step()
    return model, pruner


AGGREGATORS = {
    "MGDA": aggregation.MGDA,
    "UPGrad": aggregation.UPGrad,
    "PCGrad": aggregation.PCGrad,
    "sum": aggregation.Sum,
}
WAYS = pytest.mark.parametrize("way", [by_backward, by_mtl_backward], ids=["all", "shared"])


@WAYS
@pytest.mark.parametrize("aggregator", AGGREGATORS.values(), ids=AGGREGATORS)
def test_scoring_leaves_training_as_it_is(aggregator, way):
    plain, _ = train(aggregator(), way)
    for sweeps in (False, True):
        scored, pruner = train(aggregator(), way, SCORING, sweeps=sweeps)
        assert pruner.report().step == 9
        pruner.finalize()
        assert same(weights_of(plain), weights_of(scored))


@WAYS
def test_jacobians_give_the_masks_of_sweeps(way, backend):
    found = []
    for sweeps in (False, True):
        model, pruner = train(aggregation.MGDA(), way, GRADUAL, backend, sweeps)
        assert zeros(pruner.masks) > 0
        found.append((pruner.masks, model.state_dict()))
    (masks, state), (others, other) = found
    agree = sum(int((masks[name] == others[name]).sum()) for name in masks)
    assert agree >= 0.99 * sum(mask.numel() for mask in masks.values())
    assert set(state) == set(other)


SCALARIZERS = {
    "constant": lambda: scalarization.Constant(torch.tensor([0.5, 2.0])),
    "DWA": scalarization.DWA,
    "STCH": lambda: scalarization.STCH(0.5),
    "UW": lambda: scalarization.UW(2),
    "geometric": scalarization.GeometricMean,
}


@pytest.mark.parametrize("make", SCALARIZERS.values(), ids=SCALARIZERS)
def test_a_scalarizer_is_a_weighting(make):
    """Training is what it is without us, its parameters too; the report has what tasks count."""

    def run(pruned):
        torch.manual_seed(0)
        model, scalarizer = Net(), make()
        optimizer = torch.optim.Adam([*model.parameters(), *scalarizer.parameters()], 0.01)
        pruner = None
        if pruned:
            method = replace(recipes.adapmtl(0.0, STEPS), weighting=scalarizer)
            pruner = pruner_of(model, optimizer, method)
        for batch in batches():
            optimizer.zero_grad()
            found = losses(model(batch), batch)
            if pruner is None:
                total = scalarizer(torch.stack(list(found.values())))
            else:
                pruner.observe_losses(found)
                total = pruner.weigh(found)
            total.backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()
        return model, scalarizer, pruner

    plain, own, _ = run(pruned=False)
    weighed, other, pruner = run(pruned=True)
    weights = pruner.report().weights
    assert set(weights) == {"a", "b"}
    assert all(weight > 0 for weight in weights.values())
    if make is SCALARIZERS["constant"]:
        assert weights == {"a": 0.5, "b": 2.0}
    pruner.finalize()
    assert same(weights_of(plain), weights_of(weighed))
    assert same(own.state_dict(), other.state_dict())


def test_an_aggregator_is_no_weighting():
    message = r"combines gradients.*observe_jacobian\(losses\), jac_to"
    with pytest.raises(TypeError, match=message):
        replace(recipes.adapmtl(0.5, STEPS), weighting=aggregation.MGDA())
