# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A trainer of your own
#
# You have a trainer: a class that draws batches, weighs the losses of the tasks, clips, schedules the
# learning rate, saves and resumes. Libraries for multitask learning look much the same inside. This
# tutorial takes one with the parts that usually get in a plugin's way and puts a pruner into it: one
# loader for each task, loss weights that are learned, clipped gradients, checkpoints. Five lines change,
# and they are marked.
#
# ## The trainer
#
# Three tasks on scikit-learn's digits, each with data of its own: a batch has labels of one task only.

# %%
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import mtprune

digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
image = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
digit = torch.tensor(digits.target)[order]
labels = {"digit": digit, "odd": digit % 2, "large": (digit > 4).long()}
classes = {"digit": 10, "odd": 2, "large": 2}
parts = {"digit": slice(0, 500), "odd": slice(500, 900), "large": slice(900, 1300)}
held_out = slice(1300, None)


class Net(nn.Module):
    """Called with pictures and the name of a task."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(64, classes[task]) for task in classes})

    def forward(self, image, task):
        return self.heads[task](self.encoder(image))


class Loader:
    """Batches of one task: a function of the seed and the step, so that a run can be resumed."""

    def __init__(self, task):
        self.image, self.label = image[parts[task]], labels[task][parts[task]]

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(self.image), (64,), generator=generator)
        return self.image[chosen], self.label[chosen]


# %% [markdown]
# The trainer weighs the losses by learned uncertainties (Kendall et al., CVPR 2018). In each step it
# goes through all tasks and adds up their losses.
#
# 1. The pruner is made where the optimizer is made. It gets the *names* of the tasks, because the trainer
#    computes the losses itself.
# 2. `observe_losses` gets each loss as it is, before it is weighed. Its task is its key. It leaves `.grad`,
#    random state and buffers alone, so that the training goes on as it would have.
# 3. `step` comes after the optimizer's step.
# 4. Checkpoints have one more state dict, and
# 5. so has loading.


# %%
class Trainer:
    """Knows how to train, and five lines about pruning."""

    def __init__(self, model, steps, sparsity=None, lr=2e-3):
        self.model, self.steps, self.done = model, steps, 0
        self.loaders = {task: Loader(task) for task in classes}
        self.log_variance = nn.Parameter(torch.zeros(len(classes)))
        self.optimizer = torch.optim.AdamW(
            [{"params": model.parameters()}, {"params": [self.log_variance], "weight_decay": 0.0}],
            lr=lr,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.pruner = sparsity and mtprune.MultitaskPruner(  # 1
            model, list(classes), [model.encoder],
            sparsity=sparsity, steps=steps, optimizer=self.optimizer,
        )  # fmt: skip

    def train(self, until=None):
        while self.done < (until or self.steps):
            self.optimizer.zero_grad()
            weights, total = (-self.log_variance).exp(), 0.0
            for number, (task, loader) in enumerate(self.loaders.items()):
                pictures, truth = loader.batch(self.done)
                loss = F.cross_entropy(self.model(pictures, task), truth)
                if self.pruner:
                    self.pruner.observe_losses({task: loss})  # 2
                total = total + weights[number] * loss + self.log_variance[number]
            total.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if self.pruner:
                self.pruner.step()  # 3
            self.schedule.step()
            self.done += 1

    @torch.no_grad()
    def test(self):
        outputs = {task: self.model(image[held_out], task).argmax(dim=1) for task in classes}
        return {t: (outputs[t] == labels[t][held_out]).float().mean().item() for t in classes}

    def parts(self):
        kept = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return kept | {"pruner": self.pruner}  # 4

    def state(self):
        states = {name: part.state_dict() for name, part in self.parts().items() if part}
        return states | {"done": self.done, "log_variance": self.log_variance.detach().clone()}

    def load(self, state):
        self.done = state["done"]
        self.log_variance.data.copy_(state["log_variance"])
        for name, part in self.parts().items():
            if part:
                part.load_state_dict(state[name])  # 5


# %% [markdown]
# ## Dense, then pruned
#
# First the trainer as it was. Then the trained net goes on for as long with a pruner, and a copy of it
# without, so that both have had the same training.

# %%
import copy


def show(name, results):
    print(f"{name:12}", *(f"{task} {value:.1%}  " for task, value in results.items()))


torch.manual_seed(0)
first = Trainer(Net(), steps=300)
first.train()
show("dense", first.test())

longer = Trainer(copy.deepcopy(first.model), steps=300)
longer.train()
show("dense, longer", longer.test())

pruned = Trainer(copy.deepcopy(first.model), steps=300, sparsity=0.9)
pruned.train()
show("90 % zeros", pruned.test())
print()
print(pruned.pruner.report())

# %% [markdown]
# ## Stopped and resumed
#
# The same run once more, but stopped after 130 steps, in the middle of pruning, and resumed in new
# objects from a file. It ends bitwise like the one that was not stopped.

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "stopped.pt"
    stopped = Trainer(copy.deepcopy(first.model), steps=300, sparsity=0.9)
    stopped.train(until=130)
    print(f"stopped at {stopped.pruner.sparsity:.1%}")
    torch.save(stopped.state(), file)

    resumed = Trainer(Net(), steps=300, sparsity=0.9)
    resumed.load(torch.load(file, weights_only=True))
    resumed.train()

for trainer in (pruned, resumed):
    trainer.pruner.finalize()
one, other = pruned.model.state_dict(), resumed.model.state_dict()
print("bitwise equal:", all(torch.equal(one[name], other[name]) for name in one))

# %% [markdown]
# ## What else a trainer may have
#
# Mixed precision with a scaler, accumulation, gradient surgery with or without TorchJD, early stopping,
# Lightning: each has a section with a loop on the page [your trainer](../your-trainer.md). Next here:
# [a score of your own](own_score.md).
