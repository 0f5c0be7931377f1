r"""Which method prunes a pretrained encoder that serves several tasks: recipes side by side.

For each seed an encoder with new heads is fine-tuned for --dense-steps, one task's batch after the
other. Every method then prunes it and fine-tunes it for --steps, with the same batches. Methods are

* ``here`` and ``elsewhere``: `recipes.best` for weights that were trained on these tasks, and for
  weights that were trained on something else;
* ``vote``, ``joint`` and ``magnitude``: ``|w g|`` by vote, ``|w g|`` of the sum of the losses, and
  the size of the weights;
* ``units`` and ``units_joint``: whole attention heads and neurons, by vote and of the sum;
* ``movement`` and ``movement_joint``: what training does to a weight, by vote and of the sum, the
  same share of every layer, with masks that open again.

Each is followed by ``:rounds``, four of them before the first of the steps, or ``:gradual``, from a
tenth of the steps to six tenths, which is all that movement can be. ``tuned`` is the dense net with
as many steps more. The others but units have a floor under every layer. With ``--dense-steps 0``
the heads are new when they prune.

    python encoder_recipes.py --data DIR --tasks sst2 trec subj sick_e --seeds 3 --out DIR

Of several ``--rates`` each method takes, for each sparsity, the one that does best on the
validation split with another seed. Runs that are done are not done again. Tables and pictures are
those of ``compare.py``, and ``overview.py`` takes what this writes.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import compare
import torch
from common import checkpoints, judging, text
from common.options import positive, positive_float, whole
from encoder_multitask import (
    PACKAGE,
    UNITS,
    Net,
    World,
    metrics,
    moved,
    open_world,
    rate,
    task_loss,
)
from tqdm import tqdm

from mtprune import Cubic, MultitaskPruner, Rounds, Vote, recipes, saliency
from mtprune.files import write_text, write_torch

Options = argparse.Namespace
TUNED = "tuned"
MOVEMENT = ("movement", "movement_joint")
ROUNDS = 4
RATE_SEED = 1000
"""Chooses learning rates, and is not reported."""


def methods(sparsity: float) -> dict[str, Vote]:
    """The votes by name, without a schedule."""
    elsewhere = recipes.best(sparsity, trained="elsewhere")
    here = recipes.best(sparsity)
    assert isinstance(elsewhere, Vote)
    assert isinstance(here, Vote)
    joint = replace(elsewhere, disentangled=False)
    units = replace(elsewhere, granularity=UNITS, min_keep=0, allocation="global")
    return {
        "here": here,
        "elsewhere": elsewhere,
        "vote": elsewhere,
        "joint": joint,
        "magnitude": replace(joint, saliency=saliency.magnitude),
        "units": units,
        "units_joint": replace(units, disentangled=False),
    }


def scheduled(spec: str, sparsity: float, steps: int, tasks: int, observations: int = 4) -> Vote:
    """A method with its schedule.

    Args:
        spec: ``name:rounds`` or ``name:gradual``.
        sparsity: Share of zeros.
        steps: Length of the run.
        tasks: How many; a step has a batch of one, and an update needs one of each.
        observations: Batches of every task before each round.
    """
    name, how = spec.split(":")
    if name in MOVEMENT:
        return recipes.movement(
            *(sparsity, steps),
            disentangled=name == "movement",
            allocation="uniform",
            cooldown=0.4,
            updates=max(1, steps // tasks),
        )
    method = methods(sparsity)[name]
    if how == "rounds":
        return replace(method, schedule=Rounds(ROUNDS), observations=observations)
    begin, end = max(tasks, steps // 10), max(tasks, 6 * steps // 10)
    every = max(tasks, (end - begin) // 8)
    return replace(method, schedule=Cubic(begin=begin, end=end, every=every), observations=1)


@dataclass(frozen=True)
class Study:
    """What all runs have in common.

    Attributes:
        world: The encoder, and how its texts are read.
        tasks: The tasks.
        options: The command line.
    """

    world: World
    tasks: Mapping[str, text.Task]
    options: Options

    def batches(self, seed: int, start: int = 0) -> Iterator[tuple[str, text.Batch]]:
        """A batch of one task after the other, always the same for a seed.

        Args:
            seed: The seed.
            start: How many batches come before.
        """
        names, options = list(self.tasks), self.options
        loaders = {
            name: text.training_batches(
                task,
                options.batch,
                seed=seed,
                padding=self.world.padding,
                start=len(range(place, start, len(names))),
            )
            for place, (name, task) in enumerate(self.tasks.items())
        }
        for step in count(start):
            name = names[step % len(names)]
            yield name, moved(next(loaders[name]), options.device)

    def dense(self, seed: int) -> Net:
        """The encoder with new heads, fine-tuned; from its file if it is there."""
        path = self.options.out / "dense" / f"seed{seed}" / "net.pt"
        encoder = self.world.encoder()
        torch.manual_seed(seed)
        net = Net(encoder, {name: task.outputs for name, task in self.tasks.items()})
        if path.exists():
            net.load_state_dict(checkpoints.read(path))
            return net.to(self.options.device)
        net.to(self.options.device)
        steps = self.options.dense_steps
        self.tune(net, None, self.batches(seed), steps, self.options.lr)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_torch(path, net.state_dict())
        return net

    def tune(
        self,
        net: Net,
        pruner: MultitaskPruner | None,
        batches: Iterator[tuple[str, text.Batch]],
        steps: int,
        lr: float,
    ) -> None:
        """Fine-tune, with a pruner in the loop if there is one."""
        optimizer = self.optimizer(net, lr)
        net.train()
        for step, (name, batch) in enumerate(islice(batches, steps)):
            for group in optimizer.param_groups:
                group["lr"] = group["most"] * rate(step, steps)
            loss = task_loss(self.tasks[name], net(name, batch), batch)
            optimizer.zero_grad()
            if pruner is not None:
                pruner.observe_losses({name: loss})  # mtprune
            loss.backward()
            optimizer.step()
            if pruner is not None:
                pruner.step()  # mtprune

    def optimizer(self, net: Net, lr: float) -> torch.optim.Optimizer:
        """AdamW, ten times as fast for the heads."""
        body = [p for p in net.encoder.parameters() if p.requires_grad]
        groups = [
            {"params": body, "lr": lr, "most": lr},
            {"params": list(net.heads.parameters()), "lr": 10 * lr, "most": 10 * lr},
        ]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    @torch.no_grad()
    def evaluate(self, net: Net, split: str) -> dict[str, dict[str, float]]:
        """Loss and metrics of every task on a split."""
        net.eval()
        found = {}
        for name, task in self.tasks.items():
            outputs, labels = [], []
            for batch in text.test_batches(task.splits[split], 64, padding=self.world.padding):
                outputs.append(net(name, moved(batch, self.options.device)).cpu())
                labels.append(batch["label"])
            given, truth = torch.cat(outputs), torch.cat(labels)
            loss = float(task_loss(task, given, {"label": truth}))
            found[name] = {"loss": loss, **metrics(task, given, truth)}
        net.train()
        return found

    def judged(self, net: Net, lr: float) -> dict[str, Any]:
        """What a run gave, as `compare.py` has it."""
        matrices = [
            p for n, p in net.encoder.named_parameters() if p.dim() == 2 and p.requires_grad
        ]
        return {
            "options": {"lr": lr},
            "judged": {name: ["loss"] for name in self.tasks},
            "val": self.evaluate(net, "val"),
            "test": self.evaluate(net, "test"),
            "weights": sum(p.numel() for p in matrices),
            "zeros": sum(int((p == 0).sum()) for p in matrices),
        }

    def run(self, spec: str, sparsity: float, seed: int, lr: float, folder: Path) -> dict[str, Any]:
        """Prune and fine-tune by a method, or read what that gave."""
        path = folder / f"seed{seed}" / "results.json"
        if path.exists():
            told: dict[str, Any] = checkpoints.results(path).plain()
            return told
        net, options = copy.deepcopy(self.dense(seed)), self.options
        later = self.batches(seed, start=options.dense_steps)
        torch.manual_seed(seed)
        if spec == "dense":
            found = self.judged(net, options.lr)
        else:
            self.prune_and_tune(net, spec, sparsity, seed, lr, later)
            found = self.judged(net, lr)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found))
        return found

    def prune_and_tune(
        self,
        net: Net,
        spec: str,
        sparsity: float,
        seed: int,
        lr: float,
        batches: Iterator[tuple[str, text.Batch]],
    ) -> None:
        """Prune by a method, before or while the net is tuned; its weights are plain after."""
        steps = self.options.steps
        if spec == TUNED:
            self.tune(net, None, batches, steps, lr)
            return
        method = scheduled(spec, sparsity, steps, len(self.tasks), self.options.observations)
        pruner = MultitaskPruner(  # mtprune
            net,
            {name: self.loss_of(name) for name in self.tasks},
            net.encoder,
            method=method,
            exclude="heads",
            seed=seed,
            backend="prune" if method.straight_through else "inplace",
        )
        if isinstance(method.schedule, Rounds):
            every = ROUNDS * int(method.observations)
            pruner.prune(self.sets(seed, every), forward=_forward, progress=False)  # mtprune
        self.tune(net, pruner, batches, steps, lr)
        pruner.finalize()  # mtprune

    def loss_of(self, name: str) -> Callable[[Any, Any], torch.Tensor]:
        """A task's loss of what `sets` and `_forward` give."""
        return lambda outputs, batch: task_loss(self.tasks[name], outputs[name], batch[name])

    def sets(self, seed: int, number: int) -> Iterator[dict[str, text.Batch]]:
        """So many times a batch of every task, from another order than that of training."""
        stream = self.batches(seed + 10_000)
        for _ in range(number):
            yield dict(islice(stream, len(self.tasks)))


