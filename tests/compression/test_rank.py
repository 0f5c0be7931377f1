"""The rank form: two layers where a matrix is of low rank, checked, stored and counted."""

import copy
import warnings

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.forms import Rank
from mtprune.model import factors
from tests.compression.fakes import prefer


def lower_(layer, rank):
    """Make a layer of that rank, in place."""
    with torch.no_grad():
        left, right = factors.factors(layer.weight.double(), rank)
        layer.weight.copy_((left @ right).view_as(layer.weight))
    return layer


def mlp(*ranks_, bias=True):
    model = nn.Sequential(nn.Linear(12, 16, bias), nn.GELU(), nn.Linear(16, 10, bias))
    for layer, rank in zip((model[0], model[2]), ranks_, strict=False):
        lower_(layer, rank)
    return model.eval()


def numbers(model):
    return sum(p.numel() for p in model.parameters())


def test_literals():
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight.copy_(
            torch.tensor([2.0, 0.0, 0.0, 0.0])[:, None] * torch.tensor([0.0, 2.0, 0])
        )
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    rank = Rank(layer, Rank.parts(layer))
    assert rank.down.weight.abs().tolist() == [[0, 2, 0]]
    assert rank.up.weight.abs().tolist() == [[2], [0], [0], [0]]
    assert rank(torch.tensor([[5.0, 1.0, 7.0]])).tolist() == [[5, 2, 3, 4]]
    assert torch.equal(rank.weight, layer.weight)
    assert torch.equal(rank.bias, layer.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_the_form_is_the_layer(rank, bias):
    layer = lower_(nn.Linear(12, 16, bias), rank)
    form = Rank(layer, Rank.parts(layer))
    x = torch.randn(2, 5, 12)
    assert torch.allclose(form(x), layer(x), atol=1e-5)
    assert torch.allclose(form.weight, layer.weight, atol=1e-6)
    assert (form.down.out_features, form.up.in_features) == (rank, rank)
    assert numbers(form) == rank * 28 + (16 if bias else 0)
    assert not any(p.requires_grad for p in form.parameters())


def test_it_is_offered_below_break_even_only():
    assert Rank.parts(lower_(nn.Linear(12, 16), 6)) is not None  # 168 of 192 parameters
    assert Rank.parts(lower_(nn.Linear(12, 16), 7)) is None  # 196
    assert Rank.parts(nn.Linear(12, 16)) is None
    assert Rank.parts(lower_(nn.Conv2d(3, 8, 3), 6)) is not None  # 210 of 216
    assert Rank.parts(lower_(nn.Conv2d(3, 8, 3), 7)) is None  # 245
    assert Rank.parts(nn.Conv2d(3, 8, 3)) is None
    assert Rank.parts(lower_(nn.Conv2d(4, 8, 3, groups=2), 1)) is None
    assert Rank.parts(lower_(nn.Conv2d(4, 4, 3, groups=4), 1)) is None
    assert Rank.parts(lower_(nn.Linear(1, 4), 0)) is not None
    with torch.no_grad():
        layer = nn.Linear(2, 2)
        layer.weight.fill_(float("nan"))
    assert Rank.parts(layer) is None


CONVS = {
    "3x3": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 5)),
    "1x1, stride 2": (lambda: nn.Conv2d(12, 16, 1, 2), (2, 12, 7, 5)),
    "without bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), (2, 6, 7, 5)),
    "one image": (lambda: nn.Conv2d(6, 8, 3), (6, 7, 5)),
    "no image": (lambda: nn.Conv2d(6, 8, 3), (0, 6, 7, 5)),
    "3x5, all options": (lambda: nn.Conv2d(6, 8, (3, 5), (1, 2), (2, 1), (2, 1)), (2, 6, 9, 9)),
    "same": (lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2), (2, 6, 9, 9)),
    "reflect": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
    "circular": (lambda: nn.Conv2d(6, 8, 3, 2, 1, padding_mode="circular"), (2, 6, 9, 9)),
    "more outputs than inputs": (lambda: nn.Conv2d(1, 20, 3), (2, 1, 9, 9)),
    "float64": (lambda: nn.Conv2d(6, 8, 3).double(), (2, 6, 7, 5)),
    "channels last": (
        lambda: nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last),
        (2, 6, 7, 5),
    ),
}


