"""Watch sparsity rise: thresholds that are asked for a number, and thresholds that are trained.

The network of `quickstart.py` is trained from scratch while soft thresholds prune it, with three
learning rates. `recipes.adapmtl` sets the common level of its thresholds by the schedule, here
without learning how they differ; in `recipes.adapmtl_published` the thresholds are trained like
weights, as in the original code of AdapMTL. Both are asked for the same sparsity. The script
prints where each ends, component by component, and writes a picture and a JSON.

    pip install "mtprune[examples]"
    python thresholds.py

It takes some minutes.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quickstart import CLASSES, Net, accuracy, draw, make_data, task_loss

import mtprune
from mtprune import MultitaskPruner, recipes
from mtprune.files import write_text

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'{error}. The examples need: pip install "mtprune[examples]"') from error

RATES = (1e-4, 1e-3, 3e-3)
INITS = (-20.0, -8.0, -5.0)
COLORS = {"shared": "black", "left": "#08519c", "right": "#d94801", "parity": "#238b45"}


def run(method: Any, lr: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train from scratch with a pruner; what became of sparsity and accuracy."""
    torch.manual_seed(options.seed)
    training, test = make_data(options.seed)
    model = Net()
    losses = {task: task_loss(task) for task in CLASSES}
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.5, 0.999))
    pruner = MultitaskPruner(model, losses, [model.trunk], method=method, optimizer=optimizer)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in tqdm(range(options.steps + 1), leave=False, unit="step"):
        batch = draw(training, 128, generator)
        optimizer.zero_grad()
        pruner.weigh(pruner.observe(model(batch["image"]), batch)).backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    report = pruner.report()
    history = report.history[:: max(1, len(report.history) // 50)]
    return {
        "lr": lr,
        "sparsity": pruner.sparsity,
        "components": {row.name: row.sparsity for row in report.components},
        "weights": dict(report.weights),
        "accuracy": accuracy(model, test),
        "history": [asdict(moment) for moment in (*history, report.history[-1])],
    }


def experiment(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The runs of each recipe, under the name they go by."""
    steps, found = options.steps, {}
    ours = recipes.adapmtl(options.sparsity, steps, allocation="uniform")
    found["adapmtl"] = [run(ours, lr, options) for lr in RATES]
    for init in INITS:
        name = f"published, s0 = {init:g}"
        found[name] = [
            run(recipes.adapmtl_published(options.sparsity, steps, init=init, lr=lr), lr, options)
            for lr in RATES
        ]
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Where each run ended."""
    lines = [f"{'':22}{'lr':>8}{'overall':>10}" + "".join(f"{name:>9}" for name in COLORS)]
    for name, runs in found.items():
        for one in runs:
            parts = "".join(f"{one['components'][c]:9.2%}" for c in COLORS)
            lines.append(f"{name:22}{one['lr']:8g}{one['sparsity']:10.2%}{parts}")
    return "\n".join(lines)


def draw_picture(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> Figure:
    """Sparsity of each component over training: a row for each recipe, a column for each rate."""
    figure = Figure(figsize=(11, 2.4 * len(found) + 0.6))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(found), len(RATES), sharex=True, sharey=True, squeeze=False)
    for row, (name, runs) in zip(axes, found.items(), strict=True):
        for place, one in zip(row, runs, strict=True):
            draw_run(place, one, options)
        row[0].set_ylabel(f"{name}\nsparsity")
    for place, lr in zip(axes[0], RATES, strict=True):
        place.set_title(f"learning rate {lr:g}", fontsize=11)
    for place in axes[-1]:
        place.set_xlabel("step")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def draw_run(place: Axes, one: dict[str, Any], options: argparse.Namespace) -> None:
    """One run's curves, and the line they were asked to reach."""
    steps = [moment["step"] for moment in one["history"]]
    place.axhline(options.sparsity, color="0.6", lw=1, ls="--", label="asked for, overall")
    for name, color in COLORS.items():
        curve = [moment["components"][name]["sparsity"] for moment in one["history"]]
        place.plot(steps, curve, color=color, lw=1.2, alpha=0.8, label=name)
    overall = [moment["sparsity"] for moment in one["history"]]
    place.plot(steps, overall, color="red", lw=2, label="overall")
    place.set_ylim(-0.03, 1.03)
    place.spines[["top", "right"]].set_visible(False)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Sparsity over training: thresholds by schedule, and thresholds as published.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of zeros, in [0, 1)")
    parser.add_argument("--steps", type=int, default=600, help="length of each run")
    parser.add_argument("--seed", type=int, default=0, help="of data, network and batches")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("thresholds_out"), help="for results")
    options = parser.parse_args(arguments)
    try:
        recipes.adapmtl(options.sparsity, options.steps)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it all; the results, as written to the JSON."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    found = experiment(options)
    print(f"Asked for {options.sparsity:.0%}:\n\n{table(found)}\n")
    results = {
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "versions": {"mtprune": mtprune.__version__, "torch": torch.__version__},
        "runs": found,
    }
    write_text(options.out / "thresholds.json", json.dumps(_rounded(results)) + "\n")
    draw_picture(found, options).savefig(options.out / "thresholds.png", dpi=120)
    print(f"Wrote {options.out / 'thresholds.json'} and {options.out / 'thresholds.png'}.")
    return results


def _rounded(value: Any) -> Any:
    """Numbers to six digits: the JSON is for looking up and drawing."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