def _forward(net: torch.nn.Module, batch: Mapping[str, text.Batch]) -> dict[str, torch.Tensor]:
    return {name: net(name, part) for name, part in batch.items()}


def collect(study: Study) -> list[dict[str, Any]]:
    """All runs, done if they are not there yet; a row for each method and sparsity."""
    options = study.options
    dense = {
        seed: study.run("dense", 0.0, seed, options.lr, options.out / "dense")
        for seed in (*range(options.seeds), *([RATE_SEED] if len(options.rates) > 1 else []))
    }
    cells = [(TUNED, 0.0)] if TUNED in options.methods else []
    cells += [(m, s) for s in options.sparsities for m in options.methods if m != TUNED]
    bar = tqdm(total=len(cells) * options.seeds, unit="run", disable=None)
    found: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for spec, sparsity in cells:
        folder = options.out / f"{spec.replace(':', '-')}-{sparsity:g}"

        def under(lr: float, folder: Path = folder) -> Path:
            return folder / f"rate{lr:g}"

        lr = options.rates[0]
        if len(options.rates) > 1:
            tries = {
                lr: {RATE_SEED: study.run(spec, sparsity, RATE_SEED, lr, under(lr))}
                for lr in options.rates
            }
            lr = judging.best_rate(tries, dense)
        for seed in range(options.seeds):
            bar.set_description(f"{spec} {sparsity:g} seed {seed}")
            one = study.run(spec, sparsity, seed, lr, under(lr))
            found.setdefault((spec, sparsity), {})[seed] = one
            bar.update()
    rows = []
    for (spec, sparsity), runs in found.items():
        against = found.get((options.reference, sparsity))
        row = judging.row(runs, dense, None if spec == options.reference else against)
        first = next(iter(runs.values()))["options"]["lr"]
        head = {"method": spec, "sparsity": sparsity, "scaled": False, "rate": first}
        rows.append({**head, **row})
    return rows


