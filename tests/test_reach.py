"""Reach: which task uses which layer is seen in gradients, and settled at the first mask change."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from mtprune import Cubic, Linear, MultitaskPruner, OneShot, Vote
from mtprune.model.components import Declared
from mtprune.model.inventory import Inventory
from mtprune.model.layers import find_layers
from mtprune.observing.evidence import Evidence
from mtprune.observing.reach import Reach
from tests.checkpoints import users


class Net(nn.Module):
    """A trunk with a side branch, and one head per task."""

    def __init__(self, tasks=("a", "b")):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in tasks})

    def forward(self, x):
        hidden = self.trunk(x)
        return {task: head(hidden) for task, head in self.heads.items()}


class Square:
    """Mean squared distance of one task's output to a target of its own."""

    def __init__(self, task, target=1.0):
        self.task = task
        self.target = target

    def __call__(self, out, x):
        return (out[self.task] - self.target * x.sum(1, keepdim=True)).square().mean()


def losses_of(*tasks):
    return {task: Square(task, 1.0 + i) for i, task in enumerate(tasks)}


def hits(reached):
    return {task: dict(enumerate(found.unbind())) for task, found in reached.items()}


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def components(pruner):
    """Every pruned layer's component."""
    rows = {row.name: row.tasks for row in pruner.report().layers}
    assert all(users(pruner)[name] == set(tasks) for name, tasks in rows.items())
    return rows


def observe_once(pruner, model, device, size=16):
    x = torch.randn(size, 4, device=device)
    return pruner.observe(model(x), x)


# Settling.


def components_of(reach):
    return {subject.name: subject.component for subject in reach.subjects(reach.settled)}


def make_reach(declared=()):
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("one", "two", "three")})
    return Reach(Inventory(("a", "b"), find_layers(model), declared))


def test_a_task_is_clear_when_graph_and_gradients_agree():
    reach = make_reach()
    evidence = Evidence(
        walked={"a": flags(1, 1, 0), "b": flags(1, 1, 1)},
        hits=hits({"a": flags(1, 1, 0), "b": flags(1, 0, 1)}),
    )
    assert reach.is_clear(evidence, "a")
    assert not reach.is_clear(evidence, "b")
    with pytest.warns(UserWarning, match=r"leads to 'two\.weight' from task 'b', but no gradient"):
        reach.settle(evidence)
    assert reach.is_clear(Evidence(), "b")


def test_a_graph_that_leads_everywhere_for_every_task_promises_nothing():
    reach = make_reach()
    everywhere = flags(1, 1, 1)
    reached = {"a": flags(1, 1, 0), "b": flags(1, 0, 1)}
    reach.settle(Evidence(walked={"a": everywhere, "b": everywhere}, hits=hits(reached)))
    assert all(torch.equal(reach.settled[task], found) for task, found in reached.items())


def test_what_is_settled_stays():
    reach = make_reach()
    walked = {"a": flags(1, 1, 0), "b": flags(1, 0, 1)}
    reach.settle(Evidence(walked=walked, hits=hits(walked)))
    other = {"a": flags(0, 0, 1), "b": flags(0, 0, 1)}
    reach.settle(Evidence(walked=other, hits=hits(other)))
    assert all(torch.equal(reach.settled[task], walked[task]) for task in walked)
    assert components_of(reach) == {
        "one.weight": "shared",
        "two.weight": "a",
        "three.weight": "b",
    }


def test_every_candidate_is_active_until_it_is_known_who_uses_what():
    reach = make_reach()
    assert [layer.name for _, layer in reach.active()] == [
        "one.weight",
        "two.weight",
        "three.weight",
    ]
    assert reach.left_alone() == {}
    seen = {"a": flags(1, 0, 0), "b": flags(1, 0, 1)}
    reach.settle(Evidence(walked=seen, hits=hits(seen)))
    assert [(i, layer.name) for i, layer in reach.active()] == [
        (0, "one.weight"),
        (2, "three.weight"),
    ]
    assert reach.left_alone() == {"two.weight": "no task uses it"}


