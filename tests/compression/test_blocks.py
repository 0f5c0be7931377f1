"""Encoder layers that run as one block of native code, against themselves part by part."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import mtprune
from mtprune import patterns
from mtprune.compression import anatomy, together
from mtprune.compression.anatomy import Torch
from mtprune.compression.attention import NarrowAttention
from mtprune.compression.forms import building, packed
from mtprune.compression.forms.block import Block
from mtprune.compression.plan import Joined
from mtprune.compression.together import Together, can_join, join, separate, unpack
from mtprune.compression.verify import difference
from tests.compression.fakes import zero_

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(bool(building.unavailable()), reason=building.unavailable())


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def layer_of(width=16, heads=2, hidden=24, zeros=0.8, **options):
    torch.manual_seed(0)
    options = {"batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.3, **options).eval()
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter) / 4)
    zero_(layer, zeros)
    for name in ("in_proj_weight",):
        weight = getattr(layer.self_attn, name)
        weight.mul_(torch.rand_like(weight) >= zeros)
    return layer


@torch.no_grad()
def check(layer, x, **arguments):
    """The block gives what the layer gives in double, and it was the block that ran."""
    double = {
        name: value.double() if value.is_floating_point() else value
        for name, value in arguments.items()
    }
    with torch.enable_grad():  # torch's fused layer reads masks of numbers in a way of its own
        expected = copy.deepcopy(layer).double()(x.double(), **double).float()
    join(layer)
    got = layer(x, **arguments)
    assert layer._packed.block is not None
    assert difference(expected, got) <= 2e-6
    return got


@pytest.mark.parametrize("zeros", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True, "activation": "gelu"},
        {"batch_first": False, "activation": nn.GELU("tanh"), "bias": False},
    ],
    ids=str,
)
def test_it_is_the_layer(zeros, options):
    # Few tokens and many, in one panel and in several, and sentences that end within one.
    for sentences, length in ((1, 1), (3, 7), (2, 32), (9, 20), (2, 130)):
        layer = layer_of(20, 4, 150, zeros, **options)
        shape = (length, sentences) if options.get("batch_first") is False else (sentences, length)
        check(layer, torch.randn(*shape, 20))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e4])
def test_gelu_near_zero_and_far_from_it(scale):
    layer = layer_of(activation="gelu", zeros=0.5)
    with torch.no_grad():
        layer.linear1.weight.mul_(scale)
        layer.linear1.bias.mul_(scale)
        layer.linear2.weight.div_(scale)
    check(layer, torch.randn(2, 40, 16))


@pytest.mark.parametrize(("width", "heads", "hidden"), [(6, 6, 1), (150, 3, 70), (14, 2, 200)])
def test_odd_sizes(width, heads, hidden):
    for zeros in (0.2, 0.9):
        check(layer_of(width, heads, hidden, zeros), torch.randn(3, 11, width))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_padding(kind):
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    if kind == "float":
        padding = torch.randn(2, 7).masked_fill(padding, float("-inf"))
    x = torch.randn(2, 7, 16)
    y = check(layer_of(), x, src_key_padding_mask=padding)
    x[1, 4:] = 100.0
    layer = layer_of()
    join(layer)
    with torch.no_grad():
        again = layer(x, src_key_padding_mask=padding)
    assert torch.equal(again[0], y[0])
    assert torch.equal(again[1, :4], y[1, :4])


def test_a_sentence_of_padding_alone():
    """Whatever torch makes of it, the others are what they were."""
    padding = torch.tensor([[True] * 5, [False] * 5])
    x, layer = torch.randn(2, 5, 16), layer_of()
    with torch.no_grad():
        alone = layer(x[1:], src_key_padding_mask=padding[1:])
        join(layer)
        got = layer(x, src_key_padding_mask=padding)
    assert difference(alone, got[1:]) <= 2e-6


@torch.no_grad()
def test_a_sentence_of_padding_alone_in_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=48,
        attn_implementation="sdpa",
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids, seen = torch.randint(50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    seen[1, 4:] = 0
    seen[2] = 0
    expected = model(input_ids=ids, attention_mask=seen).last_hidden_state
    join(model.encoder.layer[0])
    got = model(input_ids=ids, attention_mask=seen).last_hidden_state
    assert model.encoder.layer[0]._packed.block is not None
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_threads_change_nothing():
    layer = layer_of(40, 4, 300)
    join(layer)
    for sentences in (1, 2, 7):
        x = torch.randn(sentences, 33, 40)
        outputs = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            outputs.append(layer(x))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_numbers_that_are_none():
    """NaN stays in its sentence, and in it spreads as torch spreads it."""
    layer, x = layer_of(), torch.randn(2, 5, 16)
    x[0, 2, 3] = float("nan")
    expected = layer(x)
    join(layer)
    got = layer(x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[0].isnan().all()
    assert not got[1].isnan().any()


@torch.no_grad()
def test_a_weight_that_changes_is_packed_anew():
    layer, x = layer_of(), torch.randn(2, 5, 16)
    join(layer)
    layer(x)
    other = layer_of(zeros=0.5)
    for change in (
        lambda: layer.linear1.weight.mul_(2),
        lambda: layer.norm1.bias.add_(1),
        lambda: setattr(layer.linear2, "bias", nn.Parameter(torch.randn(16))),
        lambda: setattr(layer.linear1.weight, "data", -layer.linear1.weight),
        lambda: layer.load_state_dict(other.state_dict()),
        lambda: setattr(layer, "linear1", nn.Linear(16, 24)),
        lambda: setattr(layer, "activation", torch.nn.functional.gelu),
        lambda: setattr(layer, "norm_first", True),
    ):
        change()
        got = layer(x)
        plain = copy.deepcopy(layer)
        separate(plain)
        with torch.enable_grad():  # torch's fused layer would not see all of it
            assert difference(plain(x).detach(), got) <= 2e-6


@torch.no_grad()
def test_parts_one_by_one_where_the_block_cannot_run():
    layer, x = layer_of(), torch.randn(2, 5, 16)
    plain = copy.deepcopy(layer)
    join(layer)
    mask = torch.zeros(5, 5)
    assert torch.equal(layer(x, mask), plain(x, mask))
    assert torch.equal(layer(x[0]), plain(x[0]))
    assert torch.equal(copy.deepcopy(layer).double()(x.double()), plain.double()(x.double()))
    plain = plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    heard = []
    handle = layer.linear1.register_forward_hook(lambda *_: heard.append(1))
    layer(x)
    handle.remove()
    assert heard == [1]
    layer(x)
    assert heard == [1]
    layer.train()
    assert not torch.equal(layer(x), layer(x))  # dropout


def test_gradients_pass():
    layer, x = layer_of(), torch.randn(2, 5, 16, requires_grad=True)
    join(layer)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.linear1.weight.grad is not None
    layer(x.detach()).sum().backward()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert not layer(x.detach()).requires_grad
    assert layer._packed.block is not None


@torch.no_grad()
def test_it_is_traced_part_by_part():
    layer, x = layer_of(), torch.randn(2, 5, 16)
    plain = copy.deepcopy(layer)
    join(layer)
    whole = not torch.__version__.startswith("2.6.")  # which breaks its graph there
    compiled = torch.compile(layer, backend="eager", fullgraph=whole)
    assert torch.allclose(compiled(x), plain(x), atol=1e-5)
    exported = torch.export.export(layer, (x,), strict=False).module()
    assert torch.allclose(exported(x), plain(x), atol=1e-5)


@torch.no_grad()
def test_copies():
    layer, x = layer_of(), torch.randn(2, 5, 16)
    join(layer)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert other._packed is None
        assert torch.equal(other(x), y)
    assert set(layer.state_dict()) == set(layer_of().state_dict())


@torch.no_grad()
def test_a_layer_that_was_tried_leaves_nothing_behind():
    layer, x = layer_of(), torch.randn(2, 5, 16)
    before = set(layer.__dict__)
    check(layer, x)
    separate(layer)
    unpack(layer)
    assert set(layer.__dict__) == before
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@torch.no_grad()
def test_a_block_is_packed_once_however_often_it_is_timed(monkeypatch):
    made, packed_of = [], together._Packed

    def count(layer):
        made.append(layer)
        return packed_of(layer)

    def measure(functions):
        for _ in range(4):
            for function in functions:
                function()
        return [1 / (1 + i) for i in range(len(functions))]

    monkeypatch.setattr(together, "_Packed", count)
    encoder = nn.TransformerEncoder(layer_of(), 2, enable_nested_tensor=False).eval()
    fast = mtprune.compress(encoder, torch.randn(2, 5, 16), measure=measure)
    assert len(mtprune.plan_of(fast).blocks) == 2
    # Once to be compared and timed, once in the whole model, once in what is given back.
    assert len(made) <= 3 * 2


@torch.no_grad()
def test_neither_heads_nor_neurons():
    layer, x = layer_of(), torch.randn(2, 5, 16)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    layer = encoder.layers[0]
    attention = layer.self_attn
    for weight in (attention.in_proj_weight, attention.out_proj.weight):
        weight.zero_()
    for linear in (layer.linear1, layer.linear2):
        linear.weight.zero_()
    small = mtprune.compress(encoder, x)
    separate(small.layers[0])
    assert small.layers[0].self_attn.num_heads == 0
    assert small.layers[0].linear1.out_features == 0
    torch.testing.assert_close(check(small.layers[0], x), encoder(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_joined():
    for layer in (
        nn.Linear(2, 2),
        layer_of(activation=torch.tanh),
        layer_of().double(),
    ):
        assert not can_join(layer)
        with pytest.raises(ValueError, match=f"A {type(layer).__name__} of this kind cannot run"):
            join(layer)


@torch.no_grad()
def test_layers_of_bert():
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
    )
    ids = torch.randint(0, 50, (3, 9))
    seen = torch.ones(3, 9, dtype=torch.long)
    seen[1, 5:] = 0
    for build in (transformers.BertModel, transformers.RobertaModel):
        for attention in ("sdpa", "eager"):
            model = build._from_config(config, attn_implementation=attention).eval()
            plain = copy.deepcopy(zero_(model, 0.8))
            for layer in model.encoder.layer:
                join(layer)
            for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": seen}):
                got = model(**inputs).last_hidden_state
                assert difference(plain(**inputs).last_hidden_state, got) <= 2e-6
                assert all(layer._packed.block is not None for layer in model.encoder.layer)
            # Whoever asks for what a block does not make gets it.
            names = {"output_attentions": True, "output_hidden_states": True}
            if attention == "eager":
                asked, other = model(ids, **names), plain(ids, **names)
                assert len(asked.attentions) == len(other.attentions) == 2
                assert len(asked.hidden_states) == 3
            other = copy.deepcopy(model)
            assert torch.equal(other(ids).last_hidden_state, model(ids).last_hidden_state)
            # Queries with masks of their own.
            x = torch.randn(3, 9, 24)
            mask = torch.ones(3, 1, 9, 9).tril().log()
            expected = plain.encoder.layer[0](x, mask)
            assert torch.equal(model.encoder.layer[0](x, mask), expected)


@torch.no_grad()
def test_a_folder_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
    config = transformers.BertConfig(vocab_size=50, num_hidden_layers=2, **sizes)
    model = zero_(transformers.BertModel(config), 0.8).eval()
    batch = {"input_ids": torch.randint(0, 50, (3, 9))}
    fast = mtprune.compress(model, batch, measure=Times())
    layers = ["encoder.layer.0", "encoder.layer.1"]
    assert [block.layer for block in mtprune.plan_of(fast).blocks] == layers
    import_module("mtprune.integrations.pretrained").save_pretrained(fast, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert all(isinstance(layer, Together) for layer in loaded.encoder.layer)
    got = loaded(**batch).last_hidden_state
    assert torch.equal(got, fast(**batch).last_hidden_state)
    assert all(layer._packed.block is not None for layer in loaded.encoder.layer)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, 0.1, batch_first=True)
        self.trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x, padding=None):
        return self.head(self.trunk(x, src_key_padding_mask=padding))


class Times:
    """A measure for which sparse layers are fast, and blocks too."""

    def __init__(self, together=1.0):
        self.together = together

    def __call__(self, functions):
        times = []
        for function in functions:
            function()
            called = getattr(function, "func", None)
            name = getattr(called, "choice", getattr(called, "__name__", ""))
            known = {"sparse": 1.0, "_together": self.together, "_apart": 2.0}
            times.append(known.get(name, 5.0 - len(times)))
        return times


@pytest.mark.parametrize("half", [False, True])
def test_compress_joins(half, tmp_path):
    torch.manual_seed(0)
    model, groups = Encoder().eval(), ()
    with torch.no_grad():
        if half:
            groups = [*patterns.heads(model), *patterns.neurons(model)]
            for group in groups:
                for member in group.members:
                    tensor = model.get_parameter(member.tensor).movedim(member.dim, 0)
                    index = member.index()
                    tensor[(index >= 0) & (index < group.size // 2)] = 0
        else:
            zero_(model, 0.8)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    x = torch.randn(2, 7, 16)
    fast = mtprune.compress(model, (x, padding), groups=groups, measure=Times())
    layers = [m for m in fast.modules() if isinstance(m, Together)]
    assert len(layers) == 2
    assert any(isinstance(m, NarrowAttention) for m in fast.modules()) == half
    plan = mtprune.plan_of(fast)
    assert [block.layer for block in plan.blocks] == ["trunk.layers.0", "trunk.layers.1"]
    assert "block: trunk.layers.0: 2.00 ms part by part, 1.00 ms as one" in str(plan)
    assert mtprune.Plan.from_dict(plan.to_dict()) == plan
    with torch.no_grad():
        y = fast(x, padding)
        assert difference(model(x, padding)[0], y[0]) <= 1e-5
        assert all(layer._packed.block is not None for layer in layers)
        again = mtprune.compress(model, (x, padding), groups=groups, plan=plan)
        assert torch.equal(again(x, padding), y)
    one = mtprune.compress(model, (x, padding), plan=plan.replace("trunk.layers.0", "dense"))
    assert [m for m in one.modules() if isinstance(m, Together)] == [one.trunk.layers[1]]
    none = mtprune.compress(model, (x, padding), plan=plan.replace("*", "dense"))
    assert not any(isinstance(m, Together) for m in none.modules())
    portable = mtprune.compress(model, (x, padding), groups=groups, portable=True, measure=Times())
    assert not mtprune.plan_of(portable).blocks
    slow = mtprune.compress(model, (x, padding), groups=groups, measure=Times(together=1.95))
    assert not mtprune.plan_of(slow).blocks
    assert not any(isinstance(m, Together) for m in slow.modules())
    mtprune.save(fast, tmp_path)
    loaded = mtprune.load(tmp_path, Encoder())
    with torch.no_grad():
        assert torch.equal(loaded(x, padding), y)


class Own(nn.TransformerEncoderLayer):
    """Like torch's, but for what `twist` says."""

    twist = 1.0

    def forward(self, *args, **kwargs):
        return self.twist * super().forward(*args, **kwargs)