def read(arguments: Sequence[str] | None) -> Options:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [f"{name}:{how}" for name in methods(0.5) for how in ("rounds", "gradual")]
    known += [f"{name}:gradual" for name in MOVEMENT]
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the tasks")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="what to learn")
    add("--encoder", default=PACKAGE, metavar="PATH|NAME", help="what to start from")
    add("--layers", type=positive, help="only its first layers, so many; all unless given")
    add("--random", action="store_true", help="two small random layers instead, to try it out")
    add("--length", type=positive, default=32, help="tokens of a sentence or pair, at most")
    add("--held-out", type=positive, default=400, help="examples of a val or test split, at most")
    add(
        "--methods",
        nargs="+",
        choices=[TUNED, *known],
        default=[
            *("elsewhere:rounds", "joint:rounds", "joint:gradual", "vote:gradual", "here:rounds"),
            *("magnitude:gradual", TUNED),
        ],
        metavar="METHOD",
        help="NAME:HOW, see above",
    )
    add("--reference", help="the method that the others are held against; the first unless given")
    add("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9], help="shares of zeros")
    add("--seeds", type=positive, default=3, help="how many")
    add("--dense-steps", type=whole, default=240, help="of fine-tuning before pruning")
    add("--steps", type=positive, default=80, help="of fine-tuning with it, and after")
    add("--observations", type=positive, default=4, help="batches of a task before each round")
    add("--batch", type=positive, default=8, help="sentences in a batch")
    add("--lr", type=positive_float, default=3e-4, help="of AdamW for the dense encoder")
    add(
        "--rates",
        type=positive_float,
        nargs="+",
        default=[3e-4],
        metavar="LR",
        help="of AdamW after that, to choose from",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    add("--threads", type=positive, help="CPU threads")
    add("--out", type=Path, default=Path("encoder_recipes_out"), help="folder for what comes out")
    options = parser.parse_args(arguments)
    options.reference = options.reference or options.methods[0]
    options.loss_scale = []
    if options.reference not in options.methods:
        parser.error(f"--reference {options.reference} is none of --methods.")
    return options


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Do what is not done yet, and tell what came out."""
    options = read(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        world = open_world(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"encoder_recipes: {error}") from None
    study = Study(world, world.tasks(options.tasks, {}), options)
    rows = collect(study)
    told = compare.table(rows, options)
    print(told)
    write_text(options.out / "compare.md", told + "\n")
    write_text(options.out / "compare.json", json.dumps(rows, indent=1) + "\n")
    print(f"Wrote compare.md and compare.json to {options.out}.")
    return rows


if __name__ == "__main__":
    main()
