"""Components: what is pruned by default, how layers are named, and who shares them."""

from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations

from mtprune import MultitaskPruner, Vote
from mtprune.model.components import Declared, assign, declare
from mtprune.model.layers import find_layers
from mtprune.model.names import strip, unwrap


def names(model, **options):
    return [layer.name for layer in find_layers(unwrap(model), **options)]


def held(model, spec, **options):
    """The layers each component holds."""
    found = {}
    for declared in declare(model, find_layers(model, **options), spec):
        found.setdefault(declared.component, []).extend(declared.names)
    return found


class Net(nn.Module):
    """Two stages, a norm, an embedding, a bare Parameter and two heads."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 4))
        self.table = nn.Embedding(8, 4)
        self.trunk = nn.Sequential(
            OrderedDict(
                stem=nn.Linear(4, 6),
                norm=nn.LayerNorm(6),
                act=nn.Tanh(),
                body=nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]),
            )
        )
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in ("a", "b")})

    def forward(self, batch):
        hidden = (self.table(batch["id"]) + batch["x"] @ self.scale).tanh()
        hidden = self.trunk.act(self.trunk.norm(self.trunk.stem(hidden)))
        for layer in self.trunk.body:
            hidden = layer(hidden).tanh()
        return {task: head(hidden) for task, head in self.heads.items()}


TRUNK = ["trunk.stem.weight", "trunk.body.0.weight", "trunk.body.1.weight"]
HEADS = ["heads.a.weight", "heads.b.weight"]

LOSSES = {
    "a": lambda out, batch: (out["a"] - batch["x"].sum(1, keepdim=True)).square().mean(),
    "b": lambda out, batch: (out["b"] - batch["x"].prod(1, keepdim=True)).square().mean(),
}


def make_batch(device, size=16):
    return {
        "x": torch.randn(size, 4, device=device),
        "id": torch.randint(8, (size,), device=device),
    }


# What is pruned by default.

KINDS = {
    "linear": (lambda: nn.Linear(3, 4), ["weight"]),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), ["weight"]),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), ["weight"]),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), ["weight"]),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), ["weight"]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3), ["weight"]),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), ["weight"]),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 3), ["weight"]),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 3), ["weight"]),
    "rnn": (lambda: nn.RNN(2, 3), ["weight_ih_l0", "weight_hh_l0"]),
    "gru of two layers": (
        lambda: nn.GRU(2, 3, num_layers=2),
        ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"],
    ),
    "lstm with projection, bidirectional": (
        lambda: nn.LSTM(2, 4, proj_size=3, bidirectional=True),
        [
            "weight_ih_l0",
            "weight_hh_l0",
            "weight_hr_l0",
            "weight_ih_l0_reverse",
            "weight_hh_l0_reverse",
            "weight_hr_l0_reverse",
        ],
    ),
    "rnn cell": (lambda: nn.RNNCell(2, 3), ["weight_ih", "weight_hh"]),
    "lstm cell": (lambda: nn.LSTMCell(2, 3), ["weight_ih", "weight_hh"]),
    "gru cell": (lambda: nn.GRUCell(2, 3), ["weight_ih", "weight_hh"]),
    "attention": (lambda: nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
    "attention with kdim and vdim": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "subclass of linear": (lambda: type("Mine", (nn.Linear,), {})(3, 4), ["weight"]),
}

NEVER = {
    "batch norm": lambda: nn.BatchNorm2d(3),
    "instance norm": lambda: nn.InstanceNorm1d(3, affine=True),
    "layer norm": lambda: nn.LayerNorm((3, 4)),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "rms norm": lambda: nn.RMSNorm(4),
}

UNASKED = {
    "embedding": lambda: nn.Embedding(5, 3),
    "embedding bag": lambda: nn.EmbeddingBag(5, 3),
    "prelu": lambda: nn.PReLU(3),
    "parameter list": lambda: nn.ParameterList([torch.ones(2, 2)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_this_kind_are_pruned_and_biases_are_not(kind):
    make, expected = KINDS[kind]
    assert names(make()) == expected
    assert names(nn.ModuleDict({"x": make()})) == ["x." + name for name in expected]


@pytest.mark.parametrize("kind", [*NEVER, *UNASKED])
def test_this_kind_is_not_pruned_by_default(kind):
    assert names((NEVER | UNASKED)[kind]()) == []


@pytest.mark.parametrize("kind", NEVER)
def test_norms_are_not_pruned_whoever_asks(kind):
    model = nn.ModuleDict({"norm": NEVER[kind](), "x": nn.Linear(2, 2)})
    for spec in ("*", [*model.parameters()]):
        assert names(model, include=spec) == ["x.weight"]
    for spec in ("norm", model["norm"], model["norm"].weight, "norm.weight", ["x", "norm.weight"]):
        with pytest.raises(ValueError, match=r"`include` names 'norm.*, which is a bias or"):
            names(model, include=spec)


@pytest.mark.parametrize("kind", KINDS)
def test_biases_are_not_pruned_whoever_asks(kind):
    make, expected = KINDS[kind]
    model = nn.ModuleDict({"x": make()})
    assert names(model, include="x") == ["x." + name for name in expected]
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    for spec in (biases, "x.*bias*") if biases else ():
        with pytest.raises(ValueError, match=r"`include` names 'x.*bias.*', which is a bias"):
            names(model, include=spec)


def test_a_layer_without_weights_is_no_layer():
    model = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2))
    model[0].weight = nn.Parameter(torch.empty(3, 0))
    assert names(model) == ["1.weight"]


# include and exclude.

SPECS = {
    "module": lambda m: m.table,
    "parameter": lambda m: m.table.weight,
    "name of a module": lambda m: "table",
    "name of a parameter": lambda m: "table.weight",
    "glob": lambda m: "tab*",
    "glob over parameters": lambda m: "*able.weight",
    "callable": lambda m: lambda model: model.table,
    "callable giving a name": lambda m: lambda model: ["table"],
    "list": lambda m: [m.table],
    "nested list": lambda m: [[m.table], ["table.weight"]],
    "generator": lambda m: (p for p in m.table.parameters()),
    "wrapper prefixes": lambda m: "module._orig_mod.table",
}


@pytest.mark.parametrize("form", SPECS)
def test_include_takes_every_form(form):
    model = Net()
    assert names(model) == [*TRUNK, *HEADS]
    assert names(model, include=SPECS[form](model)) == ["table.weight", *TRUNK, *HEADS]


@pytest.mark.parametrize("form", SPECS)
def test_exclude_takes_every_form_and_wins_over_include(form):
    model = Net()
    spec = SPECS[form](model)
    found = names(model, include=["table", model.scale], exclude=spec)
    assert found == ["scale", *TRUNK, *HEADS]


def test_include_of_a_bare_parameter_and_of_a_parameter_list():
    model = nn.ModuleDict({"x": nn.Linear(2, 2), "more": nn.ParameterList([torch.ones(2, 2)] * 2)})
    model.own = nn.Parameter(torch.ones(3, 3))
    assert names(model, include=model.own) == ["own", "x.weight"]
    assert names(model, include="own") == ["own", "x.weight"]
    assert names(model, include=model["more"]) == ["x.weight", "more.0", "more.1"]
    assert names(model, include="more.1") == ["x.weight", "more.1"]


def test_include_of_what_is_pruned_anyway_changes_nothing():
    model = Net()
    assert names(model, include=[model.trunk, "heads.a.weight"]) == [*TRUNK, *HEADS]


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        ("trunk", HEADS),
        ("trunk.body.*", [TRUNK[0], *HEADS]),
        (["heads.a", "trunk.body.1"], [*TRUNK[:2], HEADS[1]]),
        ("*.weight", []),
    ],
    ids=["a subtree", "a glob", "a list", "everything"],
)
def test_exclude_takes_subtrees(spec, left):
    assert names(Net(), exclude=spec) == left


def odd_net():
    """A model with a part that computes its weight, so that it cannot be pruned."""
    return nn.ModuleDict(
        {"odd": parametrizations.weight_norm(nn.Linear(4, 4)), "plain": nn.Linear(4, 4)}
    )


@pytest.mark.parametrize(
    "spec",
    [
        lambda m: m["odd"],
        lambda m: [m["odd"]],
        lambda m: "odd",
        lambda m: "o*",
        lambda m: "module.odd",
        lambda m: lambda model: model["odd"],
        lambda m: (x for x in (m["odd"],)),
    ],
    ids=["module", "list", "name", "glob", "wrapper prefix", "callable", "generator"],
)
def test_exclude_in_every_form_lets_a_model_through_that_has_an_unprunable_part(spec):
    model = odd_net()
    assert names(model, exclude=spec(model)) == ["plain.weight"]


# shared_modules.


@pytest.mark.parametrize(
    "spec",
    [
        lambda m: m.trunk,
        lambda m: [m.trunk],
        lambda m: [m.trunk.stem, [m.trunk.body[0], (m.trunk.body[1],)]],
        lambda m: [m.trunk.stem.weight, m.trunk.body[0].weight, m.trunk.body[1].weight],
        lambda m: "trunk",
        lambda m: "tr?nk",
        lambda m: ["trunk.stem", "trunk.body"],
        lambda m: "trunk.*.weight",
        lambda m: "module.trunk",
        lambda m: "_orig_mod.trunk.*",
        lambda m: lambda model: model.trunk,
        lambda m: lambda model: ["trunk"],
        lambda m: [lambda model: model.trunk],
        lambda m: (x for x in (m.trunk.stem, m.trunk.body)),
        lambda m: {"shared": m.trunk},
        lambda m: [m.trunk, m.trunk.stem],
    ],
    ids=[
        "module",
        "list",
        "nested list",
        "parameters",
        "name",
        "glob over modules",
        "names",
        "glob over parameters",
        "module. prefix",
        "_orig_mod. prefix",
        "callable",
        "callable giving names",
        "callable in a list",
        "generator",
        "mapping",
        "named twice",
    ],
)
def test_shared_modules_takes_every_form(spec):
    model = Net()
    found = held(model, spec(model))
    assert list(found) == ["shared"]
    assert list(dict.fromkeys(found["shared"])) == TRUNK


def test_shared_modules_as_a_mapping_makes_one_component_each():
    model = Net()
    spec = {"low": "trunk.stem", "high": [model.trunk.body[0], model.trunk.body[1].weight]}
    assert held(model, spec) == {"low": TRUNK[:1], "high": TRUNK[1:]}
    assert held(model, lambda m: spec) == {"low": TRUNK[:1], "high": TRUNK[1:]}


def test_a_module_list_is_one_thing():
    model = Net()
    [declared] = declare(model, find_layers(model), model.trunk.body)
    assert declared.label == "'trunk.body'"
    assert list(declared.names) == TRUNK[1:]


def test_a_parameter_list_can_be_shared():
    model = nn.ModuleDict({"x": nn.Linear(2, 2), "more": nn.ParameterList([torch.ones(2, 2)] * 2)})
    assert held(model, model["more"], include="more") == {"shared": ["more.0", "more.1"]}


def test_auto_declares_nothing():
    assert held(Net(), "auto") == {}


def test_the_model_itself_can_be_declared_shared():
    model = Net()
    assert held(model, model) == {"shared": [*TRUNK, *HEADS]}


# Names, order and ties.


def test_layers_come_in_the_order_of_named_parameters():
    model = Net()
    model.first = nn.Linear(2, 2)
    model.trunk.last = nn.Linear(2, 2)
    found = names(model, include=["table", "scale"])
    order = [name for name, _ in model.named_parameters() if name in found]
    assert found == order
    assert len(found) == 9
    assert found != sorted(found)


def test_a_tied_weight_is_one_layer_with_every_place_it_is_used_in():
    model = nn.ModuleDict({"enter": nn.Linear(4, 4), "leave": nn.Linear(4, 4)})
    model["leave"].weight = model["enter"].weight
    [layer] = find_layers(model)
    assert layer.name == "enter.weight"
    assert layer.places == ((model["enter"], "weight"), (model["leave"], "weight"))


def test_a_weight_tied_to_an_embedding_is_one_layer_under_its_first_name():
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False)})
    model["out"].weight = model["table"].weight
    [layer] = find_layers(model)
    assert layer.name == "table.weight"
    assert {id(module) for module, _ in layer.places} == {id(model["table"]), id(model["out"])}
    assert held(model, model["out"]) == {"shared": ["table.weight"]}
    assert held(model, "out.weight") == {"shared": ["table.weight"]}


def test_a_module_used_twice_is_one_layer():
    layer = nn.Linear(3, 3)
    assert names(nn.Sequential(layer, nn.Tanh(), layer)) == ["0.weight"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.trunk.0.weight", "trunk.0.weight"),
        ("_orig_mod.module.trunk.0.weight", "trunk.0.weight"),
        ("trunk._orig_mod.0._checkpoint_wrapped_module.weight", "trunk.0.weight"),
        ("modules.weight", "modules.weight"),
        ("trunk.module_list.weight", "trunk.module_list.weight"),
    ],
)
def test_wrapper_prefixes_are_ignored(name, plain):
    assert strip(name) == plain


class Residual(nn.Module):
    """A module of the user's own that happens to call its child `module`."""

    def __init__(self, inner):
        super().__init__()
        self.module = inner

    def forward(self, x):
        return x + self.module(x)