def test_a_gradient_where_the_graph_does_not_lead_is_no_reason_to_warn():
    reach = make_reach([Declared("shared", "'one'", ("one.weight",))])
    reach.settle(
        Evidence(
            walked={"a": flags(1, 0, 0), "b": flags(1, 0, 0)},
            hits=hits({"a": flags(1, 1, 0), "b": flags(1, 0, 1)}),
        )
    )
    assert components_of(reach)["two.weight"] == "a"


def test_a_declared_layer_that_the_graph_promises_to_a_task_is_named_with_that_task():
    layers = find_layers(nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2)}))
    reach = Reach(
        Inventory(("a", "b", "c"), layers, [Declared("shared", "'one'", ("one.weight",))])
    )
    seen = {"a": flags(1, 0), "b": flags(1, 0), "c": flags(0, 1)}
    with pytest.warns(UserWarning, match=r"The autograd graph leads to 'one' from task 'c', but"):
        reach.settle(Evidence(walked=seen | {"c": flags(1, 1)}, hits=hits(seen)))


# Through the pruner.


def test_one_observation_is_enough_when_the_graph_agrees(backend, device):
    model = Net().to(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5), backend=backend)
    observe_once(pruner, model, device)
    assert pruner.step() is True
    assert components(pruner) == {
        "trunk.0.weight": ("a", "b"),
        "trunk.2.weight": ("a", "b"),
        "heads.a.weight": ("a",),
        "heads.b.weight": ("b",),
    }
    assert pruner.report().observations == {"a": 1, "b": 1}


@pytest.mark.parametrize("shared", ["trunk", "auto"])
def test_stacked_losses_need_a_second_observation_and_heads_are_private_then(
    shared, backend, device
):
    model = Net().to(device)
    functions = losses_of("a", "b")
    pruner = MultitaskPruner(model, ["a", "b"], shared, method=Vote(0.5), backend=backend)
    for expected in (False, True):
        x = torch.randn(16, 4, device=device)
        out = model(x)
        pruner.observe_losses(torch.stack([loss(out, x) for loss in functions.values()]))
        assert pruner.step() is expected
        assert (pruner.report().step is None) is not expected
    found = components(pruner)
    assert found["heads.a.weight"] == ("a",)
    assert found["heads.b.weight"] == ("b",)
    assert found["trunk.0.weight"] == ("a", "b")
    assert pruner.report().observations == {"a": 2, "b": 2}
    assert [row.name for row in pruner.report().components] == ["shared", "a", "b"]


def test_stacked_losses_need_the_second_observation_only_before_the_first_change(device):
    model = Net().to(device)
    functions = losses_of("a", "b")
    method = Vote(0.5, schedule=Linear(begin=2, end=8, every=3))
    pruner = MultitaskPruner(model, ["a", "b"], "trunk", method=method)
    done = []
    for _ in range(8):
        x = torch.randn(16, 4, device=device)
        out = model(x)
        pruner.observe_losses(torch.stack([loss(out, x) for loss in functions.values()]))
        pruner.step()
        done.append(pruner.report().step)
    # The update of step 2 is made one late, with what was seen at steps 2 and 3.
    assert done == [None, None, 2, 2, 5, 5, 5, 8]


def test_a_layer_is_used_if_any_observation_says_so(device):
    # Task b's gate opens for positive sums alone: its side branch has no gradient in one batch.
    class Gated(Net):
        def __init__(self):
            super().__init__()
            self.side = nn.Linear(4, 1)

        def forward(self, x):
            out = super().forward(x)
            gate = (x.sum() > 0).to(x.dtype)
            out["b"] = out["b"] + gate * self.side(x)
            return out

    model = Gated().to(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5))
    shut, open_ = -torch.ones(4, 4, device=device), torch.ones(4, 4, device=device)
    for batch, expected in ((shut, False), (open_, True)):
        pruner.observe(model(batch), batch)
        assert pruner.step() is expected
    assert components(pruner)["side.weight"] == ("b",)


def gated_side(device):
    """A net whose head ``a`` adds a zero-initialised gate over a side branch."""

    class Gated(Net):
        def __init__(self):
            super().__init__()
            self.side = nn.Linear(4, 4)
            self.gate = nn.Linear(4, 1, bias=False)
            nn.init.zeros_(self.gate.weight)

        def forward(self, x):
            out = super().forward(x)
            out["a"] = out["a"] + self.gate(self.side(x))
            return out

    return Gated().to(device)


