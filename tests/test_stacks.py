"""Stacks of experts' matrices are pruned as if each matrix were a Linear of its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mtprune
from mtprune import NM, Block, Cubic, LowRank, MultitaskPruner, Vote, testing
from mtprune.allocation import PerOutput
from mtprune.model.layers import find_layers
from mtprune.model.layout import Layout, layout_of
from mtprune.model.macs import macs_per_weight
from tests import families

EXPERTS, WIDTH, HIDDEN = 3, 8, 12
TASKS = ["a", "b"]


class Stacks(nn.Module):
    """Experts in two tensors, either way around."""

    def __init__(self, transposed):
        super().__init__()
        self.num_experts, self.is_transposed = EXPERTS, transposed
        self.up_proj, self.down_proj = (
            nn.Parameter(torch.empty(EXPERTS, *(shape[::-1] if transposed else shape)))
            for shape in ((HIDDEN, WIDTH), (WIDTH, HIDDEN))
        )

    def forward(self, x, expert):
        matrices = self.up_proj[expert], self.down_proj[expert]
        up, down = (w.t() if self.is_transposed else w for w in matrices)
        return F.linear(F.linear(x, up).relu(), down)


class Written(nn.Module):
    """The same, a Linear for each matrix."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.ModuleList(nn.Linear(WIDTH, HIDDEN, False) for _ in range(EXPERTS))
        self.down_proj = nn.ModuleList(nn.Linear(HIDDEN, WIDTH, False) for _ in range(EXPERTS))

    def forward(self, x, expert):
        return self.down_proj[expert](self.up_proj[expert](x).relu())


