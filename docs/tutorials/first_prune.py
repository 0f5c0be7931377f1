# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A first prune
#
# A small network reads handwritten digits and answers three questions about each: which digit is it,
# is it odd, and how much ink was used? We train it, prune 90 % of its weights in its own training
# loop, look at the report, and make it smaller for real. It takes seconds on one CPU core, and no
# download: the digits come with scikit-learn.
#
# ## Data, tasks, a network

# %%
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import mtprune

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
image = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
digit = torch.tensor(digits.target)[order]
data = {"image": image, "digit": digit, "odd": digit % 2, "ink": image.mean(dim=1)}
train_split = {name: values[:1400] for name, values in data.items()}
test_split = {name: values[1400:] for name, values in data.items()}


class Net(nn.Module):
    """A trunk that three heads share."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU())
        self.heads = nn.ModuleDict(
            {"digit": nn.Linear(128, 10), "odd": nn.Linear(128, 2), "ink": nn.Linear(128, 1)}
        )

    def forward(self, image):
        features = self.trunk(image)
        return {task: head(features) for task, head in self.heads.items()}


# %% [markdown]
# Each task is a name and a loss, a function of the outputs and the batch. Their sizes differ a lot,
# and that is left as it is: each task only *ranks* the weights by its own loss, so the size of a loss
# cannot choose what is pruned.

# %%
losses = {
    "digit": lambda outputs, batch: F.cross_entropy(outputs["digit"], batch["digit"]),
    "odd": lambda outputs, batch: F.cross_entropy(outputs["odd"], batch["odd"]),
    "ink": lambda outputs, batch: F.mse_loss(outputs["ink"].squeeze(1), batch["ink"]),
}


def draw(generator):
    """A random batch of 64."""
    chosen = torch.randint(1400, (64,), generator=generator)
    return {name: values[chosen] for name, values in train_split.items()}


@torch.no_grad()
def test(model):
    """What each task achieves on digits the network has not seen."""
    outputs = model(test_split["image"])
    digit, odd = (
        (outputs[task].argmax(dim=1) == test_split[task]).float().mean()
        for task in ("digit", "odd")
    )
    error = (outputs["ink"].squeeze(1) - test_split["ink"]).abs().mean()
    return f"digit {digit:.1%}, odd {odd:.1%}, ink off by {error:.4f}"


# %% [markdown]
# ## Train it dense
#
# Pruning finds out what a network has learned to need, so let it learn first.

# %%
model = Net()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)
for _ in range(600):
    batch = draw(generator)
    optimizer.zero_grad()
    outputs = model(batch["image"])
    sum(loss(outputs, batch) for loss in losses.values()).backward()
    optimizer.step()
dense = copy.deepcopy(model)
print("dense: ", test(dense))

# %% [markdown]
# ## Prune it while it trains on
#
# The loop is the same, with a pruner in two places. `observe` computes the losses and, when masks are
# about to change, also looks at what each loss needs. `step` changes the masks when that is due: in
# about ten updates over the first half of the steps, after which the network recovers.

# %%
STEPS = 600
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
pruner = mtprune.MultitaskPruner(
    model, losses, [model.trunk], sparsity=0.9, steps=STEPS, optimizer=optimizer
)
sparsities = []
for _ in range(STEPS):
    batch = draw(generator)
    optimizer.zero_grad()
    seen = pruner.observe(model(batch["image"]), batch)  # {"digit": ..., "odd": ..., "ink": ...}
    sum(seen.values()).backward()
    optimizer.step()
    pruner.step()
    sparsities.append(pruner.sparsity)
print("pruned:", test(model))
print("dense: ", test(dense))

# %% [markdown]
# ## Read the report
#
# *Kept* is exact. Below each task's name stands which share of the kept weights that task alone would
# have kept (what it *wants*); *unanimity* is the share that all of them would. One more voter is no task:
# the method that is used for trained networks also asks how large each weight is (`want magnitude`).

# %%
report = pruner.report()
print(report)

# %% [markdown]
# How sparsity rose, and what is left of every layer:

# %%
from matplotlib import pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot([100 * sparsity for sparsity in sparsities])
left.set(xlabel="step", ylabel="zeros (%)", title="Sparsity while training")
shares = {row.name: 100 * row.kept / row.parameters for row in report.layers}
right.barh(list(shares), list(shares.values()))
right.invert_yaxis()
right.set(xlabel="weights kept (%)", title="Layers")

# %% [markdown]
# ## Take the pruner off, and make it smaller
#
# `finalize` leaves a plain module with zeros in it; its `state_dict` has the names it always had. Zeros
# alone save neither memory nor time: a dense layer multiplies by them. `compress` makes a copy in which
# each layer has the form that was fastest when timed here, and checks that the outputs are the same.

# %%
pruner.finalize()
assert list(model.state_dict()) == list(dense.state_dict())
rows = test_split["image"][:16]
small = mtprune.compress(model, rows)
print(f"{sum(p.count_nonzero() for p in model.parameters()):,} parameters are not zero")
apart = (small(rows)["digit"] - model(rows)["digit"]).abs().max()
print(f"largest difference of an output: {apart:.0e}")

# %% [markdown]
# Which forms were chosen depends on the machine. Print `mtprune.plan_of(small)` to see them with their
# times: this network is so small that calling a layer costs more than what it computes. What to expect of
# larger ones is on the page [from sparse to fast](../compress.md).
#
# Next: [the same in a trainer of your own](your_trainer.md).
