"""Nets in which the examples hide what removal would break."""

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.running import call
from mtprune.compression.verify import difference
from mtprune.structure import Group, Member
from tests.compression.fakes import FakeTimes


class Units(nn.Module):
    """Hidden units of which half are made by zero rows, with a bias of one."""

    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 3)
        with torch.no_grad():
            self.up.weight[: width // 2] = 0
            self.up.bias[: width // 2] = 1

    def hidden(self, x):
        return self.up(x).relu()

    def forward(self, x):
        return self.down(self.hidden(x))


class Gated(Units):
    def forward(self, x, t):
        return self.down(self.hidden(x) * t)


class Film(Units):
    def __init__(self):
        super().__init__()
        self.times = nn.Embedding(10, 8)

    def forward(self, x, t):
        return self.down(self.hidden(x) * self.times(t))


class Masked(Units):
    def forward(self, x, mask):
        return self.down(self.hidden(x) * mask.unsqueeze(-1))


class Conditional(Units):
    def forward(self, x, on=None):
        h = self.hidden(x)
        return self.down(h if on is None else torch.where(on.unsqueeze(-1) > 0, h, -h))


class Positional(Units):
    def forward(self, x):
        return self.down(self.hidden(x) * (1 + torch.arange(x.shape[-2])).unsqueeze(-1))


class Scaled(Units):
    def forward(self, x):
        return self.down(self.hidden(x) * x.norm(dim=-1, keepdim=True))


class Ruled(Units):
    """A Python number as an input."""

    def forward(self, x, strength):
        return self.down(self.hidden(x) * strength)


def units(width=8):
    each = tuple(range(width))
    up = (Member("up.weight", 0, each), Member("up.bias", 0, each))
    return Group("hidden", width, (*up, Member("down.weight", 1, each, "in")))


@torch.no_grad()
def off(model, fast, batch):
    return difference(call(model, batch), call(fast, batch))


ONE, MANY = torch.randn(1, 4), torch.randn(6, 4)
SEQUENCE = torch.randn(3, 5, 4)
ROWS = torch.full((6, 1), 0.5)

CASES = {
    "gate, one row": (Gated, (ONE, torch.full((1, 1), 0.5)), (MANY, torch.rand(6, 1))),
    "gate, all alike": (Gated, (MANY, ROWS), (MANY, torch.rand(6, 1))),
    "gate, zero": (Gated, (MANY, 0 * ROWS), (MANY, torch.rand(6, 1))),
    "gate, a scalar": (Gated, (MANY, torch.tensor(2.0)), (MANY, torch.tensor(3.0))),
    "gate, keywords": (Gated, {"x": MANY, "t": ROWS}, {"x": MANY, "t": 2 * ROWS}),
    "film, one row": (Film, (ONE, torch.tensor([7])), (MANY, torch.arange(6))),
    "film, one time": (Film, (MANY, torch.full((6,), 7)), (MANY, torch.arange(6))),
    "film, time zero": (Film, (MANY, torch.zeros(6, dtype=torch.long)), (MANY, torch.arange(6))),
    "film, time one": (Film, (MANY, torch.ones(6, dtype=torch.long)), (MANY, torch.arange(6))),
    "mask, whole": (Masked, (SEQUENCE, torch.ones(3, 5)), (SEQUENCE, torch.eye(5)[:3])),
    "mask, bool": (Masked, (SEQUENCE, torch.ones(3, 5) > 0), (SEQUENCE, torch.eye(5)[:3] > 0)),
    "condition": (Conditional, (MANY, torch.ones(6)), (MANY, torch.arange(6) - 2.0)),
    "condition, one": (Conditional, (ONE, torch.ones(1)), (MANY, torch.arange(6) - 2.0)),
    "position, one": (Positional, SEQUENCE[:, :1], SEQUENCE),
    "position, one of one": (Positional, SEQUENCE[:1, :1], SEQUENCE),
    "row": (Scaled, ONE, MANY),
    "number": (Ruled, (MANY, 0.5), (MANY, 2.0)),
    "whole number": (Ruled, (MANY, 3), (MANY, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_unit_that_depends_on_inputs_stays(case):
    build, example, other = CASES[case]
    model = build().eval()
    fast = mtprune.compress(model, example, groups=units(), measure=FakeTimes())
    assert off(model, fast, other) < 1e-5
    assert fast.up.out_features == 8


@pytest.mark.parametrize("example", [ONE, MANY, SEQUENCE, torch.zeros(1, 4), [ONE, MANY]])
def test_a_constant_still_goes(example):
    model = Units().eval()
    fast = mtprune.compress(model, example, groups=units(), measure=FakeTimes())
    assert fast.up.out_features == 4
    assert off(model, fast, 5 * torch.randn(7, 4)) < 1e-5


@pytest.mark.parametrize("padding", [None, torch.zeros(2, 6, dtype=torch.bool)])
def test_a_head_with_constant_values_still_goes(padding):
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    with torch.no_grad():
        model.self_attn.in_proj_weight[16:20] = 0
        model.self_attn.in_proj_bias.fill_(0.5)
    x = torch.randn(2, 6, 8)
    example = x if padding is None else {"src": x, "src_key_padding_mask": padding}
    fast = mtprune.compress(model, example, measure=FakeTimes())
    assert fast.self_attn.num_heads == 1
    mask = torch.arange(6).expand(2, 6) > torch.tensor([[2], [4]])
    assert off(model, fast, (x, None, mask)) < 1e-5


def test_noise_in_eval_is_no_constant():
    class Noisy(Units):
        def forward(self, x):
            return self.down(self.hidden(x) * torch.rand(1))

    model = Noisy().eval()
    fast = mtprune.compress(model, MANY, groups=units(), measure=FakeTimes())
    assert fast.up.out_features == 8


def test_a_difference_on_other_inputs_is_refused_and_told():
    class Hidden(Units):
        """Reads a unit elsewhere, but not for the example."""

        def forward(self, x, on):
            h = self.hidden(x)
            return self.down(h) + on * h.softmax(-1)[:, :3]

    model = Hidden()
    with torch.no_grad():
        model.down.weight[:, 0] = 0
    with pytest.raises(RuntimeError, match=r"for inputs other than the examples"):
        mtprune.compress(model, (MANY, torch.zeros(6, 1)), groups=units(), measure=FakeTimes())


class Random(nn.Module):
    """A random net of Linear layers, with gates, sums and norms between them."""

    def __init__(self, seed):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.kinds = torch.randint(0, 5, (4,), generator=draw).tolist()
        self.ups = nn.ModuleList(nn.Linear(4, 6) for _ in self.kinds)
        self.downs = nn.ModuleList(nn.Linear(6, 4) for _ in self.kinds)
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in self.kinds)
        with torch.no_grad():
            for up, down in zip(self.ups, self.downs, strict=True):
                up.weight[torch.rand(6, generator=draw) < 0.5] = 0
                down.weight[:, torch.rand(6, generator=draw) < 0.2] = 0

    def forward(self, x, t):
        for kind, up, down, norm in zip(self.kinds, self.ups, self.downs, self.norms, strict=True):
            h = up(x).relu()
            change = (
                lambda h, norm: h,
                lambda h, norm: h * t,
                lambda h, norm: norm(h),
                lambda h, norm: h + t,
                lambda h, norm: h.softmax(-1) * h,
            )[kind]
            x = x + down(change(h, norm))
        return x

    def groups(self):
        each = tuple(range(6))
        for i, kind in enumerate(self.kinds):
            members = [Member(f"ups.{i}.{k}", 0, each) for k in ("weight", "bias")]
            if kind == 2:
                statistics = ("weight", "bias", "running_mean", "running_var")
                members += [Member(f"norms.{i}.{k}", 0, each, "with") for k in statistics]
            if kind != 4:  # a unit of a softmax is no unit
                reader = Member(f"downs.{i}.weight", 1, each, "in")
                yield Group(f"units {i}", 6, (*members, reader))


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("seed", range(12))
def test_random_nets_with_dead_units_give_the_same_on_other_inputs(seed, rows):
    torch.manual_seed(seed)
    model = Random(seed).eval()
    example = (torch.randn(rows, 4), torch.full((rows, 1), 0.5))
    fast = mtprune.compress(model, example, groups=list(model.groups()), measure=FakeTimes())
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, fast))
    assert after < before or 4 in model.kinds
    assert off(model, fast, (3 * torch.randn(50, 4), torch.randn(50, 1))) < 1e-5


def test_pruned_units_that_stay_are_told():
    plan = mtprune.plan_of(
        mtprune.compress(Gated(), (MANY, torch.rand(6, 1)), groups=units(), measure=FakeTimes())
    )
    (told,) = plan.stayed
    assert told.startswith("stayed: 4 pruned of 8 units of 'hidden': what they give depends on")
    assert told in str(plan)
    assert mtprune.compression.plan.Plan.from_dict(plan.to_dict()).stayed == (told,)
    assert mtprune.plan_of(compressed(Units())).stayed == ()


def compressed(model):
    return mtprune.compress(model, MANY, groups=units(), measure=FakeTimes())


class Copied(nn.TransformerEncoderLayer):
    """Shows the neurons to others too."""

    def forward(self, x):
        hidden = self.activation(self.linear1(x))
        return self.linear2(hidden) + hidden.mean(-1, keepdim=True)


@pytest.mark.parametrize("pruned", [True, False])
def test_pruned_units_that_fail_the_trial_are_told(pruned):
    model = Copied(8, 2, 12, batch_first=True).eval()
    with torch.no_grad():
        model.linear2.weight[:, :4] *= 0 if pruned else 1
    plan = mtprune.plan_of(mtprune.compress(model, torch.randn(2, 6, 8), measure=FakeTimes()))
    told = (
        "stayed: 4 pruned of 12 units of 'neurons': without some of its units, on trial, the model"
    )
    assert (told in str(plan)) == pruned
