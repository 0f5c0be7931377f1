"""What came out of a run: a table, a JSON, curves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mtprune.files import write_text


def is_rank(method: str) -> bool:
    """Whether a method prunes ranks: it saves parameters, and its weights have no zeros."""
    return method.startswith("flop")


def table(found: Mapping[str, Any]) -> str:
    """Every task's metrics, of the checkpoint that did best on the validation split."""
    options = found["options"]
    what = "saved" if is_rank(options["method"]) else "zeros"
    lines = [
        f"{found['problem']} ({found['layout']}), {options['net']}, {options['method']}: "
        f"{found['zeros']:,} {what} of {found['weights']:,} weights "
        f"({found['zeros'] / found['weights']:.2%}), "
        f"step {found['step']} of {options['steps']}, best on val",
        f"  {'task':15}{'metric':18}{'val':>10}{'test':>10}",
    ]
    for task, metrics in found["test"].items():
        for i, (name, value) in enumerate(metrics.items()):
            val = found["val"][task][name]
            lines.append(f"  {task if i == 0 else '':15}{name:18}{val:10.4g}{value:10.4g}")
    return "\n".join(lines)


def write(found: Mapping[str, Any], out: Path) -> None:
    """``results.json`` and ``curves.png``."""
    draw(found).savefig(out / "curves.png", dpi=110)
    write_text(out / "results.json", json.dumps(found, indent=1) + "\n")


def draw(found: Mapping[str, Any]) -> Figure:
    """Training losses, validation losses and sparsity, over the steps."""
    figure = Figure(figsize=(12, 4))
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.13, top=0.84, wspace=0.22)
    losses, validation, sparsity = figure.subplots(1, 3)
    history = found["history"]
    steps = [row["step"] for row in history["train"]]
    checks = [row["step"] for row in history["val"]]
    for task in found["test"]:
        values = [row[task] for row in history["train"]]
        line = losses.plot(steps, values, lw=0.6, alpha=0.3)[0]
        losses.plot(steps, _smooth(values), color=line.get_color(), label=task)
        loss = [row["results"][task]["loss"] for row in history["val"]]
        validation.plot(checks, loss, ".-", label=task)
    validation.axvline(found["step"], color="0.5", lw=0.8, ls=":", label="chosen")
    losses.set(title="training loss", yscale="log")
    validation.set(title="validation loss", yscale="log")
    sparsity.step(steps, [100 * row["sparsity"] for row in history["train"]], where="post")
    sparsity.set(title="zeros, %", ylim=(-2, 102))
    for axes in (losses, validation, sparsity):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (losses, validation):
        axes.legend(frameon=False)
    figure.suptitle(f"{found['problem']}, {found['options']['method']}", fontweight="bold")
    return figure


def _smooth(values: list[float]) -> list[float]:
    """A running mean that forgets over a twentieth of the run."""
    keep = 1 - 1 / max(1, len(values) // 20)
    smooth, weight, found = 0.0, 0.0, []
    for value in values:
        smooth, weight = keep * smooth + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(smooth / weight)
    return found
