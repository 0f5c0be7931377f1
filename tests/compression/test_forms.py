"""Forms: literal weights first, then random ones against the dense layer."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.forms import (
    ALL,
    CHOICES,
    EXPORTERS,
    FORMS,
    Csr,
    Form,
    Rows,
    SemiStructured,
    Thin,
)
from tests.compression.fakes import prefer, zero_


def linear(weight, bias=None):
    weight = torch.tensor(weight)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


WEIGHT = [[1.0, 0.0, 2.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]


def test_thin_keeps_live_rows_and_columns():
    layer = linear(WEIGHT, [1.0, 2.0, 3.0])
    thin = Thin(layer, Thin.parts(layer))
    assert thin.inner.weight.tolist() == [[1, 2], [3, 0]]
    assert thin.inner.bias.tolist() == [1, 3]
    assert thin(torch.tensor([[1.0, 5.0, 1.0]])).tolist() == [[4, 2, 6]]


def test_rows_keeps_all_columns():
    layer = linear(WEIGHT)
    rows = Rows(layer, Rows.parts(layer))
    assert rows.inner.weight.tolist() == [[1, 0, 2], [3, 0, 0]]
    assert rows(torch.tensor([1.0, 5.0, 1.0])).tolist() == [3, 0, 3]


def test_csr_stores_values_and_places():
    layer = linear(WEIGHT, [1.0, 2.0, 3.0])
    csr = Csr(layer, Csr.parts(layer))
    assert csr.weight_crow.tolist() == [0, 2, 2, 3]
    assert csr.weight_col.tolist() == [0, 2, 0]
    assert csr.weight_values.tolist() == [1, 2, 3]
    assert csr(torch.tensor([[1.0, 5.0, 1.0]])).tolist() == [[4, 2, 6]]


def test_two_to_four_stores_pairs_and_places():
    weight = torch.zeros(32, 64)
    weight[0, :4] = torch.tensor([0.0, 5.0, 0.0, 7.0])
    layer = nn.Linear(64, 32)
    layer.weight.data = weight
    form = SemiStructured(layer, SemiStructured.parts(layer))
    assert form.weight_pairs.shape == form.weight_places.shape == (32, 32)
    assert form.weight_pairs[0, :2].tolist() == [5, 7]
    assert form.weight_places[0, :2].tolist() == [1, 3]
    assert torch.equal(form.weight, weight)
    assert "CUDA" in SemiStructured.why_not(layer.weight)


def test_two_to_four_is_not_offered_where_the_pattern_does_not_hold():
    layer = nn.Linear(64, 32)
    assert SemiStructured.parts(layer) is None
    assert SemiStructured.parts(nn.Linear(4, 4)) is None
    assert SemiStructured.parts(nn.Conv2d(64, 32, 1)) is None


LAYERS = {
    "linear": (lambda: nn.Linear(24, 20), (5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 20, bias=False), (5, 24)),
    "linear on a vector": (lambda: nn.Linear(24, 20), (24,)),
    "linear on tokens": (lambda: nn.Linear(24, 20), (2, 70, 24)),
    "linear on nothing": (lambda: nn.Linear(24, 20), (0, 24)),
    "float64": (lambda: nn.Linear(24, 20).double(), (5, 24)),
    "1x1": (lambda: nn.Conv2d(12, 16, 1), (3, 12, 7, 5)),
    "1x1, stride 2": (lambda: nn.Conv2d(12, 16, 1, 2), (3, 12, 7, 5)),
    "3x3": (lambda: nn.Conv2d(12, 16, 3, padding=1), (3, 12, 7, 5)),
    "3x3, one image": (lambda: nn.Conv2d(12, 16, 3), (12, 7, 5)),
    "3x5, all options": (lambda: nn.Conv2d(12, 16, (3, 5), (1, 2), (2, 1), (2, 1)), (2, 12, 9, 9)),
    "same": (lambda: nn.Conv2d(12, 16, 3, padding="same"), (2, 12, 9, 9)),
    "reflect": (lambda: nn.Conv2d(12, 16, 3, padding=1, padding_mode="reflect"), (2, 12, 9, 9)),
    "grouped": (lambda: nn.Conv2d(12, 16, 3, groups=4), (2, 12, 9, 9)),
}


@pytest.mark.parametrize("sparsity", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("choice", ["rows", "thin", "sparse", "csr"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_form_gives_what_the_dense_layer_gives(name, choice, sparsity):
    make, shape = LAYERS[name]
    layer = zero_(make(), sparsity, rows=0.4, cols=0.4).eval()
    parts = FORMS[choice].parts(layer)
    if parts is None:
        assert name in {"grouped"} or (choice == "csr" and name in {"same", "reflect"})
        return
    form = FORMS[choice](layer, parts)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    expected = layer(x)
    got = form(x)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(form.weight, layer.weight)
    assert (form.bias is None) == (layer.bias is None)
    assert layer.bias is None or torch.equal(form.bias, layer.bias)
    assert not any(p.requires_grad for p in form.parameters())
    for twin in (copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
        assert torch.equal(twin(x), got)
    rebuilt = FORMS[choice](make(), dict(form.state_dict()))
    assert torch.equal(rebuilt(x), got)


def test_parts_are_no_part_of_the_dense_layer():
    layer = zero_(nn.Linear(24, 20), 0.5, rows=0.4)
    for form in (Rows, Thin, Csr):
        built = form(layer, form.parts(layer) or Rows.parts(layer))
        held = {t.data_ptr() for t in built.state_dict().values()}
        assert layer.bias.data_ptr() not in held
        assert layer.weight.data_ptr() not in held


def test_nan_weights_are_not_zero():
    layer = linear([[float("nan"), 0.0], [0.0, 0.0]])
    assert Rows(layer, Rows.parts(layer)).rows.tolist() == [0]


def test_csr_needs_a_cpu_and_floats():
    assert "float32 or float64" in Csr.why_not(torch.zeros(1, dtype=torch.bfloat16))
    assert "CPU" in Csr.why_not(torch.zeros(1, device="meta"))
    assert Csr.why_not(torch.zeros(1)) == ""


class Signed(Form):
    """The size and the sign of each weight: a form as somebody may add it."""

    choice = "signed"
    min_zeros = 0.3

    @classmethod
    def parts(cls, layer):
        if isinstance(layer, nn.Conv2d):
            return None
        weight = layer.weight.detach()
        return {"sizes": weight.abs(), "bias": layer.bias.detach().clone(), "minus": weight < 0}

    @staticmethod
    def why_not(weight):
        return "" if weight.dtype == torch.float32 else "it needs float32"

    @property
    def weight(self):
        return torch.where(self.minus, -self.sizes, self.sizes)

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def test_a_new_form_is_one_class(monkeypatch, tmp_path):
    monkeypatch.setitem(FORMS, "signed", Signed)
    for module in ("plan", "row"):
        monkeypatch.setattr(f"mtprune.compression.{module}.CHOICES", (*CHOICES, "signed"))
    model = zero_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 0.5)
    model[2].weight.data.fill_(1.0)  # of rank one, and without zeros
    x = torch.randn(4, 6)
    fast = mtprune.compress(model, x, measure=prefer("signed"))
    assert (type(fast[0]), mtprune.plan_of(fast)["0"].choice) == (Signed, "signed")
    assert "signed" not in {m.choice for m in mtprune.plan_of(fast)["2"].measured}
    torch.testing.assert_close(fast(x), model(x))
    mtprune.save(fast, tmp_path)
    again = mtprune.load(tmp_path, copy.deepcopy(model))
    assert type(again[0]) is Signed
    assert torch.equal(again(x), fast(x))
    plan = mtprune.Plan.from_dict(mtprune.plan_of(fast).to_dict())
    with pytest.warns(UserWarning, match="Layer '0' stays dense: it needs float32"):
        mtprune.compress(model.double(), x.double(), plan=plan)
    portable = mtprune.compress(model.float(), x, measure=prefer("signed"), portable=True)
    assert type(portable[0]) is not Signed


def test_names_are_those_of_the_list():
    assert list(FORMS.values()) == list(ALL)
    assert CHOICES == ("dense", "rows", "thin", "sparse", "csr", "2:4", "rank")
    assert all(set(form.exporters) <= set(EXPORTERS) for form in ALL)


def test_what_prints():
    layer = linear(WEIGHT)
    assert repr(Csr(layer, Csr.parts(layer))) == "Csr(3x3, csr)"


CLASSES = [FORMS["csr"], FORMS["sparse"]]


def beside(form, conv):
    """A layer in a form that has a product of its own, and the layer."""
    layer = nn.Conv2d(4, 5, 3, padding=1) if conv else nn.Linear(6, 5)
    zero_(layer, 0.7).requires_grad_(False)
    x = torch.randn(2, 4, 5, 5) if conv else torch.randn(3, 6)
    return form(layer, form.parts(layer)), layer, x


# Torch compiles what it has on forward derivatives with something of its own that is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("form", CLASSES)
@pytest.mark.parametrize("conv", [False, True])
def test_products_of_their_own_see_what_is_not_in_memory(form, conv):
    """Torch may keep a sign, a derivative or a batch beside the numbers."""
    kernel, layer, x = beside(form, conv)
    negative = torch._neg_view(x)
    torch.testing.assert_close(kernel(negative), layer(negative))
    torch.testing.assert_close(torch.vmap(kernel)(x[None]), torch.vmap(layer)(x[None]))
    along = torch.randn_like(x)
    for got, expected in zip(
        torch.func.jvp(kernel, (x,), (along,)), torch.func.jvp(layer, (x,), (along,)), strict=True
    ):
        torch.testing.assert_close(got, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, along)
        tangents = [torch.autograd.forward_ad.unpack_dual(f(dual)).tangent for f in (kernel, layer)]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("form", CLASSES)
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_products_of_their_own_take_every_type(form, conv, dtype):
    kernel, layer, x = beside(form, conv)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(kernel(x).float(), layer(x).float(), rtol=0.05, atol=0.05)
        assert kernel(x.bfloat16()).dtype == torch.bfloat16
    got, expected = kernel.to(dtype)(x.to(dtype)), layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        kernel(x.int())
    assert kernel.to("meta")(x.to("meta", dtype)).shape == expected.shape
