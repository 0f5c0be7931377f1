"""Compressed models go where dense ones go: torch.export, torch.compile, ONNX."""

import copy
import warnings

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.forms import FORMS, Form
from tests import nets
from tests.compression.fakes import leaves, prefer, zero_
from tests.long import few

PORTABLE = ["dense", *(choice for choice, form in FORMS.items() if form.is_portable())]
EXPORTS = ["dense", *(c for c, form in FORMS.items() if "torch.export" in form.exporters)]
STUCK = [choice for choice, form in FORMS.items() if not form.exporters]


def cnn():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return zero_(model, 0.6, 0.5, 0.5)


def compressed(choice, x):
    fast = mtprune.compress(cnn(), x, measure=prefer(choice))
    assert {m.choice for m in fast.modules() if isinstance(m, Form)} == {choice} - {"dense"}
    return fast


@pytest.mark.parametrize("choice", EXPORTS)
def test_export(choice):
    x = torch.randn(2, 3, 6, 6)
    fast = compressed(choice, x)
    program = torch.export.export(fast, (x,), strict=False)
    assert torch.equal(program.module()(x), fast(x))


@pytest.mark.parametrize("choice", EXPORTS)
def test_export_of_any_batch_size(choice):
    x = torch.randn(2, 3, 6, 6)
    fast = compressed(choice, x)
    program = torch.export.export(
        fast, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )
    more = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(program.module()(more), fast(more))


@pytest.mark.slow
@pytest.mark.parametrize("choice", few(PORTABLE, "rows"))
def test_onnx(choice, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 6, 6)
    fast = compressed(choice, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of torch's internals
        torch.onnx.export(fast, (x,), str(tmp_path / "fast.onnx"), dynamo=True, verbose=False)
    where = str(tmp_path / "fast.onnx")
    session = onnxruntime.InferenceSession(where, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), fast(x))


@pytest.mark.slow
@pytest.mark.parametrize("choice", few(["dense", *FORMS]))
def test_compile(choice):
    x = torch.randn(2, 3, 6, 6)
    fast = mtprune.compress(cnn(), x, measure=prefer(choice))
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch breaks the graph at
        got = torch.compile(fast, backend="eager")(x)
    torch.testing.assert_close(got, fast(x))


@pytest.mark.parametrize("choice", [c for c in STUCK if c != "2:4"])
def test_what_cannot_be_exported_says_which_layer_and_what_to_do(choice):
    x = torch.randn(2, 3, 6, 6)
    fast = mtprune.compress(cnn(), x, measure=prefer(choice))
    if not any(isinstance(m, Form) for m in fast.modules()):
        pytest.skip(f"{choice} does not run here")
    with pytest.raises(Exception, match=rf"Layer '0' has the form '{choice}'.*portable=True"):
        torch.export.export(fast, (x,), strict=False)
    plan = mtprune.plan_of(fast).replace("*", "dense")
    program = torch.export.export(
        mtprune.compress(cnn_like(fast), x, plan=plan), (x,), strict=False
    )
    torch.testing.assert_close(program.module()(x), fast(x), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("choice", [c for c in EXPORTS if c not in PORTABLE])
def test_what_onnx_alone_cannot_take_it_names(choice):
    pytest.importorskip("onnxscript")
    x = torch.randn(2, 3, 6, 6)
    fast = compressed(choice, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of torch's internals
        with pytest.raises(Exception, match=f"mtprune.{choice}_conv2d"):
            torch.onnx.export(fast, (x,), dynamo=True, verbose=False)


def cnn_like(fast):
    """The dense model again, from what the compressed one stores."""
    model = cnn()
    with torch.no_grad():
        for at in (0, 3):
            model[at].weight.copy_(fast[at].weight)
            model[at].bias.copy_(fast[at].bias)
    return model


def test_portable_takes_only_what_can_be_exported():
    model, x = cnn(), torch.randn(2, 3, 6, 6)
    fast = mtprune.compress(model, x, measure=prefer("csr"), portable=True)
    tried = {m.choice for row in mtprune.plan_of(fast).rows for m in row.measured}
    assert tried <= set(PORTABLE)
    assert {"rows", "thin"} <= tried
    plan = mtprune.plan_of(mtprune.compress(model, x, measure=prefer("csr")))
    with pytest.warns(UserWarning, match="Layer '0' stays dense: portable=True, and csr cannot"):
        fast = mtprune.compress(model, x, plan=plan.replace("3", "thin"), portable=True)
    assert [row.choice for row in mtprune.plan_of(fast).rows] == ["dense", "thin"]
    torch.export.export(fast, (x,), strict=False)


@pytest.mark.parametrize("name", ["plain", "conv_bn", "attention", "heads_in_a_dict"])
def test_nets_of_several_tasks_are_exported(name):
    net = nets.build(name)
    zero_(net.model, 0.7, rows=0.3, cols=0.3)
    x = net.make_batch(0)["x"]
    fast = mtprune.compress(net.model, x, measure=prefer("thin"), portable=True)
    assert any(isinstance(m, Form) for m in fast.modules())
    got = torch.export.export(copy.deepcopy(fast), (x,), strict=False).module()(x)
    with torch.no_grad():
        for one, other in zip(leaves(got), leaves(fast(x)), strict=True):
            torch.testing.assert_close(one, other)