def test_what_no_gradient_reached_is_named_in_a_warning_and_left_alone(backend, device):
    model = gated_side(device)
    before = model.side.weight.clone()
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5), backend=backend)
    observe_once(pruner, model, device)
    assert pruner.step() is False
    observe_once(pruner, model, device)
    with pytest.warns(
        UserWarning,
        match=r"graph leads to 'side\.weight', but no gradient there was other than zero.*"
        r"zero-initialised head hides the trunk.*begin a few steps later",
    ) as caught:
        assert pruner.step() is True
    assert sum("side" in str(warning.message) for warning in caught) == 1
    assert "side.weight" not in pruner.masks
    assert "gate.weight" in pruner.masks
    assert torch.equal(model.side.weight, before)
    told = "every gradient there was zero, though the graph of some loss leads there"
    assert pruner.report().left_alone == {"side.weight": told}
    assert f"Left alone: side.weight ({told})." in str(pruner.report())
    assert pruner.sparsity == 0.5


@pytest.mark.parametrize("call", ["step", "prune"])
def test_the_warning_points_at_the_line_of_the_user(call, device):
    model = gated_side(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5))
    batches = [torch.randn(16, 4, device=device) for _ in range(2)]
    if call == "step":
        for x in batches:
            pruner.observe(model(x), x)
    with pytest.warns(UserWarning, match="side") as caught:
        pruner.step() if call == "step" else pruner.prune(batches, progress=False)
    assert caught[0].filename == __file__


def test_the_warning_comes_once(device):
    model = gated_side(device)
    method = Vote(0.5, schedule=Cubic(begin=1, end=9, every=2))
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=method)
    for step in range(1, 11):
        observe_once(pruner, model, device)
        # The update of step 1 waits for a second observation, made at step 2.
        with pytest.warns(UserWarning, match="side") if step == 2 else nullcontext():
            pruner.step()
    assert pruner.sparsity == 0.5


def test_a_zero_initialised_head_that_training_opens_in_time_is_no_matter(device):
    model = Net().to(device)
    for head in model.heads.values():
        nn.init.zeros_(head.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5))
    changed = []
    for _ in range(3):
        optimizer.zero_grad()
        sum(observe_once(pruner, model, device).values()).backward()
        optimizer.step()
        changed.append(pruner.step())
    assert changed == [False, True, False]
    assert components(pruner)["trunk.0.weight"] == ("a", "b")


def test_a_frozen_layer_is_left_alone_and_said_to_be_frozen(device):
    model = Net().to(device)
    model.trunk[0].requires_grad_(False)
    before = model.trunk[0].weight.clone()
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=Vote(0.5))
    observe_once(pruner, model, device)
    assert pruner.step() is True
    assert pruner.report().left_alone == {"trunk.0.weight": "frozen"}
    assert "trunk.0.weight" not in pruner.masks
    assert torch.equal(model.trunk[0].weight, before)


def test_what_several_tasks_use_without_a_declaration_is_undeclared(device):
    model = Net().to(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"), model.trunk[0], method=Vote(0.5))
    observe_once(pruner, model, device)
    assert pruner.step() is True
    report = pruner.report()
    assert [row.name for row in report.components] == ["shared", "undeclared", "a", "b"]
    assert report.components[1].tasks == ("a", "b")
    assert report.components[1].parameters == 36
    assert "'undeclared': used by several tasks, but not in `shared_modules`." in str(report)


def test_nothing_is_undeclared_under_auto(device):
    model = Net().to(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"), method=Vote(0.5))
    observe_once(pruner, model, device)
    assert pruner.step() is True
    assert [row.name for row in pruner.report().components] == ["shared", "a", "b"]
    assert "undeclared" not in str(pruner.report())


@pytest.mark.parametrize("shared", ["trunk", "auto"])
def test_a_layer_of_one_task_inside_the_declared_trunk_is_private(shared, device):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.ModuleDict(
                {
                    "stem": nn.Linear(4, 6),
                    "norms": nn.ModuleDict({task: nn.LayerNorm(6) for task in ("a", "b")}),
                    "adapters": nn.ModuleDict({task: nn.Linear(6, 6) for task in ("a", "b")}),
                }
            )
            self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in ("a", "b")})

        def forward(self, x):
            hidden = self.trunk["stem"](x).tanh()
            return {
                task: head(self.trunk["norms"][task](self.trunk["adapters"][task](hidden)))
                for task, head in self.heads.items()
            }

    model = Adapted().to(device)
    pruner = MultitaskPruner(model, losses_of("a", "b"), shared, method=Vote(0.5))
    observe_once(pruner, model, device)
    assert pruner.step() is True
    assert components(pruner) == {
        "trunk.stem.weight": ("a", "b"),
        "trunk.adapters.a.weight": ("a",),
        "trunk.adapters.b.weight": ("b",),
        "heads.a.weight": ("a",),
        "heads.b.weight": ("b",),
    }
    rows = {row.name: row.parameters for row in pruner.report().components}
    assert rows == {"shared": 24, "a": 42, "b": 42}
    masks = pruner.task_masks
    assert "trunk.adapters.b.weight" not in masks["a"]
    assert "trunk.adapters.b.weight" in masks["b"]