@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("name", CONVS)
def test_the_form_is_the_convolution(name, rank):
    make, shape = CONVS[name]
    layer = lower_(make(), rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of tensors without elements
        form = Rank(layer, Rank.parts(layer))
    x = torch.randn(shape, dtype=layer.weight.dtype)
    expected = layer(x)
    assert form(x).shape == expected.shape
    torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(form.weight, layer.weight, rtol=1e-5, atol=1e-6)
    assert (form.bias is None) == (layer.bias is None)
    assert (form.down.kernel_size, form.up.kernel_size) == (layer.kernel_size, (1, 1))
    high, wide = layer.weight.flatten(1).shape
    assert numbers(form) == rank * (high + wide) + (0 if layer.bias is None else high)
    assert not any(p.requires_grad for p in form.parameters())
    rebuilt = Rank(make(), dict(form.state_dict()))
    assert torch.equal(rebuilt(x), form(x))
    assert torch.equal(copy.deepcopy(form)(x), form(x))
    if "last" in name and rank:
        assert form.down.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_convolution_by_hand():
    layer = nn.Conv2d(1, 2, (1, 2))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[[3.0, 0.0]]], [[[4.0, 0.0]]]]))
        layer.bias.copy_(torch.tensor([1.0, 2.0]))
    assert Rank.parts(layer) is None  # 4 parameters, and 4 of rank one
    layer = nn.Conv2d(1, 4, (1, 2))
    with torch.no_grad():
        layer.weight.zero_()[:2] = torch.tensor([3.0, 4.0])[:, None, None, None]
        layer.weight[..., 1] = 0.0
        layer.bias.fill_(1.0)
    form = Rank(layer, Rank.parts(layer))
    assert torch.allclose(form.down.weight.abs(), torch.tensor([[[[5.0**0.5, 0.0]]]]))
    y = form(torch.tensor([[[1.0, 2.0, 7.0]]]))
    assert torch.allclose(y[:, 0], torch.tensor([[4.0, 7], [5, 9], [1, 1], [1, 1]]))


def convs(*ranks_, bias=True):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3, padding="same", bias=bias),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 4, bias=bias),
    )
    for layer, rank in zip((model[0], model[2], model[5]), ranks_, strict=False):
        lower_(layer, rank)
    return model.eval()


def test_convolutions_are_timed_chosen_and_counted():
    model, x = convs(2, 3), torch.randn(2, 3, 9, 7)
    fast = mtprune.compress(model, x, measure=prefer("rank"))
    assert (type(fast[0]), type(fast[2]), type(fast[5])) == (Rank, Rank, nn.Linear)
    plan = mtprune.plan_of(fast)
    assert [m.choice for m in plan["0"].measured] == ["dense", "rank"]
    assert plan["0"].chosen.bytes == 4 * (2 * (8 + 27) + 8)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    sizes = mtprune.measure(fast, x)
    positions = 2 * 5 * 4
    assert sizes.macs == positions * (2 * (8 + 27) + 3 * (10 + 72)) + 2 * 40
    assert sizes.parameters == 2 * (8 + 27) + 8 + 3 * (10 + 72) + 10 + 44


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_round_trip_bitwise(rank, bias, layout, tmp_path):
    pytest.importorskip("safetensors")
    x = torch.randn(2, 3, 9, 7)
    model = convs(rank, rank, bias=bias).to(memory_format=layout)
    fast = mtprune.compress(model, x, measure=prefer("rank"))
    assert type(fast[0]) is type(fast[2]) is Rank
    mtprune.save(fast, tmp_path)
    loaded = mtprune.load(tmp_path, convs(bias=bias))
    assert mtprune.plan_of(loaded) == mtprune.plan_of(fast)
    assert torch.equal(loaded(x), fast(x))
    again = mtprune.compress(fast, x)
    assert torch.equal(again(x), fast(x))


def turned(part):
    return part.transpose(0, 1).contiguous()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("down.weight", lambda w: w[..., :2].contiguous(), r"factors have shapes .*\(2, 3, 3, 2\)"),
        ("down.weight", lambda w: w[:1].contiguous(), "factors have shapes"),
        ("down.weight", lambda w: w[:, :2].contiguous(), "factors have shapes"),
        ("down.weight", turned, "factors have shapes"),
        ("down.weight", lambda w: w.flatten(1), r"its down\.weight has shape \(2, 27\)"),
        ("down.weight", lambda w: w.double(), "its numbers are of the types"),
        ("up.weight", turned, "factors have shapes"),
        ("up.weight", lambda w: w.repeat(1, 1, 3, 3), "factors have shapes"),
        ("up.weight", lambda w: w.flatten(), r"its up\.weight has shape \(16,\)"),
        ("up.bias", lambda b: b[:3].contiguous(), "its bias has shape"),
    ],
)
def test_factors_that_fit_no_convolution_are_refused(name, change, message):
    layer = lower_(nn.Conv2d(3, 8, 3), 2)
    parts = dict(Rank(layer, Rank.parts(layer)).state_dict())
    with pytest.raises(ValueError, match=message):
        Rank(layer, {**parts, name: change(parts[name])})
    del parts["up.bias"]
    with pytest.raises(ValueError, match="it lacks the layer's bias"):
        Rank(layer, parts)


