"""Extraction: literals, then the shelf; the outputs are those of a model masked by hand."""

import copy
import json
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mtprune
from mtprune import MultitaskPruner, Vote
from mtprune.compression.extract import Absent
from tests import nets
from tests.compression.fakes import leaves, prefer, zero_

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Named:
    first: torch.Tensor | None
    second: torch.Tensor | None


class Two(nn.Module):
    """A trunk of one weight per input, and a head each; what it returns is up to the test."""

    def __init__(self, form="dict"):
        super().__init__()
        self.trunk = nn.Linear(3, 3, bias=False)
        self.a, self.b = nn.Linear(3, 1), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.form = form

    def forward(self, x):
        hidden = self.trunk(x)
        a, b = self.a(hidden), self.b(hidden)
        match self.form:
            case "dict":
                return {"a": a, "b": b}
            case "other names":
                return {"x": a, "y": {"deep": [b]}}
            case "tuple":
                return a, b
            case "namedtuple":
                return Pair(a, b)
            case "dataclass":
                return Named(a, b)
            case "with features":
                return a, b, hidden
            case "mixed":
                return a + b, b
            case "read":
                return {"a": a, "b": b.relu()}
            case "one":
                return torch.cat([a, b], 1)


def masks():
    """Rows of the trunk: the first for both, the second for a, the third for b."""
    rows = {"a": (True, True, False), "b": (True, False, True)}
    found = {t: {"trunk.weight": torch.tensor(r)[:, None].expand(3, 3)} for t, r in rows.items()}
    found["a"]["a.weight"] = torch.tensor([[True, True, False]])
    found["b"]["b.0.weight"] = torch.ones(2, 3, dtype=torch.bool)
    return found


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def masked(model, task="a"):
    """The same by hand."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if any(name in mine for mine in masks().values()):
                parameter.mul_(masks()[task].get(name, torch.zeros(1)))
    return twin


def extracted(model, tasks=("a",), **options):
    options = {"task_masks": masks(), "measure": prefer("dense"), **options}
    return mtprune.compress(model, X, tasks=tasks, **options)


def test_literals():
    model = Two()
    fast = extracted(model)
    part = mtprune.plan_of(fast).subnetwork
    assert (part.tasks, part.outputs, part.absent) == (("a",), ("a",), ("b",))
    assert (part.weights, part.before, part.kept) == (12, 12, 8)
    assert fast.trunk.weight[2].tolist() == [0, 0, 0]
    assert fast.a.weight[0, 2] == 0
    assert isinstance(fast.b, Absent)
    assert not any(name.startswith("b.") for name in fast.state_dict())
    out = fast(X)
    assert list(out) == ["a"]
    assert torch.equal(out["a"], masked(model)(X)["a"])
    assert str(part) in str(mtprune.plan_of(fast))
    assert model.trunk.weight.count_nonzero() == 9
    assert list(model(X)) == ["a", "b"]


@pytest.mark.parametrize(
    ("form", "places", "take"),
    [
        ("dict", ("a",), lambda out: out["a"]),
        ("other names", ("x",), lambda out: out["x"]),
        ("tuple", (0,), lambda out: out[0]),
        ("namedtuple", ("first",), lambda out: out.first),
        ("dataclass", ("first",), lambda out: out.first),
    ],
)
def test_outputs_are_found_by_name_or_by_whose_weights_they_need(form, places, take):
    model = Two(form)
    fast = extracted(model)
    assert mtprune.plan_of(fast).subnetwork.outputs == places
    assert len(leaves(fast(X))) == 1
    assert type(fast(X)) is type(model(X))
    assert torch.equal(take(fast(X)), take(masked(model)(X)))


def test_where_it_is_unclear_it_asks():
    for form in ("with features", "mixed"):
        with pytest.raises(ValueError, match=r"belong to \['a'\] is unclear: .* outputs=\{'a'"):
            extracted(Two(form))
    with pytest.raises(ValueError, match="the model returns one tensor"):
        extracted(Two("one"))
    fast = extracted(Two("with features"), outputs={"a": (0, 2)})
    assert len(fast(X)) == 2
    assert mtprune.plan_of(fast).subnetwork.absent == ("b",)
    fast = extracted(Two("mixed"), outputs={"a": 0})
    assert mtprune.plan_of(fast).subnetwork.absent == ()  # a's output needs b's head
    with pytest.raises(ValueError, match=r"`outputs` names \[7\]. The model returns \[0, 1, 2\]"):
        extracted(Two("with features"), outputs={"a": 7})
    with pytest.raises(ValueError, match=r"`outputs` does not say for \['a'\]"):
        extracted(Two("with features"), outputs={"b": 1})


def test_a_module_whose_output_is_read_stays_and_what_it_holds_goes():
    model = Two("read")
    fast = extracted(model, measure=prefer("rows"))
    part = mtprune.plan_of(fast).subnetwork
    assert part.absent == ()  # None has no relu
    assert mtprune.plan_of(fast)["b.0"].choice == "rows"
    assert fast.b[0].inner.weight.shape == (1, 3)
    torch.testing.assert_close(fast(X)["a"], masked(model)(X)["a"])


class Detached(nn.Module):
    """Its trunk runs without gradients: no graph leads there, and yet all need it."""

    def __init__(self):
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x):
        with torch.no_grad():
            hidden = self.trunk(x)
        return {"a": self.a(hidden), "b": self.b(hidden)}


def test_what_no_graph_leads_to_is_tried_before_it_goes():
    model = Detached()
    own = {t: {f"{t}.weight": torch.ones(1, 3, dtype=torch.bool)} for t in "ab"}
    fast = extracted(model, task_masks=own)
    assert mtprune.plan_of(fast).subnetwork.absent == ("b",)
    assert torch.equal(fast(X)["a"], model.eval()(X)["a"])


def test_all_tasks_are_the_union():
    model = Two()
    fast = extracted(model, tasks=["a", "b"])
    part = mtprune.plan_of(fast).subnetwork
    assert (part.outputs, part.absent, part.weights, part.kept) == (None, (), 18, 17)
    assert list(fast(X)) == ["a", "b"]


@pytest.mark.parametrize("name", ["plain", "conv_bn", "adapters", "dataclass_outputs", "tied"])
def test_a_pruner_leaves_what_tasks_voted_for(name):
    run = nets.Run(nets.build(name), Vote(sparsity=0.6)).train(2)
    pruner, model = run.pruner, run.model
    pruner.finalize()
    x = run.net.make_batch(0)["x"]
    fast = mtprune.compress(model, x, tasks=["a"], measure=prefer("csr"))
    wish = pruner.task_masks["a"]
    twin = copy.deepcopy(model).eval()
    used = dict(twin.named_parameters())
    with torch.no_grad():
        for at, mask in pruner.masks.items():
            used[at].mul_(wish.get(at, torch.zeros_like(mask)))
    expected, got = twin(x), fast(x)
    take = (lambda out: out.a) if name == "dataclass_outputs" else (lambda out: out["a"])
    torch.testing.assert_close(take(got), take(expected), rtol=1e-4, atol=1e-6)
    part = mtprune.plan_of(fast).subnetwork
    assert part.kept == sum(int(used[at].count_nonzero()) for at in wish)
    assert part.sparsity >= part.sparsity_before
    with pytest.raises(ValueError, match=r"a copy, was loaded.* task_masks=pruner.task_masks"):
        mtprune.compress(copy.deepcopy(model), x, tasks=["a"])
    again = mtprune.compress(
        copy.deepcopy(model), x, tasks=["a"], task_masks=pruner.task_masks, measure=prefer("csr")
    )
    assert torch.equal(take(again(x)), take(got))


def test_the_record_goes_with_the_model():
    import gc
    import weakref

    run = nets.Run(nets.build("plain")).train(1)
    run.pruner.finalize()
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None


def test_replayed_saved_and_exported(tmp_path):
    model = zero_(Two(), 0.3)
    fast = extracted(model, measure=prefer("csr"))
    plan = mtprune.Plan.from_dict(json.loads(json.dumps(mtprune.plan_of(fast).to_dict())))
    assert plan == mtprune.plan_of(fast)
    assert torch.equal(extracted(model, plan=plan)(X)["a"], fast(X)["a"])
    with pytest.raises(ValueError, match=r"The plan is for the tasks \['a'\]"):
        mtprune.compress(model, X, plan=plan)
    assert torch.equal(mtprune.compress(fast, X, tasks=["a"])(X)["a"], fast(X)["a"])
    with pytest.raises(ValueError, match="compressed already, by another plan"):
        mtprune.compress(fast, X, tasks=["b"], task_masks=masks())
    mtprune.save(fast, tmp_path)
    loaded = mtprune.load(tmp_path, Two())
    assert torch.equal(loaded(X)["a"], fast(X)["a"])
    assert list(loaded(X)) == ["a"]
    portable = extracted(model, measure=prefer("thin"), portable=True)
    program = torch.export.export(portable, (X,), strict=False)
    assert torch.equal(program.module()(X)["a"], portable(X)["a"])
    assert list(torch.compile(portable, backend="eager")(X)) == ["a"]
    assert mtprune.recalibrate_bn(portable, [X]) == 0


def test_errors():
    with pytest.raises(ValueError, match=r"`tasks` names \['c'\]. Known here: \['a', 'b'\]"):
        extracted(Two(), tasks=["c"])
    with pytest.raises(ValueError, match=r"`tasks` must be a list of some of .* Got 'a'"):
        extracted(Two(), tasks="a")
    with pytest.raises(ValueError, match=r"`task_masks` and `outputs` say what belongs to `tasks`"):
        mtprune.compress(Two(), X, task_masks=masks())
    other = masks()
    other["a"]["trunk.weight"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"another model: they have 'trunk.weight' .*\(3, 3\)"):
        extracted(Two(), task_masks=other)
    pruner = MultitaskPruner(Two(), ["a", "b"])
    pruner.finalize()
    with pytest.raises(ValueError, match="needs to know what each task voted for"):
        mtprune.compress(Two(), X, tasks=["a"])
