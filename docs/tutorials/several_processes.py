# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Several processes
#
# With `DistributedDataParallel` every process has a copy of the model and a part of the batch. Would each
# prune by its own part, the copies would drift apart. So gradients are averaged over all processes before
# they are scored, every process comes to the same masks, and the masks are those of one process that has
# the whole batch. This tutorial checks that, bit for bit, with two processes on a CPU.
#
# ## A worker
#
# This is what each process runs, and what you would start with `torchrun --nproc-per-node 2 train.py`. Only
# the lines about the process group are not there in a single process. What to mind: every process makes the
# pruner, and calls it as often as the others.

# %%
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mtprune

torch.set_default_dtype(torch.float64)  # so that sums in another order come to the same
STEPS = 40


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.sign, self.size = nn.Linear(32, 2), nn.Linear(32, 1)

    def forward(self, x):
        features = self.trunk(x)
        return {"sign": self.sign(features), "size": self.size(features).squeeze(1)}


losses = {
    "sign": lambda out, batch: nn.functional.cross_entropy(out["sign"], batch["sign"]),
    "size": lambda out, batch: nn.functional.mse_loss(out["size"], batch["size"]),
}


def batches(rank, world):
    """The part of each batch of 32 that a process sees."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x = torch.randn(32, 16, generator=generator)
        x = x[rank::world]
        yield {"x": x, "sign": (x[:, 0] * x[:, 1] > 0).long(), "size": x[:, 2:5].abs().sum(dim=1)}


def train(rank, world, out):
    """Train and prune; the masks and weights of this process go to a file."""
    torch.manual_seed(0)
    plain = Net()
    model = DistributedDataParallel(plain) if world > 1 else plain
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = mtprune.MultitaskPruner(
        model, losses, [plain.trunk], sparsity=0.8, steps=STEPS, optimizer=optimizer
    )
    for batch in batches(rank, world):
        optimizer.zero_grad()
        seen = pruner.observe(model(batch["x"]), batch)
        sum(seen.values()).backward()
        optimizer.step()
        pruner.step()
    masks = pruner.masks
    pruner.finalize()
    torch.save({"masks": masks, "weights": plain.state_dict()}, f"{out}-{world}-{rank}.pt")


def worker(rank, world, port, out):
    """A process of several."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    train(rank, world, out)
    dist.destroy_process_group()


# %% [markdown]
# ## One process, and two
#
# `start_processes` does here what `torchrun` does for a script. (`fork`, because the functions above are in
# a notebook; a script has no need of it.)

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "run"
    train(0, 1, out)
    torch.multiprocessing.start_processes(worker, (2, port, out), nprocs=2, start_method="fork")
    alone, first, second = (
        torch.load(f"{out}-{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )

for name, other in (("the other process", second), ("a single process", alone)):
    moved = sum(int((first["masks"][k] != other["masks"][k]).sum()) for k in first["masks"])
    print(f"mask entries that differ from {name}: {moved}")
kept = sum(int(mask.sum()) for mask in first["masks"].values())
print(f"kept: {kept:,} of {sum(mask.numel() for mask in first['masks'].values()):,}")

# %% [markdown]
# A process that misses a call, or is at another, is an error on all of them that says which, and not a run
# that hangs for ever. What else holds with several processes, and which wrappers work, is in
# [the guide](../guide.md#mixed-precision-accumulation-checkpointing-compile-many-processes).