class Adapted(nn.Linear):
    """A Linear with another one, called `module`, inside."""

    def __init__(self):
        super().__init__(4, 4)
        self.module = nn.Linear(4, 4)

    def forward(self, x):
        return super().forward(x) + self.module(x)


def test_masks_have_the_names_of_named_parameters_when_a_child_is_called_module():
    model = nn.Sequential(Residual(nn.Linear(4, 4)), nn.Linear(4, 1))
    pruner = MultitaskPruner(model, ["a"])
    assert set(pruner.masks) <= {name for name, _ in model.named_parameters()}
    pruner.finalize()


def test_two_layers_never_have_one_name():
    found = names(nn.Sequential(Adapted(), nn.Linear(4, 1)))
    assert len(found) == 3
    assert len(set(found)) == 3


# Wrapped models are looked into.


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pruned_masks(model, inner, device, shared):
    """Masks of a model, called and described through its wrapper."""
    torch.manual_seed(1)
    batch = make_batch(device)
    pruner = MultitaskPruner(model, LOSSES, shared, method=Vote(0.5, allocation="global"))
    pruner.observe(model(batch), batch)
    assert pruner.step() is True
    masks = pruner.masks
    for name, parameter in inner.named_parameters():
        layer = name.removesuffix("_orig")
        if layer in masks:
            assert bool((parameter[~masks[layer]] == 0).all())
    pruner.finalize()
    return masks


