# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # One encoder for four tasks, to ONNX and int8
#
# A transformer encoder serves four tasks and is to run on a CPU, in ONNX Runtime, in whole numbers of
# eight bits. Heads and neurons that no task needs are pruned first: what is left is an ordinary, smaller
# dense model, so that everything which follows (export, quantization) works as always, and the gains
# multiply.
#
# To need no download the encoder is small, made from scratch, and reads handwritten digits line by line:
# eight tokens of eight pixels. With a pretrained one it is the same; see [encoders](../encoders.md).

# %%
import copy
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import quantize_dynamic
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import mtprune

torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
lines = torch.tensor(digits.images, dtype=torch.float32)[order] / 16  # [N, 8 tokens, 8]
digit = torch.tensor(digits.target)[order]
classes = {"digit": 10, "odd": 2, "large": 2, "round": 2}
labels = {
    "digit": digit,
    "odd": digit % 2,
    "large": (digit > 4).long(),
    "round": torch.isin(digit, torch.tensor([0, 6, 8, 9])).long(),
}
TRAIN = 1400


class Encoder(nn.Module):
    """Two layers, eight heads and 512 neurons each; a mean over tokens; a head for each task."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 128)
        self.position = nn.Parameter(torch.zeros(8, 128))
        layer = nn.TransformerEncoderLayer(128, 8, 512, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.heads = nn.ModuleDict({task: nn.Linear(128, n) for task, n in classes.items()})

    def forward(self, lines):
        features = self.encoder(self.embed(lines) + self.position).mean(dim=1)
        return {task: head(features) for task, head in self.heads.items()}


losses = {
    task: lambda out, chosen, task=task: F.cross_entropy(out[task], labels[task][chosen])
    for task in classes
}


def train(model, steps, method=None):
    """The loop, with a pruner if there is a method."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    pruner = method and mtprune.MultitaskPruner(
        model, losses, [model.encoder], method=method, optimizer=optimizer
    )
    model.train()
    for _ in range(steps):
        chosen = torch.randint(TRAIN, (64,), generator=generator)
        out = model(lines[chosen])
        seen = (
            pruner.observe(out, chosen)
            if pruner
            else {t: f(out, chosen) for t, f in losses.items()}
        )
        optimizer.zero_grad()
        sum(seen.values()).backward()
        optimizer.step()
        if pruner:
            pruner.step()
    model.eval()
    return pruner


def accuracy(predict):
    """The mean over tasks, and the worst, of what a function of the test digits predicts."""
    out = predict(lines[TRAIN:])
    right = [
        (torch.as_tensor(out[task]).argmax(dim=1) == labels[task][TRAIN:]).float().mean().item()
        for task in classes
    ]
    return f"{sum(right) / len(right):.1%} (worst {min(right):.1%})"


# %% [markdown]
# ## Dense
#
# Trained on all tasks.

# %%
model = Encoder()
train(model, 250)
with torch.no_grad():
    print("dense:", accuracy(model))

# %% [markdown]
# ## Half of the heads and neurons
#
# `(Head(), Neuron())` says that either may go, from one budget. Which, the four tasks say; a unit's score
# for a task is the sum over its weights. Then the model trains on, with what is left. A copy of the dense
# one trains for as long, to compare with.

# %%
dense = copy.deepcopy(model)
train(dense, 150)

units = (mtprune.Head(), mtprune.Neuron())
schedule = mtprune.Cubic(begin=1, end=75, every=15)
pruner = train(model, 150, mtprune.Vote(0.5, granularity=units, schedule=schedule, observations=2))
print(pruner.report())
pruner.finalize()
with torch.no_grad():
    print("dense, as long: ", accuracy(dense))
    print("half the units: ", accuracy(model))

# %% [markdown]
# ## Smaller for real
#
# `compress` removes the dead heads and neurons. `portable=True` keeps to forms that any exporter knows.

# %%
small = mtprune.compress(model, lines[:16], portable=True)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


print(f"parameters: {size(dense):,} -> {size(small):,}")
with torch.no_grad():
    print("compressed:     ", accuracy(small))

# %% [markdown]
# ## ONNX, then int8
#
# Weights become whole numbers of eight bits, activations when they come along (`quantize_dynamic`). Nothing
# here knows that the model was pruned.

# %%
logging.disable(logging.WARNING)


def export(model, path):
    """To ONNX, with any number of rows."""
    rows = torch.export.Dim("rows")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (lines[:16],), path, dynamic_shapes=({0: rows},), verbose=False,
            external_data=False,
        )  # fmt: skip


def forget_shapes(path):
    """Drop the shapes the exporter noted: the quantizer infers them itself, and wants no others."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    onnx.save(model, path)


def runner(path):
    """A function like the model, run by ONNX Runtime on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return lambda x: dict(
        zip(classes, session.run(None, {session.get_inputs()[0].name: x.numpy()}))
    )


with tempfile.TemporaryDirectory() as folder:
    rows = []
    for name, net in (("dense", dense), ("pruned", small)):
        whole, eight = Path(folder) / f"{name}.onnx", Path(folder) / f"{name}-int8.onnx"
        export(net, whole)
        forget_shapes(whole)
        quantize_dynamic(whole, eight)
        for kind, path in (("float32", whole), ("int8", eight)):
            run = runner(path)
            rows.append((f"{name}, {kind}", path.stat().st_size, accuracy(run), run(lines[:16])))

with torch.no_grad():
    expected = small(lines[:16])["digit"].numpy()
exported = next(out for name, _, _, out in rows if name == "pruned, float32")
assert np.allclose(exported["digit"], expected, atol=1e-4)
for name, size_of_file, found, _ in rows:
    print(f"{name:16} {size_of_file / 1024:6.0f} kB   {found}")

# %% [markdown]
# How much faster that is depends on the machine: time `runner(path)` on the one that will run it.
# [Measured there](../results/compress.md) are larger encoders.
