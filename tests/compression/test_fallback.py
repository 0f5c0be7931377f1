"""Where there is no native code, what was compressed elsewhere is a dense model, made once."""

import shutil

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.forms import Form, Sparse, building, products
from mtprune.integrations.pretrained import save_pretrained
from tests import encoders
from tests.compression.fakes import prefer, zero_
from tests.compression.test_sparse import Classifier, needs_compiler

pytestmark = needs_compiler

REASON = r"no C compiler was found \(cc, gcc, clang, or the variable CC\)"
NOTE = rf"2 layers are dense here, because this machine lacks their form 'sparse': {REASON}"


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=bias)
        self.head = nn.Linear(128, 10, bias=bias)
        self.again = self.head  # a second place

    def forward(self, x):
        return self.head(self.stem(x).relu().flatten(1))


@pytest.fixture
def bare(monkeypatch):
    """Take the compiler away, and forget what was built."""
    building.unavailable()

    def take_away():
        building.library.cache_clear()
        monkeypatch.setattr(shutil, "which", lambda name: None)

    yield take_away
    building.library.cache_clear()
    products._warn.cache_clear()


@pytest.mark.parametrize("bias", [False, True])
def test_layers_become_dense_when_loaded(bare, tmp_path, bias):
    model, x = zero_(Net(bias), 0.8).eval(), torch.randn(2, 3, 8, 8)
    fast = mtprune.compress(model, x, measure=prefer("sparse"))
    assert [row.choice for row in mtprune.plan_of(fast).rows] == ["sparse", "sparse"]
    mtprune.save(fast, tmp_path / "a")
    bare()
    with pytest.warns(UserWarning, match=NOTE) as warned:
        loaded = mtprune.load(tmp_path / "a", Net(bias))
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert not any(isinstance(module, Form) for module in loaded.modules())
    assert loaded.again is loaded.head
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    plan = mtprune.plan_of(loaded)
    assert [row.choice for row in plan.rows] == ["dense", "dense"]
    assert [row.chosen.bytes for row in plan.rows] == [row.dense.bytes for row in plan.rows]
    assert "2 layers are dense here" in str(plan)
    assert plan.sizes is None
    # What is saved here is dense, and loads without a word.
    mtprune.save(loaded, tmp_path / "b")
    again = mtprune.load(tmp_path / "b", Net(bias))
    assert mtprune.plan_of(again) == plan
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_what_is_broken_is_refused_before_it_is_dense(bare, tmp_path):
    model, x = zero_(Net(), 0.8).eval(), torch.randn(2, 3, 8, 8)
    fast = mtprune.compress(model, x, measure=prefer("sparse"))
    fast.head.weight_column.add_(1000)
    mtprune.save(fast, tmp_path)
    bare()
    target = Net()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match="do not fit each other"):
        mtprune.load(tmp_path, target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("heads", ["all heads", "fewer heads"])
def test_attentions_are_fused_again(bare, tmp_path, heads):
    torch.manual_seed(0)
    model = Classifier().eval()
    groups = ()
    if heads == "fewer heads":
        groups = mtprune.patterns.heads(model)[:1]
        with torch.no_grad():
            out = model.trunk.layers[0].self_attn.out_proj.weight
            out[:, :8] = 0  # nobody reads two heads of the first layer
            model.trunk.layers[0].self_attn.in_proj_weight[32:40] = 0
            model.trunk.layers[0].self_attn.in_proj_bias[32:40] = 0
    zero_(model, 0.8)
    x = torch.randn(2, 7, 16)
    fast = mtprune.compress(model, x, measure=prefer("sparse"), groups=groups)
    assert isinstance(fast.trunk.layers[1].self_attn.in_proj, Sparse)
    mtprune.save(fast, tmp_path)
    bare()
    with pytest.warns(UserWarning, match="layers are dense here"):
        loaded = mtprune.load(tmp_path, Classifier())
    attention = loaded.trunk.layers[0].self_attn
    assert isinstance(attention, nn.MultiheadAttention)
    assert attention.num_heads == (4 if heads == "all heads" else 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
    mtprune.save(loaded, tmp_path / "again")
    mtprune.load(tmp_path / "again", Classifier())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_pretrained_models_too(bare, tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    encoder = encoders.build("Bert")
    zero_(encoder.model, 0.8)
    fast = mtprune.compress(
        encoder.model, encoder.inputs, groups=(), measure=prefer("sparse"), tolerance=1e-4
    )
    save_pretrained(fast, tmp_path / "one")
    bare()
    auto = transformers.AutoModel
    with pytest.warns(UserWarning, match="layers are dense here"):
        loaded = auto.from_pretrained(tmp_path / "one")
    assert not any(isinstance(module, Form) for module in loaded.modules())
    assert torch.equal(encoder.states(loaded), encoder.states(encoder.model))
    loaded.save_pretrained(tmp_path / "two")
    again = auto.from_pretrained(tmp_path / "two")
    assert torch.equal(encoder.states(again), encoder.states(encoder.model))


def test_what_was_never_saved_is_made_dense_once(bare, monkeypatch):
    model, x = zero_(Net(), 0.8).eval(), torch.randn(2, 3, 8, 8)
    fast = mtprune.compress(model, x, measure=prefer("sparse"))
    program = torch.export.export(fast, (x,)).module()
    bare()
    made = []
    unpack = products.unpack
    monkeypatch.setattr(products, "unpack", lambda *args: made.append(args) or unpack(*args))
    with torch.no_grad(), pytest.warns(UserWarning, match="multiplied as dense ones, which are"):
        first = fast(x)
    torch.testing.assert_close(first, model(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(fast(x), first)
    assert len(made) == 2
    with torch.no_grad():
        fast.head.weight_values.mul_(2)  # what changes is made anew
        model.head.weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)
    assert len(made) == 3
    for _ in range(2):
        torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)
    assert len(made) <= 5
