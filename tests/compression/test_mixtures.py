"""Experts run one by one in forms of their own where that is faster, and stay in stacks if not."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import mtprune
from mtprune import Expert, Neuron, compress, load, plan_of, save
from mtprune.compression.experts import OpenExperts, can_open_experts
from mtprune.compression.forms import Form
from mtprune.compression.verify import difference
from mtprune.integrations.pretrained import save_pretrained
from mtprune.patterns import close_experts, experts, neurons
from tests import families
from tests.compression.fakes import FakeTimes, prefer
from tests.compression.test_fallback import bare
from tests.compression.test_sparse import needs_compiler
from tests.test_families import generated, outputs

__all__ = ["bare"]

NAMES = ["mixtral", "qwen3 moe", "gpt oss", "deepseek"]
FORMS = ["csr", pytest.param("sparse", marks=needs_compiler), "rank"]


def mixtures(model):
    """The experts of every block, in stacks or one by one."""
    return [m for n, m in model.named_modules() if n.endswith(".experts")]


@torch.no_grad()
def thinned(model, share=0.9, low=False):
    """A model whose experts have zeros, or low rank."""
    for module in mixtures(model):
        for stack in (module.gate_up_proj, module.down_proj):
            for matrix in stack:
                if low:
                    matrix.copy_(torch.outer(matrix[:, 0], matrix[0]))
                else:
                    matrix.mul_(torch.rand_like(matrix) >= share)
    return model


@pytest.fixture(params=NAMES)
def model(request):
    return families.build(request.param)


def routed(module, tokens=9, k=2):
    """What experts are called with."""
    width = 32
    scores = torch.rand(tokens, module.num_experts)
    chosen = scores.topk(k).indices
    return torch.randn(tokens, width), chosen, torch.rand(tokens, k)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_by_one_they_compute_what_stacks_do(model, dtype):
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped products have no such type
    module = mixtures(model.to(dtype))[-1]
    assert can_open_experts(module)
    own = OpenExperts(module)
    x, chosen, weights = routed(module)
    x, weights = x.to(dtype), weights.to(dtype)
    for rows in (slice(None), slice(1), slice(0)):
        expected = module(x[rows], chosen[rows], weights[rows])
        got = own(x[rows], chosen[rows], weights[rows])
        assert (got.dtype, got.shape) == (dtype, expected.shape)
        assert difference(expected, got) <= (2e-2 if dtype == torch.bfloat16 else 1e-6)
    # An expert that nobody chooses computes nothing, so that it cannot spoil anything either.
    own.ups[1].weight.data.fill_(torch.nan)
    others = own(x, torch.where(chosen == 1, 0, chosen), weights)
    assert bool(others.isfinite().all())


@torch.no_grad()
def test_they_go_back_into_stacks(model):
    module = mixtures(model)[-1]
    back = OpenExperts(module).closed()
    assert type(back) is type(module)
    state = back.state_dict()
    assert state.keys() == module.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
    call = routed(module)
    assert torch.equal(back(*call), module(*call))


@pytest.mark.filterwarnings("ignore:Both `max_new_tokens`", "ignore:Passing `generation`")
@pytest.mark.parametrize("choice", FORMS)
def test_forms_are_saved_and_loaded(model, choice, tmp_path):
    name = next(n for n in NAMES if type(families.build(n)) is type(model))
    thinned(model, low=choice == "rank")
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    fast = compress(model, inputs, measure=prefer(choice))
    for module in mixtures(fast):
        assert {x.choice for x in (*module.ups, *module.downs)} == {choice}
        assert not any(p.dim() == 3 for p in module.parameters())
    rows = [row for row in plan_of(fast).rows if "experts." in row.layer and "sh" not in row.layer]
    assert {row.choice for row in rows} == {choice}
    assert len(rows) == 8 * len(mixtures(fast))
    expected, got = outputs(model, others), outputs(fast, others)
    assert max(difference(expected[k], got[k]) for k in got) <= 1e-5
    save(fast, tmp_path / "own")
    save_pretrained(fast, tmp_path / "hub")
    loaded = [
        load(tmp_path / "own", families.build(name)),
        families.loader(name).from_pretrained(tmp_path / "hub"),
        load(tmp_path / "hub"),
    ]
    for net in loaded:
        assert plan_of(net).rows == plan_of(fast).rows
        assert all(torch.equal(got[k], v) for k, v in outputs(net, others).items())
    assert generated(loaded[1], inputs).tolist() == generated(model, inputs).tolist()


def test_a_plan_that_is_made_again_gives_the_same():
    model = thinned(families.build("mixtral"))
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    fast = compress(model, inputs, measure=prefer("csr"))
    plan = mtprune.Plan.from_dict(plan_of(fast).to_dict())
    again = compress(model, inputs, plan=plan)
    got = outputs(fast, others)
    assert all(torch.equal(got[k], v) for k, v in outputs(again, others).items())
    name = "model.layers.0.mlp.experts.ups.2"
    mixed = compress(model, inputs, plan=plan.replace(name, "dense"))
    assert type(mixed.get_submodule(name)) is nn.Linear
    plain = compress(model, inputs, plan=plan.replace("*", "dense"))
    assert not any(isinstance(module, OpenExperts) for module in plain.modules())
    expected = outputs(model, others)
    assert all(torch.equal(expected[k], v) for k, v in outputs(plain, others).items())


@pytest.mark.parametrize("name", ["mixtral", "gpt oss"])
def test_experts_of_which_some_are_dense(name, tmp_path):
    """What stays dense has memory of its own, and the stack goes."""
    model = families.build(name)
    with torch.no_grad():
        for stack in (mixtures(model)[0].gate_up_proj, mixtures(model)[1].down_proj):
            stack[1].mul_(torch.rand_like(stack[1]) > 0.9)
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    fast = compress(model, inputs, measure=prefer("csr"))
    first, second = mixtures(fast)
    assert [type(x).__name__ for x in first.ups] == ["Linear", "Csr", "Linear", "Linear"]
    assert [type(x).__name__ for x in second.downs] == ["Linear", "Csr", "Linear", "Linear"]
    for parameter in (*first.parameters(), *second.parameters()):
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    got, expected = outputs(fast, others), outputs(model, others)
    assert max(difference(expected[k], got[k]) for k in got) <= 1e-5
    save(fast, tmp_path / "own")
    save_pretrained(fast, tmp_path / "hub")
    for net in (
        load(tmp_path / "own", families.build(name)),
        families.loader(name).from_pretrained(tmp_path / "hub"),
    ):
        assert all(torch.equal(got[k], v) for k, v in outputs(net, others).items())


def test_a_plan_prints_experts_that_are_alike_as_one_row():
    model = families.build("mixtral")
    with torch.no_grad():
        for stack in (mixtures(model)[0].gate_up_proj, mixtures(model)[0].down_proj):
            stack[1:] *= torch.rand_like(stack[1:]) > 0.9
    plan = plan_of(compress(model, families.inputs(model), measure=prefer("csr")))
    rows = [line.split()[:3] for line in str(plan).splitlines() if "experts" in line]
    name = "model.layers.0.mlp.experts"
    assert rows == [
        [f"{name}.ups.0", "48x32", "dense"],
        [f"{name}.ups.1-3", "48x32", "csr"],
        [f"{name}.downs.0", "32x24", "dense"],
        [f"{name}.downs.1-3", "32x24", "csr"],
    ]
    ups = [row for row in plan.rows if row.layer.startswith(f"{name}.ups")]
    assert len(ups) == 4
    line = next(line for line in str(plan).splitlines() if "ups.1-3" in line)
    assert line.split()[3:] == [
        "3.00",
        "0.30",
        f"{3 * 48 * 32 * 4:,}",
        f"{sum(row.chosen.bytes for row in ups[1:]):,}",
    ]


def test_stacks_stay_where_one_by_one_is_not_faster():
    model = thinned(families.build("mixtral"))
    inputs = families.inputs(model)
    for ms, stays in ((9.6, True), (9.4, False)):
        fast = compress(model, inputs, measure=FakeTimes(csr=0.1, dense=10.0, experts=ms))
        plan = plan_of(fast)
        assert any(isinstance(module, OpenExperts) for module in fast.modules()) != stays
        assert any(".ups." in row.layer for row in plan.rows) != stays
        told = (
            "2 mixtures of experts stay in stacks: they took 20.00 ms, and 19.20 ms one by one in "
            "the fastest forms."
        )
        assert (told in plan.note) == stays
    dense = compress(families.build("mixtral"), inputs, measure=prefer("csr"))
    assert not any(isinstance(module, OpenExperts) for module in dense.modules())
    assert plan_of(dense).note == "Nothing to compress: no weight of a layer is zero."


def test_experts_that_the_examples_do_not_reach_take_forms_too():
    model = thinned(families.build("qwen3 moe"))
    inputs = {"input_ids": torch.tensor([[3]])}  # one token goes to two of four experts
    fast = compress(model, inputs, measure=prefer("csr"))
    for module in mixtures(fast):
        assert {x.choice for x in (*module.ups, *module.downs)} == {"csr"}


@pytest.mark.parametrize("name", ["mixtral", "gpt oss"])
def test_after_experts_and_neurons_are_gone(name, tmp_path):
    model = thinned(families.build(name), 0.8)
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    close_experts(model)
    with torch.no_grad():
        gone = experts(model)[0]
        model.get_parameter(gone.gate.tensor)[[0, 3]] = 0
        for group in (g for g in neurons(model) if "layers.1" in g.name):
            for member in group.members:
                tensor = model.get_parameter(member.tensor)
                if "bias" not in member.tensor or member.role == "out":
                    index = [i for i, unit in enumerate(member.units) if unit in (0, 2)]
                    tensor.index_fill_(member.dim, torch.tensor(index), 0.0)
    fast = compress(model, inputs, groups=(Expert(), Neuron()), measure=prefer("csr"))
    assert len(mixtures(fast)[0].ups) == 2
    assert mixtures(fast)[0].num_experts == 2
    assert plan_of(fast).removal
    got, expected = outputs(fast, others), outputs(model, others)
    assert max(difference(expected[k], got[k]) for k in got) <= 1e-5
    save_pretrained(fast, tmp_path)
    loaded = families.loader(name).from_pretrained(tmp_path)
    assert all(torch.equal(got[k], v) for k, v in outputs(loaded, others).items())


def test_portable_ones_stay_in_stacks_and_others_name_themselves():
    model = thinned(families.build("mixtral"), low=True)
    inputs = families.inputs(model)
    assert plan_of(compress(model, inputs, measure=prefer("rank"), portable=True)).rows
    for module in mixtures(compress(model, inputs, measure=prefer("rank"), portable=True)):
        assert not isinstance(module, OpenExperts)
    fast = compress(model, inputs, measure=prefer("rank"))
    with pytest.raises(Exception, match=r"experts of 'model\.layers\.0\.mlp\.experts' run one"):
        torch.export.export(fast, (), inputs, strict=False)


@needs_compiler
@pytest.mark.parametrize("name", ["mixtral", "gpt oss"])
def test_without_a_compiler_they_are_stacks_again(name, bare, tmp_path):
    model = thinned(families.build(name))
    inputs, others = families.inputs(model), families.inputs(model, 1, 3, 9)
    fast = compress(model, inputs, measure=prefer("sparse"))
    save(fast, tmp_path / "own")
    save_pretrained(fast, tmp_path / "hub")
    bare()
    expected = outputs(model, others)
    with pytest.warns(UserWarning, match="16 layers are dense here, because this machine lacks"):
        loaded = [load(tmp_path / "own", families.build(name))]
    with pytest.warns(UserWarning, match="16 layers are dense here, because this machine lacks"):
        loaded.append(families.loader(name).from_pretrained(tmp_path / "hub"))
    for net in loaded:
        assert not any(isinstance(module, (OpenExperts, Form)) for module in net.modules())
        assert all(torch.equal(expected[k], v) for k, v in outputs(net, others).items())
    save(loaded[0], tmp_path / "again")
    again = load(tmp_path / "again", families.build(name))
    assert all(torch.equal(expected[k], v) for k, v in outputs(again, others).items())


@pytest.mark.parametrize("name", ["mixtral", "gpt oss"])
def test_code_without_mtprune_does_not_load_something_else(name, tmp_path):
    model = thinned(families.build(name))
    save_pretrained(compress(model, families.inputs(model), measure=prefer("csr")), tmp_path)
    code = (
        "import sys, transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "gate_up_proj" in done.stderr


def test_what_is_not_known_to_compute_what_it_must_stays_in_stacks():
    model = families.build("mixtral")
    (module, hooked) = mixtures(model)
    assert can_open_experts(module)
    hooked.register_forward_hook(lambda *_: None)
    assert not can_open_experts(hooked)
    module.register_parameter("scale", nn.Parameter(torch.ones(4)))
    assert not can_open_experts(module)
    own = nn.Module()
    own.num_experts, own.has_bias, own.is_transposed = 4, False, False
    own._apply_gate = own.forward = lambda x: x
    own.gate_up_proj, own.down_proj = (nn.Parameter(torch.ones(4, *s)) for s in ((8, 4), (4, 4)))
    assert not can_open_experts(own)


def test_multiply_adds_of_stacks_are_counted_however_they_are_multiplied():
    found = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = families.build("mixtral")
        model.set_experts_implementation(implementation)
        found.append(mtprune.measure(model, families.inputs(model)).macs)
    assert found[0] == found[1] == found[2]
    opened = thinned(families.build("mixtral"), 0.0)
    for block in opened.model.layers:
        block.mlp.experts = OpenExperts(block.mlp.experts)
    assert mtprune.measure(opened, families.inputs(opened)).macs == found[0]
