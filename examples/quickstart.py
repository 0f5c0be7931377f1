"""Prune a three-task network to 90 % zeros, with no task left behind.

Every image holds two overlapping handwritten digits. One convolutional trunk serves three tasks:
read the left digit, read the right digit, and tell whether their sum is odd. The script

1. trains the dense network;
2. prunes it step by step while it trains on, by vote (every task ranks the weights, a weight goes
   when all agree) and, for comparison, by joint saliency (one ranking, by the sum of the losses),
   to the same budget;
3. fine-tunes both;
4. does 2 and 3 again with one task's loss multiplied by 30, in the scoring only: losses come in
   whatever units they come in, and which weights go should not hang on that;
5. prints each task's accuracy and writes a picture and a JSON.

    pip install "mtprune[examples]"
    python quickstart.py
    python quickstart.py --one-shot               # prune at once instead; harder on every method
    python quickstart.py --allocation global      # no floor under every layer; harder on joint
    python quickstart.py --method adapmtl         # thresholds that rise, instead of the vote

It takes a minute or two. What concerns pruning is in `make_method`, `prune_and_tune` and `train`.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import mtprune
from mtprune import Cubic, MultitaskPruner, Report, Vote, recipes
from mtprune.files import write_text
from mtprune.methods import Method
from mtprune.metrics import delta_t

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'{error}. The examples need: pip install "mtprune[examples]"') from error

CLASSES = {"left": 10, "right": 10, "parity": 2}
Batch = dict[str, Tensor]
Accuracies = dict[str, float]


# The problem.


def make_data(seed: int) -> tuple[Batch, Batch]:
    """Training and test images. They are made of different digits, so nothing leaks."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype("float32") / 16
    split = train_test_split(images, labels, test_size=0.3, random_state=seed, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, split)
    generator = torch.Generator().manual_seed(seed)
    return (
        overlap(train_images, train_labels, 8000, generator),
        overlap(test_images, test_labels, 2000, generator),
    )


def overlap(images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Batch:
    """Pairs of digits that overlap by one to three columns, each up to two rows off.

    Args:
        images: Single digits, ``[digits, 8, 8]``.
        labels: What they are, ``[digits]``.
        count: How many pairs.
        generator: Draws the pairs and the offsets.
    """
    left, right = torch.randint(len(images), (2, count), generator=generator)
    rows = torch.randint(3, (2, count), generator=generator)
    columns = torch.randint(5, 8, (count,), generator=generator)
    canvas = torch.zeros(count, 1, 10, 15)
    for i in range(count):
        canvas[i, 0, rows[0, i] : rows[0, i] + 8, :8] = images[left[i]]
        place = canvas[i, 0, rows[1, i] : rows[1, i] + 8, columns[i] : columns[i] + 8]
        place.copy_(torch.maximum(place, images[right[i]]))
    return {
        "image": canvas,
        "left": labels[left],
        "right": labels[right],
        "parity": (labels[left] + labels[right]) % 2,
    }


class Net(nn.Module):
    """A trunk that all tasks share, and a head for each."""

    def __init__(self) -> None:
        """Build it, with far more weights than it needs."""
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            nn.Flatten(),
            *(nn.Linear(32 * 3 * 4, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, classes))
                for task, classes in CLASSES.items()
            }
        )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """``[batch, 1, 10, 15]`` to ``{task: [batch, classes]}``."""
        hidden = self.trunk(image)
        return {task: head(hidden) for task, head in self.heads.items()}


def task_loss(task: str, scale: float = 1.0) -> Callable[[dict[str, Tensor], Batch], Tensor]:
    """The loss of a task, as `MultitaskPruner` takes it: ``loss(outputs, batch)``."""
    return lambda outputs, batch: scale * cross_entropy(outputs[task], batch[task])


# Train, prune, fine-tune.


