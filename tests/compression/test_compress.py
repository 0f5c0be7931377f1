"""`compress`: what is chosen, what stays dense and why; nothing is handed out unchecked."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import mtprune
from mtprune.compression.choose import _best
from mtprune.compression.forms import Csr, Form, Rows
from mtprune.compression.plan import Measured
from tests import nets
from tests.compression.fakes import FakeTimes, leaves, prefer, zero_


def mlp():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    zero_(model[0], 0.9)
    zero_(model[2], 0.2, rows=0.5)
    with torch.no_grad():
        model[2].weight[0].zero_()
    return model


def test_literals():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    fast = mtprune.compress(model, torch.ones(1, 2), measure=prefer("csr"))
    assert fast[0].weight_values.tolist() == [2]
    assert fast(torch.tensor([[1.0, 3.0]])).tolist() == [[6, 0]]
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("measured", "chosen"),
    [
        ([("dense", 1.0, 100)], "dense"),
        ([("dense", 1.0, 100), ("csr", 0.5, 30)], "csr"),
        ([("dense", 1.0, 100), ("csr", 0.96, 30)], "dense"),  # not enough to be sure
        ([("dense", 1.0, 100), ("csr", 2.0, 30)], "dense"),
        ([("dense", 1.0, 100), ("thin", 0.50, 60), ("csr", 0.52, 30)], "csr"),  # a tie: bytes
        ([("dense", 1.0, 100), ("thin", 0.50, 60), ("csr", 0.60, 30)], "thin"),
        ([("dense", 0.0, 100), ("csr", 0.0, 30)], "dense"),
    ],
)
def test_the_fastest_form_wins_and_the_smallest_on_a_tie(measured, chosen):
    assert _best([Measured(*m) for m in measured]) == chosen


def test_each_layer_takes_its_own_form():
    times = FakeTimes(dense=1.0, csr=0.5, rows=0.2)
    fast = mtprune.compress(mlp(), torch.randn(3, 6), measure=times)
    assert isinstance(fast[0], (Csr, Rows))
    assert type(fast[2]) is Rows  # CSR is not tried below half zeros
    plan = mtprune.plan_of(fast)
    assert [m.choice for m in plan["2"].measured][:2] == ["dense", "rows"]
    assert (plan.dense_ms, plan.ms) == (2.0, 1.0)
    assert not fast.training


def test_times_add_up_over_calls_and_batches():
    net = nets.build("called_twice")
    zero_(net.model, 0.9)
    batches = [torch.randn(2, 6), torch.randn(5, 6)]
    fast = mtprune.compress(net.model, batches, measure=prefer("csr"))
    row = mtprune.plan_of(fast)["trunk.inner"]
    assert row.dense.ms == pytest.approx(4.0)  # two calls, two shapes, 1 ms each
    assert row.chosen.ms == pytest.approx(0.4)


def test_never_slower_as_a_whole():
    times = FakeTimes(whole=(1.0, 1.5), csr=0.5, dense=1.0)
    fast = mtprune.compress(mlp(), torch.randn(3, 6), measure=times)
    assert not any(isinstance(m, Form) for m in fast.modules())
    assert "All layers stay dense" in str(mtprune.plan_of(fast))


def test_a_plan_is_replayed_without_timing():
    model, x = mlp(), torch.randn(3, 6)
    first = mtprune.compress(model, x, measure=prefer("csr"))
    plan = mtprune.Plan.from_dict(mtprune.plan_of(first).to_dict())
    times = FakeTimes()
    second = mtprune.compress(model, x, plan=plan, measure=times)
    assert times.timed == 0
    assert torch.equal(first(x), second(x))
    assert mtprune.plan_of(second) == plan
    third = mtprune.compress(model, x, plan=plan.replace("0", "dense"))
    assert type(third[0]) is nn.Linear


def test_twice_is_once():
    x = torch.randn(3, 6)
    fast = mtprune.compress(mlp(), x, measure=prefer("csr"))
    again = mtprune.compress(fast, x)
    assert again is not fast
    assert mtprune.plan_of(again) == mtprune.plan_of(fast)
    assert again.state_dict().keys() == fast.state_dict().keys()
    assert torch.equal(again(x), fast(x))
    with pytest.raises(ValueError, match="compressed already, by another plan"):
        mtprune.compress(fast, x, plan=mtprune.plan_of(fast).replace("*", "dense"))


def test_a_model_never_pruned_comes_back_as_it_is():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    fast = mtprune.compress(model, x, measure=prefer("csr"))
    assert "Nothing to compress" in str(mtprune.plan_of(fast))
    assert fast is not model
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("backend", ["prune", "inplace"])
def test_after_finalize(backend):
    run = nets.Run(nets.build("plain"), nets.static(), backend).train(2)
    x = run.net.make_batch(7)["x"]
    run.model.eval()
    masked = leaves(run.model(x))
    if backend == "prune":
        with pytest.raises(ValueError, match=r"'trunk.0' still holds .*pruner.finalize\(\)"):
            mtprune.compress(run.model, x)
    run.pruner.finalize()
    fast = mtprune.compress(run.model, x, measure=prefer("csr"))
    assert any(isinstance(m, Csr) for m in fast.modules())
    for got, expected in zip(leaves(fast(x)), masked, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_layers_that_must_stay_dense_say_why():
    net = nets.build("tied")
    zero_(net.model, 0.9)
    plan = mtprune.plan_of(
        mtprune.compress(net.model, net.make_batch(0)["x"], measure=prefer("csr"))
    )
    assert plan["trunk.first"].choice == plan["trunk.last"].choice == "dense"
    assert "tied" in plan["trunk.first"].note
    assert plan["trunk.between"].choice == "csr"
    net = nets.build("attention_with_other_keys")
    zero_(net.model, 0.9)
    plan = mtprune.plan_of(
        mtprune.compress(net.model, net.make_batch(0)["x"], measure=prefer("csr"))
    )
    assert "NonDynamicallyQuantizableLinear" in plan["trunk.attention.out_proj"].note
    net = nets.build("read_not_called")
    zero_(net.model, 0.9)
    plan = mtprune.plan_of(
        mtprune.compress(net.model, net.make_batch(0)["x"], measure=prefer("csr"))
    )
    assert plan["trunk.lin"].note == "the example inputs do not reach it"


class ReadAndCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x) @ self.lin.weight + self.lin.bias


def test_a_weight_that_is_read_too_is_still_there():
    model = zero_(ReadAndCalled(), 0.8, rows=0.3)
    x = torch.randn(3, 6)
    for choice in ("csr", "rows"):
        fast = mtprune.compress(model, x, measure=prefer(choice))
        assert fast.lin.choice == choice
        torch.testing.assert_close(fast(x), model(x))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = self.one

    def forward(self, x):
        return self.two(self.one(x).tanh())


def test_a_layer_that_hangs_in_two_places_is_replaced_in_both():
    model = zero_(Shared(), 0.8)
    x = torch.randn(3, 6)
    fast = mtprune.compress(model, x, measure=prefer("csr"))
    assert fast.one is fast.two
    assert isinstance(fast.one, Csr)
    torch.testing.assert_close(fast(x), model(x))


def test_layers_with_hooks_stay_dense():
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    fast = mtprune.compress(model, torch.randn(3, 6), measure=prefer("csr"))
    assert mtprune.plan_of(fast)["0"].note == "it has hooks"


@pytest.mark.parametrize("padded", [False, True])
def test_fused_encoders_stand_back(padded):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    model = zero_(nn.TransformerEncoder(layer, 2), 0.8).eval()
    x = torch.randn(2, 5, 8)
    inputs = {"src": x}
    if padded:
        inputs["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    fast = mtprune.compress(model, inputs, measure=prefer("csr"))
    assert sum(isinstance(m, Csr) for m in fast.modules()) == 8  # projections of attention too
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's nested tensors are a prototype
        expected, got = model(**inputs), fast(**inputs)
    torch.testing.assert_close(got[:, :3], expected[:, :3], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_is():
    net = nets.build("conv_bn")
    zero_(net.model, 0.8)
    net.model.train()
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    random = torch.get_rng_state()
    mtprune.compress(net.model, net.make_batch(0)["x"], measure=prefer("csr"))
    assert net.model.training
    assert nets.same(before, net.model.state_dict())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("choice", ["sparse", "csr", "rows", "thin"])
def test_copies_and_states_of_the_compressed_model(choice):
    model, x = zero_(nn.Sequential(nn.Linear(6, 16), nn.Tanh()), 0.6, 0.3, 0.3), torch.randn(3, 6)
    fast = mtprune.compress(model, x, measure=prefer(choice))
    assert fast[0].choice == choice
    other = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other(x), fast(x))
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(x), fast(x))
    assert torch.equal(pickle.loads(pickle.dumps(fast))(x), fast(x))
    assert mtprune.plan_of(other) == mtprune.plan_of(fast)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(fast.state_dict())


def test_a_wrong_form_is_refused_and_named(monkeypatch):
    forward = Csr.forward

    def wrong(self, x):
        return forward(self, x) * (1.001 if self.weight_shape == (16, 6) else 1)

    monkeypatch.setattr(Csr, "forward", wrong)
    model = zero_(mlp(), 0.8)
    with pytest.raises(RuntimeError, match=r"output .* off by .* worst layer is '0' \(csr\)"):
        mtprune.compress(model, torch.randn(3, 6), measure=prefer("csr"))
    assert mtprune.compress(model, torch.randn(3, 6), measure=prefer("csr"), tolerance=0.1)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.lin(x) + self.calls


class Wordy(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return "no tensor"


def test_errors():
    model, x = mlp(), torch.randn(3, 6)
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module"):
        mtprune.compress("model", x)
    with pytest.raises(TypeError, match=r"`plan` must be a mtprune.Plan"):
        mtprune.compress(model, x, plan={})
    with pytest.raises(ValueError, match="empty list"):
        mtprune.compress(model, [])
    with pytest.raises(ValueError, match=r"does not run on `example_inputs\[1\]`"):
        mtprune.compress(model, [x, torch.randn(3, 7)])
    with pytest.raises(ValueError, match=r"is on meta and the model on cpu. Move one"):
        mtprune.compress(model, x.to("meta"))
    with pytest.raises(ValueError, match="has no plan"):
        mtprune.plan_of(model)
    with pytest.raises(RuntimeError, match="does not repeat its own outputs"):
        mtprune.compress(Noisy(), torch.randn(2, 4))
    with pytest.raises(ValueError, match="holds no tensor to compare: str"):
        mtprune.compress(Wordy(), torch.randn(2, 4))
    prune.random_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="'0' still holds 'weight_orig'"):
        mtprune.compress(model, x)


@torch.no_grad()
def test_a_layer_that_is_parametrized_stays_as_it_is():
    model, x = (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 2)),
        torch.randn(3, 6),
    )
    model[1].weight[:, ::2] = 0
    fast = mtprune.compress(model, x, measure=prefer("csr"))
    assert [row.layer for row in mtprune.plan_of(fast).rows] == ["1"]
    assert torch.equal(fast[0](x), model[0](x))


def test_a_plan_for_another_model_is_refused():
    model, x = mlp(), torch.randn(3, 6)
    plan = mtprune.plan_of(mtprune.compress(model, x, measure=prefer("csr")))
    with pytest.raises(ValueError, match=r"it has '0' with shape \(16, 6\), and .* \(8, 6\)"):
        mtprune.compress(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), x, plan=plan)
    with pytest.raises(ValueError, match=r"'2' with shape .* no such layer"):
        mtprune.compress(nn.Sequential(nn.Linear(6, 16)), x, plan=plan)
    larger = nn.Sequential(*mlp(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="it lacks layer '3'"):
        mtprune.compress(larger, x, plan=plan)
    whole = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="does not fit layer '0': it cannot be 'thin'"):
        mtprune.compress(whole, x, plan=plan.replace("0", "thin"))


def test_a_form_that_cannot_run_here_is_dense_and_says_so():
    model, x = mlp(), torch.randn(3, 6)
    plan = mtprune.plan_of(mtprune.compress(model, x, measure=prefer("csr")))
    with pytest.warns(UserWarning, match="Layer '0' stays dense: 2:4 needs a CUDA device"):
        fast = mtprune.compress(model, x, plan=plan.replace("0", "2:4"))
    assert mtprune.plan_of(fast)["0"].choice == "dense"
    assert type(fast[0]) is nn.Linear


@pytest.mark.slow
def test_it_is_imported_when_asked_for():
    code = (
        "import sys, mtprune\n"
        "assert 'mtprune.compression' not in sys.modules\n"
        "assert callable(mtprune.compress)\n"
        "assert all(hasattr(mtprune, name) for name in mtprune.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("progress", [None, True, False])
def test_a_bar_is_shown_where_wanted_or_in_a_terminal(monkeypatch, capsys, watched, progress):
    pytest.importorskip("tqdm")
    module = sys.modules["mtprune.compression.compress"]
    monkeypatch.setattr(module, "is_watched", lambda: watched)
    mtprune.compress(mlp(), torch.randn(3, 6), measure=FakeTimes(), progress=progress)
    shown = capsys.readouterr().err
    for stage in ("running other inputs", "timing layers", "comparing outputs"):
        assert (stage in shown) == (watched if progress is None else progress)


def test_layers_that_are_alike_are_timed_once():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        for i, layer in enumerate(model):
            two = torch.eye(6) + torch.eye(6).roll(i + 1, 0)
            layer.weight.copy_(torch.eye(6) if i == 3 else two)  # one has fewer
    times = FakeTimes(csr=1.0)
    fast = mtprune.compress(model, torch.randn(3, 6), measure=times, groups=())
    assert times.timed == 4  # the first three, the one with fewer, the one without bias; the whole
    assert [row.choice for row in mtprune.plan_of(fast).rows] == ["csr"] * 5
    assert [row.chosen.ms for row in mtprune.plan_of(fast).rows] == [1.0] * 5