def wrapped_net(device):
    torch.manual_seed(0)
    return Net().to(device)


WRAPPERS = {
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["trunk", "module.trunk", "_orig_mod.trunk", "auto"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_looked_into(wrap, shared, device):
    plain = wrapped_net(device)
    expected = pruned_masks(plain, plain, device, "trunk")
    model = wrapped_net(device)
    found = pruned_masks(WRAPPERS[wrap](model), model, device, shared)
    assert list(found) == list(expected) == [*TRUNK, *HEADS]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    torch.compiler.reset()


def test_a_model_in_distributed_data_parallel_is_looked_into(one_process, device):
    plain = wrapped_net(device)
    expected = pruned_masks(plain, plain, device, "trunk")
    model = wrapped_net(device)
    wrapper = nn.parallel.DistributedDataParallel(model)
    found = pruned_masks(wrapper, model, device, [wrapper.module.trunk])
    assert list(found) == [*TRUNK, *HEADS]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_compiled_part_of_a_model_is_looked_into(device):
    model = wrapped_net(device)
    plain = model.trunk.stem
    model.trunk.stem = torch.compile(plain, backend="eager")
    assert names(model) == [*TRUNK, *HEADS]
    for spec in ("trunk.stem", "trunk.stem.weight", plain, model.trunk.stem, plain.weight):
        assert held(model, spec) == {"shared": TRUNK[:1]}


def test_a_module_given_in_a_wrapper_is_found():
    model = Net()
    wrapper = torch.compile(model.trunk, backend="eager")
    assert held(model, wrapper) == {"shared": TRUNK}


# Who shares what.


@pytest.mark.parametrize(
    ("users", "declared", "tasks", "expected"),
    [
        (["a", "b"], True, ["a", "b"], "deep"),
        (["a", "b"], False, ["a", "b"], "shared"),
        (["a"], True, ["a", "b"], "a"),
        (["a"], False, ["a", "b"], "a"),
        ([], True, ["a", "b"], None),
        (["a"], True, ["a"], "deep"),
        (["a"], False, ["a"], "a"),
    ],
    ids=[
        "declared, two users",
        "auto, two users",
        "declared, one of two tasks",
        "auto, one of two tasks",
        "no user",
        "declared, the only task",
        "auto, the only task",
    ],
)
def test_a_layer_belongs_to_the_component_its_users_make_of_it(users, declared, tasks, expected):
    spec = [Declared("deep", "'x'", ("x",))] if declared else []
    assert assign(["x"], {"x": users}, spec, tasks).get("x") == expected


def test_what_nobody_declared_is_undeclared_once_something_is():
    spec = [Declared("deep", "'x'", ("x",))]
    users = {"x": ["a", "b"], "y": ["a", "b"], "z": ["b"]}
    found = assign(["x", "y", "z"], users, spec, ["a", "b"])
    assert found == {"x": "deep", "y": "undeclared", "z": "b"}


def test_a_model_without_anything_prunable_is_refused():
    with pytest.raises(ValueError, match="nothing prunable"):
        MultitaskPruner(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), ["a"])
    with pytest.raises(ValueError, match="nothing prunable"):
        MultitaskPruner(nn.Sequential(nn.Linear(3, 3)), ["a"], exclude="0")


def test_bare_parameters_and_embeddings_are_pruned_end_to_end(backend, device):
    model = wrapped_net(device)
    pruner = MultitaskPruner(
        model,
        LOSSES,
        [model.trunk, model.table, model.scale],
        method=Vote(0.7, allocation="uniform"),
        include=["table", model.scale],
        backend=backend,
    )
    batch = make_batch(device)
    pruner.observe(model(batch), batch)
    assert pruner.step() is True
    masks = pruner.masks
    assert list(masks) == ["scale", "table.weight", *TRUNK, *HEADS]
    assert all(not bool(mask.all()) for mask in masks.values())
    pruner.finalize()
    plain = dict(model.named_parameters())
    assert all(bool((plain[name][~mask] == 0).all()) for name, mask in masks.items())
    assert all(bool((plain[name][mask] != 0).all()) for name, mask in masks.items())


def test_members_of_a_parameter_list_are_pruned_end_to_end(backend, device):
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
            self.heads = nn.ModuleDict({task: nn.Linear(4, 1) for task in ("a", "b")})

        def forward(self, batch):
            hidden = batch["x"]
            for weight in self.stages:
                hidden = (hidden @ weight).tanh()
            return {task: head(hidden) for task, head in self.heads.items()}

    model = Low().to(device)
    method = Vote(0.5, allocation="uniform")
    pruner = MultitaskPruner(
        model, LOSSES, "stages", method=method, include="stages", backend=backend
    )
    batch = make_batch(device)
    pruner.observe(model(batch), batch)
    assert pruner.step() is True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(loss(model(batch), batch) for loss in LOSSES.values()).backward()
        optimizer.step()
        pruner.step()
    masks = pruner.masks
    assert list(masks)[:2] == ["stages.0", "stages.1"]
    pruner.finalize()
    assert len(model.stages) == 2
    for i, weight in enumerate(model.stages):
        assert int((weight == 0).sum()) == int((~masks[f"stages.{i}"]).sum()) == 8
