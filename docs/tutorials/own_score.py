# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A score of your own, and a fair comparison
#
# You have an idea which weights matter. It takes three lines to try it, and some care to find out whether
# it is better: the same dense nets, the same training, as many tries at the learning rate for every
# method, validation data to choose and test data to report, several seeds, differences with an interval.
#
# ## The idea
#
# A gradient tells how much the loss changes if a weight moves a little, the weight's size how far it has
# to move to be zero. The usual score `|w g|` takes the product. For a net that is trained the gradients
# are small and noisy, so suppose that size deserves more trust. Layers differ in how large their weights
# are; so it is size in units of the layer's typical weight:

# %%
import torch

import mtprune
from mtprune.testing import check_saliency


def sized(weight, grad):
    """`|w g|`, and the size once more, in units of the layer's typical weight."""
    return (weight * grad).abs() * (weight / weight.square().mean().sqrt().clamp(min=1e-12)).abs()


check_saliency(sized)

# %% [markdown]
# `check_saliency` makes sure that it returns what it must for all kinds of weights: as many finite
# numbers as there are weights, none changed in place. Only the order of the scores counts, within one
# task. Each task scores on its own loss; the vote merges the orders.
#
# ## What it is compared with
#
# Everything but the score stays as it is: the vote, the schedule, how the budget is spread over layers.
# Size alone, in the same schedule, is the baseline that any score must beat.

# %%
from mtprune import saliency

STEPS, SPARSITY = 100, 0.95
schedule = mtprune.Cubic(begin=1, end=STEPS // 2, every=10)
scores = {"size": saliency.magnitude, "|w g|": saliency.taylor, "sized": sized}
methods = {
    name: mtprune.Vote(SPARSITY, saliency=score, schedule=schedule, observations=2)
    for name, score in scores.items()
}

# %% [markdown]
# ## The problem
#
# Three tasks on scikit-learn's digits. For each seed one dense net is trained, and all methods prune
# copies of that one, on the same batches in the same order.

# %%
import copy

from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
image = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
digit = torch.tensor(digits.target)[order]
labels = {"digit": digit, "odd": digit % 2, "large": (digit > 4).long()}
training, validation, test = slice(0, 1000), slice(1000, 1300), slice(1300, None)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 192), nn.ReLU(), nn.Linear(192, 64), nn.ReLU())
        self.heads = nn.ModuleDict(
            {"digit": nn.Linear(64, 10), "odd": nn.Linear(64, 2), "large": nn.Linear(64, 2)}
        )

    def forward(self, image):
        features = self.trunk(image)
        return {task: head(features) for task, head in self.heads.items()}


losses = {
    task: lambda outputs, chosen, task=task: F.cross_entropy(outputs[task], labels[task][chosen])
    for task in labels
}


def train(model, seed, lr, steps, method=None):
    """The one training that all have; with a method it prunes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    pruner = method and mtprune.MultitaskPruner(
        model, losses, [model.trunk], method=method, optimizer=optimizer
    )
    for _ in range(steps):
        chosen = torch.randint(1000, (64,), generator=generator)
        outputs = model(image[chosen])
        if pruner:
            now = pruner.observe(outputs, chosen)
        else:
            now = {task: loss(outputs, chosen) for task, loss in losses.items()}
        optimizer.zero_grad()
        sum(now.values()).backward()
        optimizer.step()
        if pruner:
            pruner.step()
    if pruner:
        assert round(pruner.sparsity, 2) == SPARSITY
        pruner.finalize()
    return model


@torch.no_grad()
def loss_of(model, split):
    """The loss of each task on a split."""
    indices = torch.arange(len(image))[split]
    outputs = model(image[split])
    return {task: loss(outputs, indices).item() for task, loss in losses.items()}


# %% [markdown]
# ## The comparison
#
# Each method has four learning rates, and its rate is chosen by the validation loss, over all seeds. The
# dense net also trains on for as many steps, with a rate chosen in the same way: that is what pruning is
# measured against. The test split is looked at once.

# %%
SEEDS, RATES = range(4), (5e-4, 2e-3, 5e-3, 1e-2)
runs = {}  # method, rate, seed -> the trained model
for seed in SEEDS:
    torch.manual_seed(seed)
    dense = train(Net(), seed, 2e-3, 300)
    for name, method in {"dense": None, **methods}.items():
        for rate in RATES:
            runs[name, rate, seed] = train(copy.deepcopy(dense), 100 + seed, rate, STEPS, method)


def mean(values):
    return sum(values) / len(values)


def chosen_rate(name):
    """The rate with the lowest validation loss, mean over tasks and seeds."""
    return min(
        RATES,
        key=lambda rate: mean(
            [mean(loss_of(runs[name, rate, seed], validation).values()) for seed in SEEDS]
        ),
    )


rates = {name: chosen_rate(name) for name in ("dense", *methods)}
print("learning rates:", rates)

# %% [markdown]
# A rate at the end of the grid says that the grid is too short: before you tell anybody, go on until the
# best of each method has a neighbour on either side.
#
# ## The result
#
# The change of each task's test loss against the dense net of the same seed, in percent, `+` is better:
# the mean over tasks, and the task that loses most.


# %%
def change(name, seed):
    """For each task, how much better the test loss is than that of the dense net, in percent."""
    now = loss_of(runs[name, rates[name], seed], test)
    before = loss_of(runs["dense", rates["dense"], seed], test)
    return [100 * (before[task] - now[task]) / before[task] for task in losses]


changes = {name: [change(name, seed) for seed in SEEDS] for name in methods}
print(f"{'':8}{'mean':>8}{'worst task':>12}")
for name, seeds in changes.items():
    print(f"{name:8}{mean([mean(s) for s in seeds]):8.1f}{mean([min(s) for s in seeds]):12.1f}")

# %% [markdown]
# Is that a difference? Seeds differ more than methods do, so take differences within each seed, and their
# 95 % interval (Student's t, 3 degrees of freedom). If it has 0 in it, say "no difference", whichever mean
# is higher.

# %%
from scipy import stats


def interval(values):
    """Mean and half the width of its 95 % interval."""
    values = torch.tensor(values)
    width = stats.t.ppf(0.975, len(values) - 1) * values.std() / len(values) ** 0.5
    return values.mean().item(), float(width)


compared = {}
for other in ("size", "|w g|"):
    pairs = zip(changes["sized"], changes[other])
    compared[other] = interval([mean(mine) - mean(theirs) for mine, theirs in pairs])
    middle, width = compared[other]
    verdict = "no difference" if abs(middle) <= width else "ahead" if middle > 0 else "behind"
    print(f"sized against {other:6} {middle:+6.1f} +- {width:.1f} points: {verdict}")

# %%
from matplotlib import pyplot as plt

figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for row, seeds in enumerate(changes.values()):
    axes.plot([mean(s) for s in seeds], [row] * len(seeds), "o", alpha=0.6)
axes.axvline(0, color="gray", linewidth=1)
axes.set_yticks(range(len(changes)), list(changes))
axes.set(xlabel="change of the test loss (%), mean over tasks; one dot per seed", ylim=(2.5, -0.5))

# %% [markdown]
# Four seeds of one small problem say little. The same on other data, with all methods and more seeds:
# `python examples/compare.py --help`, and [what it found](../results/recipe.md). What else can be your
# own, a vote, a schedule, a whole method: [extending](../extending.md).
