"""Dead units leave: the sizes are as counted by hand, the outputs those of the zeros."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.forms import Csr
from mtprune.compression.removal import apply, find, remove
from mtprune.structure import NOBODY, Group, Member
from tests.compression.fakes import FakeTimes, prefer


def hidden(size, up="0", down="2", between=None, bias=True):
    units = tuple(range(size))
    members = [Member(f"{up}.weight", 0, units), Member(f"{down}.weight", 1, units, "in")]
    if bias:
        members.append(Member(f"{up}.bias", 0, units))
    return Group("hidden", size, tuple(members), between)


def chain(width, *, activation=None, bias=True, out_bias=True):
    model = nn.Sequential(
        nn.Linear(2, width, bias=bias), activation or nn.ReLU(), nn.Linear(width, 2, bias=out_bias)
    )
    return model.eval()


def set_(model, **values):
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name.replace("__", ".")[1:]).copy_(torch.as_tensor(value))
    return model


def test_a_unit_that_nobody_reads_goes():
    model = chain(3)
    set_(model, _0__weight=[[1.0, 2], [3, 4], [5, 6]], _0__bias=[7.0, 8, 9])
    set_(model, _2__weight=[[1.0, 0, 2], [3, 0, 0]], _2__bias=[1.0, 2])
    removal = remove(model, [hidden(3)])
    assert model[0].weight.tolist() == [[1, 2], [5, 6]]
    assert model[0].bias.tolist() == [7, 9]
    assert model[2].weight.tolist() == [[1, 2], [3, 0]]
    assert model[2].bias.tolist() == [1, 2]
    assert (model[0].out_features, model[2].in_features) == (2, 2)
    cut = removal["2.weight"]
    assert (cut.shape, cut.kept, cut.after) == ((2, 3), (None, (0, 2)), (2, 2))
    assert removal["2.bias"] is None


@pytest.mark.parametrize("declared", [True, False])
def test_a_constant_moves_into_the_bias_of_who_reads_it(declared):
    model = chain(2, activation=nn.Sigmoid(), out_bias=False)
    set_(model, _0__weight=[[1.0, 2], [0, 0]], _0__bias=[0.0, 0], _2__weight=[[1.0, 4], [3, 8]])
    if declared:
        removal = remove(model, [hidden(2, between="1")])
    else:
        removal = remove(model, [hidden(2)], [torch.randn(5, 2)])
    assert removal["0.weight"].kept == ((0,), None)
    assert model[2].weight.tolist() == [[1], [3]]
    assert model[2].bias.tolist() == [2, 4]  # sigmoid(0) is a half
    assert model[2].bias.requires_grad


def test_a_constant_that_nobody_knows_stays():
    model = chain(2, activation=nn.Sigmoid())
    set_(model, _0__weight=[[1.0, 2], [0, 0]])
    assert not remove(model, [hidden(2)])


def test_what_only_dead_units_read_is_dead():
    model = nn.Sequential(*chain(3), nn.ReLU(), nn.Linear(2, 1)).eval()
    set_(model, _2__weight=[[1.0, 1, 0], [0, 0, 1]], _4__weight=[[1.0, 0]])
    groups = [hidden(3), hidden(2, "2", "4")]
    remove(model, groups)
    assert model[0].weight.shape == (2, 2)
    assert model[2].weight.shape == (1, 2)
    assert model[4].weight.shape == (1, 1)


def test_all_units_of_linear_layers_may_go():
    model = chain(3)
    set_(model, _2__weight=torch.zeros(2, 3), _2__bias=[1.0, 2])
    remove(model, [hidden(3)])
    assert model[0].weight.shape == (0, 2)
    assert model(torch.randn(4, 2)).tolist() == [[1, 2]] * 4


def test_a_convolution_keeps_one():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 1, 1)).eval()
    set_(model, _2__weight=torch.zeros(1, 3, 1, 1))
    x = torch.randn(1, 1, 2, 2)
    expected = model(x)
    remove(model, [hidden(3)])
    assert model[0].out_channels == model[2].in_channels == 1
    assert torch.equal(model(x), expected)


def test_nothing_dead_is_nothing_done():
    model = chain(3)
    before = copy.deepcopy(model)
    assert not remove(model, [hidden(3)], [torch.randn(2, 2)])
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )


class Attention(nn.Module):
    def __init__(self, dim=4, heads=2):
        super().__init__()
        self.num_heads, self.all_head_size = heads, dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        seen = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(seen.transpose(1, 2).flatten(2))


def heads(dim=4, count=2):
    units = tuple(i * count // dim for i in range(dim))
    rows = [
        Member(f"{part}.{kind}", 0, units, "out" if part == "v" else "with")
        for part in "qkv"
        for kind in ("weight", "bias")
    ]
    return Group("heads", count, (*rows, Member("o.weight", 1, units, "in")))


def test_a_head_that_looks_everywhere_alike_stays():
    model = Attention().eval()
    with torch.no_grad():
        model.q.weight[:2] = 0
        model.q.bias[:2] = 0
    assert not remove(model, [heads()], [torch.randn(2, 3, 4)])


def test_a_head_that_says_always_the_same_is_a_bias():
    model, x = Attention().double().eval(), torch.randn(2, 3, 4, dtype=torch.double)
    with torch.no_grad():
        model.v.weight[:2] = 0
        expected, bias = model(x), model.o.bias + model.o.weight[:, :2] @ model.v.bias[:2]
        removal = remove(model, [heads()], [x])
        assert removal.counts == (("num_heads", 1), ("all_head_size", 2))
        torch.testing.assert_close(model.o.bias, bias)
        torch.testing.assert_close(model(x), expected)
    assert model.q.weight.shape == (2, 4)
    assert model.num_heads == 1


def test_a_head_that_nobody_reads_goes():
    model, x = Attention().eval(), torch.randn(2, 3, 4)
    with torch.no_grad():
        model.o.weight[:, 2:] = 0
        expected = model(x)
        remove(model, [heads()])
        torch.testing.assert_close(model(x), expected)
    assert model.k.out_features == 2


@pytest.mark.parametrize(
    ("reader", "goes"),
    [
        (nn.Conv2d(2, 1, 3), True),
        (nn.Conv2d(2, 1, 1), True),
        (nn.Conv2d(2, 1, 3, padding="valid"), True),
        (nn.Conv2d(2, 1, 1, padding="same"), True),
        (nn.Conv2d(2, 1, 3, padding=1, padding_mode="reflect"), True),
        (nn.Conv2d(2, 1, 3, padding=1), False),
        (nn.Conv2d(2, 1, 3, padding="same"), False),
        (nn.ConvTranspose2d(2, 1, 3), False),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_padding_hides_a_constant_but_not_zero(reader, goes, constant):
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), copy.deepcopy(reader)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 2.0 if constant else -1.0
    units = (0, 1)
    into = Member("2.weight", 0 if isinstance(reader, nn.ConvTranspose2d) else 1, units, "in")
    group = Group("g", 2, (Member("0.weight", 0, units), Member("0.bias", 0, units), into))
    x = torch.randn(1, 1, 5, 5)
    expected = model(x)
    assert bool(remove(model, [group], [x])) == (goes or not constant)
    torch.testing.assert_close(model(x), expected)


def test_whole_groups_of_a_convolution():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 1, 1)
    ).eval()
    with torch.no_grad():
        model[3].weight[:, :3] = 0
    two, three = (0, 0, 1, 1), (0, 0, 0, 1, 1, 1)
    norm = [Member(f"1.{k}", 0, two, "with") for k in model[1].state_dict() if "num" not in k]
    members = (
        Member("0.weight", 0, two),
        Member("0.bias", 0, two),
        *norm,
        Member("2.weight", 0, three, "with"),
        Member("2.bias", 0, three, "with"),
        Member("3.weight", 1, three, "in"),
    )
    x = torch.randn(2, 1, 5, 5)
    expected = model(x)
    remove(model, [Group("g", 2, members)])
    torch.testing.assert_close(model(x), expected)
    conv = model[2]
    assert (conv.groups, conv.in_channels, conv.out_channels) == (1, 2, 3)
    assert model[1].num_features == len(model[1].running_mean) == 2


def test_two_groups_meet_in_one_tensor():
    class Cat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(5, 1)

        def forward(self, x):
            return self.out(torch.cat([self.a(x), self.b(x)], 1))

    model = Cat().eval()
    with torch.no_grad():
        model.out.weight.copy_(torch.tensor([[1.0, 0, 0, 2, 0]]))
    none = NOBODY
    groups = [
        Group(
            name,
            size,
            (
                Member(f"{name}.weight", 0, tuple(range(size))),
                Member(f"{name}.bias", 0, tuple(range(size))),
                Member("out.weight", 1, units, "in"),
            ),
        )
        for name, size, units in (("a", 2, (0, 1, *[none] * 3)), ("b", 3, (none, none, 0, 1, 2)))
    ]
    x = torch.randn(3, 2)
    expected = model(x)
    remove(model, groups)
    assert model.out.weight.tolist() == [[1, 2]]
    torch.testing.assert_close(model(x), expected)


def test_what_a_tensor_is_stays():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    model.to(torch.bfloat16).to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    remove(model, [hidden(4)])
    weight = model[0].weight
    assert (weight.dtype, weight.requires_grad) == (torch.bfloat16, False)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert model[2].weight.requires_grad


def test_tied_weights_are_cut_in_both_places():
    model = nn.ModuleDict({"up": nn.Linear(2, 3, bias=False), "again": nn.Linear(2, 3, bias=False)})
    model["down"] = nn.Linear(3, 2)
    model["again"].weight = model["up"].weight
    with torch.no_grad():
        model["down"].weight[:, 0] = 0
    remove(model.eval(), [hidden(3, "again", "down", bias=False)])
    assert model["again"].weight is model["up"].weight
    assert model["up"].out_features == model["again"].out_features == 2


def test_errors():
    model = chain(3)
    set_(model, _2__weight=[[1.0, 0, 2], [3, 0, 0]])
    with pytest.raises(ValueError, match=r"Group 'hidden' names '7.weight', and the model has no"):
        remove(model, [hidden(3, "7")])
    with pytest.raises(ValueError, match=r"names 4 units along dimension 0 of '0.weight', whose"):
        remove(model, [hidden(4)])
    with pytest.raises(ValueError, match="has 'act' in between, and the model has no such module"):
        remove(model, [hidden(3, between="act")])
    with pytest.raises(ValueError, match=r"left with 2 outputs, and its 'bias' with 3 .* '0.bias'"):
        remove(copy.deepcopy(model), [hidden(3, bias=False)])
    removal = find(model, [hidden(3)])
    with pytest.raises(ValueError, match=r"it has '0.weight' with shape \(3, 2\), and .*\(4, 2\)"):
        apply(chain(4), removal)
    with pytest.raises(ValueError, match="'2' still reads input 1, which is to go"):
        apply(chain(3), removal)
    lstm = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    with torch.no_grad():
        lstm[1].weight_ih_l0[:, 0] = 0
    group = Group(
        "g", 2, (Member("0.weight", 0, (0, 1)), Member("1.weight_ih_l0", 1, (0, 1), "in"))
    )
    with pytest.raises(ValueError, match="belongs to a LSTM, which cannot lose a part"):
        remove(lstm, [group])
    conv = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        conv[2].weight[:, 0] = 0
    units = (0, 1, 2, 3)
    group = Group("g", 4, (Member("1.weight", 0, units), Member("2.weight", 1, units, "in")))
    with pytest.raises(ValueError, match=r"has 2 groups of 2 channels, .* left with \[1, 2\]"):
        remove(conv, [group])


def sparse_chain():
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 6, bias=False))
    with torch.no_grad():
        model[2].weight[:, 1] = 0  # nobody reads it
        model[0].weight[2] = 0  # always tanh(1)
        model[0].bias[2] = 1.0
    return model


def test_compress_removes_first_and_tells():
    model, x = sparse_chain(), torch.randn(3, 2)
    fast = mtprune.compress(model, x, groups=[hidden(4)], measure=FakeTimes())
    plan = mtprune.plan_of(fast)
    assert fast[0].weight.shape == (2, 2)
    assert fast[2].weight.shape == (6, 2)
    torch.testing.assert_close(fast[2].bias, model[2].weight[:, 2] * torch.tensor(1.0).tanh())
    torch.testing.assert_close(fast(x), model(x))
    lines = str(plan).splitlines()
    assert "removed: 0 4x2 -> 2x2" in lines
    assert "removed: 2 6x4 -> 6x2" in lines
    assert lines[-1].startswith("whole model: parameters 36 -> 24, multiply-adds 96 -> 48")
    assert plan.sizes.parameters == sum(p.numel() for p in fast.parameters())
    assert plan["2"].shape == (6, 2)
    assert (plan.dense_ms, plan.ms) == (2.0, 1.0)
    assert model[0].weight.shape == (4, 2)
    assert model[2].bias is None


def test_what_is_left_is_timed_as_ever():
    model, x = sparse_chain(), torch.randn(3, 2)
    with torch.no_grad():
        model[2].weight[:5] = 0
    fast = mtprune.compress(model, x, groups=[hidden(4)], measure=prefer("csr"))
    assert isinstance(fast[2], Csr)
    assert fast[2].weight_shape == (6, 2)
    torch.testing.assert_close(fast(x), model(x))


def test_a_removal_is_replayed_without_timing_or_groups():
    model, x = sparse_chain(), torch.randn(3, 2)
    first = mtprune.compress(model, x, groups=hidden(4), measure=prefer("csr"))
    text = json.dumps(mtprune.plan_of(first).to_dict())
    plan = mtprune.Plan.from_dict(json.loads(text))
    assert plan == mtprune.plan_of(first)
    times = FakeTimes()
    second = mtprune.compress(model, torch.randn(5, 2), plan=plan, measure=times)
    assert times.timed == 0
    assert mtprune.plan_of(second) == plan
    assert torch.equal(first(x), second(x))
    assert mtprune.Plan.from_dict({k: v for k, v in plan.to_dict().items() if k != "removal"})
    with pytest.raises(ValueError, match=r"it has '0.weight' with shape \(4, 2\), and .*\(5, 2\)"):
        mtprune.compress(chain(5), x, plan=plan)
    whole = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 6, bias=False))
    with pytest.raises(ValueError, match="'2' still reads input 1"):
        mtprune.compress(whole, x, plan=plan)


def test_twice_is_once():
    x = torch.randn(3, 2)
    fast = mtprune.compress(sparse_chain(), x, groups=[hidden(4)], measure=FakeTimes())
    again = mtprune.compress(fast, x, groups=[hidden(4)], measure=FakeTimes())
    assert torch.equal(again(x), fast(x))
    assert mtprune.plan_of(again) == mtprune.plan_of(fast)
    assert not remove(sparse_chain(), [])


def test_nothing_dead_is_bitwise():
    model, x = chain(3), torch.randn(4, 2)
    fast = mtprune.compress(model, x, groups=[hidden(3)], measure=FakeTimes())
    assert not mtprune.plan_of(fast).removal
    assert torch.equal(fast(x), model(x))


class Grouped:
    """As a granularity that finds its groups in the model."""

    def groups(self, model, layers):
        assert [layer.name for layer in layers] == ["0.weight", "2.weight"]
        return [hidden(4)]


def test_a_granularity_says_which_groups_there_are():
    for groups in (Grouped(), (Grouped(),), [Grouped(), hidden(4)]):
        fast = mtprune.compress(
            sparse_chain(), torch.randn(3, 2), groups=groups, measure=FakeTimes()
        )
        assert fast[0].out_features == 2


class Gated(nn.Module):
    """Its units depend on one another."""

    def __init__(self):
        super().__init__()
        self.free = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        self.soft = nn.Sequential(nn.Linear(2, 4), nn.Softmax(-1), nn.Linear(4, 2))

    def forward(self, x):
        return self.soft(self.free(x))


def test_a_group_that_says_too_little_is_refused_and_named():
    model, x = Gated(), torch.randn(3, 2)
    with torch.no_grad():
        model.free[2].weight[:, 0] = 0
        model.soft[2].weight[:, 0] = 0
    groups = [
        Group(f"{part} units", 4, hidden(4, f"{part}.0", f"{part}.2").members)
        for part in ("free", "soft")
    ]
    with pytest.raises(RuntimeError, match=r"worst group is 'soft units', which \['soft.2'\] read"):
        mtprune.compress(model, x, groups=groups, measure=FakeTimes())
    assert mtprune.compress(model, x, groups=groups[:1], measure=FakeTimes())
    double = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        double[2].weight[:, 0] = 0
    with pytest.raises(RuntimeError, match=r"does not run: .* worst group is 'hidden'"):
        mtprune.compress(double, x, groups=[hidden(4)], measure=FakeTimes())


def test_groups_are_groups():
    for groups in (["0.weight"], mtprune.Element(), 3):
        with pytest.raises(TypeError, match=r"`groups` must be groups .* Got"):
            mtprune.compress(chain(2), torch.randn(3, 2), groups=groups)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 9, 1, bias=False)

    def forward(self, x):
        return self.down(self.norm(self.up(x)).sigmoid())


@pytest.mark.slow
def test_what_is_saved_comes_back_in_a_new_process(tmp_path):
    model, x, units = Chain(), torch.randn(2, 1, 5, 5), tuple(range(6))
    with torch.no_grad():
        model.down.weight[:, :2] = 0
        model.up.weight[3] = 0
    norm = [
        Member(f"norm.{key}", 0, units, "with")
        for key in ("weight", "bias", "running_mean", "running_var")
    ]
    up = [Member("up.weight", 0, units), Member("up.bias", 0, units)]
    group = Group("up", 6, (*up, *norm, Member("down.weight", 1, units, "in")))
    fast = mtprune.compress(model, x, groups=[group], measure=prefer("csr"))
    assert fast.up.out_channels == fast.norm.num_features == 3
    assert fast.down.bias is not None
    mtprune.save(fast, tmp_path, arguments={})
    loaded = mtprune.load(tmp_path, Chain())
    assert mtprune.plan_of(loaded) == mtprune.plan_of(fast)
    assert loaded.down.in_channels == 3
    torch.save({"x": x, "y": fast(x)}, tmp_path / "pair.pt")
    code = (
        "import sys, torch, mtprune\n"
        "torch.set_num_threads(1)\n"
        "pair = torch.load(sys.argv[1] + '/pair.pt')\n"
        "assert torch.equal(mtprune.load(sys.argv[1])(pair['x']), pair['y'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="another model: it has 'up"):
        mtprune.load(tmp_path, nn.Sequential(nn.Conv2d(1, 6, 3)))


def test_what_is_known_is_found_and_what_is_not_is_not_guessed():
    layer, x = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), torch.randn(2, 3, 8)
    with torch.no_grad():
        layer.linear2.weight[:, :4] = 0
        layer.self_attn.out_proj.weight[:, :4] = 0
    for groups in ("auto", None):
        fast = mtprune.compress(layer, x, groups=groups, measure=FakeTimes())
        assert fast.linear1.out_features == 8
        assert fast.self_attn.out_proj.in_features == 4
        torch.testing.assert_close(fast(x), layer.eval()(x), rtol=1e-5, atol=1e-6)
    assert mtprune.compress(layer, x, groups=(), measure=FakeTimes()).linear1.out_features == 12
    model = sparse_chain()
    assert mtprune.compress(model, torch.randn(3, 2), measure=FakeTimes())[0].out_features == 4


class Like(nn.Module):
    """Has the names of a feed-forward block, and reads its neurons elsewhere too."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2, self.extra = nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.activation = nn.ReLU()

    def forward(self, x):
        hidden = self.activation(self.lin1(x))
        return self.lin2(hidden) + self.extra(hidden)


def test_a_name_is_no_proof():
    model, x = Like(), torch.randn(3, 2)
    with torch.no_grad():
        model.lin2.weight[:, 0] = 0
    fast = mtprune.compress(model, x, measure=FakeTimes())
    assert fast.lin1.out_features == 4
    assert torch.equal(fast(x), model(x))