def test_a_layer_that_two_of_three_tasks_use_is_voted_on_by_those(device):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.early, self.late = nn.Linear(4, 6), nn.Linear(6, 6)
            self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in ("a", "b", "c")})

        def forward(self, x):
            early = self.early(x).tanh()
            late = self.late(early).tanh()
            return {t: h(early if t == "c" else late) for t, h in self.heads.items()}

    model = Skipping().to(device)
    spec = {"low": model.early, "high": model.late}
    pruner = MultitaskPruner(model, losses_of("a", "b", "c"), spec, method=Vote(0.5))
    observe_once(pruner, model, device)
    assert pruner.step() is True
    found = {row.name: row.tasks for row in pruner.report().components}
    assert found == {
        "low": ("a", "b", "c"),
        "high": ("a", "b"),
        "a": ("a",),
        "b": ("b",),
        "c": ("c",),
    }


def test_a_task_that_stops_using_a_layer_keeps_its_vote_there(device):
    class Moody(Net):
        straight = False

        def forward(self, x):
            out = super().forward(x)
            if self.straight:
                out["b"] = self.heads["b"](self.trunk(x).detach())
            return out

    model = Moody().to(device)
    method = Vote(0.5, schedule=Cubic(begin=1, end=5, every=2))
    pruner = MultitaskPruner(model, losses_of("a", "b"), "trunk", method=method)
    for step in range(1, 6):
        model.straight = step > 1
        observe_once(pruner, model, device)
        pruner.step()
    assert components(pruner)["trunk.0.weight"] == ("a", "b")
    assert pruner.sparsity == 0.5
    assert "trunk.0.weight" in pruner.task_masks["b"]


def test_reach_is_known_for_a_single_task(device):
    model = Net(("a",)).to(device)
    pruner = MultitaskPruner(model, losses_of("a"), "trunk", method=Vote(0.5, schedule=OneShot(2)))
    for expected in (False, True):
        observe_once(pruner, model, device)
        assert pruner.step() is expected
    assert [row.name for row in pruner.report().components] == ["shared", "a"]
    assert components(pruner) == {
        "trunk.0.weight": ("a",),
        "trunk.2.weight": ("a",),
        "heads.a.weight": ("a",),
    }


def test_a_zero_initialised_head_that_leaves_the_trunk_to_the_other_task_is_warned_of(device):
    trunk, a, b = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    nn.init.zeros_(a.weight)
    model = nn.ModuleDict({"trunk": trunk, "a": a, "b": b}).to(device)
    pruner = MultitaskPruner(model, ["a", "b"], "auto", method=Vote(0.5))
    for step in range(2):
        hidden = model["trunk"](torch.randn(8, 4, device=device))
        losses = {task: (model[task](hidden) - 1).square().mean() for task in ("a", "b")}
        pruner.observe_losses(losses)
        if step == 1:
            with pytest.warns(UserWarning, match=r"'trunk\.weight' from task 'a'"):
                pruner.step()
    assert pruner.sparsity == 0.5