def draw(data: Batch, size: int, generator: torch.Generator) -> Batch:
    """A random batch."""
    chosen = torch.randint(len(data["image"]), (size,), generator=generator)
    return {name: values[chosen] for name, values in data.items()}


def train(
    model: nn.Module,
    data: Batch,
    steps: int,
    lr: float,
    generator: torch.Generator,
    bar: "tqdm[Any]",
    pruner: MultitaskPruner | None = None,
) -> None:
    """An ordinary training loop. With a pruner it has three more lines.

    The losses that are observed here are those given to the pruner, scaled in the second part of
    this script; the model always trains on the plain ones. Usually they are the same, and
    ``losses = pruner.observe(outputs, batch)`` is all.
    """
    losses = {task: task_loss(task) for task in CLASSES}
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        batch = draw(data, 128, generator)
        optimizer.zero_grad()
        outputs = model(batch["image"])
        found = {task: loss(outputs, batch) for task, loss in losses.items()}
        if pruner is None:
            total = torch.stack(list(found.values())).sum()
        else:
            pruner.observe(outputs, batch)  # a score per task, only when masks are about to change
            total = pruner.weigh(found)  # their sum, unless the method weighs tasks
        total.backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()  # changes the masks when that is due, and keeps zeros zero
        bar.update()


@torch.no_grad()
def accuracy(model: nn.Module, data: Batch) -> Accuracies:
    """Percent right, for every task."""
    model.eval()
    outputs = model(data["image"])
    right = {task: outputs[task].argmax(1) == data[task] for task in CLASSES}
    return {task: 100 * hits.float().mean().item() for task, hits in right.items()}


