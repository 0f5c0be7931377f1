"""Heads and neurons are found where they sit, and a pattern of one's own is a few lines."""

import pytest
import torch
from torch import nn

from mtprune import Head, MultitaskPruner, Vote
from mtprune.patterns import PATTERNS, Attention, FeedForward, heads, neurons
from mtprune.structure import NOBODY, Member
from tests.oracles import unit_masks

NO = NOBODY


def layer(**options):
    options = {"d_model": 4, "nhead": 2, "dim_feedforward": 3, "batch_first": True, **options}
    return nn.TransformerEncoderLayer(**options)


def test_literal_heads():
    """Two heads of two dimensions: queries, keys and values packed, in this order."""
    (group,) = heads(nn.MultiheadAttention(4, 2))
    query = (0, 0, 1, 1) + (NO,) * 8
    key = (NO,) * 4 + (0, 0, 1, 1) + (NO,) * 4
    value = (NO,) * 8 + (0, 0, 1, 1)
    assert (group.name, group.size, group.counts) == ("heads", 2, ("num_heads",))
    assert group.members == (
        Member("in_proj_weight", 0, query, "with"),
        Member("in_proj_bias", 0, query, "with"),
        Member("in_proj_weight", 0, key, "with"),
        Member("in_proj_bias", 0, key, "with"),
        Member("in_proj_weight", 0, value, "out"),
        Member("in_proj_bias", 0, value, "out"),
        Member("out_proj.weight", 1, (0, 0, 1, 1), "in"),
    )


def test_literal_neurons():
    (group,) = neurons(nn.Sequential(layer(bias=False)))
    assert (group.name, group.size, group.between) == ("0.neurons", 3, "0.activation")
    assert group.members == (
        Member("0.linear1.weight", 0, (0, 1, 2), "out"),
        Member("0.linear2.weight", 1, (0, 1, 2), "in"),
    )


class Gated(nn.Module):
    """A gated feed-forward block as ModernBERT packs it."""

    def __init__(self):
        super().__init__()
        self.Wi, self.act, self.Wo = nn.Linear(2, 6), nn.GELU(), nn.Linear(3, 2)


def test_literal_packed_gate():
    (group,) = neurons(Gated())
    assert group.members == (
        Member("Wi.weight", 0, (0, 1, 2, NO, NO, NO), "out"),
        Member("Wi.bias", 0, (0, 1, 2, NO, NO, NO), "out"),
        Member("Wi.weight", 0, (NO, NO, NO, 0, 1, 2), "out"),
        Member("Wi.bias", 0, (NO, NO, NO, 0, 1, 2), "out"),
        Member("Wo.weight", 1, (0, 1, 2), "in"),
    )
    assert group.between is None


class Grouped(nn.Module):
    """Attention in which two heads of queries share one of keys and values."""

    def __init__(self):
        super().__init__()
        self.head_dim = 2
        self.q_proj, self.k_proj = nn.Linear(6, 8, bias=False), nn.Linear(6, 4, bias=False)
        self.v_proj, self.o_proj = nn.Linear(6, 4, bias=False), nn.Linear(8, 6, bias=False)


def test_a_pattern_of_ones_own():
    """The unit is what can go: the shared head with both heads of queries."""
    mine = Attention(
        "mine", "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "head_dim"
    )
    model = nn.ModuleList([Grouped(), nn.MultiheadAttention(4, 2)])
    first, second = heads(model, (*PATTERNS, mine))
    assert (first.name, first.size, second.name, second.size) == ("0.heads", 2, "1.heads", 2)
    units = {member.tensor: member.units for member in first.members}
    assert units["0.q_proj.weight"] == units["0.o_proj.weight"] == (0, 0, 0, 0, 1, 1, 1, 1)
    assert units["0.k_proj.weight"] == units["0.v_proj.weight"] == (0, 0, 1, 1)


def test_what_a_pattern_asks_for_may_be_a_tensor_elsewhere():
    """Affine layers call a weight `beta`, which BLOOM's attention has for a number."""
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    model.beta = nn.Parameter(torch.ones(3))
    assert [group.name for group in heads(model)] == ["0.heads"]


def test_a_member_may_be_a_buffer_that_is_in_no_state():
    """As the biases of keys, always zero, in timm's EVA."""
    mine = Attention(
        "mine",
        *(f"{name}_proj.weight" for name in "qkvo"),
        "head_dim",
        tables=(("k_bias", 0),),
    )
    model = Grouped()
    model.register_buffer("k_bias", torch.zeros(8), persistent=False)
    method = Vote(0.5, granularity=Head(patterns=(mine,)))
    pruner = MultitaskPruner(model, ["a"], method=method)
    assert set(pruner.masks) == {f"{name}_proj.weight" for name in "qkvo"}


