"""The method of docs/extending.md, read from there: that page and these tests cannot disagree."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mtprune import Cubic, MultitaskPruner, testing
from mtprune.testing import NETS
from tests.ranks import on_ranks
from tests.test_docs import BLOCK, namespace

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
GRADUAL = Cubic(begin=1, end=5, every=2)


def surgeon(*args, **options):
    """A `BrainSurgeon` of the page."""
    [code] = [block[1] for block in BLOCK.finditer(PAGE.read_text()) if "class Brain" in block[1]]
    known = {**namespace(), "__name__": "extending"}
    exec(compile(code.split("losses = {")[0], str(PAGE), "exec"), known)
    return known["BrainSurgeon"](*args, **options)


def fast(name):
    return pytest.param(name, marks=() if name == "convolutions" else pytest.mark.slow)


@pytest.mark.parametrize("name", [fast(name) for name in NETS])
def test_it_is_a_method(name):
    def make():
        return surgeon(0.7, GRADUAL, block=5, observations=2)

    testing.check_method(make, nets={name: NETS[name]})


@pytest.mark.slow
def test_at_once_with_blocks_of_whole_rows(device):
    testing.check_exact_count(lambda: surgeon(0.9, block=1_000))


class Net(nn.Module):
    """Layers of both kinds, and two heads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.linear = nn.Linear(6 * 9, 10)
        self.recurrent = nn.LSTM(10, 3)
        self.a = nn.Linear(3, 2)
        self.b = nn.Linear(10, 2)

    def forward(self, x):
        hidden = self.linear(self.conv(x).relu().flatten(1)).tanh()
        return {"a": self.a(self.recurrent(hidden)[0]), "b": self.b(hidden)}


LOSSES = {
    "a": lambda outputs, x: outputs["a"].square().mean(),
    "b": lambda outputs, x: (outputs["b"] - 1).square().mean(),
}


def rows_of(model, x):
    """What each layer multiplies its weight by, ``[rows, columns]``, float64."""
    conv, hidden = F.unfold(x, 3, stride=2, padding=1), model.conv(x).relu().flatten(1)
    late = model.linear(hidden).tanh()
    early = model.recurrent(late)[0]
    rows = {"conv": conv.mT.flatten(0, 1), "linear": hidden, "a": early, "b": late}
    return {f"{name}.weight": value.detach().double() for name, value in rows.items()}


def pruned(device, method, count=1):
    """Inputs of layers, weights before and after, all as float64 matrices, masks and the report."""
    torch.manual_seed(0)
    model = Net().to(device)
    batches = [torch.randn(100, 2, 6, 6, device=device) for _ in range(count)]
    inputs = rows_of(model, torch.cat(batches))
    before = {name: matrix(model, name) for name in inputs}
    shared = ["conv", "linear", "recurrent"]
    pruner = MultitaskPruner(model, LOSSES, shared, method=method)
    report = pruner.prune(batches, progress=False)
    pruner.finalize()
    after = {name: matrix(model, name) for name in inputs}
    return inputs, before, after, {n: m.flatten(1) for n, m in pruner.masks.items()}, report


def matrix(model, name):
    return model.get_parameter(name).detach().flatten(1).double()


@pytest.mark.parametrize("block", [8, 1_000])
def test_outputs_change_less_than_without_the_repair(block, device):
    method = surgeon(0.7, block=block, observations=2)
    inputs, before, after, masks, _ = pruned(device, method, count=2)
    errors = {}
    for name, x in inputs.items():
        gone = before[name] - before[name] * masks[name]
        without, with_it = (x @ gone.T).norm(), (x @ (before[name] - after[name]).T).norm()
        assert bool((after[name][~masks[name]] == 0).all())
        assert with_it <= without
        errors[name] = float(with_it / without)
    assert min(errors.values()) < 0.8
    assert errors["conv.weight"] < 1