class Net(nn.Module):
    """All experts in a row, and a head for each task."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        self.heads = nn.ModuleDict({task: nn.Linear(WIDTH, 3) for task in TASKS})

    def forward(self, x):
        for expert in range(EXPERTS):
            x = x + self.experts(x, expert)
        return {task: head(x) for task, head in self.heads.items()}


def nets(transposed):
    """A net with stacks, and the same written out."""
    torch.manual_seed(0)
    written, stacked = Net(Written()), Net(Stacks(transposed))
    stacked.heads = copy.deepcopy(written.heads)
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            matrices = torch.stack([x.weight for x in getattr(written.experts, name)])
            stack = getattr(stacked.experts, name)
            stack.copy_(matrices.transpose(1, 2) if transposed else matrices)
    return stacked, written


def train(net, method, backend="inplace", steps=1, lr=0.1):
    optimizer = torch.optim.SGD(net.parameters(), lr)
    pruner = MultitaskPruner(net, TASKS, net, method=method, backend=backend, optimizer=optimizer)
    data = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        out = net(torch.randn(16, WIDTH, generator=data))
        losses = pruner.observe_losses({"a": out["a"].square().mean(), "b": out["b"].sin().mean()})
        sum(losses.values()).backward()
        optimizer.step()
        pruner.step()
    return pruner


def together(tensors, transposed):
    """The tensors of a net that is written out, in stacks."""
    found = {}
    for name in ("up_proj", "down_proj"):
        matrices = [tensors[f"experts.{name}.{i}.weight"] for i in range(EXPERTS)]
        stack = torch.stack(matrices)
        found[f"experts.{name}"] = stack.transpose(1, 2) if transposed else stack
    return {**{k: v for k, v in tensors.items() if k.startswith("heads")}, **found}


WAY = pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])


@WAY
@pytest.mark.parametrize(
    "method",
    [
        Vote(granularity=NM(2, 4)),
        Vote(granularity=NM(1, 2), schedule=Cubic(begin=0, end=4, every=2)),
        Vote(0.6, granularity=Block(2, 3)),
        Vote(0.6, granularity=Block(5, 2), allocation="erk", min_keep=2),
        Vote(0.6, granularity=Block(4, 1), allocation="uniform"),
        Vote(mtprune.PerTaskKeep(0.5), granularity=Block(2, 2)),
        Vote(0.7, granularity=Block(1, 4), schedule=Cubic(begin=0, end=4, every=2)),
        Vote(0.5, allocation=PerOutput()),
    ],
    ids=[
        "nm",
        "nm-later",
        "block",
        "block-erk",
        "block-uniform",
        "block-per-task",
        "block-later",
        "outputs",
    ],
)
def test_masks_are_those_of_one_linear_for_each_expert(method, transposed, backend):
    stacked, written = nets(transposed)
    steps = 5 if isinstance(method.schedule, Cubic) else 1
    masks = train(stacked, method, backend, steps).masks
    expected = together(train(written, method, backend, steps).masks, transposed)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    assert not all(mask.all() for mask in masks.values())


def test_a_pattern_runs_along_the_inputs_of_gpt_oss():
    model = families.build("gpt oss")
    ids = families.inputs(model)["input_ids"]
    pruner = MultitaskPruner(model, TASKS, model, method=Vote(granularity=NM(2, 4)))
    logits = model(ids).logits
    pruner.observe_losses({"a": logits.sin().mean(), "b": logits.square().mean()})
    pruner.step()
    pruner.finalize()
    for block in model.model.layers:
        for stack in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            kept = (stack != 0).unflatten(1, (-1, 4)).sum(2)  # [experts, inputs, outputs]
            assert bool((kept == 2).all())
            assert not bool(((stack != 0).unflatten(2, (-1, 4)).sum(3) == 2).all())


@pytest.mark.parametrize(
    ("name", "tensor", "inputs"),
    [
        ("mixtral", "experts.gate_up_proj", (2, 32)),
        ("mixtral", "experts.down_proj", (2, 24)),
        ("qwen3 moe", "experts.down_proj", (2, 24)),
        ("gpt oss", "experts.gate_up_proj", (1, 32)),
        ("gpt oss", "experts.down_proj", (1, 24)),
        ("gpt2", "mlp.c_fc.weight", (0, 32)),
        ("llama", "mlp.down_proj.weight", (1, 24)),
    ],
)
def test_which_dimension_of_a_weight_is_the_inputs(name, tensor, inputs):
    layers = [x for x in find_layers(families.build(name)) if x.name.endswith(tensor)]
    assert len(layers) == 2
    assert {(x.layout.inputs, x.shape[x.layout.inputs]) for x in layers} == {inputs}


def test_inputs_of_stacks_that_do_not_tell_are_told_by_their_number():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_local_experts": 4}
    module = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    experts = module.Llama4TextExperts(transformers.Llama4TextConfig(**sizes))
    assert not hasattr(experts, "is_transposed")
    for name, parameter in experts.named_parameters():
        assert layout_of(experts, name, parameter.shape) == Layout(stacked=True, transposed=True)
    usual = nn.Module()
    usual.num_experts, usual.hidden_dim = 4, 8
    assert layout_of(usual, "gate_up_proj", (4, 32, 8)) == Layout(stacked=True)
    assert layout_of(usual, "down_proj", (4, 8, 16)) == Layout(stacked=True)
    assert layout_of(usual, "down_proj", (4, 8, 8)) == Layout(stacked=True)
    assert layout_of(usual, "down_proj", (3, 8, 16)) == Layout()


def test_one_expert_is_a_stack_too():
    only = nn.Module()
    only.num_experts, only.is_transposed = 1, True
    only.up_proj = nn.Parameter(torch.randn(1, 8, 4))
    only.forward = lambda x: {"a": (x @ only.up_proj[0]).sin()}
    (layer,) = find_layers(only)
    assert (layer.matrices, layer.layout.inputs) == (1, 1)
    pruner = MultitaskPruner(only, ["a"], method=Vote(granularity=NM(2, 4)))
    pruner.observe_losses({"a": only.forward(torch.randn(5, 8))["a"].mean()})
    pruner.step()
    assert pruner.masks["up_proj"].unflatten(1, (2, 4)).sum(2).unique().tolist() == [2]


def test_blocks_of_a_conv1d_are_outputs_by_inputs():
    """Its weight is transposed, and its blocks are those of the Linear that computes the same."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    conv1d = transformers.pytorch_utils.Conv1D(6, 8)
    linear = nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight.copy_(conv1d.weight.t())
        linear.bias.copy_(conv1d.bias)
    x, found = torch.randn(5, 8), []
    for layer in (conv1d, linear):
        net = nn.Sequential(layer)
        pruner = MultitaskPruner(net, ["a"], method=Vote(0.5, granularity=Block(3, 2)))
        pruner.observe_losses({"a": net(x).sin().mean()})
        pruner.step()
        found.append(pruner.masks["0.weight"])
    assert torch.equal(found[0], found[1].t())


# --- Ranks ---------------------------------------------------------------------------------------


def ranks(matrices):
    return [int(torch.linalg.matrix_rank(m.double(), rtol=1e-5)) for m in matrices]


