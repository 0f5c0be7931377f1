"""An optimizer goes on: what it remembers is that of the entries that stayed."""

import copy

import pytest
import torch
from torch import nn

import mtprune
from mtprune.compression.resizing import cut_out
from tests.compression.fakes import FakeTimes, prefer
from tests.compression.test_removal import hidden, sparse_chain

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def chain():
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    return model


def step(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def mask_(model):
    with torch.no_grad():
        model[2].weight[:, 1] = 0


@pytest.mark.parametrize("name", ["adam", "amsgrad", "momentum"])
def test_a_step_is_the_step_of_what_stayed(name):
    torch.manual_seed(0)
    model, x = chain(), torch.randn(8, 2)
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer, x)
        mask_(model)
    fast = mtprune.compress(model, x, groups=[hidden(4)], measure=FakeTimes())
    twin = copy.deepcopy(model)
    other = OPTIMIZERS[name](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mtprune.carry_optimizer(optimizer, model, fast)
    step(fast, optimizer, x)
    step(twin, other, x)
    removal = mtprune.plan_of(fast).removal
    assert len(removal.cuts) == 3
    for key, parameter in fast.named_parameters():
        cut = removal[key]
        whole = twin.get_parameter(key)
        kept = whole if cut is None else cut_out(whole, cut)
        torch.testing.assert_close(parameter, kept, rtol=1e-5, atol=1e-7)


def test_literals():
    model = chain()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    weight = model[2].weight
    optimizer.state[weight]["momentum_buffer"] = torch.arange(12.0).view(3, 4)
    extra = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    fast = mtprune.compress(model, torch.ones(1, 2), groups=[hidden(4)], measure=FakeTimes())
    mtprune.carry_optimizer(optimizer, model, fast)
    state = optimizer.state[fast[2].weight]["momentum_buffer"]
    assert state.tolist() == [[0, 2, 3], [4, 6, 7], [8, 10, 11]]
    assert weight not in optimizer.state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [
        id(p) for p in fast.parameters()
    ]
    assert optimizer.param_groups[1]["params"] == [extra]


def test_sums_over_a_dimension_are_cut_along_the_other():
    model, x = chain(), torch.randn(8, 2)
    optimizer = OPTIMIZERS["adafactor"](model.parameters())
    step(model, optimizer, x)
    mask_(model)
    fast = mtprune.compress(model, x, groups=[hidden(4)], measure=FakeTimes())
    mtprune.carry_optimizer(optimizer, model, fast)
    state = optimizer.state[fast[2].weight]
    assert (state["row_var"].shape, state["col_var"].shape) == ((3, 1), (1, 3))
    step(fast, optimizer, x)


def test_a_new_bias_is_trained_with_its_layer():
    model, x = sparse_chain(), torch.randn(3, 2)
    first = {"params": list(model[0].parameters())}
    optimizer = torch.optim.Adam([first, {"params": list(model[2].parameters()), "lr": 0.5}])
    fast = mtprune.compress(model, x, groups=[hidden(4)], measure=FakeTimes())
    mtprune.carry_optimizer(optimizer, model, fast)
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [
        id(fast[2].weight),
        id(fast[2].bias),
    ]
    before = fast[2].bias.clone()
    step(fast.train(), optimizer, x)
    assert not torch.equal(before, fast[2].bias)


def test_errors():
    model, x = chain(), torch.randn(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    fast = mtprune.compress(model, x, groups=[hidden(4)], measure=FakeTimes())
    with pytest.raises(ValueError, match="holds no parameter of `model`"):
        mtprune.carry_optimizer(torch.optim.Adam(chain().parameters()), model, fast)
    other = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(5, 2\) in `model` and \(3, 2\)"):
        mtprune.carry_optimizer(torch.optim.Adam(other.parameters()), other, fast)
    with pytest.raises(ValueError, match="has no plan"):
        mtprune.carry_optimizer(optimizer, model, model)
    with torch.no_grad():
        model[2].weight[:2] = 0
    csr = mtprune.compress(model, x, groups=[hidden(4)], measure=prefer("csr"))
    with pytest.raises(ValueError, match=r"'2.weight' has no counterpart .*'dense'"):
        mtprune.carry_optimizer(optimizer, model, csr)
    optimizer.state[model[2].weight]["odd"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"'2.weight: odd' has shape \(7,\), and it is not known"):
        mtprune.carry_optimizer(optimizer, model, fast)
    assert len(optimizer.state) == 1  # nothing was changed