def test_the_repair_is_least_squares_where_a_block_is_a_whole_row(device):
    method = surgeon(0.6, block=1_000, damping=1e-9)
    inputs, before, after, masks, _ = pruned(device, method)
    changed = 0
    for name, x in inputs.items():
        for old, new, kept in zip(before[name], after[name], masks[name], strict=True):
            best = torch.linalg.lstsq(x[:, kept].cpu(), (x @ old).cpu()).solution
            torch.testing.assert_close(new[kept].cpu(), best, rtol=1e-3, atol=1e-4)
            changed += int(not kept.all())
    assert changed > 10


def test_what_costs_least_goes(device):
    """With inputs that are not correlated the cost is that of each weight alone."""
    model = nn.ModuleDict({"trunk": nn.Linear(4, 2), "a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    model = model.to(device)
    x = torch.tensor([1.0, 10.0, 2.0, 0.1], device=device).diag().repeat(2, 1)
    weight = torch.tensor([[1.0, 0.2, 1.0, 1.0], [3.0, 0.1, 0.4, 20.0]], device=device)
    model["trunk"].weight.data = weight

    def forward(model, x):
        hidden = model["trunk"](x)
        return {task: model[task](hidden) for task in ("a", "b")}

    losses = {task: lambda out, x, task=task: out[task].square().mean() for task in ("a", "b")}
    pruner = MultitaskPruner(model, losses, "trunk", method=surgeon(0.5), exclude=["a", "b"])
    pruner.prune([x], forward=forward, progress=False)
    # w^2 times the squared size of the inputs: 1, 4, 4, 0.01 and 9, 1, 0.64, 4.
    expected = [[False, True, True, False], [True, False, False, True]]
    assert pruner.masks["trunk.weight"].tolist() == expected
    pruner.finalize()
    kept = torch.tensor(expected, device=device)
    torch.testing.assert_close(model["trunk"].weight.data, weight * kept)


def test_the_report_says_what_is_left_dense_and_why(device):
    _, _, _, masks, report = pruned(device, surgeon(0.7))
    assert set(masks) == {"conv.weight", "linear.weight", "a.weight", "b.weight"}
    total = sum(mask.numel() for mask in masks.values())
    assert report.parameters - report.kept == round(0.7 * total)
    assert set(report.left_alone) == {"recurrent.weight_ih_l0", "recurrent.weight_hh_l0"}
    assert set(report.left_alone.values()) == {"inputs are not gathered for LSTM"}
    assert "BrainSurgeon(sparsity=0.7)" in report.table()


# Two ranks. All numbers are small and whole, so that sums are exact in any order.


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 8)
        self.a = nn.Linear(8, 1)
        self.b = nn.Linear(8, 1)
        for parameter in self.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape).float()

    def forward(self, x):
        hidden = self.trunk(x).relu()
        return {"a": self.a(hidden), "b": self.b(hidden)}


def decided(rank, world):
    """Masks and weights after an update, and the sparsity."""
    model = Whole()
    call = DistributedDataParallel(model) if world > 1 else model
    pruner = MultitaskPruner(model, LOSSES, "trunk", method=surgeon(0.6, observations=2))
    for step in range(2):
        x = torch.randint(-3, 4, (32, 8), generator=torch.Generator().manual_seed(step)).float()
        pruner.observe(call(x.chunk(world)[rank]), x)
        pruner.step()
    masks = pruner.masks
    pruner.finalize()
    return {"masks": masks, "weights": dict(model.state_dict()), "sparsity": pruner.sparsity}


@pytest.mark.slow
def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path):
    alone = decided(0, 1)
    assert alone["sparsity"] == round(0.6 * 80) / 80
    for result in on_ranks(__name__, "decided", tmp_path):
        assert result["sparsity"] == alone["sparsity"]
        for part in ("masks", "weights"):
            for name, tensor in alone[part].items():
                assert torch.equal(result[part][name], tensor)
