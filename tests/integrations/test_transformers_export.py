"""Compressed encoders travel: `from_pretrained` loads them bitwise, or fails loudly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mtprune
from mtprune.compression.forms import Form
from mtprune.integrations.pretrained import PlanConfig, save_pretrained
from mtprune.model.layers import find_layers
from mtprune.patterns import heads, neurons
from tests import encoders
from tests.compression.fakes import FakeTimes, prefer, zero_
from tests.encoders import PRETRAINED
from tests.long import few
from tests.test_cards import pruned

transformers = pytest.importorskip("transformers", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PLAIN = ("zeros", "neurons")  # layers alike are a plain model
KINDS = ["zeros", "heads", "neurons", "both", "csr", "thin", "rank", "everything"]
DENSE = FakeTimes(dense=1.0)


def lower(model, rank=2):
    """Give every Linear that rank."""
    for layer in find_layers(model):
        weight = layer.parameter
        up, down = torch.randn(len(weight), rank), torch.randn(rank, weight.shape[1])
        weight.data.copy_(0.1 * up @ down)


def compressed(name, kind, head="Model", attention="sdpa"):
    """An encoder before and after."""
    encoder = encoders.build(name, attention, head)
    model, groups, measure = encoder.model, [], DENSE
    if kind in ("heads", "both", "everything"):
        groups += heads(model)
    if kind in ("neurons", "both", "everything"):
        groups += neurons(model)
    if kind == "rank":
        lower(model)
        measure = prefer("rank")
    encoders.zero(model, groups, encoders.some)
    if kind in ("zeros", "csr", "thin", "everything"):
        zero_(model, 0.7, rows=0.2, cols=0.2)
        measure = prefer({"zeros": "dense", "everything": "csr"}.get(kind, kind))
    return encoder, mtprune.compress(model, encoder.inputs, groups=groups, measure=measure)


def equal(one, other):
    """Whether two models have the same tensors under the same names."""
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRETRAINED)
def test_round_trip_is_bitwise(name, kind, attention, tmp_path):
    encoder, fast = compressed(name, kind, attention=attention)
    save_pretrained(fast, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert type(loaded) is type(encoder.model)
    assert equal(loaded, fast)
    assert torch.equal(encoder.states(loaded), encoder.states(fast))
    assert (kind == "zeros") == (equal(fast, encoder.model))
    plain = "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert plain == (kind in PLAIN)
    if not plain:
        assert mtprune.plan_of(loaded) == mtprune.plan_of(fast)
    assert not loaded.training


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_what_is_stored(kind, tmp_path):
    _, fast = compressed("Bert", kind)
    save_pretrained(fast, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    count = mtprune.plan_of(fast).sizes.parameters
    assert count == sum(p.numel() for p in fast.parameters())
    assert count == sum(p.numel() for p in loaded.parameters())
    tensors = load_file(tmp_path / "model.safetensors")
    stored = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    filled = sum(b.numel() for n, b in fast.named_buffers() if n.endswith(".fill"))
    assert stored == count + filled


@pytest.mark.parametrize("kind", ["both", "csr", "everything"])
def test_saved_again_as_anybody_would(kind, tmp_path):
    _, fast = compressed("Bert", kind)
    save_pretrained(fast, tmp_path / "one")
    transformers.AutoModel.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    fast.save_pretrained(tmp_path / "three")  # it knows by now
    for folder in ("two", "three"):
        assert equal(transformers.AutoModel.from_pretrained(tmp_path / folder), fast)
    first, second = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("one", "two"))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k in ("both", "rank", "csr")])
@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ModernBert"])
def test_another_head_and_none(name, kind, tmp_path):
    """The encoder is loaded under a classifier, saved with it, and loaded again without."""
    _, fast = compressed(name, kind)
    save_pretrained(fast, tmp_path / "encoder")
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "encoder", num_labels=3)
    assert equal(model.base_model, fast) or name == "Bert"
    encoder = model.base_model.encoder if name == "Bert" else model.base_model
    assert equal(encoder, fast.encoder if name == "Bert" else fast)
    model.save_pretrained(tmp_path / "classifier")
    assert equal(auto.from_pretrained(tmp_path / "classifier"), model)
    assert equal(transformers.AutoModel.from_pretrained(tmp_path / "classifier"), model.base_model)
    tokens = transformers.AutoModelForTokenClassification
    other = tokens.from_pretrained(tmp_path / "encoder", num_labels=5)
    other.save_pretrained(tmp_path / "tokens")
    assert equal(tokens.from_pretrained(tmp_path / "tokens"), other)


def test_a_compressed_classifier(tmp_path):
    """Its head takes a form too; another head does without."""
    encoder, fast = compressed("Bert", "csr", "ForSequenceClassification")
    assert isinstance(fast.classifier, Form)
    save_pretrained(fast, tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert equal(loaded, fast)
    with torch.no_grad():
        assert torch.equal(loaded(**encoder.inputs).logits, fast(**encoder.inputs).logits)
    assert equal(transformers.AutoModel.from_pretrained(tmp_path), fast.bert)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zeros"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_it_is_loaded_in_another_type(kind, dtype, tmp_path):
    encoder, fast = compressed("Bert", kind)
    save_pretrained(fast, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert equal(loaded, fast.to(dtype))
    if dtype == torch.float64 or kind not in ("csr", "everything"):
        assert torch.equal(encoder.states(loaded), encoder.states(fast))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k in ("both", "rank", "csr")])
def test_it_can_be_cast_and_trained(kind, tmp_path):
    pytest.importorskip("accelerate")
    encoder, fast = compressed("Bert", kind, "ForSequenceClassification")
    save_pretrained(fast, tmp_path / "model")
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "model")
    assert model.half().dtype == torch.float16
    assert model.double().float().dtype == torch.float32
    model = auto.from_pretrained(tmp_path / "model")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, mask = encoder.inputs["input_ids"], encoder.inputs["attention_mask"]
    rows = [
        {"input_ids": i, "attention_mask": m, "labels": torch.tensor(0)}
        for i, m in zip(ids, mask, strict=True)
    ]
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(model=model, args=settings, train_dataset=rows).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert moved
    assert not moved & frozen
    layer = "bert.encoder.layer.1.output.dense."
    trained = {"both": layer + "weight", "rank": layer + "up.weight", "csr": layer + "bias"}
    assert (trained[kind] in moved) == (kind != "csr")
    assert equal(auto.from_pretrained(tmp_path / "checkpoint-2"), model)


class Multitask(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = encoders.pretrained("Bert", add_pooling_layer=False)
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 3), "b": nn.Linear(16, 2)})

    def forward(self, **inputs):
        hidden = self.encoder(**inputs).last_hidden_state[:, 0]
        return {task: head(hidden) for task, head in self.heads.items()}


def test_an_encoder_and_its_heads(tmp_path):
    model = encoders.randomize(Multitask()).eval()
    inputs = encoders.build("Bert").inputs
    groups = heads(model) + neurons(model)
    encoders.zero(model, groups, encoders.some)
    fast = mtprune.compress(model, inputs, groups=groups, measure=DENSE)
    save_pretrained(fast, tmp_path, encoder="encoder", heads="heads")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert found == {
        "config.json",
        "model.safetensors",
        "heads/a.safetensors",
        "heads/b.safetensors",
    }
    again = Multitask().eval()
    auto = transformers.AutoModel
    again.encoder = auto.from_pretrained(tmp_path, add_pooling_layer=False)
    for task, head in again.heads.items():
        head.load_state_dict(load_file(tmp_path / "heads" / f"{task}.safetensors"))
    with torch.no_grad():
        expected, got = fast(**inputs), again(**inputs)
    assert all(torch.equal(expected[task], got[task]) for task in "ab")
    plan = mtprune.plan_of(again.encoder)
    assert all(not cut.tensor.startswith("encoder.encoder") for cut in plan.removal.cuts)


def test_a_bias_that_was_not_there(tmp_path):
    """Of an architecture that transformers does not have: a constant becomes a layer's bias."""

    class Config(transformers.PreTrainedConfig):
        model_type = "mine"

    class Mine(transformers.PreTrainedModel):
        config_class = Config
        base_model_prefix = "mine"

        def __init__(self, config):
            super().__init__(config)
            self.lin1, self.activation = nn.Linear(4, 6), nn.Sigmoid()
            self.lin2 = nn.Linear(6, 4, bias=False)
            self.post_init()

        def forward(self, x):
            return self.lin2(self.activation(self.lin1(x)))

    model, x = encoders.randomize(Mine(Config())).eval(), torch.randn(5, 4)
    with torch.no_grad():
        model.lin1.weight[2] = 0
        fast = mtprune.compress(model, x, groups=neurons(model), measure=DENSE)
        assert fast.lin2.bias is not None
        save_pretrained(fast, tmp_path)
        assert torch.equal(Mine.from_pretrained(tmp_path)(x), fast(x))
    with pytest.raises(ValueError, match="holds a Mine, which transformers does not have"):
        mtprune.load(tmp_path)


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    few(
        [
            "import mtprune\nassert 'transformers' not in sys.modules\nimport transformers",
            "import transformers\nimport mtprune",
            "import transformers.quantizers.auto\nimport mtprune\nimport mtprune",
        ]
    ),
)
def test_a_new_process(order, tmp_path):
    encoder, fast = compressed("Bert", "everything")
    save_pretrained(fast, tmp_path)
    torch.save({"inputs": encoder.inputs, "states": encoder.states(fast)}, tmp_path / "pair.pt")
    code = (
        f"import sys\n{order}\nimport torch, transformers\ntorch.set_num_threads(1)\n"
        "pair = torch.load(sys.argv[1] + '/pair.pt')\n"
        "with torch.no_grad():\n"
        "    for load in (transformers.AutoModel.from_pretrained, sys.modules['mtprune'].load):\n"
        "        states = load(sys.argv[1])(**pair['inputs']).last_hidden_state\n"
        "        real = pair['inputs']['attention_mask'].bool()\n"
        "        assert torch.equal(states[real], pair['states'])\n"
        "assert not any('mtprune' in type(finder).__module__ for finder in sys.meta_path)\n"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_the_integration_registers_at_once():
    code = (
        "import sys, mtprune\n"
        "def waits():\n"
        "    return any('mtprune' in type(finder).__module__ for finder in sys.meta_path)\n"
        "assert waits() and 'transformers' not in sys.modules\n"
        "import mtprune.integrations.transformers\n"
        "assert not waits()\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as mapping\n"
        "assert mapping['mtprune'].__name__ == 'PlanQuantizer'\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_without_mtprune_it_fails_loudly_or_is_right(tmp_path):
    for kind in KINDS:
        encoder, fast = compressed("Bert", kind)
        save_pretrained(fast, tmp_path / kind)
        pair = {"inputs": encoder.inputs, "states": encoder.states(fast)}
        torch.save(pair, tmp_path / kind / "pair.pt")
    code = (
        "import sys, torch, transformers\ntorch.set_num_threads(1)\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        model = transformers.AutoModel.from_pretrained(folder)\n"
        "    except RuntimeError as error:\n"
        "        assert 'ignore_mismatched_sizes' in str(error), error\n"
        "        print('raised')\n"
        "        continue\n"
        "    pair = torch.load(folder + '/pair.pt')\n"
        "    with torch.no_grad():\n"
        "        states = model(**pair['inputs']).last_hidden_state\n"
        "    real = pair['inputs']['attention_mask'].bool()\n"
        "    print('right' if torch.equal(states[real], pair['states']) else 'wrong')\n"
        "assert 'mtprune' not in sys.modules\n"
    )
    done = run(code, *(tmp_path / kind for kind in KINDS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["right" if kind in PLAIN else "raised" for kind in KINDS]


@pytest.mark.parametrize("kind", ["zeros", "everything"])
def test_load(kind, tmp_path):
    _, fast = compressed("Roberta", kind, "ForSequenceClassification")
    save_pretrained(fast, tmp_path)
    loaded = mtprune.load(tmp_path)
    assert type(loaded) is transformers.RobertaForSequenceClassification
    assert equal(loaded, fast)


def test_errors(tmp_path, monkeypatch):
    encoder, fast = compressed("Bert", "both")
    with pytest.raises(ValueError, match=r"has no plan: mtprune\.compress did"):
        save_pretrained(encoder.model, tmp_path)
    plain = mtprune.compress(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"Got '0', a Linear. There is none in this model; others"):
        save_pretrained(plain, tmp_path, encoder="0")
    model = nn.ModuleDict({"bert": encoder.model})
    model.forward = lambda **inputs: model["bert"](**inputs)
    outer = mtprune.compress(model, encoder.inputs, measure=DENSE)
    with pytest.raises(TypeError, match=r"Got '', a ModuleDict. There is 'bert'"):
        save_pretrained(outer, tmp_path)
    save_pretrained(fast, tmp_path)
    with pytest.raises(ValueError, match="says itself which model it holds: leave `model` out"):
        mtprune.load(tmp_path, encoder.model)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(ValueError, match="The plan is for another model"):
        mtprune.load(tmp_path)
    plan = {**config["quantization_config"], "format": 99, "more": True}
    path.write_text(json.dumps({**config, "quantization_config": plan}))
    with pytest.raises(ValueError, match="has format 99, and this version of mtprune reads 1"):
        mtprune.load(tmp_path)
    assert PlanConfig.from_dict(config["quantization_config"]).prefix == ""
    monkeypatch.setattr("mtprune.integrations.pretrained.AUTO_QUANTIZER_MAPPING", None)
    with pytest.raises(ImportError, match=r"mtprune\[transformers\]"):
        mtprune.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["plan"]["rows"][0].update(choice="magic"), r"rows\.0\.choice' must"),
        (lambda config: config["plan"].pop("rows"), r"'plan' must have \['rows'\] besides"),
        (
            lambda config: config["tensors"].update(x=["__class__", [1]]),
            r"tensors\.x\.0' must be one",
        ),
        (
            lambda config: config["tensors"].update(x=["int32", [1 << 62]]),
            r"'tensors\.x\.1\.0' must",
        ),
    ],
)
def test_a_configuration_that_is_none_is_named(change, message, tmp_path):
    _, fast = compressed("Bert", "csr")
    save_pretrained(fast, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"The `quantization_config` of this model: .*{message}"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_indices_out_of_range_are_refused_when_loaded(tmp_path):
    _, fast = compressed("Bert", "csr")
    save_pretrained(fast, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_col"))
    tensors[name] = tensors[name] + 9999
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The saved tensors do not fit layer '.*': .* do not fit"):
        transformers.AutoModel.from_pretrained(tmp_path)


def lacking(tensors, name):
    del tensors[name]


def halved(tensors, name):
    tensors[name] = tensors[name].int()


@pytest.mark.parametrize(
    ("kind", "ending", "change", "message"),
    [
        ("csr", "dense.weight_values", lacking, r"they lack \['\S*weight_values'\]"),
        ("csr", "dense.bias", lacking, r"they lack \['\S*dense.bias'\]"),
        ("thin", "inner.weight", lacking, r"they lack \['\S*inner.weight'\]"),
        ("rank", "up.weight", lacking, r"they lack \['\S*up.weight'\]"),
        ("both", "query.bias", lacking, r"they lack \['\S*query.bias'\]"),
        ("csr", "dense.weight_values", halved, "weights are whole numbers"),
        ("both", "query.weight", halved, "weights are whole numbers"),
    ],
)
def test_layers_of_the_plan_are_loaded_whole(kind, ending, change, message, tmp_path):
    _, fast = compressed("Bert", kind)
    save_pretrained(fast, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors, next(name for name in tensors if name.endswith(ending)))
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"The saved tensors do not fit layer '.*': .*{message}"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_shard_is_looked_at_like_a_whole_file(tmp_path):
    _, fast = compressed("Bert", "csr")
    save_pretrained(fast, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(whole)
    places = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        part = {name: whole[name] for name in names if places[name] == shard}
        save_file(part, tmp_path / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert equal(transformers.AutoModel.from_pretrained(tmp_path), fast)
    name = next(name for name in names if name.endswith("weight_col"))
    path = tmp_path / places[name]
    part = load_file(path)
    save_file({**part, name: part[name] + 9999}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The saved tensors do not fit layer '.*': .* do not fit"):
        transformers.AutoModel.from_pretrained(tmp_path)
    save_file({k: v for k, v in part.items() if k != name}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The saved tensors do not fit layer '.*': they lack"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_shapes_that_no_layer_has_are_refused(tmp_path):
    _, fast = compressed("Bert", "csr")
    save_pretrained(fast, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    tensors = config["quantization_config"]["tensors"]
    del tensors[next(name for name in tensors if name.endswith("weight_crow"))]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`quantization_config` of this model does not fit this"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_what_is_loaded_owns_its_memory(tmp_path):
    encoder, fast = compressed("Bert", "everything")
    save_pretrained(fast, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 0)
    assert torch.equal(encoder.states(loaded), encoder.states(fast))


def test_a_card_goes_with_it(tmp_path):
    _, fast = compressed("Bert", "both")
    card = mtprune.Card.of(pruned()[1])
    save_pretrained(fast, tmp_path, card=card)
    text = (tmp_path / "README.md").read_text()
    assert text == card.markdown(mtprune.plan_of(fast))
    assert "removed: encoder.layer.0.attention.self.query" in text
    assert equal(transformers.AutoModel.from_pretrained(tmp_path), fast)
