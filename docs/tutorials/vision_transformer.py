# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A vision transformer of timm
#
# A `VisionTransformer` as timm makes it serves two tasks: one asks about the whole picture, one about each
# patch. Half of its heads and neurons go, those that neither task needs, and what is left is a smaller
# model, exported like any other. Nothing of timm is changed, and nothing is told to mtprune about it: heads
# and neurons are found by the names and shapes of the weights, here a packed `qkv`.
#
# `pip install timm` brings what mtprune's own extras do not. To need no download the model is small, has
# random weights at first, and looks at handwritten digits with noise.

# %%
import copy
import statistics
import time

import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import mtprune

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
order = torch.randperm(len(digits.target))
clean = torch.tensor(digits.images, dtype=torch.float32)[order].unsqueeze(1) / 16  # [N, 1, 8, 8]
clean = F.interpolate(clean, scale_factor=2)
noisy = clean + 0.3 * torch.randn_like(clean)
digit = torch.tensor(digits.target)[order]
TRAIN = 1400


class TwoTasks(nn.Module):
    """timm's transformer, and a head for each task on its tokens."""

    def __init__(self):
        super().__init__()
        self.vit = VisionTransformer(
            img_size=16,
            patch_size=4,
            in_chans=1,
            embed_dim=128,
            depth=4,
            num_heads=8,
            num_classes=0,
        )
        self.digit = nn.Linear(128, 10)
        self.ink = nn.Linear(128, 16)  # the clean pixels of a patch of 4 x 4

    def forward(self, pictures):
        tokens = self.vit.forward_features(pictures)  # [N, 1 + 16, 128]
        patches = self.ink(tokens[:, 1:])
        folded = patches.view(-1, 4, 4, 4, 4).permute(0, 1, 3, 2, 4)
        return {"digit": self.digit(tokens[:, 0]), "ink": folded.reshape(-1, 1, 16, 16)}


losses = {
    "digit": lambda out, chosen: F.cross_entropy(out["digit"], digit[chosen]),
    "ink": lambda out, chosen: F.mse_loss(out["ink"], clean[chosen]),
}

# %% [markdown]
# ## One loop, with a pruner or without

# %%


def train(model, steps, method=None):
    """Adam on the sum of the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    pruner = method and mtprune.MultitaskPruner(
        model, losses, [model.vit], method=method, optimizer=optimizer
    )
    model.train()
    for _ in range(steps):
        chosen = torch.randint(TRAIN, (64,), generator=generator)
        out = model(noisy[chosen])
        seen = (
            pruner.observe(out, chosen)
            if pruner
            else {task: loss(out, chosen) for task, loss in losses.items()}
        )
        optimizer.zero_grad()
        sum(seen.values()).backward()
        optimizer.step()
        if pruner:
            pruner.step()
    model.eval()
    return pruner


def quality(model):
    """Digits that are right, and the error of pixels, on pictures that were not trained on."""
    with torch.no_grad():
        out = model(noisy[TRAIN:])
    right = (out["digit"].argmax(dim=1) == digit[TRAIN:]).float().mean().item()
    error = F.mse_loss(out["ink"], clean[TRAIN:]).item()
    return f"{right:.1%} of digits, error of pixels {error:.4f}"


model = TwoTasks()
train(model, 200)
print("dense:         ", quality(model))

# %% [markdown]
# ## Half of the heads and neurons
#
# Each task ranks the units by what its own loss loses without them. `mtprune.Head()` and `mtprune.Neuron()`
# share one budget. A copy of the dense model trains on for as long, so that the comparison is fair.

# %%
dense = copy.deepcopy(model)
train(dense, 150)

method = mtprune.Vote(
    0.5,
    granularity=(mtprune.Head(), mtprune.Neuron()),
    schedule=mtprune.Cubic(begin=1, end=75, every=15),
    observations=2,
)
pruner = train(model, 150, method)
print("dense, as long:", quality(dense))
print("half the units:", quality(model))

# %% [markdown]
# Which heads are left (dark)? A row is a block, a column one of its eight heads.

# %%
masks = pruner.masks
alive = torch.stack(
    [
        masks[f"vit.blocks.{block}.attn.qkv.weight"].view(3, 8, 16, 128).any(dim=(0, 2, 3))
        for block in range(4)
    ]
)
figure, axes = plt.subplots(figsize=(4, 2))
axes.imshow(alive, cmap="Greys", vmin=0, vmax=1.5)
axes.set(xlabel="head", ylabel="block", xticks=range(8), yticks=range(4))
figure.tight_layout()

# %% [markdown]
# ## Smaller for real
#
# `finalize` leaves plain zeros, `compress` takes the dead units out. What comes back is checked against the
# masked model before you get it. `portable=True` keeps to what every exporter knows.

# %%
pruner.finalize()
pictures = noisy[TRAIN : TRAIN + 64]
small = mtprune.compress(model, pictures, portable=True)
plan = mtprune.plan_of(small)
print(f"parameters: {plan.sizes.against.parameters:,} -> {plan.sizes.parameters:,}")
print("compressed:    ", quality(small))
exported = torch.export.export(small, (pictures,)).module()
with torch.no_grad():
    torch.testing.assert_close(exported(pictures), small(pictures))
print("exported:       the same outputs")


def faster(one, other, pairs=30):
    """How many times the time of the other one takes, in turns: the median of pairs."""
    ratios = []
    with torch.no_grad():
        for _ in range(pairs):
            times = []
            for model in (one, other):
                start = time.perf_counter()
                model(pictures)
                times.append(time.perf_counter() - start)
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


print(f"faster:         {faster(dense, small):.1f}x on one thread here")

# %% [markdown]
# [Architectures](../architectures.md) says what is found in which family, and the
# [support matrix](../support.md) was generated by trying.
