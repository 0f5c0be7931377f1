"""Sizes in literals, then of the shelf; times only as far as they are numbers in order."""

import json

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.forms import building
from mtprune.compression.measure import sizes_of
from mtprune.compression.together import join
from mtprune.model.macs import MacCounter
from tests import nets
from tests.compression.fakes import prefer, zero_


def sparse():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0], [3, 0, 0, 0]]))
        model[0].bias.fill_(1.0)
    return model


def counted(model, x):
    sizes = sizes_of(model.eval(), [x], against=model)
    return sizes.parameters, sizes.parameters_kept, sizes.macs, sizes.macs_kept, sizes.memory


def test_literals():
    x = torch.ones(5, 4)
    assert counted(sparse(), x) == (15, 6, 60, 15, 60)
    forms = {
        # 2 x 4 weights and 2 biases; 2 places of int64 and 3 fills
        "rows": (10, 5, 40, 15, 40 + 16 + 12),
        # 2 x 2 weights and 2 biases; 2 + 2 places and 3 fills
        "thin": (6, 5, 20, 15, 24 + 32 + 12),
        # 3 values and 3 biases; 3 columns and 4 starts of int32
        "csr": (6, 6, 15, 15, 24 + 28),
    }
    for choice, expected in forms.items():
        assert counted(mtprune.compress(sparse(), x, measure=prefer(choice)), x) == expected


def test_convolutions_and_attention_count_what_they_multiply():
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight[0].zero_()
    assert counted(nn.Sequential(conv), torch.ones(1, 2, 5, 5))[2:4] == (54 * 25, 36 * 25)
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.ones(3, 5, 8)
    projections = 15 * (24 * 8 + 64 + 128 + 128)
    assert counted(attention, x)[2] == projections + 2 * 3 * 5 * 5 * 8
    lstm = nn.LSTM(3, 4)
    assert counted(lstm, torch.ones(2, 5, 3))[2] == 10 * 16 * 7


def test_a_product_without_weights_counts_in_full():
    a = torch.zeros(3, 4)
    with MacCounter([]) as counter:
        a @ a.t()
    assert (counter.macs, counter.kept) == (36, 36)


def test_side_by_side():
    model, x = sparse(), torch.ones(5, 4)
    model.train()
    fast = mtprune.compress(model, x, measure=prefer("csr"))
    sizes = mtprune.measure(fast, x, against=model)
    assert model.training
    assert (sizes.parameters, sizes.against.parameters) == (6, 15)
    assert sizes.rounds >= 20
    assert sizes.spread[0] <= sizes.ms <= sizes.spread[1]
    assert sizes.speedup == sizes.against.ms / sizes.ms
    assert sizes.against.against is None
    assert sizes.disk > sizes.memory
    lines = str(sizes).splitlines()
    assert lines[0].split() == ["before", "after", "ratio"]
    assert lines[1].split() == ["parameters", "15", "6", "2.50x"]
    assert lines[3].split() == ["multiply-adds", "60", "15", "4.00x"]
    assert lines[-1] == "(cpu, threads: 1, 21 rounds)".replace("1,", f"{torch.get_num_threads()},")
    plain = json.loads(json.dumps(mtprune.plan_of(fast).to_dict()))
    assert mtprune.Plan.from_dict(plain) == mtprune.plan_of(fast)


def test_the_plan_tells_of_the_whole_model():
    fast = mtprune.compress(sparse(), torch.ones(5, 4), measure=prefer("csr"))
    line = "whole model: parameters 15 -> 6, multiply-adds 60 -> 15, bytes 60 -> 52"
    assert line in str(mtprune.plan_of(fast)).splitlines()


@pytest.mark.parametrize("name", nets.SHELF)
def test_what_is_stored_is_no_more_and_what_counts_is_the_same(name):
    net = nets.build(name)
    x = net.make_batch(0)["x"]
    zero_(net.model, 0.7)
    net.model.eval()
    fast = mtprune.compress(net.model, x, groups=(), measure=prefer("csr"))
    sizes = mtprune.plan_of(fast).sizes
    assert sizes.parameters <= sizes.against.parameters
    assert sizes.macs_kept == sizes.against.macs_kept > 0
    assert sizes.macs <= sizes.against.macs
    assert sizes.macs_kept <= sizes.macs


@pytest.mark.skipif(bool(building.unavailable()), reason=building.unavailable())
@pytest.mark.parametrize("trained", [True, False])
def test_layers_that_run_as_one_block_count_what_their_parts_do(trained):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=48,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(trained)
    x = {"input_ids": torch.randint(0, 50, (2, 7))}
    before = mtprune.measure(model, x)
    for layer in model.encoder.layer:
        join(layer)
    after = mtprune.measure(model, x)
    assert (after.macs, after.macs_kept) == (before.macs, before.macs_kept)
    assert before.macs > 2 * 14 * (4 * 24 * 24 + 2 * 24 * 48)
    with torch.no_grad():
        model(**x)
    assert all(layer._packed.block is not None for layer in model.encoder.layer)


def test_errors():
    with pytest.raises(ValueError, match=r"`rounds` must be at least 20. Got 5"):
        mtprune.measure(sparse(), torch.ones(5, 4), rounds=5)
    with pytest.raises(ValueError, match=r"does not run on `example_inputs\[0\]`"):
        mtprune.measure(sparse(), torch.ones(5, 3))
    with pytest.raises(ValueError, match="is on meta and the model on cpu"):
        mtprune.measure(sparse(), torch.ones(5, 4, device="meta"))


def test_the_users_own_model_is_never_run_by_compress():
    model = Counting()
    mtprune.compress(model, torch.ones(2, 4), measure=prefer("csr"))
    assert model.calls == 0


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = sparse()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.lin(x)
