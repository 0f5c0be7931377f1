"""Families of transformers: pruned by heads and neurons, made smaller, saved, and loaded."""

import copy
import json
import pickle
import re

import pytest
import torch

from mtprune import Grouped, MultitaskPruner, Neuron, Vote, compress, plan_of
from mtprune.compression.running import named_tensors
from mtprune.compression.verify import difference
from mtprune.integrations.pretrained import save_pretrained
from mtprune.patterns import heads, neurons
from tests import families
from tests.families import FAMILIES
from tests.long import LONG

CI = ("llama", "gemma, one key", "gpt2", "falcon, shared keys", "mixtral", "t5", "swin")
"""The families that are looked at in every run, unlike in kind."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:Both `max_new_tokens`", "ignore:Passing `generation"
)


def every():
    for name in FAMILIES:
        yield pytest.param(name, marks=() if name in CI else LONG)


def found(model, name):
    """The groups of a model, as many as its family has."""
    family = FAMILIES[name]
    groups = []
    for find, sizes in ((heads, family.heads), (neurons, family.neurons)):
        if sizes:
            mine = find(model)
            assert tuple(group.size for group in mine) == sizes
            groups += mine
        else:
            with pytest.raises(ValueError, match="that cannot be removed"):
                find(model)
    return groups


def loss(factor):
    def of(outputs, _):
        tensors = [t for _, t in named_tensors(outputs) if t.is_floating_point()]
        return sum((factor * tensor).sin().mean() for tensor in tensors)

    return of


@torch.no_grad()
def outputs(model, inputs):
    return dict(named_tensors(model(**inputs)))


def generated(model, inputs):
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    return model.generate(**given, max_new_tokens=4, do_sample=False)


def dense(functions):
    """Times by which every layer stays dense."""
    return [float(i) for i, _ in enumerate(functions)]


@pytest.mark.parametrize("name", list(every()))
def test_from_a_vote_to_a_loaded_model(name, tmp_path):
    model = families.build(name)
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    groups = found(model, name)
    tasks = {"a": loss(1), "b": loss(2)}
    method = Vote(0.5, granularity=Grouped(groups))
    pruner = MultitaskPruner(model, tasks, model, method=method)
    pruner.observe(model(**inputs), None)
    assert pruner.step()
    masked = outputs(model, inputs)
    pruner.finalize()
    assert all(torch.equal(masked[k], v) for k, v in outputs(model, inputs).items())

    fast = compress(model, inputs, groups=groups, measure=dense)
    assert not plan_of(fast).stayed
    parameters = [sum(p.numel() for p in net.parameters()) for net in (fast, model)]
    assert parameters[0] < 0.95 * parameters[1]
    for batch in (inputs, others):
        got, expected = outputs(fast, batch), outputs(model, batch)
        assert max(difference(expected[k], got[k]) for k in expected) <= 1e-5

    save_pretrained(fast, tmp_path)
    loaded = families.loader(name).from_pretrained(tmp_path)
    got, again = outputs(fast, others), outputs(loaded, others)
    assert all(torch.equal(got[k], again[k]) for k in got)
    if model.can_generate():
        tokens = [generated(net, inputs).tolist() for net in (model, fast, loaded)]
        assert tokens[0] == tokens[1] == tokens[2]


@torch.no_grad()
def smaller(name, find, dead):
    """A model without the units of which `dead` says so, for each group and its number."""
    model = families.build(name)
    groups = find(model)
    for number, group in enumerate(groups):
        for member in group.members:
            if member.role == "in":
                unread = dead(number, member.index())
                model.get_parameter(member.tensor).movedim(member.dim, 0)[unread] = 0
    return compress(model, families.inputs(model), groups=groups, measure=dense)


def half(_, units):
    return units % 2 == 0


PLAIN = [
    ("llama", heads, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    (
        "phi3, a size for heads",
        heads,
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
    ),
    ("gpt2", neurons, {"n_inner": 12}),
    ("t5", heads, {"num_heads": 2, "d_kv": 8}),
    ("mixtral", neurons, {"intermediate_size": 8}),
]


@pytest.mark.parametrize(("name", "find", "numbers"), PLAIN, ids=[name for name, *_ in PLAIN])
def test_layers_alike_are_a_plain_model(name, find, numbers, tmp_path):
    fast = smaller(name, find, half)
    before = fast.config.to_dict()
    save_pretrained(fast, tmp_path)
    assert fast.config.to_dict() == before
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved
    assert saved.items() >= numbers.items()
    loaded = families.loader(name).from_pretrained(tmp_path)
    inputs = families.inputs(fast, 1, 3, 9)
    got, again = outputs(fast, inputs), outputs(loaded, inputs)
    assert all(torch.equal(got[k], again[k]) for k in got)
    assert generated(fast, inputs).tolist() == generated(loaded, inputs).tolist()


UNLIKE = {
    "another number of each": ("llama", neurons, lambda number, units: units < 5 + number),
    "a size that follows from the number": ("bert", heads, half),
    "slopes that follow from the number": ("bloom", heads, half),
    "a number that all layers read": ("phi3", heads, lambda number, units: units == number),
    "some layers whole": ("llama", heads, lambda number, units: (units == 0) & (number == 0)),
}


@pytest.mark.parametrize("why", UNLIKE)
def test_layers_that_no_configuration_describes_have_a_plan(why, tmp_path):
    name, find, dead = UNLIKE[why]
    fast = smaller(name, find, dead)
    save_pretrained(fast, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "mtprune"
    loaded = families.loader(name).from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    shapes = {k: v.shape for k, v in fast.named_parameters()}
    assert {k: v.shape for k, v in loaded.named_parameters()} == shapes
    if name == "llama":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert generated(loaded, families.inputs(fast)).shape == (2, 11)


def test_what_cannot_lose_heads_is_refused_with_the_reason():
    for name, why in {
        "olmo2": "without some of them the model does not run: The size of tensor",
    }.items():
        with pytest.raises(ValueError, match=re.escape(why)):
            heads(families.build(name))


@torch.no_grad()
def test_pruned_heads_that_stay_are_told_by_the_plan():
    model = families.build("olmo2")
    model.model.layers[1].self_attn.o_proj.weight[:, :16] = 0
    fast = compress(model, families.inputs(model), measure=dense)
    (line,) = plan_of(fast).stayed
    assert line.startswith("stayed: 1 pruned of 2 units of 'model.layers.1.self_attn.heads'")


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon, slopes"])
def test_heads_that_stay_keep_their_slopes(name):
    """Each layer loses others; with padding, without a mask, and with a cache."""

    def dead(number, units):
        return units % 2 == number

    fast, whole = smaller(name, heads, dead), families.build(name)
    for number, group in enumerate(heads(whole)):
        reader = group.members[-1]
        unread = dead(number, reader.index())
        with torch.no_grad():
            whole.get_parameter(reader.tensor)[:, unread] = 0
    inputs = families.inputs(fast, 1, 3, 9)
    inputs["attention_mask"][0, :4] = 0
    for batch in (inputs, {"input_ids": inputs["input_ids"]}):
        got, expected = outputs(fast, batch), outputs(whole, batch)
        assert max(difference(expected[k], got[k]) for k in expected) <= 1e-5
    assert generated(fast, inputs).tolist() == generated(whole, inputs).tolist()


@pytest.mark.parametrize(("name", "left"), [("bloom", 1), ("mpt", 0), ("phi3", 0)])
def test_a_block_without_heads_that_are_read(name, left):
    fast = smaller(name, heads, lambda number, units: units >= number)
    sizes = {"bloom": 8, "mpt": 8, "phi3": 16}
    readers = [
        w for n, w in fast.named_parameters() if re.search(r"(dense|out_proj|o_proj)\.weight", n)
    ]
    assert [w.shape[1] for w in readers] == [left * sizes[name], sizes[name]]


def test_layers_with_a_number_of_their_own_follow_the_configuration_in_the_rest():
    fast = smaller("phi3", heads, lambda number, units: units == number)
    first, second = (layer.self_attn.config for layer in fast.model.layers)
    assert first is not second
    assert (first.num_attention_heads, fast.config.num_attention_heads) == (2, 4)
    fast.set_attn_implementation("eager")
    assert second._attn_implementation == "eager"
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert copied.model.layers[0].self_attn.config.shared is copied.config
        inputs = families.inputs(fast)
        assert torch.equal(copied(**inputs).logits, fast(**inputs).logits)


def test_some_of_a_model_are_left_out_by_name():
    model = families.build("olmo2")
    attention = model.model.layers[0].self_attn
    attention.q_norm, attention.k_norm = torch.nn.Identity(), torch.nn.Identity()
    with pytest.warns(
        UserWarning, match=r"Left out: 'model\.layers\.1\.self_attn\.heads': without"
    ):
        (group,) = heads(model)
    assert group.name == "model.layers.0.self_attn.heads"


def test_inputs_that_are_given_are_tried():
    """A block of a known look that does something else is told by what it gives."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.fc2(self.fc1(x).softmax(-1))

    model, x = torch.nn.Sequential(Block()), torch.randn(3, 4)
    (group,) = neurons(model)
    assert group.size == 8
    with pytest.raises(
        ValueError, match=r"'0\.neurons': without some .* gives other outputs\. Prune"
    ):
        neurons(model, example_inputs=x)
    with pytest.raises(ValueError, match="does not run on `example_inputs"):
        Neuron(example_inputs=torch.randn(3, 5)).groups(model, [])
