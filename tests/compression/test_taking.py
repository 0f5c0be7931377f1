"""What smaller modules take of arguments that were computed for all units."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression import Removal
from mtprune.compression.cuts import Taken
from mtprune.compression.resizing import check_fits
from mtprune.compression.taking import take
from mtprune.patterns import Attention, heads
from mtprune.structure import Argument


class Sloped(nn.Module):
    """Attention that adds to its scores what it is called with, a slope for each head and key."""

    def __init__(self, width=8, count=4):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.size, self.count = width // count, count

    def forward(self, x, slopes):
        parts = [f(x).unflatten(-1, (self.count, self.size)).transpose(1, 2) for f in self.qkv()]
        bias = slopes.unflatten(0, (-1, self.count)).expand(len(x), -1, x.shape[1], -1)
        read = nn.functional.scaled_dot_product_attention(*parts, bias)
        return self.o(read.transpose(1, 2).flatten(2))

    def qkv(self):
        return self.q, self.k, self.v


class Model(nn.Module):
    """Two blocks that are given the slopes of all heads, of each in the batch or once."""

    def __init__(self, batched=True, named=True, **sizes):
        super().__init__()
        self.blocks = nn.ModuleList([Sloped(**sizes), Sloped(**sizes)])
        self.count, self.batched, self.named = self.blocks[0].count, batched, named

    def forward(self, x):
        slopes = torch.arange(1, self.count + 1).view(-1, 1, 1) * torch.arange(x.shape[1]) / 4
        slopes = slopes.repeat(len(x), 1, 1) if self.batched else slopes
        for block in self.blocks:
            x = x + (block(x, slopes=slopes) if self.named else block(x, slopes))
        return x


MINE = Attention(
    "mine",
    *(f"{name}.weight" for name in "qkvo"),
    "size",
    counts=("count",),
    arguments=(("slopes", 0),),
)


def unread(model, groups):
    """A model of which block 0 loses heads 0 and 2, and block 1 head 1."""
    with torch.no_grad():
        for group, dead in zip(groups, ((0, 2), (1,)), strict=True):
            reader = group.members[-1]
            gone = torch.isin(reader.index(), torch.tensor(dead))
            model.get_parameter(reader.tensor)[:, gone] = 0
    return model.eval()


def dense(functions):
    return [float(i) for i, _ in enumerate(functions)]


@pytest.mark.parametrize("batched", [True, False], ids=["of each in the batch", "of all at once"])
@pytest.mark.parametrize("named", [True, False], ids=["by name", "by place"])
def test_heads_that_stay_keep_their_slopes(batched, named, tmp_path):
    model, x = Model(batched, named), torch.randn(3, 5, 8)
    groups = heads(model, (MINE,), example_inputs=x)
    assert groups[1].arguments == (Argument("blocks.1", "slopes", 0, (0, 1, 2, 3)),)
    unread(model, groups)
    fast = mtprune.compress(model, x, groups=groups, measure=dense)
    assert [block.count for block in fast.blocks] == [2, 3]
    y = torch.randn(2, 7, 8)
    torch.testing.assert_close(fast(y), model(y))
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(copied(y), fast(y))
    mtprune.save(fast, tmp_path)
    loaded = mtprune.load(tmp_path, Model(batched, named))
    assert torch.equal(loaded(y), fast(y))
    exported = torch.export.export(fast, (y,)).module()
    assert torch.equal(exported(y), fast(y))


def test_without_the_argument_the_trial_tells():
    bare = Attention("bare", *(f"{n}.weight" for n in "qkvo"), "size", counts=("count",))
    with pytest.raises(ValueError, match="without some of them the model does not run"):
        heads(Model(), (bare,), example_inputs=torch.randn(3, 5, 8))


class Given(nn.Module):
    def forward(self, x, slopes=None):
        return x if slopes is None else slopes


def test_what_is_taken_of_what_was_taken():
    module = Given()
    take(module, Taken("", "slopes", 1, 4, (0, 2, 3)))
    take(module, Taken("", "slopes", 1, 3, (1, 2)))
    slopes = torch.arange(8).view(1, 8)
    assert module(0, slopes).tolist() == [[2, 3, 6, 7]]


@pytest.mark.parametrize(
    "given", [None, "text", torch.ones(4), torch.ones(2, 1)], ids=["none", "text", "flat", "one"]
)
def test_what_is_the_same_for_all_units_stays(given):
    module = Given()
    take(module, Taken("", "slopes", 1, 4, (0, 2)))
    assert module("x", slopes=given) is (given if given is not None else "x")
    assert module("x") == "x"


def test_none_left():
    module = Given()
    take(module, Taken("", "slopes", 0, 4, ()))
    assert module(0, torch.ones(8, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (Taken("lost", "slopes", 0, 4, ()), "no such module there"),
        (Taken("blocks.0", "slope", 0, 4, ()), "a Sloped without it there"),
    ],
)
def test_a_plan_for_another_model(part, why):
    with pytest.raises(ValueError, match=rf"takes a part of its argument '{part.argument}'.*{why}"):
        check_fits(Model(), Removal(taken=(part,)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("kept", "0x10"), ("kept", [1]), ("size", 0), ("dim", -1), ("dim", 64), ("argument", 3)],
)
def test_plans_are_looked_at(name, value):
    removal = Removal(taken=(Taken("m", "slopes", 1, 4, (0, 2)),))
    plan = mtprune.Plan((), removal=removal)
    data = json.loads(json.dumps(plan.to_dict()))
    assert mtprune.Plan.from_dict(data) == plan
    data["removal"]["taken"][0][name] = value
    with pytest.raises(ValueError, match=rf"'removal\.taken\.0\.{name}' must be"):
        mtprune.Plan.from_dict(data)


def test_names_change_with_the_module():
    removal = Removal(taken=(Taken("a.b", "slopes", 1, 4, (0,)), Taken("c", "slopes", 1, 4, (0,))))
    plan = mtprune.Plan((), removal=removal)
    assert [part.module for part in plan.part("a").removal.taken] == ["b"]
    assert [part.module for part in plan.part("a.b").removal.taken] == [""]
    assert [part.module for part in plan.part("c").under("d").removal.taken] == ["d"]
    assert "taken" not in mtprune.Plan(()).to_dict()["removal"]
