"""The published rule, restated from its formulas in plain torch, against the pruner end to end."""

import copy
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtprune import MultitaskPruner, PerTaskKeep, Regrow, Vote, affinity, recipes, saliency, votes

TASKS = ("left", "right", "both")


class Net(nn.Module):
    """A trunk for three tasks, a neck that only two of them use, and a head each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU())
        self.neck = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 3) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.trunk(x).mean((2, 3))
        deep = self.neck(features).relu()
        return {t: self.heads[t](features if t == "left" else deep) for t in TASKS}


def loss(task: str, scale: float = 1.0) -> Any:
    return lambda outputs, batch: scale * F.cross_entropy(outputs[task], batch["y"][task])


LOSSES = {task: loss(task) for task in TASKS}
SHARED = ["trunk", "neck"]


@pytest.fixture
def net(device: torch.device) -> nn.Module:
    return Net().to(device)


@pytest.fixture
def batches(device: torch.device) -> list[dict[str, Any]]:
    return [
        {
            "x": torch.randn(8, 1, 8, 8, device=device),
            "y": {task: torch.randint(3, (8,), device=device) for task in TASKS},
        }
        for _ in range(3)
    ]


def pruned(net: nn.Module, batches: list[Any], method: Vote, losses: Any = LOSSES) -> Any:
    pruner = MultitaskPruner(copy.deepcopy(net), losses, SHARED, method=method)
    pruner.prune(batches, forward=lambda model, batch: model(batch["x"]), progress=False)
    return pruner


def weights_of(net: nn.Module, task: str) -> dict[str, Tensor]:
    """The prunable weights that a task uses, as the wiring above says."""
    return {
        name: parameter
        for name, parameter in net.named_parameters()
        if name.endswith("weight")
        and ("heads" not in name or task in name)
        and not (task == "left" and "neck" in name)
    }


def summed(net: nn.Module, batches: list[Any], task: str, formula: Any) -> dict[str, Tensor]:
    """Scores of one task, a forward and a backward of its own for every batch."""
    net = copy.deepcopy(net)
    weights = weights_of(net, task)
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for batch in batches:
        net.zero_grad()
        LOSSES[task](net(batch["x"]), batch).backward()
        for name, weight in weights.items():
            scores[name] += formula(weight.detach(), weight.grad)
    return scores


def top(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """Keep what is at or above the k-th largest of all, k = int(ratio * N_k)."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    k = int(ratio * everything.numel())
    threshold = everything.topk(k).values[-1] if k else float("inf")
    return {name: score >= threshold for name, score in scores.items()}


def union(masks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for task in masks:
        for name, mask in task.items():
            merged[name] = merged[name] | mask if name in merged else mask
    return merged


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


FORMULAS = {
    "static, |w g|": (saliency.snip, lambda w, g: (w * g).abs()),
    "pretrained, |g| w^2": (lambda w, g: g.abs() * w**2, lambda w, g: g.abs() * w**2),
    "pretrained, |w|": (saliency.magnitude, lambda w, g: w.abs()),
}


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.37, 0.8])
@pytest.mark.parametrize("name", FORMULAS)
def test_per_task_keep_is_the_published_rule(
    net: nn.Module, batches: list[Any], name: str, ratio: float
) -> None:
    ours, formula = FORMULAS[name]
    observations = 1 if ours is saliency.magnitude else 3
    method = Vote(PerTaskKeep(ratio), saliency=ours, observations=observations)
    expected = union(
        [top(summed(net, batches[:observations], task, formula), ratio) for task in TASKS]
    )
    assert same(pruned(net, batches, method).masks, expected)


def test_magnitude_by_the_published_rule_is_one_threshold_on_shared_weights(
    net: nn.Module, batches: list[Any]
) -> None:
    masks = pruned(net, batches, Vote(PerTaskKeep(0.3), saliency=saliency.magnitude)).masks
    thresholds = []
    for task in TASKS:
        every = torch.cat([w.detach().abs().flatten() for w in weights_of(net, task).values()])
        thresholds.append(every.topk(int(0.3 * every.numel())).values[-1])
    trunk = dict(net.named_parameters())["trunk.2.weight"].detach().abs()
    assert torch.equal(masks["trunk.2.weight"], trunk >= min(thresholds))


def test_unanimous_is_the_union_of_the_tasks_best_at_the_share_that_fills_the_budget(
    net: nn.Module, batches: list[Any]
) -> None:
    scores = [summed(net, batches, task, lambda w, g: (w * g).abs()) for task in TASKS]
    method = replace(recipes.disparse_static(0.8, observations=3), min_keep=0)
    ours = pruned(net, batches, method).masks
    kept = sum(int(mask.sum()) for mask in ours.values())
    ratios = [q / 4000 for q in range(1, 4000)]
    matching = [
        masks
        for q in ratios
        if (masks := union([top(score, q) for score in scores]))
        and sum(int(mask.sum()) for mask in masks.values()) == kept
    ]
    assert matching
    assert all(same(ours, masks) for masks in matching)


def test_the_original_rule_misses_the_sparsity_and_ours_does_not(
    net: nn.Module, batches: list[Any]
) -> None:
    total = sum(m.numel() for m in pruned(net, batches, Vote(0.9)).masks.values())
    original = pruned(net, batches, Vote(PerTaskKeep(0.1))).sparsity
    assert original < 0.89
    assert pruned(net, batches, Vote(0.9)).sparsity == round(0.9 * total) / total


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_a_loss_moves_no_vote_but_moves_joint_saliency(
    net: nn.Module, batches: list[Any], scale: float
) -> None:
    scaled = {**LOSSES, "right": loss("right", scale)}
    vote = Vote(0.8)
    assert same(pruned(net, batches, vote).masks, pruned(net, batches, vote, losses=scaled).masks)
    joint = replace(vote, disentangled=False)
    assert not same(
        pruned(net, batches, joint).masks, pruned(net, batches, joint, losses=scaled).masks
    )