class Apart(nn.Module):
    """Heads on a representation whose gradient somebody takes apart from theirs."""

    def __init__(self, detached):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 8))
        self.a, self.b = nn.Linear(8, 2), nn.Linear(8, 2)
        self.detached = detached

    def losses(self):
        hidden = self.trunk(torch.randn(6, 4))
        hidden = hidden.detach().requires_grad_() if self.detached else hidden
        return {"a": self.a(hidden).square().mean(), "b": self.b(hidden).square().mean()}


def test_a_detached_trunk_that_nobody_declared_is_an_error(backend):
    model = Apart(detached=True)
    pruner = MultitaskPruner(model, ["a", "b"], method=Vote(0.5), backend=backend)
    pruner.observe_losses(model.losses())
    message = (
        r"No task uses 'trunk\.0\.weight', 'trunk\.2\.weight', and tasks share nothing\. Is the "
    )
    with pytest.raises(RuntimeError, match=message):
        pruner.step()
    assert pruner.sparsity == 0.0
    model.detached = False
    pruner.observe_losses(model.losses())
    assert pruner.step()


class Cut(nn.Module):
    """A trunk before the cut, and a neck that tasks share behind it."""

    def __init__(self, width, neck=True):
        super().__init__()
        self.trunk = nn.Linear(4, width)
        self.neck = nn.Linear(width, 4) if neck else nn.Identity()
        self.heads = nn.ModuleDict({t: nn.Linear(4 if neck else width, 9) for t in "ab"})

    def losses(self):
        hidden = self.neck(self.trunk(torch.randn(6, 4)).detach()).tanh()
        return {task: head(hidden).square().mean() for task, head in self.heads.items()}


@pytest.mark.parametrize("shared", ["auto", ["trunk", "neck"]])
def test_a_cut_before_most_of_what_is_shared_is_told(shared, backend):
    """Also if it is within what was declared."""
    model = Cut(4)
    model.trunk = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4))
    if shared != "auto":
        model = nn.ModuleDict({"body": model})
        losses, shared, prefix = model["body"].losses, ["body"], r"body\."
    else:
        losses, prefix = model.losses, ""
    pruner = MultitaskPruner(model, ["a", "b"], shared, method=Vote(0.5), backend=backend)
    pruner.observe_losses(losses())
    match = (
        rf"No loss leads to '{prefix}trunk\.0\.weight', '{prefix}trunk\.1\.weight', more weights"
    )
    with pytest.warns(UserWarning, match=match) as caught:
        assert pruner.step()
    assert caught[-1].filename == __file__
    assert set(pruner.report().left_alone.values()) == {"no task uses it"}


def test_a_small_trunk_before_large_heads_is_told():
    model = Cut(3, neck=False)
    pruner = MultitaskPruner(model, ["a", "b"], method=Vote(0.5))
    pruner.observe_losses(model.losses())
    with pytest.warns(UserWarning, match=r"No loss leads to 'trunk\.weight', more weights than"):
        assert pruner.step()


def test_a_little_that_is_not_in_use_is_no_matter():
    model = Net()
    model.pooler = nn.Linear(6, 6)
    pruner = MultitaskPruner(model, losses_of("a", "b"), method=Vote(0.5))
    observe_once(pruner, model, torch.device("cpu"))
    assert pruner.step()
    assert pruner.report().left_alone == {"pooler.weight": "no task uses it"}


def test_nets_that_share_nothing_are_no_error():
    model = nn.ModuleDict({task: nn.Linear(4, 2) for task in "ab"})
    pruner = MultitaskPruner(model, ["a", "b"], method=Vote(0.5))
    pruner.observe_losses({t: model[t](torch.ones(2, 4)).square().mean() for t in "ab"})
    assert pruner.step()


class Beside(nn.Module):
    """A layer that takes part, and one that nobody calls."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return {"a": self.head(self.trunk[0](x).tanh())}


def test_an_update_that_is_refused_settles_nothing():
    model, x = Beside(), torch.randn(8, 4)
    method = Vote(0.8, allocation={"shared": 0.2})
    pruner = MultitaskPruner(model, losses_of("a"), "trunk", method=method)
    before = pruner.masks
    pruner.observe(model(x), x)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot give the sparsity asked for"):
            pruner.step()
        assert list(pruner.masks) == list(before)