@WAY
@pytest.mark.parametrize(
    "method",
    [
        LowRank(0.5),
        LowRank(0.6, floor=0.0, min_rank=0, disentangled=False),
        LowRank(0.5, schedule=Cubic(begin=0, end=4, every=2)),
        LowRank(0.5, "learned", schedule=Cubic(begin=0, end=4, every=1)),
    ],
    ids=["static", "joint", "gradual", "learned"],
)
def test_each_expert_has_the_rank_of_one_linear(method, transposed, backend):
    stacked, written = nets(transposed)
    pruner = train(stacked, method, backend, 6, lr=1e-3)
    other = train(written, method, backend, 6, lr=1e-3)
    expected = together(dict(written.named_parameters()), transposed)
    for name, weight in expected.items():
        got = stacked.get_parameter(name)
        torch.testing.assert_close(got, weight, rtol=1e-4, atol=1e-5)
    rows, single = pruner.report().layers, {row.name: row for row in other.report().layers}
    for row in rows:
        if row.name.startswith("experts"):
            mine = [single[f"{row.name}.{i}.weight"] for i in range(EXPERTS)]
            assert row.rank == sum(one.rank for one in mine)
            assert row.full_rank == sum(one.full_rank for one in mine) == 8 * EXPERTS
            assert row.kept == sum(one.kept for one in mine)
            found = ranks(stacked.get_parameter(row.name).detach())
            assert found == [one.rank for one in mine]
    assert pruner.sparsity == other.sparsity > 0.4


@pytest.mark.parametrize("gates", ["saliency", "learned"])
def test_ranks_of_stacks_go_on_from_a_checkpoint(gates, tmp_path):
    method = LowRank(0.5, gates, schedule=Cubic(begin=1, end=6, every=1))

    def run(net, pruner, optimizer, start, end):
        for step in range(start, end):
            data = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            out = net(torch.randn(16, WIDTH, generator=data))
            losses = pruner.observe_losses({"a": out["a"].square().mean(), "b": out["b"].mean()})
            sum(losses.values()).backward()
            optimizer.step()
            pruner.step()

    def made():
        net, _ = nets(True)
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        pruner = MultitaskPruner(net, TASKS, net, method=method, optimizer=optimizer)
        return net, pruner, optimizer

    straight = made()
    run(*straight, 0, 4)
    torch.save([x.state_dict() for x in straight], tmp_path / "state.pt")
    run(*straight, 4, 10)
    resumed = made()
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for thing, state in zip(resumed, states, strict=True):
        thing.load_state_dict(state)
    run(*resumed, 4, 10)
    for mine, other in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(mine, other)
    assert straight[1].report().layers == resumed[1].report().layers
    assert straight[1].sparsity >= 0.5


@pytest.mark.parametrize("name", ["mixtral", "qwen3 moe", "gpt oss", "deepseek"])
def test_ranks_of_transformers_experts(name):
    model = families.build(name)
    inputs = families.inputs(model, 0, 4, 9)
    pruner = MultitaskPruner(model, TASKS, model, method=LowRank(0.5))
    logits = model(**inputs).logits
    pruner.observe_losses({"a": logits.sin().mean(), "b": logits.square().mean()})
    pruner.step()
    pruner.finalize()
    stacks = [row for row in pruner.report().layers if row.name.endswith("experts.down_proj")]
    assert stacks
    for row in stacks:
        weight = model.get_parameter(row.name).detach()
        assert sum(ranks(weight)) <= row.rank < row.full_rank
        assert row.full_rank == 4 * min(weight.shape[1:])
    saved = pruner.report().parameters - sum(row.kept for row in pruner.report().layers)
    assert 0 <= saved - round(0.5 * pruner.report().parameters) < 100


def test_the_checks_of_methods_know_stacks():
    def made():
        stacked, _ = nets(False)

        def batch(step):
            data = torch.Generator().manual_seed(step)
            return {"x": torch.randn(8, WIDTH, generator=data)}

        losses = {task: (lambda out, _, task=task: out[task].square().mean()) for task in TASKS}
        return testing.Net(stacked, losses, [stacked.experts], batch)

    for method in (LowRank(0.5), Vote(0.5, granularity=Block(2, 2))):
        testing.check_exact_count(method, nets={"stacks": made})


def test_a_budget_of_multiply_adds_knows_experts():
    """Each token is sent to two of four, so their weights cost half of what others do."""
    model = families.build("mixtral")
    inputs = families.inputs(model)
    layers = find_layers(model)
    costs = dict(zip((x.name for x in layers), macs_per_weight(model, layers, inputs), strict=True))
    tokens = inputs["input_ids"].numel()
    assert costs["model.layers.0.mlp.experts.down_proj"] == tokens / 2
    assert costs["model.layers.0.self_attn.q_proj.weight"] == tokens
    for method in (
        LowRank(0.3, budget_unit="macs", example_inputs=inputs),
        Vote(macs=0.5, granularity=Block(4, 4), example_inputs=inputs),
    ):
        model = families.build("mixtral")
        pruner = MultitaskPruner(model, TASKS, model, method=method)
        logits = model(**inputs).logits
        pruner.observe_losses({"a": logits.sin().mean(), "b": logits.square().mean()})
        pruner.step()
        share = 0.3 if isinstance(method, LowRank) else 0.5
        assert share <= pruner.report().macs_sparsity < share + 0.05
