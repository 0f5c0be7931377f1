"""Channels: what must go when one goes is found, and what cannot be followed is left alone."""

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import mtprune
from mtprune.compression.removal import remove
from mtprune.compression.resizing import cut_out
from mtprune.compression.running import call, named_tensors
from mtprune.compression.verify import TOLERANCES, difference
from mtprune.integrations import torch_pruning as integration
from mtprune.integrations.torch_pruning import channels
from mtprune.structure import NOBODY
from tests import nets
from tests.cnns import RandomCNN, draw, image, mask_
from tests.compression.fakes import FakeTimes

needed = pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is not installed"
)


class Does(nn.Module):
    """Runs a function over modules of its own."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.does = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.does(self, x)


def conv(before, after, size=3, **options):
    return nn.Conv2d(before, after, size, padding=size // 2, **options)


def down(before, after, stride):
    return nn.Conv2d(before, after, 3, stride=stride, padding=1)


def outputs(model, x):
    return [tensor for _, tensor in named_tensors(call(model, x))]


def off(model, other, x):
    with torch.no_grad():
        return max(
            difference(a, b) for a, b in zip(outputs(model, x), outputs(other, x), strict=True)
        )


def gate(self, x):
    y = self.a(x)
    return self.c(y * self.v(self.u(y.mean((2, 3))).relu()).sigmoid()[:, :, None, None])


def unpool(self, x):
    y, places = F.max_pool2d(self.a(x), 2, return_indices=True)
    return self.c(F.max_unpool2d(self.b(y), places, 2))


def features(self, x):
    y = self.a(x)
    return {"features": y, "out": self.c(self.b(y))}


def twice(self, x):
    y = self.a(x)
    return self.c(torch.cat([y, y], 1))


def cat(*names, image=False, flat=False, dim=1):
    def forward(self, x):
        parts = [getattr(self, name)(x) for name in names]
        parts = [part.flatten(1) for part in parts] if flat else parts
        return self.c(torch.cat([x, *parts] if image else parts, dim))

    return forward


def chain(*names):
    def forward(self, x):
        for name in names:
            x = getattr(self, name)(x)
        return x

    return forward


ABC = chain("a", "b", "c")
CASES = {
    "a chain": (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2)), {"0": 8}),
    "batch norm": (nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 2)), {"0": 8}),
    "batch norm without weights": (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, affine=False), conv(8, 2)),
        {"0": 8},
    ),
    "instance norm": (
        nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 2)),
        {"0": 8},
    ),
    "instance norm that complains": (
        nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8), conv(8, 2)),
        {},
    ),
    "group norm": (nn.Sequential(conv(3, 8), nn.GroupNorm(4, 8), conv(8, 2)), {"0": 4}),
    "one slope": (nn.Sequential(conv(3, 8), nn.PReLU(), conv(8, 2)), {"0": 8}),
    "a slope each": (nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 2)), {"0": 8}),
    "residual": (
        Does(lambda s, x: s.c(s.a(x) + s.b(s.a(x))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 2)),
        {"a": 4},
    ),
    "depthwise": (Does(ABC, a=conv(3, 4), b=conv(4, 4, groups=4), c=conv(4, 2)), {"a": 4}),
    "depthwise, two each": (
        Does(ABC, a=conv(3, 4), b=conv(4, 8, groups=4), c=conv(8, 2)),
        {"a": 4},
    ),
    "grouped": (Does(ABC, a=conv(3, 6), b=conv(6, 9, groups=3), c=conv(9, 2)), {"a": 3}),
    "grouped, of the image": (nn.Sequential(conv(3, 6, groups=3), conv(6, 2)), {}),
    "transposed": (
        Does(ABC, a=conv(3, 4), b=nn.ConvTranspose2d(4, 5, 2, stride=2), c=conv(5, 2)),
        {"a": 4, "b": 5},
    ),
    "transposed and grouped": (
        Does(ABC, a=conv(3, 4), b=nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2), c=conv(8, 2)),
        {"a": 2},
    ),
    "transposed and depthwise": (
        Does(ABC, a=conv(3, 4), b=nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), c=conv(4, 2)),
        {"a": 4},
    ),
    "concat": (
        Does(cat("a", "b"), a=conv(3, 4), b=conv(3, 5), c=conv(9, 2)),
        {"a": 4, "b": 5},
    ),
    "concat, counted from behind": (
        Does(cat("a", "b", dim=-3), a=conv(3, 4), b=conv(3, 5), c=conv(9, 2)),
        {"a": 4, "b": 5},
    ),
    "concat side by side": (
        Does(cat("a", "b", dim=3), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)),
        {"a": 4},
    ),
    "concat with the image": (
        Does(cat("a", "b", image=True), a=conv(3, 4), b=conv(3, 5), c=conv(12, 2)),
        {"a": 4, "b": 5},
    ),
    "concat with itself": (Does(twice, a=conv(3, 4), c=conv(8, 2)), {"a": 4}),
    "flattened": (
        nn.Sequential(down(3, 4, 4), nn.Flatten(), nn.Linear(16, 2)),
        {"0": 4},
    ),
    "joined, then flattened": (
        Does(
            lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1).flatten(1)),
            a=down(3, 4, 4),
            b=down(3, 5, 4),
            c=nn.Linear(36, 2),
        ),
        {"a": 4, "b": 5},
    ),
    "flattened, then joined": (
        Does(cat("a", "b", flat=True), a=down(3, 4, 4), b=down(3, 5, 2), c=nn.Linear(96, 2)),
        {"a": 4, "b": 5},
    ),
    "a gate": (
        Does(gate, a=conv(3, 8), u=nn.Linear(8, 2), v=nn.Linear(2, 8), c=conv(8, 2)),
        {"a": 8, "u": 2},
    ),
    "a scale": (
        Does(
            lambda s, x: s.c(s.a(x) * s.scale),
            a=conv(3, 8),
            scale=nn.Parameter(torch.rand(1, 8, 1, 1)),
            c=conv(8, 2),
        ),
        {"a": 8},
    ),
    "called twice": (
        Does(lambda s, x: s.c(s.b(s.b(s.a(x)).relu())), a=conv(3, 8), b=conv(8, 8), c=conv(8, 2)),
        {"a": 8},
    ),
    "an output": (Does(features, a=conv(3, 8), b=conv(8, 6), c=conv(6, 2)), {"b": 6}),
    "one dimension": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 2, 3)), {"0": 8}),
    "three": (nn.Sequential(nn.Conv3d(3, 8, 3), nn.Conv3d(8, 2, 3)), {"0": 8}),
    "frozen": (nn.Sequential(conv(3, 8), conv(8, 2)).requires_grad_(False), {"0": 8}),
    "softmax over channels": (nn.Sequential(conv(3, 8), nn.Softmax(1), conv(8, 2)), {}),
    "mean over channels": (
        Does(lambda s, x: s.c(s.a(x).mean(1, keepdim=True)), a=conv(3, 8), c=conv(1, 2)),
        {},
    ),
    "shuffled": (nn.Sequential(conv(3, 8), nn.ChannelShuffle(2), conv(8, 2)), {}),
    "made larger of channels": (nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 2)), {}),
    "places of a pool": (Does(unpool, a=conv(3, 8), b=conv(8, 8), c=conv(8, 2)), {}),
    "split": (
        Does(
            lambda s, x: (lambda y, z: s.c(y * z.sigmoid()))(*s.a(x).chunk(2, 1)),
            a=conv(3, 8),
            c=conv(4, 2),
        ),
        {},
    ),
    "layer norm": (
        Does(
            lambda s, x: s.c(s.n(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            a=conv(3, 8),
            n=nn.LayerNorm(8),
            c=conv(8, 2),
        ),
        {},
    ),
}


@needed
@pytest.mark.parametrize("case", CASES)
def test_what_hangs_together_and_what_is_left_alone(case):
    model, expected = CASES[case]
    model = copy.deepcopy(model).eval()
    x = torch.randn(2, 3, *{"one dimension": (9,), "three": (5, 5, 5)}.get(case, (8, 8)))
    groups = channels(model, x)
    assert {group.name.removesuffix(".channels"): group.size for group in groups} == expected
    for seed in range(3):
        masks = draw(groups, seed)
        masked = mask_(copy.deepcopy(model), groups, masks)
        small = copy.deepcopy(masked)
        removal = remove(small, groups, [x])
        assert bool(removal) == any(not mask.all() for mask in masks)
        assert off(masked, small, x) <= TOLERANCES[torch.float32]


@needed
@pytest.mark.parametrize("name", nets.SHELF)
def test_awkward_nets(name):
    net = nets.build(name)
    model, x = net.model.eval(), net.make_batch(0)["x"]
    groups = channels(model, x)
    mask_(model, groups, draw(groups, 1))
    fast = mtprune.compress(model, x, groups=groups, measure=FakeTimes())
    x = net.make_batch(9)["x"]
    dtype = next(model.parameters()).dtype
    assert off(model, fast, x) <= TOLERANCES[dtype]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, fast)]
    assert sizes[1] < sizes[0] if groups else sizes[1] == sizes[0]
    if name in ("called_twice", "tied", "attention", "lstm", "read_not_called"):
        assert not groups


@needed
def test_literals():
    def forward(self, x):
        y = self.trunk(x)
        return {"a": self.a(y), "b": self.b(torch.cat([x, y], 1).flatten(1))}

    trunk = nn.Sequential(conv(3, 2), nn.BatchNorm2d(2))
    model = Does(forward, trunk=trunk, a=conv(2, 1), b=nn.Linear(20, 1))
    (group,) = channels(model, torch.randn(1, 3, 2, 2))
    assert (group.name, group.size) == ("trunk.0.channels", 2)
    four = [NOBODY] * 12 + [0] * 4 + [1] * 4
    assert {(m.tensor, m.dim, m.role, m.units) for m in group.members} == {
        ("trunk.0.weight", 0, "out", (0, 1)),
        ("trunk.0.bias", 0, "out", (0, 1)),
        ("trunk.1.weight", 0, "with", (0, 1)),
        ("trunk.1.bias", 0, "with", (0, 1)),
        ("trunk.1.running_mean", 0, "with", (0, 1)),
        ("trunk.1.running_var", 0, "with", (0, 1)),
        ("a.weight", 1, "in", (0, 1)),
        ("b.weight", 1, "in", tuple(four)),
    }


def hidden_convs(model):
    last = {"heads.dense", "heads.up.2", f"heads.flat.{len(model.heads['flat']) - 1}"}
    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    return {n for n, m in model.named_modules() if isinstance(m, kinds)} - last


@pytest.mark.slow
@needed
@pytest.mark.parametrize("seed", range(100))
def test_random_nets(seed):
    model, x = RandomCNN(seed).eval(), image()
    groups = channels(model, x)
    made = {m.tensor.removesuffix(".weight") for g in groups for m in g.members if m.role != "in"}
    assert hidden_convs(model) <= made
    masked = mask_(copy.deepcopy(model), groups, draw(groups, seed))
    fast = mtprune.compress(masked, x, groups=groups, measure=FakeTimes())
    assert off(masked, fast, image()) <= TOLERANCES[torch.float32]
    plan = mtprune.plan_of(fast)
    assert plan.sizes.parameters == sum(p.numel() for p in fast.parameters())
    assert plan.sizes.parameters < plan.sizes.against.parameters
    if seed < 5:
        program = torch.export.export(fast, (x,), strict=False)
        assert off(fast, program.module(), x) == 0
    for cut in plan.removal.cuts:
        assert tuple(fast.state_dict()[cut.tensor].shape) == cut.after


@needed
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [True, False])
def test_all_kept_and_none_kept(keep, seed):
    model, x = RandomCNN(seed).eval(), image()
    groups = channels(model, x)
    mask_(model, groups, [torch.full((group.size,), keep) for group in groups])
    fast = mtprune.compress(model, x, groups=groups, measure=FakeTimes())
    assert off(model, fast, x) == 0 if keep else off(model, fast, x) <= 1e-5
    cut = mtprune.plan_of(fast).removal["stem.0.weight"]
    assert cut is None if keep else cut.after[0] <= 2  # one unit, of a grouped convolution two
    again = mtprune.compress(fast, x, groups=groups)
    assert off(fast, again, x) == 0
    assert mtprune.plan_of(again) == mtprune.plan_of(fast)


@pytest.mark.slow
@needed
def test_saved_and_loaded_in_a_new_process(tmp_path):
    model, x = RandomCNN(5).eval(), image()
    groups = channels(model, x)
    mask_(model, groups, draw(groups, 5))
    fast = mtprune.compress(model, x, groups=groups, measure=FakeTimes())
    mtprune.save(fast, tmp_path, arguments={"seed": 5})
    torch.save({"x": x, "y": fast(x)}, tmp_path / "pair.pt")
    code = (
        "import sys, torch, mtprune\n"
        "torch.set_num_threads(1)\n"
        "pair = torch.load(sys.argv[1] + '/pair.pt')\n"
        "out = mtprune.load(sys.argv[1])(pair['x'])\n"
        "assert all(torch.equal(out[task], pair['y'][task]) for task in out)\n"
        "assert 'torch_pruning' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@needed
@pytest.mark.parametrize("seed", range(5))
def test_training_goes_on(seed):
    """A step of Adam is what it would have been for the entries that stayed, batch norms too."""
    model, x = RandomCNN(seed).double(), image(4).double()
    groups = channels(model, x)
    masks = draw(groups, seed)
    mask_(model, groups, masks)

    def train(net, optimizer):
        optimizer.zero_grad()
        sum(out.square().mean() for out in net(x).values()).backward()
        optimizer.step()

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        train(model, optimizer)
        mask_(model, groups, masks)
    fast = mtprune.compress(model, x, groups=groups, measure=FakeTimes()).train()
    whole = copy.deepcopy(model)
    other = torch.optim.Adam(whole.parameters(), lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mtprune.carry_optimizer(optimizer, model, fast)
    train(whole, other)
    train(fast, optimizer)
    removal = mtprune.plan_of(fast).removal
    assert removal
    expected = whole.state_dict()
    for name, value in fast.state_dict().items():
        cut = removal[name]
        kept = expected[name] if cut is None else cut_out(expected[name], cut)
        torch.testing.assert_close(value, kept, rtol=1e-8, atol=1e-9)


@needed
def test_the_model_is_left_as_it_is():
    model, x = RandomCNN(3).train(), image()
    model.stem[0].weight.requires_grad_(False)
    calls = []
    model.stem.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        channels(model, x)
    assert model.training
    assert nets.same(before, model.state_dict())
    assert torch.equal(random, torch.get_rng_state())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert len(model.stem._forward_hooks) == 1
    assert not any(m._forward_hooks for m in model.modules() if m is not model.stem)
    sum(out.sum() for out in outputs.values()).backward()  # its graph is alive


@needed
def test_a_model_that_is_being_pruned():
    model, x = RandomCNN(4), image()
    expected = channels(model, x)
    half = copy.deepcopy(model)
    prune.random_unstructured(half.stem[0], "weight", 0.5)
    assert channels(half, x) == expected
    assert prune.is_pruned(half.stem[0])
    pruner = mtprune.MultitaskPruner(
        model,
        {task: lambda out, batch, task=task: out[task].square().mean() for task in model.heads},
        [model.stem, model.steps],
        method=mtprune.Vote(0.5),
    )
    assert channels(model, x) == expected
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        sum(pruner.observe(model(x), None).values()).backward()
        optimizer.step()
        pruner.step()
    assert prune.is_pruned(model)
    keys = list(model.state_dict())
    assert channels(model, x) == expected
    assert list(model.state_dict()) == keys
    pruner.finalize()
    assert channels(model, x) == expected


@needed
@pytest.mark.parametrize("backend", ["prune", "inplace"])
def test_a_model_whose_masks_may_open(backend):
    model, x = RandomCNN(4), image()
    expected = channels(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = mtprune.MultitaskPruner(
        model,
        {task: lambda out, batch, task=task: out[task].square().mean() for task in model.heads},
        [model.stem, model.steps],
        method=mtprune.recipes.movement(0.5, steps=10),
        optimizer=optimizer,
        backend=backend,
    )
    for _ in range(6):
        optimizer.zero_grad()
        sum(pruner.observe(model(x), None).values()).backward()
        optimizer.step()
        pruner.step()
    assert 0 < pruner.sparsity < 0.5
    keys, outputs = list(model.state_dict()), model(x)
    assert channels(model, x) == expected
    assert list(model.state_dict()) == keys
    assert all(torch.equal(out, outputs[task]) for task, out in model(x).items())


@needed
def test_a_last_layer_of_zeros_hides_nothing():
    model = nn.Sequential(conv(3, 8), nn.Softmax(1), conv(8, 4), nn.ReLU(), conv(4, 2)).eval()
    nn.init.zeros_(model[4].weight)
    assert [group.name for group in channels(model, torch.randn(1, 3, 8, 8))] == ["2.channels"]


@needed
def test_tied_weights_stay():
    model = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 2))
    model[2].weight = model[1].weight
    assert channels(model, torch.randn(1, 3, 8, 8)) == []


@needed
@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: {"x": x}, lambda x: [x, x]])
def test_inputs_in_any_form(wrap):
    model, x = Does(ABC, a=conv(3, 4), b=nn.ReLU(), c=conv(4, 2)), torch.randn(1, 3, 8, 8)
    assert [group.size for group in channels(model, wrap(x))] == [4]


@needed
def test_a_model_that_does_not_run():
    with pytest.raises(ValueError, match=r"does not run on `example_inputs\[0\]`"):
        channels(nn.Sequential(conv(3, 8)), torch.randn(1, 4, 8, 8))


class Looking(nn.Module):
    """Attention whose number of heads follows from the width that is left of its projections."""

    def __init__(self, gain=0.02):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        for layer in (self.q, self.k):  # so that it looks everywhere alike, as at the start
            nn.init.normal_(layer.weight, std=gain)

    def forward(self, x):
        rows = x.flatten(2).transpose(1, 2)
        q, k, v = (
            layer(rows).view(*rows.shape[:2], -1, 4).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        rows = rows + self.o(seen)
        return rows + self.down(self.up(rows).relu())


@needed
def test_what_cannot_be_removed_is_named_when_it_is_found():
    torch.manual_seed(0)
    model, x = Looking(), torch.randn(2, 16, 3, 3)
    with pytest.warns(
        UserWarning, match=r"Left out: 'q\.channels': without some of them the model"
    ):
        (group,) = mtprune.Channel(x).groups(model, [])
    assert group.name == "up.channels"
    mask_(model, [group], draw([group], 1))
    fast = mtprune.compress(model, x, groups=[group], measure=FakeTimes())
    assert off(model, fast, x) <= TOLERANCES[torch.float32]
    model = nn.Sequential(conv(3, 8), nn.Softmax(1), conv(8, 2))
    with pytest.raises(
        ValueError, match=r"channels that cannot be removed: '0\.channels': .*Prune"
    ):
        mtprune.MultitaskPruner(
            model,
            {"a": lambda out, x: out.mean()},
            method=mtprune.Vote(0.5, granularity=mtprune.Channel(torch.randn(1, 3, 8, 8))),
        )
    tied = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 2))
    tied[2].weight = tied[1].weight
    with pytest.raises(ValueError, match=r"'0\.channels': weights are used in two places"):
        mtprune.Channel(torch.randn(1, 3, 8, 8)).groups(tied, [])


@needed
def test_of_large_images_a_corner_is_looked_at_if_the_model_runs_on_it():
    seen = []
    model = nn.Sequential(conv(3, 8), nn.AdaptiveAvgPool2d(96), down(8, 4, 96), nn.Flatten())
    model.append(nn.Linear(4, 2))
    model[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    groups = channels(model, torch.randn(1, 3, 96, 200))
    assert [(group.name, group.size) for group in groups] == [("0.channels", 8), ("2.channels", 4)]
    assert set(seen) == {(64, 64)}
    seen.clear()
    del model[1]
    model[1] = down(8, 4, 48)
    model[3] = nn.Linear(4 * 2 * 5, 2)
    groups = channels(model, torch.randn(1, 3, 96, 200))
    assert [(group.name, group.size) for group in groups] == [("0.channels", 8), ("1.channels", 4)]
    assert seen[0] == (64, 64)
    assert set(seen[1:]) == {(96, 200)}


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'mtprune[structured]'")):
        integration.channels(nn.Sequential(conv(3, 8)), torch.randn(1, 3, 8, 8))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                conv(16, 24, bias=False), nn.BatchNorm2d(24), nn.ReLU(), conv(24, 16, bias=False)
            )
            for _ in range(2)
        )
        self.seg = nn.Sequential(conv(16, 8), nn.ReLU(), conv(8, 2, 1))
        self.cls = nn.Linear(16 * 4, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return {"seg": self.seg(x), "cls": self.cls(F.adaptive_avg_pool2d(x, 2).flatten(1))}


@needed
@pytest.mark.parametrize("backend", ["prune", "inplace"])
def test_from_vote_to_a_smaller_model(backend):
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(4, 3, 8, 8)
    losses = {
        "seg": lambda out, _: out["seg"].square().mean(),
        "cls": lambda out, _: F.cross_entropy(out["cls"], torch.tensor([0, 1, 2, 0])),
    }
    channel = mtprune.Channel(x)
    pruner = mtprune.MultitaskPruner(
        model,
        losses,
        [model.stem, model.blocks],
        method=mtprune.Vote(0.5, granularity=channel),
        backend=backend,
    )
    report = pruner.prune([x], forward=lambda model, x: model(x), progress=False)
    model.eval()
    masked = model(x)
    pruner.finalize()
    assert torch.equal(model(x)["seg"], masked["seg"])
    mtprune.recalibrate_bn(model, [x, torch.randn(4, 3, 8, 8)])
    fast = mtprune.compress(model, x, groups=channel, measure=FakeTimes())
    assert off(model, fast, torch.randn(2, 3, 8, 8)) <= TOLERANCES[torch.float32]
    plan = mtprune.plan_of(fast)
    # Every zero is one of a unit, and every unit goes.
    weights = [p for p in fast.parameters() if p.dim() > 1]
    assert sum(p.numel() for p in weights) <= report.kept + 2
    assert plan.sizes.parameters == sum(p.numel() for p in fast.parameters())
    assert plan.sizes.parameters < 0.6 * plan.sizes.against.parameters
    assert all(row.note == "no zeros" for row in plan.rows)

    def operations(net):
        with FlopCounterMode(display=False) as counter:
            net(x)
        return counter.get_total_flops()

    assert operations(fast) < 0.6 * operations(model)


class Adds(nn.Module):
    """Adds what a norm that starts at zero lets through, as timm's residual blocks do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(8, 8, bias=False), nn.BatchNorm2d(8)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return (x + self.norm(self.conv(x))).relu()


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(conv(3, 8), nn.ReLU(), Adds())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 2) for task in "ab"})

    def forward(self, x):
        hidden = self.trunk(x).mean((2, 3))
        return {task: head(hidden) for task, head in self.heads.items()}


@needed
def test_a_unit_is_pruned_whole_though_a_part_has_no_gradient_yet():
    torch.manual_seed(0)
    model, x = Pooled(), torch.randn(4, 3, 8, 8)
    losses = {task: lambda out, _, task=task: out[task].square().mean() for task in "ab"}
    channel = mtprune.Channel(x)
    method = mtprune.Vote(sparsity=0.5, granularity=channel)
    pruner = mtprune.MultitaskPruner(model, losses, [model.trunk], method=method)
    report = pruner.prune([x], progress=False)
    assert "trunk.2.conv.weight" in pruner.masks
    assert "no task uses it" not in str(report)
    pruner.finalize()
    (group,) = report.groups
    fast = mtprune.compress(model, x, groups=channel, measure=FakeTimes())
    assert fast.trunk[0].out_channels == fast.trunk[2].conv.in_channels == group.kept < 8
    assert off(model.eval(), fast, x) < 1e-5


@needed
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_is_followed_on_any_number_of_rows(rows):
    """On one row its heads are joined as channels are when they are flattened: endless, then."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    (group,) = channels(layer, torch.randn(rows, 3, 8))
    assert (group.name, group.size) == ("linear1.channels", 12)
