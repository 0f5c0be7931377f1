"""Kinds that transformers has of its own: Conv1D, and stacks with a matrix for each expert."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mtprune import (
    Cubic,
    MultitaskPruner,
    Regrow,
    SoftThreshold,
    Vote,
    compress,
    load,
    plan_of,
    save,
)
from mtprune.allocation import Budget, Erk
from mtprune.compression.verify import difference
from mtprune.integrations.pretrained import save_pretrained
from mtprune.model.layers import find_layers
from mtprune.model.macs import macs_per_weight
from tests import families
from tests.compression.fakes import FakeTimes
from tests.test_families import dense, outputs

NAMES = ["gpt2", "mixtral", "gpt oss"]
TASKS = ["a", "b"]


def losses(model, inputs):
    logits = model(**inputs).logits
    return {"a": logits.sin().mean(), "b": logits.square().mean()}


def foreign(model):
    """The matrices of these kinds, by name."""
    return {
        name: p
        for name, p in model.named_parameters()
        if ("c_" in name and name.endswith("weight"))
        or name.endswith(("gate_up_proj", "down_proj"))
    }


def test_literal_candidates():
    model = families.build("gpt2")
    first = [x.name for x in find_layers(model) if x.name.startswith("transformer.h.0.")]
    assert first == [
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    stacks = {x.name: x.matrices for x in find_layers(families.build("gpt oss"))}
    assert stacks["model.layers.0.mlp.experts.gate_up_proj"] == 4
    assert stacks["model.layers.0.mlp.experts.down_proj"] == 4
    assert stacks["model.layers.0.self_attn.q_proj.weight"] == 1
    assert not [name for name in stacks if name.endswith("bias")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "method",
    [
        Vote(0.75, schedule=Cubic(begin=1, end=3, every=1)),
        Vote(0.75, schedule=Regrow(every=1, end=3)),
        SoftThreshold(0.75, schedule=Cubic(begin=1, end=3, every=1)),
    ],
    ids=["vote", "regrow", "thresholds"],
)
def test_every_element_method_prunes_them(name, method, backend):
    if isinstance(method, SoftThreshold) and name != "mixtral":
        pytest.skip("one stack is enough")
    model = families.build(name)
    inputs = families.inputs(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner = MultitaskPruner(
        model, TASKS, model, method=method, optimizer=optimizer, backend=backend
    )
    for _ in range(4):
        optimizer.zero_grad()
        observed = pruner.observe_losses(losses(model, inputs))
        sum(observed.values()).backward()
        optimizer.step()
        pruner.step()
    masked = outputs(model, inputs)
    pruner.finalize()
    assert all(torch.equal(masked[k], v) for k, v in outputs(model, inputs).items())
    masks = pruner.masks
    assert foreign(model).keys() <= masks.keys()
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert total - kept == round(0.75 * total)
    assert all(not bool(model.get_parameter(k)[~m].any()) for k, m in masks.items())
    if name == "gpt2":
        assert pruner.report().coverage == 1.0
    else:
        assert pruner.report().coverage > 0.97  # routers are left alone, and told
        assert all("gate" in k or "router" in k for k in pruner.report().left_alone if "mlp" in k)


@pytest.mark.parametrize("name", NAMES)
def test_sparse_ones_are_compressed_saved_and_loaded(name, tmp_path):
    model = families.build(name)
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    with torch.no_grad():
        for parameter in foreign(model).values():
            parameter.mul_(torch.rand_like(parameter) > 0.5)
    fast = compress(model, inputs, measure=dense)
    expected = outputs(model, others)
    save(fast, tmp_path / "own")
    save_pretrained(fast, tmp_path / "hub")
    loaded = [
        fast,
        load(tmp_path / "own", families.build(name)),
        families.loader(name).from_pretrained(tmp_path / "hub"),
    ]
    for net in loaded:
        got = outputs(net, others)
        assert all(torch.equal(expected[k], got[k]) for k in expected)


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_another_kind_of_linear_takes_other_forms(name, tmp_path):
    """Conv1D, whose weight is transposed, and Falcon's: sparse, and as two layers."""
    model = families.build(name)
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    ends = ("c_attn.weight", "query_key_value.weight")
    layers = [x for x in find_layers(model) if x.name.endswith(ends)]
    zeros, low = layers[0].parameter, layers[1].parameter
    with torch.no_grad():
        zeros.mul_(torch.rand_like(zeros) > 0.9)
        low.copy_(torch.outer(low[:, 0], low[0]))
    names = [layer.name.removesuffix(".weight") for layer in layers]
    fast = compress(model, inputs, measure=FakeTimes(csr=1.0, rank=2.0))
    assert [plan_of(fast)[name].choice for name in names] == ["csr", "rank"]
    expected = outputs(model, others)
    got = outputs(fast, others)
    assert max(difference(expected[k], got[k]) for k in expected) <= 1e-5
    save(fast, tmp_path / "own")
    save_pretrained(fast, tmp_path / "hub")
    for net in (
        load(tmp_path / "own", families.build(name)),
        families.loader(name).from_pretrained(tmp_path / "hub"),
    ):
        again = outputs(net, others)
        assert all(torch.equal(got[k], again[k]) for k in got)


@torch.no_grad()
def test_a_plan_that_does_not_tell_of_another_kind_of_linear_leaves_it_dense():
    model = families.build("gpt2")
    inputs = families.inputs(model)
    plan = plan_of(compress(model, inputs, measure=dense))
    older = replace(plan, rows=tuple(row for row in plan.rows if ".h." not in row.layer))
    assert len(older.rows) < len(plan.rows)
    again = compress(model, inputs, plan=older)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_multiply_experts_sees_the_mask(implementation, backend):
    model = families.build("mixtral")
    model.set_experts_implementation(implementation)
    inputs = families.inputs(model)
    pruner = MultitaskPruner(model, TASKS, model, method=Vote(0.9), backend=backend)
    pruner.observe_losses(losses(model, inputs))
    assert pruner.step()
    masked = outputs(model, inputs)["output['logits']"]
    baked = copy.deepcopy(model)
    pruner.finalize()
    for name, mask in pruner.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    assert torch.equal(masked, outputs(model, inputs)["output['logits']"])
    assert torch.equal(masked, outputs(baked, inputs)["output['logits']"])


def test_a_stack_is_as_many_layers_as_it_has_matrices():
    """Four matrices in one tensor get what four layers of their shape get."""
    apart = Budget([(8, 4)] * 4 + [(16, 16)], ["shared"] * 5, 96, [32] * 4 + [256])
    together = Budget([(4, 8, 4), (16, 16)], ["shared"] * 2, 96, [128, 256], matrices=[4, 1])
    counts = Erk().counts(apart)
    assert Erk().counts(together) == [sum(counts[:4]), counts[4]]
    assert together.part([0], 10).matrices == [4]


def test_multiply_adds_of_a_conv1d():
    model = families.build("gpt2")
    layers = [x for x in find_layers(model) if "c_fc" in x.name]
    inputs = families.inputs(model)
    assert macs_per_weight(model, layers, inputs) == [inputs["input_ids"].numel()] * 2


def test_what_only_looks_like_one_is_none():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_experts = 4
            self.states = nn.Parameter(torch.ones(3, 4, 2))
            self.states_bias = nn.Parameter(torch.ones(4, 3, 2))

    model = nn.ModuleList([Conv1D(), Table(), nn.Linear(2, 2)])
    assert [layer.name for layer in find_layers(model)] == ["2.weight"]