@torch.no_grad()
def refresh_norms(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Let the BatchNorm statistics, which are of the dense model, follow the pruned one."""
    model.train()
    for _ in range(4):
        for batch in batches:
            model(batch["image"])


@dataclass(frozen=True)
class Run:
    """What came of pruning once.

    Attributes:
        method: ``"vote"``, ``"adapmtl"`` or ``"joint"``.
        scale: What one task's loss was multiplied by while scoring.
        seed: Of the data, the dense model and the batches.
        pruned: Accuracies straight after pruning.
        tuned: Accuracies after fine-tuning.
        pruned_delta: Mean relative change against dense, in percent, straight after pruning.
        tuned_delta: The same after fine-tuning.
        weights: How many weights the pruner prunes among.
        zeros: How many of them are zero in the finished model, counted there.
        differ: How many weights have another mask than with the losses as they are.
    """

    method: str
    scale: float
    seed: int
    pruned: Accuracies
    tuned: Accuracies
    pruned_delta: float
    tuned_delta: float
    weights: int
    zeros: int
    differ: int = 0


def prune_and_tune(
    dense: Net,
    data: tuple[Batch, Batch],
    name: str,
    method: Method,
    scale: float,
    seed: int,
    options: argparse.Namespace,
    bar: "tqdm[Any]",
) -> tuple[Run, dict[str, Tensor], Report]:
    """Prune a copy of the dense model and fine-tune it: the run, its masks, its report."""
    training, test = data
    model = copy.deepcopy(dense).train()
    generator = torch.Generator().manual_seed(seed)
    scales = dict.fromkeys(CLASSES, 1.0) | {options.scaled_task: scale}
    pruner = MultitaskPruner(
        model,
        task_losses={task: task_loss(task, scales[task]) for task in CLASSES},
        shared_modules=[model.trunk],
        method=method,
        backend=options.backend,
    )
    if options.one_shot:
        batches = [draw(training, 256, generator) for _ in range(8)]
        pruner.prune(batches, forward=lambda m, batch: m(batch["image"]), progress=False)
        refresh_norms(model, batches)
    else:
        train(model, training, options.tune_steps, 1e-3, generator, bar, pruner)
    pruned = accuracy(model, test)
    train(model, training, options.tune_steps, 1e-3, generator, bar, pruner)
    tuned = accuracy(model, test)
    pruner.finalize()

    weights = dict(model.named_parameters())
    run = Run(
        method=name,
        scale=scale,
        seed=seed,
        pruned=pruned,
        tuned=tuned,
        pruned_delta=change(pruned, accuracy(dense, test)),
        tuned_delta=change(tuned, accuracy(dense, test)),
        weights=sum(mask.numel() for mask in pruner.masks.values()),
        zeros=sum(int((weights[name] == 0).sum()) for name in pruner.masks),
    )
    return run, pruner.masks, pruner.report()


def change(now: Accuracies, dense: Accuracies) -> float:
    """Delta_T: the mean over tasks of the relative change, in percent; 0 is as good as dense."""
    return delta_t(
        {task: {"accuracy": value} for task, value in now.items()},
        {task: {"accuracy": value} for task, value in dense.items()},
    ).overall


def experiment(
    options: argparse.Namespace,
) -> tuple[list[Accuracies], list[Run], Report]:
    """All seeds: the dense accuracies, the pruned runs, and the first report."""
    methods = {options.method: make_method(options), "joint": make_joint(options)}
    tunings = 1 if options.one_shot else 2  # one to prune in, one with masks that stay
    per_seed = options.steps + 4 * tunings * options.tune_steps
    dense_accuracies, runs, reports = [], [], []
    with tqdm(total=options.seeds * per_seed, unit="step") as bar:
        for seed in range(options.seed, options.seed + options.seeds):
            torch.manual_seed(seed)
            data = make_data(seed)
            dense = Net()
            bar.set_description(f"seed {seed}: dense")
            train(dense, data[0], options.steps, 3e-3, torch.Generator().manual_seed(seed), bar)
            dense_accuracies.append(accuracy(dense, data[1]))
            for name, method in methods.items():
                bar.set_description(f"seed {seed}: {name}")
                run, plain, report = prune_and_tune(
                    dense, data, name, method, 1.0, seed, options, bar
                )
                again, masks, _ = prune_and_tune(
                    dense, data, name, method, options.scale, seed, options, bar
                )
                differ = sum(int((masks[name] != plain[name]).sum()) for name in plain)
                runs += [run, replace(again, differ=differ)]
                reports.append(report)
    return dense_accuracies, runs, reports[0]


def make_method(options: argparse.Namespace) -> Method:
    """How to prune: by vote in ten updates, or at once; or by thresholds that rise meanwhile."""
    end = max(2, options.tune_steps)
    if options.method != "vote":
        learned = "uniform" if options.method == "adapmtl-uniform" else "learned"
        return recipes.adapmtl(options.sparsity, steps=4 * end // 3, allocation=learned)
    vote = Vote(sparsity=options.sparsity, allocation=options.allocation)
    if options.one_shot:
        return replace(vote, observations=8)
    return replace(vote, schedule=Cubic(begin=1, end=end, every=max(1, end // 10)))


def make_joint(options: argparse.Namespace) -> Method:
    """What it is compared with: the vote's setting, but with one ranking by the summed losses."""
    vote = make_method(argparse.Namespace(**vars(options) | {"method": "vote"}))
    assert isinstance(vote, Vote)
    return replace(vote, disentangled=False)


# Tell what came out.


def mean(values: Sequence[Accuracies]) -> Accuracies:
    """The mean of each task's accuracy."""
    return {task: statistics.fmean(value[task] for value in values) for task in CLASSES}


def groups(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of every method and scale, over seeds, under the name they go by."""
    return {
        f"{method}, x{scale:g}": [
            run for run in runs if run.method == method and run.scale == scale
        ]
        for method in (options.method, "joint")
        for scale in (1.0, options.scale)
    }


def table(dense: Sequence[Accuracies], runs: Sequence[Run], options: argparse.Namespace) -> str:
    """Each task's test accuracy, mean over seeds."""
    tasks = "".join(f"{task:>8}" for task in CLASSES) + "  Delta_T"
    lines = [
        f"{'':14}{'straight after pruning':>33}   {'fine-tuned':>33}",
        f"{'':14}{tasks}   {tasks}   mask entries that differ",
        f"{'dense':14}" + " " * 36 + "".join(f"{v:8.1f}" for v in mean(dense).values()),
    ]
    for name, same in groups(runs, options).items():
        line = f"{name:14}"
        for values, deltas in (
            ([run.pruned for run in same], [run.pruned_delta for run in same]),
            ([run.tuned for run in same], [run.tuned_delta for run in same]),
        ):
            line += "".join(f"{value:8.1f}" for value in mean(values).values())
            line += f"{statistics.fmean(deltas):8.1f}%   "
        differ = ", ".join(f"{run.differ:,}" for run in same)
        lines.append((line + ("" if same[0].scale == 1 else differ)).rstrip())
    return "\n".join(lines)


def behind(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """Where the method is behind joint saliency, in so many words."""
    found = groups(runs, options)
    places = []
    for moment, words in (("pruned", "straight after pruning"), ("tuned", "fine-tuned")):
        for scale in (1.0, options.scale):
            ours, theirs = (
                mean([getattr(run, moment) for run in found[f"{method}, x{scale:g}"]])
                for method in (options.method, "joint")
            )
            places += [
                f"  {words}, x{scale:g}: {task} ({ours[task]:.1f}, joint {theirs[task]:.1f})"
                for task in CLASSES
                if ours[task] < theirs[task]
            ]
    return "\n".join(
        [f"Where {options.method} is behind joint saliency:", *(places or ["  nowhere"])]
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it all; the results, as written to the JSON."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    dense, runs, report = experiment(options)
    zeros = {run.zeros for run in runs}
    print(f"\n{options.method.capitalize()}, seed {options.seed}, losses as they are:\n{report}\n")
    print(
        f"Test accuracy in %, mean over {options.seeds} seed(s), {options.sparsity:.0%} pruned "
        f"({' or '.join(f'{n:,}' for n in sorted(zeros))} zeros of {runs[0].weights:,} weights).\n"
        f"x{options.scale:g}: the loss of '{options.scaled_task}' multiplied by that in the "
        f"scoring.\n\n{table(dense, runs, options)}\n\n{behind(runs, options)}"
    )
    results = {
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "versions": {"mtprune": mtprune.__version__, "torch": torch.__version__},
        "dense": dense,
        "runs": [asdict(run) for run in runs],
        "report": report.to_dict(),
    }
    write_text(options.out / "quickstart.json", json.dumps(results, indent=2) + "\n")
    draw_picture(dense, runs, options).savefig(options.out / "quickstart.png", dpi=150)
    print(f"Wrote {options.out / 'quickstart.json'} and {options.out / 'quickstart.png'}.")
    return results


# The picture.


def draw_picture(
    dense: Sequence[Accuracies], runs: Sequence[Run], options: argparse.Namespace
) -> Figure:
    """What the scale of one loss does to every task, by the method and by joint saliency."""
    found = groups(runs, options)
    differ, delta = {}, {}
    for method in (options.method, "joint"):
        plain, scaled = found[f"{method}, x1"], found[f"{method}, x{options.scale:g}"]
        differ[method] = statistics.fmean(run.differ for run in scaled)
        delta[method] = [
            statistics.fmean(run.tuned_delta for run in same) for same in (plain, scaled)
        ]
    figure = Figure(figsize=(11.5, 6))
    figure.set_layout_engine("constrained", w_pad=0.12)
    figure.suptitle(
        f"{options.scaled_task.capitalize()} loss x{options.scale:g} while scoring: "
        f"{differ[options.method]:,.0f} mask entries change by {options.method}, "
        f"{differ['joint']:,.0f} by joint saliency\n\n",
        fontsize=14,
        fontweight="bold",
    )
    changes = ", ".join(
        f"{m} {a:.1f}% \N{RIGHTWARDS ARROW} {b:.1f}%" for m, (a, b) in delta.items()
    )
    figure.text(
        *(0.5, 0.915, f"Mean accuracy change against dense, fine-tuned: {changes}"),
        ha="center",
        fontsize=11,
        color="0.25",
    )
    examples, pruned, tuned = figure.subplots(1, 3, width_ratios=[0.5, 2, 2])
    draw_examples(examples, make_data(options.seed)[1])
    draw_bars(pruned, found, dense, "pruned", f"Straight after pruning {options.sparsity:.0%}")
    draw_bars(tuned, found, dense, "tuned", "After fine-tuning")
    handles, names = pruned.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_examples(axes: Axes, data: Batch) -> None:
    """Three test images under each other."""
    gap = torch.ones(2, 15)
    tiles = [part for i in range(3) for part in (1 - data["image"][i, 0], gap)][:-1]
    axes.imshow(torch.cat(tiles).numpy(), cmap="gray")
    axes.set_title("Test images", fontsize=11)
    axes.set_yticks(
        [4.5 + 12 * i for i in range(3)],
        [f"{data['left'][i]} and {data['right'][i]}" for i in range(3)],
    )
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_bars(
    axes: Axes,
    found: dict[str, list[Run]],
    dense: Sequence[Accuracies],
    moment: str,
    title: str,
) -> None:
    """What every task lost: a bar for each method and scale, a dot for each seed."""
    colors = ("#08519c", "#6baed6", "#d94801", "#fdae6b")
    for i, ((name, same), color) in enumerate(zip(found.items(), colors, strict=True)):
        lost = [
            {task: before[task] - getattr(run, moment)[task] for task in CLASSES}
            for run, before in zip(same, dense, strict=True)
        ]
        places = [k + 0.2 * (i - 1.5) for k in range(len(CLASSES))]
        axes.bar(places, list(mean(lost).values()), 0.18, color=color, label=name)
        for k, seed in enumerate(lost):
            label = "one seed" if name == list(found)[-1] and k == 0 else None
            dots = list(seed.values())
            axes.plot(places, dots, ".", color="black", ms=5, alpha=0.7, label=label)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_title(title, fontsize=11)
    axes.set_xticks(range(len(CLASSES)), list(CLASSES))
    axes.set_xlabel("task")
    axes.set_ylabel("accuracy lost (points; 0 = dense)")
    axes.spines[["top", "right"]].set_visible(False)


# The command line.


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Got {number}.")
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Prune a three-task network by vote and by joint saliency, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--method", choices=["vote", "adapmtl", "adapmtl-uniform"], default="vote", help="ours")
    add("--sparsity", type=float, default=0.9, help="share of zeros, in [0, 1)")
    add("--scale", type=float, default=30.0, help="what one loss is multiplied by in the scoring")
    add("--scaled-task", choices=list(CLASSES), default="left", help="the task it is done to")
    add(
        "--allocation",
        choices=["floor", "global", "erk", "uniform"],
        default="floor",
        help="how the budget is spread over layers",
    )
    add("--one-shot", action="store_true", help="prune at once, not in ten updates of training")
    add("--backend", choices=["prune", "inplace"], default="prune", help="how masks are held")
    add("--steps", type=positive, default=400, help="training steps of the dense model")
    add("--tune-steps", type=positive, default=100, help="steps to prune in, and to tune for")
    add("--seeds", type=positive, default=3, help="how many seeds to average over")
    add("--seed", type=int, default=0, help="the first of them")
    add("--threads", type=positive, default=1, help="CPU threads")
    add("--out", type=Path, default=Path("quickstart_out"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.scale <= 0 or options.scale == 1:
        parser.error(f"--scale must be positive, and not 1. Got {options.scale:g}.")
    if options.one_shot and options.method != "vote":
        parser.error("--one-shot leaves thresholds no time to rise.")
    try:
        make_method(options)
    except ValueError as error:
        parser.error(str(error))
    return options


if __name__ == "__main__":
    main()
