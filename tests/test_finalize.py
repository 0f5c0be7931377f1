"""What `finalize` gives back computes what the masked model computed, to the bit."""

import pytest
import torch
from torch import nn

from mtprune import Linear, MultitaskPruner, SoftThreshold, Vote

# Torch multiplies in another order where a weight requires a gradient, if inputs are like these.
SHAPES = [(5, 10), (7, 3), (11, 24), (16, 8), (33, 17), (40, 48), (57, 21), (13, 59)]


class Wide(nn.Module):
    """Layers of many shapes, each by itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False) for shape in SHAPES)

    def forward(self):
        g = torch.Generator().manual_seed(0)
        inputs = [torch.randn(layer.in_features, 9, 5, generator=g) for layer in self.layers]
        return [f(x.permute(2, 1, 0)) for x, f in zip(inputs, self.layers, strict=True)]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "method", [Vote(0.5), SoftThreshold(0.5, schedule=Linear(0, 9, 3))], ids=["masks", "thresholds"]
)
def test_outputs_are_the_same_to_the_bit_after_finalize(method, mode, backend):
    model = Wide()
    pruner = MultitaskPruner(model, ["a"], method=method, backend=backend)
    pruner.observe_losses({"a": sum(out.square().mean() for out in model())})
    pruner.step()
    with mode():
        before = model()
    pruner.finalize()
    with mode():
        after = model()
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