class OfOwn(Torch):
    def has(self, cls):
        return cls is Own


def test_a_family_of_ones_own(monkeypatch):
    monkeypatch.setattr(anatomy, "_families", [*anatomy._families])
    model, x = zero_(Encoder(), 0.8).eval(), torch.randn(2, 7, 16)
    for layer in model.trunk.layers:
        layer.__class__ = Own
    assert not mtprune.plan_of(mtprune.compress(model, x, measure=Times())).blocks
    anatomy.add_family(OfOwn())
    model.trunk.layers[1].twist = 1.5  # which the family does not know
    fast = mtprune.compress(model, x, measure=Times())
    assert [block.layer for block in mtprune.plan_of(fast).blocks] == ["trunk.layers.0"]
    with torch.no_grad():
        assert difference(model(x), fast(x)) <= 1e-5
    with pytest.raises(TypeError, match=r"`family` must be a .*Family. Got 3"):
        anatomy.add_family(3)


@pytest.mark.slow
def test_a_new_process_gives_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model, x = zero_(Encoder(), 0.8).eval(), torch.randn(2, 7, 16)
    fast = mtprune.compress(model, x, measure=Times())
    mtprune.save(fast, tmp_path)
    with torch.no_grad():
        torch.save({"x": x, "y": fast(x)}, tmp_path / "pair.pt")
    code = (
        "import sys, torch, mtprune\n"
        "from tests.compression.test_blocks import Encoder\n"
        "pair = torch.load(sys.argv[1] + '/pair.pt')\n"
        "model = mtprune.load(sys.argv[1], Encoder())\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(model(pair['x']), pair['y'])\n"
        "assert model.trunk.layers[0]._packed.block is not None\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_plan_of_another_model():
    model, x = zero_(Encoder(), 0.8).eval(), torch.randn(2, 7, 16)
    plan = mtprune.plan_of(mtprune.compress(model, x, measure=Times()))
    other = replace(plan, blocks=(Joined("trunk.layers.7"),))
    with pytest.raises(ValueError, match=r"runs 'trunk.layers.7' as one block, and this model has"):
        mtprune.compress(model, x, plan=other)
    # What cannot run as one runs part by part.
    model.trunk.layers[1].activation = torch.tanh
    model.trunk.layers[1].activation_relu_or_gelu = 0
    fast = mtprune.compress(model, x, plan=plan)
    assert [isinstance(layer, Together) for layer in fast.trunk.layers] == [True, False]


def test_a_dense_model_stays_as_it_is():
    model, x = Encoder().eval(), torch.randn(2, 7, 16)
    fast = mtprune.compress(model, x, measure=Times())
    assert not mtprune.plan_of(fast).blocks
    assert torch.equal(fast(x), model(x))


def test_without_native_code_it_is_part_by_part(monkeypatch):
    model, x = zero_(Encoder(), 0.8).eval(), torch.randn(2, 7, 16)
    fast = mtprune.compress(model, x, measure=Times())
    layer = copy.deepcopy(fast.trunk.layers[0])
    monkeypatch.setattr(building, "library", lambda: "no C compiler was found")
    with torch.no_grad(), pytest.warns(UserWarning, match="multiplied as dense ones"):
        y = layer(x)
    assert layer._packed is None
    assert difference(model.trunk.layers[0](x), y) <= 1e-5
    with pytest.raises(RuntimeError, match="A block needs native code: no C compiler"):
        Block([], [], (1, 1), norm_first=False, activation="relu")


def matrices():
    """Those of a layer of width 4 with two heads of 2 and 3 hidden numbers, all sparse."""
    made = []
    for outputs, inputs in ((12, 4), (4, 4), (3, 4), (4, 3)):
        torch.manual_seed(0)
        start = torch.arange(outputs + 1)
        column = torch.arange(outputs) % inputs
        value = torch.randn(outputs)
        made.append(packed.sparse_matrix(start, column, value, None, outputs, inputs))
    return made


def block_of(made):
    norms = [packed.norm_of(None, None, 1e-5) for _ in range(2)]
    return Block(made, norms, (2, 2), norm_first=False, activation="relu")


def test_parts_that_lie_are_refused():
    block_of(matrices())
    for which in range(4):
        lies = {
            "cells that go back": lambda cell, line, column: cell[0].fill_(1),
            "lines past the end": lambda cell, line, column: cell[-1, 0].add_(1),
            "weights past the end": lambda cell, line, column: cell[-1, 1].add_(1),
            "a row outside": lambda cell, line, column: line[0, 0].fill_(63),
            "a count": lambda cell, line, column: line[0, 1].fill_(255),
            "a column outside": lambda cell, line, column: column[0].fill_(120),
        }
        for lie in lies.values():
            made = matrices()
            lie(*made[which].kept[:3])
            with pytest.raises(ValueError, match="do not fit each other"):
                block_of(made)
        made = matrices()
        made[which].outputs += 1
        with pytest.raises(ValueError, match="do not fit each other"):
            block_of(made)
    with pytest.raises(ValueError, match="do not fit each other"):
        packed.sparse_matrix(torch.tensor([0, 1]), torch.tensor([4]), torch.ones(1), None, 1, 4)


def test_inputs_of_other_shapes_are_refused():
    block = block_of(matrices())
    with pytest.raises(ValueError, match=r"takes \[sentences, length, 4\].* Got \(1, 2, 5\)"):
        block(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"Got \(1, 2, 4\) and \(1, 3\)"):
        block(torch.zeros(1, 2, 4), torch.zeros(1, 3))


def test_parts_of_a_file_that_lie_are_refused():
    model, x = zero_(Encoder(), 0.8).eval(), torch.randn(2, 7, 16)
    fast = mtprune.compress(model, x, measure=Times())
    with torch.no_grad():
        fast(x)
        fast.trunk.layers[1].linear1.weight_column[0] = 1000
        with pytest.raises(ValueError, match="do not fit each other"):
            fast(x)