def test_identical_tasks_want_the_same_whatever_the_vote(
    net: nn.Module, batches: list[Any]
) -> None:
    losses = {name: loss("right") for name in ("one", "two", "three")}
    masks = []
    for vote in (votes.unanimous, votes.majority, votes.intersection, votes.mean):
        model = copy.deepcopy(net)
        pruner = MultitaskPruner(model, losses, "auto", method=Vote(0.7, vote=vote))
        pruner.prune(batches, forward=lambda m, b: m(b["x"]), progress=False)
        assert affinity.compare(pruner.task_masks).iou == 1.0
        masks.append(pruner.masks)
    assert all(same(masks[0], other) for other in masks[1:])


def test_one_task_makes_every_vote_and_the_joint_baseline_plain_snip(
    net: nn.Module, batches: list[Any]
) -> None:
    losses = {"right": LOSSES["right"]}
    scores = summed(net, batches[:1], "right", lambda w, g: (w * g).abs())
    total = sum(score.numel() for score in scores.values())
    expected = top(scores, (total - round(0.8 * total) + 0.5) / total)
    for method in (
        recipes.snip(0.8),
        *(
            replace(recipes.disparse_static(0.8), vote=vote)
            for vote in (votes.unanimous, votes.majority, votes.intersection, votes.mean)
        ),
    ):
        assert same(pruned(net, batches, replace(method, min_keep=0), losses).masks, expected)


def test_a_layer_that_two_of_three_tasks_reach_is_voted_on_by_those(
    net: nn.Module, batches: list[Any]
) -> None:
    report = pruned(net, batches, Vote(0.8)).report()
    rows = {row.name: row for row in report.layers}
    assert rows["neck.weight"].tasks == ("right", "both")
    assert rows["trunk.0.weight"].tasks == TASKS
    assert rows["heads.left.weight"].tasks == ("left",)


@pytest.mark.parametrize("within", ["layer", "model"])
def test_one_step_of_sparse_training_drops_by_magnitude_and_grows_by_vote(
    net: nn.Module, batches: list[Any], backend: str, within: Literal["layer", "model"]
) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    method = recipes.disparse_dynamic(0.6, every=2, end=100)
    assert isinstance(method.schedule, Regrow)
    assert method.schedule.within == "layer"
    method = replace(method, schedule=replace(method.schedule, within=within))
    pruner = MultitaskPruner(
        net, LOSSES, SHARED, method=method, optimizer=optimizer, backend=backend
    )

    def effective() -> dict[str, Tensor]:
        held = {n.replace("_orig", ""): p.detach().clone() for n, p in net.named_parameters()}
        return {name: held[name] * mask for name, mask in pruner.masks.items()}

    for step, batch in enumerate(batches[:2]):
        if step == 1:
            start, before = pruner.masks, effective()
            dense = Net().to(next(net.parameters()).device)
            state = {n.replace("_orig", ""): p for n, p in net.named_parameters()}
            dense.load_state_dict({**state, **before})
        optimizer.zero_grad()
        sum(pruner.observe(net(batch["x"]), batch).values()).backward()
        optimizer.step()
        if step == 1:
            moved = effective()
        pruner.step()

    grads = {task: summed(dense, [batches[1]], task, lambda w, g: g.abs()) for task in TASKS}
    assert isinstance(method.schedule, Regrow)
    fraction = method.schedule.fraction_at(2)
    for name, mask in start.items():
        kept = int(mask.sum())
        drop = min(round(fraction * kept), mask.numel() - kept)
        weight = moved[name].abs().masked_fill(~mask, -1).flatten()
        survive = torch.zeros_like(weight, dtype=torch.bool)
        survive[weight.topk(kept - drop).indices] = True
        percentile = []
        for scores in grads.values():
            if name in scores:
                own = scores[name].flatten()
                every = torch.cat([s.flatten() for s in scores.values()])
                ordered = (own[~survive] if within == "layer" else every).sort().values
                percentile.append(torch.searchsorted(ordered, own).double() / ordered.numel())
        worth = torch.stack(percentile).amax(0).masked_fill(survive, -1)
        grow = torch.zeros_like(survive)
        grow[worth.topk(drop).indices] = True
        after = pruner.masks[name]
        assert int(after.sum()) == kept
        assert torch.equal(after.flatten(), survive | grow), name
        back = after & ~mask
        assert bool((effective()[name][back] == 0).all())
        parameter = dict(net.named_parameters()).get(name + "_orig")
        parameter = dict(net.named_parameters())[name] if parameter is None else parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            assert bool((optimizer.state[parameter][moment][back] == 0).all())


def test_dropped_exchange_of_nothing_changes_nothing(net: nn.Module, batches: list[Any]) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    method = recipes.disparse_dynamic(0.6, every=1, end=2, fraction=1e-6)
    pruner = MultitaskPruner(net, LOSSES, SHARED, method=method, optimizer=optimizer)
    masks = []
    for batch in batches[:2]:
        optimizer.zero_grad()
        sum(pruner.observe(net(batch["x"]), batch).values()).backward()
        optimizer.step()
        pruner.step()
        masks.append(pruner.masks)
    assert pruner.report().step == 1
    assert same(*masks)