def test_of_two_that_fit_the_first_counts():
    two = (FeedForward("two", ("linear1.weight",), "linear2.weight", "norm1"), *PATTERNS)
    assert [group.between for group in neurons(layer(), two)] == ["norm1"]


@pytest.mark.parametrize(
    "attention",
    [
        nn.MultiheadAttention(4, 2, kdim=3),
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, add_zero_attn=True),
    ],
    ids=["sizes of their own", "a key of its own", "a key of zeros"],
)
def test_what_is_not_plain_is_left_alone(attention):
    with pytest.raises(ValueError, match="has no attention heads where the patterns look"):
        heads(attention)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("head_dim", 3),  # 4 rows are no whole number of heads
        ("head_dim", 0),
        ("head_dim", None),
        ("o_proj", nn.Linear(6, 6)),  # reads more than the heads
        ("o_proj", nn.Conv1d(8, 6, 1)),  # no rows and columns
        ("v_proj", nn.Identity()),
    ],
)
def test_what_does_not_fit_together_is_no_block(attribute, value):
    paths = (f"{name}_proj.weight" for name in "qkvo")
    mine = (Attention("mine", *paths, "head_dim"),)
    block = Grouped()
    assert heads(block, mine)
    setattr(block, attribute, value)
    with pytest.raises(ValueError, match="no attention heads"):
        heads(block, mine)


def test_nothing_found_says_what_was_tried_and_what_is_there():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    message = (
        r"Sequential has no feed-forward neurons where the patterns look. Tried: 'BERT', "
        r"'DistilBERT', 'ModernBERT', 'torch.nn.TransformerEncoderLayer', .*'experts'. The model "
        r"has '0.weight' \(4, 3\), '2.weight' \(2, 4\). Say where they are with a pattern"
    )
    with pytest.raises(ValueError, match=message):
        neurons(model)
    with pytest.raises(ValueError, match=r"Tried: none\. The model has no weight with two"):
        heads(nn.ReLU(), ())


def test_a_masked_model_has_the_same_groups(backend):
    """Where weights are computed from others, they still are where they were."""
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer(), 2), "a": nn.Linear(4, 1)})
    before = heads(model), neurons(model)
    assert [group.name for group in before[0]] == [
        "encoder.layers.0.self_attn.heads",
        "encoder.layers.1.self_attn.heads",
    ]
    pruner = MultitaskPruner(model, ["a"], "encoder", method=Vote(0.5), backend=backend)
    pruner.observe_losses({"a": model["a"](model["encoder"](torch.randn(2, 5, 4))).mean()})
    assert pruner.step()
    assert (heads(model), neurons(model)) == before


@torch.no_grad()
def test_a_masked_head_is_one_that_nobody_reads():
    """All that belongs to a head set to 0 is the same as its columns of the output set to 0."""
    torch.manual_seed(0)
    one, other = nn.MultiheadAttention(8, 4, batch_first=True), nn.MultiheadAttention(8, 4)
    other.batch_first = True
    other.load_state_dict(one.state_dict())
    mask = torch.tensor([True, False, True, False])
    shapes = {name: tuple(p.shape) for name, p in one.named_parameters()}
    for name, kept in unit_masks(heads(one), [mask], shapes).items():
        one.get_parameter(name).mul_(kept)
    other.out_proj.weight[:, 2:4] = 0
    other.out_proj.weight[:, 6:8] = 0
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(one(x, x, x)[0], other(x, x, x)[0])


SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["", "ForSequenceClassification"])
@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "DistilBert", "ModernBert"])
def test_pretrained_architectures(name, head):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {**SIZES, "intermediate_size": 24}
    if name == "DistilBert":
        sizes = {"vocab_size": 30, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
    config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0)
    model = getattr(transformers, f"{name}{head or 'Model'}")(config)
    assert [group.size for group in heads(model)] == [4, 4]
    assert [group.size for group in neurons(model)] == [24, 24]
    for group in heads(model):
        values = [len(m.units) - m.units.count(NO) for m in group.members if m.role == "out"]
        assert set(values) == {16}
        (reader,) = (member for member in group.members if member.role == "in")
        assert model.get_parameter(reader.tensor).shape == (16, 16)
