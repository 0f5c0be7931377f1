"""What is proved on examples must hold on other inputs: constants, removal, verification."""

import math

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.others import other_inputs
from mtprune.structure import Group, Member

DEAD = (1, 4, 6)


def hidden(first, second, size=8):
    """The units between two layers."""
    units = tuple(range(size))
    return Group(
        "hidden",
        size,
        (
            Member(f"{first}.weight", 0, units),
            Member(f"{first}.bias", 0, units),
            Member(f"{second}.weight", 1, units, "in"),
        ),
    )


class Between(nn.Module):
    """Two layers, and something that depends on the inputs between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.between = between
        with torch.no_grad():
            self.first.weight[list(DEAD)] = 0.0
            self.first.bias[list(DEAD)] = 1.0

    def forward(self, x, *rest, **named):
        return self.second(self.between(self.first(x).relu(), x, *rest, **named))


def positions(h, x):
    return h * torch.linspace(1, 2, h.shape[1]).view(1, -1, 1)


torch.manual_seed(0)
ROW, ROWS, SEQUENCE = torch.randn(1, 5), torch.randn(6, 5), torch.randn(2, 4, 5)
# What stands between, examples that hide it, and inputs that show it.
NETS = {
    "a scale that all rows share": (
        lambda h, x, t: h * t,
        (ROWS, torch.full((6, 1), 0.5)),
        (ROWS, torch.rand(6, 1)),
    ),
    "a timestep": (lambda h, x, t: h * (1 + t), (ROWS, 0.5), (ROWS, 0.9)),
    "a whole timestep": (
        lambda h, x, t: h * torch.cos(t / 7.0).unsqueeze(1),
        (ROWS, torch.full((6,), 3)),
        (ROWS, torch.arange(6)),
    ),
    "one row": (lambda h, x: h * x.norm(dim=1, keepdim=True), (ROW,), (ROWS,)),
    "the size of the input": (lambda h, x: h * x.shape[0], (ROWS,), (ROW,)),
    "a mask without padding": (
        lambda h, x, mask: h * mask.unsqueeze(-1),
        (SEQUENCE, torch.ones(2, 4)),
        (SEQUENCE, torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])),
    ),
    "a bool mask without padding": (
        lambda h, x, mask: h.masked_fill(~mask.unsqueeze(-1), 0.0),
        (SEQUENCE, torch.ones(2, 4, dtype=torch.bool)),
        (SEQUENCE, torch.tensor([[True, True, True, False], [True, True, False, False]])),
    ),
    "the length of the sequence": (
        lambda h, x: h / math.sqrt(h.shape[1]),
        (SEQUENCE,),
        (SEQUENCE[:, :2],),
    ),
    "the place in a sequence of one": (positions, (SEQUENCE[:, :1],), (SEQUENCE,)),
}


@pytest.mark.parametrize("name", NETS)
def test_what_depends_on_the_inputs_is_no_constant(name):
    between, examples, others = NETS[name]
    model = Between(between)
    fast = mtprune.compress(model, examples, groups=hidden("first", "second"))
    for inputs in (examples, others):
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
    assert fast.first.out_features == 8


def test_a_constant_is_still_removed():
    model = Between(lambda h, x: h.square() + 1)
    fast = mtprune.compress(model, ROWS, groups=hidden("first", "second"))
    assert fast.first.out_features == 5
    x = 9 * torch.randn(3, 5)
    torch.testing.assert_close(fast(x), model(x))


def test_where_an_input_cannot_be_varied_no_constant_is_believed():
    class Coded(Between):
        def forward(self, x, code):
            assert code.tolist() == [3]
            return super().forward(x)

    model = Coded(lambda h, x: h)
    code = torch.tensor([3])
    assert other_inputs(model.eval(), [(ROWS, code)]).unvaried == ["'1'"]
    fast = mtprune.compress(model, (ROWS, code), groups=hidden("first", "second"))
    assert fast.first.out_features == 8
    assert "constants stay" in str(mtprune.plan_of(fast))
    assert "'1'" in str(mtprune.plan_of(fast))


def test_outputs_are_compared_on_other_inputs():
    """A group that leaves out a reader which the example never reaches."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
            with torch.no_grad():
                self.second.weight[:, 2] = 0.0

        def forward(self, x, gate):
            h = self.first(x)
            wide = torch.nn.functional.pad(h, (0, 4 - h.shape[-1]))
            return self.second(h) + gate * self.third(wide)

    model, x = Gated(), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"inputs other than the examples is off by a.*'hid"):
        mtprune.compress(model, (x, torch.zeros(3, 1)), groups=hidden("first", "second", 4))


@pytest.mark.parametrize("tolerance", [math.nan, math.inf, -1.0, True, "1e-5"])
def test_a_tolerance_is_a_finite_number(tolerance):
    with pytest.raises(ValueError, match=r"`tolerance` must be a finite number, at least 0\. Got"):
        mtprune.compress(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), tolerance=tolerance)


def test_no_randomness_of_others_is_drawn_and_the_model_is_as_it_was():
    model = Between(lambda h, x: nn.functional.dropout(h, 0.5, training=False))
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mtprune.compress(model, ROWS)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_inputs_are_of_the_same_kinds():
    seen = []

    class Watching(nn.Module):
        def forward(self, image, mask, ids, options):
            seen.append((image, mask, ids, options["scale"]))
            return image * options["scale"] + mask.float() + ids

    batch = (torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3).long())
    others = other_inputs(Watching(), [(*batch, {"scale": 2.0, "name": "a", "flag": True})])
    assert others.unvaried == []
    assert len(others.batches) >= 5
    for image, mask, ids, scale in seen:
        assert (image.dtype, mask.dtype, ids.dtype) == (torch.float32, torch.bool, torch.int64)
        assert isinstance(scale, float)
    assert any(not bool(mask.all()) for _, mask, _, _ in seen)
    assert {scale for *_, scale in seen} > {2.0}


def test_infinite_inputs_stay_infinite():
    class Masked(nn.Module):
        def forward(self, x, bias):
            return (x + bias).softmax(-1)

    bias = torch.tensor([[0.0, -torch.inf, 0.0]])
    for _, other in other_inputs(Masked(), [(torch.randn(1, 3), bias)]).batches:
        assert bool((other.isinf() == (other == -torch.inf)).all())
        assert bool(other.isinf().any())
