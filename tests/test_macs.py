"""Multiply-adds of every weight, against counting by hand."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtprune.model.layers import find_layers
from mtprune.model.macs import macs_per_weight


class Twice(nn.Module):
    """A layer called twice, a tied one, and one read behind its module's back."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        return F.linear(self.two(self.one(self.one(x))), self.three.weight)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, *, x):
        return self.layer(x)


CASES = {
    "linear": (lambda: nn.Linear(3, 5), torch.zeros(7, 3), [7]),
    "tokens": (lambda: nn.Linear(3, 5), torch.zeros(2, 7, 3), [14]),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 4, 5), [40]),
    "strided": (lambda: nn.Conv2d(3, 8, 3, stride=2, bias=False), torch.zeros(1, 3, 9, 9), [16]),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), torch.zeros(2, 4, 9), [14]),
    "transposed": (lambda: nn.ConvTranspose2d(4, 8, 3), torch.zeros(1, 4, 5, 5), [25]),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4)), [2]),
    "lstm": (lambda: nn.LSTM(4, 8), torch.zeros(5, 2, 4), [10, 10]),
    "gru": (lambda: nn.GRU(4, 8, 2), torch.zeros(5, 2, 4), [10] * 4),
    "cell": (lambda: nn.LSTMCell(3, 4), torch.zeros(2, 3), [2, 2]),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (torch.zeros(5, 2, 8),) * 3, [10, 10]),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.zeros(2, 5, 8),
        [10] * 4,
    ),
    "twice": (Twice, torch.zeros(2, 4), [6, 2]),
    "keywords": (Keywords, {"x": torch.zeros(3, 4)}, [3]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_weight_is_counted_as_often_as_it_is_used(case):
    make, inputs, expected = CASES[case]
    model = make()
    assert macs_per_weight(model, find_layers(model), inputs) == list(map(Fraction, expected))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    macs_per_weight(model, find_layers(model), torch.randn(2, 1, 5, 5, generator=None))
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.set_rng_state(random)


def test_a_layer_that_does_not_run_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ValueError, match=r"No multiply-adds of \['idle\.weight'\]"):
        macs_per_weight(model, find_layers(model), torch.zeros(1, 2))