@pytest.mark.parametrize("shape", [(24, 24), (40, 12), (12, 40)])
def test_a_corner_of_full_rank_tells_at_once(shape, monkeypatch):
    monkeypatch.setattr(factors, "numerical_rank", lambda weight: pytest.fail("not needed"))
    assert Rank.parts(nn.Linear(*shape)) is None


def test_a_corner_of_low_rank_does_not_mislead():
    layer = nn.Linear(24, 24)
    with torch.no_grad():
        layer.weight[:20, :20] = 0.0  # rank 8 in the frame
    assert factors.numerical_rank(layer.weight) == 8
    assert Rank.parts(layer)["down.weight"].shape == (8, 24)
    with torch.no_grad():
        layer.weight[:20, :20] = torch.eye(20)
        layer.weight[:13, :13] = 0.0
    assert Rank.parts(layer) is None


def test_it_is_timed_chosen_and_checked():
    model = mlp(3, 99)
    x = torch.randn(7, 12)
    fast = mtprune.compress(model, x, measure=prefer("rank"))
    assert type(fast[0]) is Rank
    assert type(fast[2]) is nn.Linear
    plan = mtprune.plan_of(fast)
    assert [m.choice for m in plan["0"].measured] == ["dense", "rank"]
    assert plan["0"].chosen.bytes == 4 * (3 * 28 + 16)
    assert plan["2"].note == "no zeros"
    assert plan.note == ""
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    slow = mtprune.compress(model, x, measure=prefer("dense"))
    assert type(slow[0]) is nn.Linear


def test_outputs_that_differ_are_refused(monkeypatch):
    """Were a rank too low, nothing would be handed out."""
    true = factors.factors
    monkeypatch.setattr(factors, "factors", lambda weight, rank: true(weight, rank - 1))
    with pytest.raises(RuntimeError, match=r"The worst layer is '0' \(rank\)"):
        mtprune.compress(mlp(3), torch.randn(7, 12), measure=prefer("rank"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_are_kept(dtype):
    model, x = mlp().to(dtype), torch.randn(7, 12, dtype=dtype)
    lower_(model[0], 2), lower_(model[2], 2)
    fast = mtprune.compress(model, x, measure=prefer("rank"))
    assert type(fast[0]) is type(fast[2]) is Rank
    assert {p.dtype for p in fast.parameters()} == {dtype}
    assert torch.allclose(fast(x), model(x), atol=1e-9 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_round_trip_is_bitwise(rank, bias, tmp_path):
    pytest.importorskip("safetensors")
    x = torch.randn(7, 12)
    fast = mtprune.compress(mlp(rank, rank, bias=bias), x, measure=prefer("rank"))
    mtprune.save(fast, tmp_path)
    loaded = mtprune.load(tmp_path, mlp(bias=bias))
    assert mtprune.plan_of(loaded) == mtprune.plan_of(fast)
    assert torch.equal(loaded(x), fast(x))
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
    again = mtprune.compress(fast, x)
    assert torch.equal(again(x), fast(x))


def test_a_checkpoint_does_not_load_into_a_dense_model():
    fast = mtprune.compress(mlp(3), torch.randn(7, 12), measure=prefer("rank"))
    with pytest.raises(RuntimeError, match=r"0\.down\.weight"):
        mlp().load_state_dict(fast.state_dict())


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("bias", [True, False])
def test_the_export_has_as_many_parameters_as_the_report_says(sparsity, bias):
    model = nn.ModuleDict({"trunk": mlp(bias=bias), "a": nn.Linear(10, 6), "b": nn.Linear(10, 7)})
    method = mtprune.LowRank(sparsity, min_rank=0, floor=0.0)
    pruner = mtprune.MultitaskPruner(model, ["a", "b"], "trunk", method=method)
    hidden = model["trunk"](torch.randn(32, 12))
    pruner.observe_losses({t: model[t](hidden).square().mean() for t in ("a", "b")})
    pruner.step()
    pruner.finalize()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    parts = {name: Rank.parts(layer) for name, layer in layers.items()}
    exported = sum(
        sum(p.numel() for p in found.values()) if found else numbers(layers[name])
        for name, found in parts.items()
    )
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    report = pruner.report()
    assert exported - biases == report.kept
    assert report.kept <= report.parameters - round(sparsity * report.parameters)
