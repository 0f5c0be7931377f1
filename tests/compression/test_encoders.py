"""Encoders without some heads and neurons: what they say is what they said with these at 0."""

import copy

import pytest
import torch
from torch import nn

from mtprune import Head, MultitaskPruner, Neuron, Vote, compress, load, plan_of, save
from mtprune.compression.attention import NarrowAttention
from mtprune.compression.removal import remove
from mtprune.compression.verify import difference
from mtprune.patterns import Attention, FeedForward, heads, neurons
from tests import encoders
from tests.compression.fakes import prefer, zero_
from tests.encoders import HEADS, INNER, PRETRAINED, TORCH, WIDTH

SIZE = WIDTH // HEADS
ALL = {
    "none": lambda size: torch.zeros(size, dtype=torch.bool),
    "some": encoders.some,
    "all": lambda size: torch.ones(size, dtype=torch.bool),
}


def cases():
    for name in [*TORCH, *PRETRAINED]:
        for attention in ("sdpa",) if name in TORCH else ("eager", "sdpa"):
            for dead in ALL:
                yield pytest.param(name, attention, dead, id=f"{name}-{attention}-{dead}")


@pytest.mark.parametrize(("name", "attention", "dead"), list(cases()))
def test_without_units_as_with_them_at_0(name, attention, dead):
    encoder = encoders.build(name, attention)
    groups = heads(encoder.model) + neurons(encoder.model)
    encoders.zero(encoder.model, groups, ALL[dead])
    smaller = copy.deepcopy(encoder.model)
    before = sum(p.numel() for p in smaller.parameters())
    remove(smaller, groups, [encoder.inputs])
    assert difference(encoder.states(), encoder.states(smaller)) <= 1e-5
    # A head has 3 * SIZE rows and biases, and as many columns as the output has rows.
    biases = 0 if name == "ModernBert" else 1
    gated = 2 if name == "ModernBert" else 1
    head = 3 * SIZE * (WIDTH + biases) + SIZE * WIDTH
    neuron = gated * (WIDTH + biases) + WIDTH
    gone = {"none": 0, "some": 1, "all": 2}[dead] * (HEADS // 2 * head + INNER // 2 * neuron)
    assert sum(p.numel() for p in smaller.parameters()) == before - encoders.LAYERS * gone
    if dead != "all":
        found = [group.size for group in heads(smaller) + neurons(smaller)]
        left = 1 if dead == "none" else 2
        assert found == [HEADS // left] * 2 + [INNER // left] * 2
    assert all(p.requires_grad for p in smaller.parameters())


@pytest.mark.parametrize("name", [*TORCH, *PRETRAINED])
def test_it_can_be_trained_further(name):
    encoder = encoders.build(name)
    groups = heads(encoder.model) + neurons(encoder.model)
    encoders.zero(encoder.model, groups, encoders.some)
    remove(encoder.model, groups)
    states = encoder._read(encoder.model.train()(**encoder.inputs))
    (states * torch.randn_like(states))[encoder.real].sum().backward()
    without = [n for n, p in encoder.model.named_parameters() if p.grad is None]
    assert not [n for n in without if "pooler" not in n]


def rows(model, group, role, unit):
    """The rows of a unit in the weight and bias that have this role."""
    for member in group.members:
        if member.role == role and member.dim == 0:
            yield model.get_parameter(member.tensor), member.index() == unit


@torch.no_grad()
@pytest.mark.parametrize("name", ["torch", "Bert", "DistilBert"])
def test_a_head_without_values_is_a_bias(name):
    """Attention adds up to 1: what a head says is the bias of its values."""
    encoder = encoders.build(name)
    group = heads(encoder.model)[0]
    for tensor, mine in rows(encoder.model, group, "out", 1):
        if tensor.dim() > 1:
            tensor[mine] = 0
    smaller = copy.deepcopy(encoder.model)
    assert remove(smaller, [group], [encoder.inputs])
    assert heads(smaller)[0].size == HEADS - 1
    assert difference(encoder.states(), encoder.states(smaller)) <= 1e-5
    (bias,) = (
        tensor[mine] for tensor, mine in rows(encoder.model, group, "out", 1) if tensor.dim() == 1
    )
    reader = next(m.tensor for m in group.members if m.role == "in")
    out = encoder.model.get_parameter(reader)[:, SIZE : 2 * SIZE]
    name = reader.removesuffix("weight") + "bias"
    moved = smaller.get_parameter(name) - encoder.model.get_parameter(name)
    torch.testing.assert_close(moved, out @ bias, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["torch", "Bert", "ModernBert"])
def test_a_head_that_looks_everywhere_alike_stays(name):
    """Queries of 0 are not a head of 0: it averages its values."""
    encoder = encoders.build(name)
    group = heads(encoder.model)[0]
    for tensor, mine in rows(encoder.model, group, "with", 1):
        tensor[mine] = 0
    assert not remove(encoder.model, [group], [encoder.inputs])
    assert heads(encoder.model) == heads(encoders.build(name).model)


@torch.no_grad()
@pytest.mark.parametrize("probed", [True, False])
@pytest.mark.parametrize("name", ["torch", "Bert", "DistilBert"])
def test_a_neuron_that_nothing_reaches_is_a_bias(name, probed):
    """And that bias is what the activation makes of its own."""
    encoder = encoders.build(name)
    group = neurons(encoder.model)[0]
    up, down = (next(m.tensor for m in group.members if m.role == role) for role in ("out", "in"))
    encoder.model.get_parameter(up)[3] = 0
    smaller = copy.deepcopy(encoder.model)
    removal = remove(smaller, [group], [encoder.inputs] if probed else [])
    assert removal[up].after == (INNER - 1, WIDTH)
    assert difference(encoder.states(), encoder.states(smaller)) <= 1e-5
    bias = encoder.model.get_parameter(up.removesuffix("weight") + "bias")[3]
    column = encoder.model.get_parameter(down)[:, 3]
    name = down.removesuffix("weight") + "bias"
    moved = smaller.get_parameter(name) - encoder.model.get_parameter(name)
    torch.testing.assert_close(moved, column * nn.functional.gelu(bias), rtol=1e-4, atol=1e-6)


class Shared(nn.Module):
    """Heads of queries that share keys and values two by two, and a gate apart."""

    def __init__(self):
        super().__init__()
        self.head_dim, self.out_features = 2, 8
        self.q_proj, self.o_proj = nn.Linear(6, 16), nn.Linear(16, 6, bias=False)
        self.k_proj, self.v_proj = nn.Linear(6, 8), nn.Linear(6, 8)
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        x = x + self.o_proj(read.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


MINE = (
    Attention(
        "mine",
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "o_proj.weight",
        "head_dim",
        counts=("out_features",),
        only=(("head_dim", 2),),
    ),
    FeedForward("mine", up=("gate.weight", "up.weight"), down="down.weight"),
)


@torch.no_grad()
@pytest.mark.parametrize("dead", ALL)
@pytest.mark.parametrize("constant", [False, True])
def test_a_block_of_ones_own(dead, constant):
    """A head of keys and values goes with its queries; constants of both kinds are biases."""
    torch.manual_seed(0)
    model = encoders.randomize(nn.Sequential(Shared(), nn.LayerNorm(6))).eval()
    groups = heads(model, MINE) + neurons(model, MINE)
    assert [group.size for group in groups] == [4, 10]
    if constant:
        for group in groups:
            for tensor, mine in rows(model, group, "out", 1):
                if tensor.dim() > 1:
                    tensor[mine] = 0
    encoders.zero(model, groups, ALL[dead])
    x = torch.randn(64, 5, 6)
    expected = model(x)
    remove(model, groups, [x])
    assert difference(expected, model(x)) <= 1e-5
    gone = {"none": 0, "some": 2, "all": 4}[dead] + (constant and dead != "all")
    assert len(model[0].q_proj.weight) == 4 * (4 - gone)
    assert model[0].out_features == 2 * (4 - gone)


class Multitask(nn.Module):
    """A torch encoder as it comes: packed sequences, fused layers; and a head for each task."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.heads = nn.ModuleDict({"a": nn.Linear(WIDTH, 3), "b": nn.Linear(WIDTH, 1)})

    def forward(self, src, src_key_padding_mask):
        states = self.encoder(src, src_key_padding_mask=src_key_padding_mask)
        return {task: head(states[:, 0]) for task, head in self.heads.items()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("choice", ["dense", "csr", "thin"])
def test_from_vote_to_disk(choice, tmp_path):
    """Pruned by heads and neurons, without them, saved and loaded: the same outputs."""
    torch.manual_seed(0)
    model = encoders.randomize(Multitask())
    inputs = encoders.build("torch").inputs
    losses = {"a": lambda y, _: y["a"].square().mean(), "b": lambda y, _: y["b"].exp().mean()}
    units = (Head(), Neuron())
    pruner = MultitaskPruner(model, losses, "encoder", method=Vote(0.5, granularity=units))
    pruner.observe(model(**inputs), None)
    assert pruner.step()
    pruner.finalize()
    if choice != "dense":
        zero_(model, 0.7, rows=0.2)
    model.eval()
    with torch.no_grad():
        expected = model(**inputs)
        fast = compress(model, inputs, groups=units, measure=prefer(choice))
        got = fast(**inputs)
        for task in "ab":
            assert difference(expected[task], got[task]) <= 1e-5
        narrow = [layer.self_attn for layer in fast.encoder.layers]
        assert any(isinstance(attention, NarrowAttention) for attention in narrow)
        assert plan_of(fast).parameters == sum(p.numel() for p in fast.parameters())
        assert plan_of(fast).parameters < plan_of(fast).dense_parameters
        save(fast, tmp_path)
        loaded = load(tmp_path, Multitask())(**inputs)
        assert all(torch.equal(loaded[task], got[task]) for task in "ab")


def test_torch_attention_stays_torch_if_nothing_goes():
    encoder = encoders.build("torch")
    remove(encoder.model, heads(encoder.model), [encoder.inputs])
    assert not any(isinstance(m, NarrowAttention) for m in encoder.model.modules())
    assert all(layer.self_attn._qkv_same_embed_dim for layer in encoder.model.layers)
