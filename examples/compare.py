r"""Compare pruning methods on one of the trainers: methods x sparsities x seeds, in one command.

    python compare.py census --data DIR --out DIR --seeds 5 --sparsities 0.8 0.9 0.95 \
        --methods vote joint magnitude random:init:erk disparse_static disparse_dynamic lth imp

A method is ``name[:when[:allocation]]`` with the trainer's names, for instance
``vote:trained:global``; ``when`` may be empty. For every seed a dense net is trained first.

* ``init`` methods and sparse training start from scratch and train for --scratch-steps;
* so do ``loop`` ones, which prune in about ten updates over the first half of that one training;
* ``trained``, ``gradual`` and ``rounds`` ones start from the dense net and train for --tune-steps;
  so does ``dense_tuned``, the dense net with the same extra training;
* ``imp`` prunes the dense net by magnitude in --rounds, which share --tune-steps;
* ``lth`` prunes in --rounds too, but goes back to the initial weights each time and trains for
  --steps.

Of several learning rates (``--tune-rates``, ``--scratch-rates``) each method takes, for each
sparsity, the one that does best on the validation split in runs with --rate-seeds other seeds.
``--tell`` runs nothing, and tells what is there so far.

With ``--loss-scale TASK=30`` every method that looks at gradients runs a second time, that task's
loss multiplied in the scoring only. With ``--distil W`` all but the dense nets learn from what
their seed's dense net says, too: W times that loss beside the labels'. Options not known here go to
the trainer. Runs that are done are not done again. All numbers are of the test split; checkpoints
are chosen on the validation split.
"""

import argparse
import io
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from common import checkpoints, judging
from common.data import Source
from common.loop import comparable, open_or_exit, train
from common.options import (
    METHODS,
    Options,
    Problem,
    assignment,
    build,
    make_method,
    parse,
    positive,
    positive_float,
)
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

from mtprune.files import write_text
from mtprune.paired import Difference, spread
from mtprune.saliency import asks

TRAINERS = ("nyuv2", "cityscapes", "taskonomy", "camvid", "census", "digits", "multimnist")
CHAINS = ("imp", "lth")
TUNED = "dense_tuned"
LOOP = "loop"
RATE_SEEDS = 1000
"""Seeds from here on choose learning rates, and are not reported."""


@dataclass(frozen=True)
class Entry:
    """A line of the comparison: all seeds of a method at a sparsity.

    Attributes:
        spec: The method, as given.
        sparsity: Share of zeros.
        scaled: Whether a loss is multiplied in the scoring.
    """

    spec: str
    sparsity: float
    scaled: bool = False

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.spec.replace(':', '-')}-{self.sparsity:g}{'-scaled' * self.scaled}"


@dataclass(frozen=True)
class Job:
    """A run of a trainer.

    Attributes:
        arguments: Its command line, without data and folder.
        out: Its folder.
    """

    arguments: tuple[str, ...]
    out: Path


# What to run.


def jobs(entry: Entry, seed: int, options: Options, rate: float | None = None) -> list[Job]:
    """The runs that an entry needs for a seed, in order; the last is the one that counts.

    Args:
        entry: The entry.
        seed: The seed.
        options: The command line.
        rate: The learning rate; the trainer's unless given.
    """
    name, when, allocation = (*entry.spec.split(":"), "", "")[:3]
    folder = options.out / entry.name
    out = (folder if rate is None else folder / f"rate{rate:g}") / f"seed{seed}"
    dense = dense_job(seed, options).out / "model.pt"
    common = ["--seed", str(seed), "--sparsity", str(entry.sparsity)]
    if allocation:
        common += ["--allocation", allocation]
    if entry.scaled:
        common += ["--loss-scale", *(f"{task}={x}" for task, x in options.loss_scale)]
    extra = [] if rate is None else ["--lr", str(rate)]
    if options.distil:
        extra += ["--distil", str(options.distil), "--teacher", str(dense)]
        extra += ["--temperature", str(options.temperature)]

    def length(steps: int) -> list[str]:
        return ["--steps", str(steps), *extra]

    scratch, tuned = length(options.scratch_steps), length(options.tune_steps)
    if name == TUNED:
        arguments = ["--method", "dense", "--seed", str(seed), "--pretrained", str(dense), *tuned]
        return [Job(tuple(arguments), out)]
    if name in CHAINS:
        chain, start = [], dense
        for i in range(1, options.rounds + 1):
            sparsity = 1 - (1 - entry.sparsity) ** (i / options.rounds)
            last = i == options.rounds
            part = options.tune_steps // options.rounds
            part += options.tune_steps % options.rounds if last else 0
            steps = [*length(options.steps), "--rewind"] if name == "lth" else length(part)
            folder = out if last else out / f"round{i}"
            arguments = ["--method", "magnitude", "--seed", str(seed), *steps]
            arguments += ["--sparsity", str(entry.sparsity if last else sparsity)]
            arguments += ["--allocation", allocation] if allocation else []
            chain.append(Job((*arguments, "--pretrained", str(start)), folder))
            start = folder / "model.pt"
        return chain
    if when == LOOP:
        common += ["--when", "gradual", "--dense-steps", "0"]
    elif when:
        common += ["--when", when]
    start_from = [*tuned, "--pretrained", str(dense)] if is_tuned(entry.spec) else scratch
    return [Job(("--method", name, *common, *start_from), out)]


def is_tuned(spec: str) -> bool:
    """Whether a method's last training starts from the dense net."""
    name, when = (*spec.split(":"), "")[:2]
    if name in (*CHAINS, TUNED):
        return name != "lth"
    return (when or METHODS[name]) in ("trained", "gradual", "rounds")


def rates(spec: str, options: Options) -> list[float | None]:
    """The learning rates to choose from; None is the trainer's."""
    return (options.tune_rates if is_tuned(spec) else options.scratch_rates) or [None]


def dense_job(seed: int, options: Options) -> Job:
    """The dense run of a seed."""
    arguments = ("--method", "dense", "--seed", str(seed), "--steps", str(options.steps))
    return Job(arguments, options.out / "dense" / f"seed{seed}")


def entries(options: Options) -> list[Entry]:
    """All lines of the comparison."""
    found = [Entry(TUNED, 0.0)] if TUNED in options.methods else []
    for sparsity in options.sparsities:
        for spec in (spec for spec in options.methods if spec != TUNED):
            found.append(Entry(spec, sparsity))
            if options.loss_scale and looks_at_losses(spec):
                found.append(Entry(spec, sparsity, scaled=True))
    return found


def looks_at_losses(spec: str) -> bool:
    """Whether a method's scores depend on the losses."""
    name = spec.split(":")[0]
    if name in (*CHAINS, TUNED):
        return False
    stand_in = argparse.Namespace(
        method=name,
        sparsity=0.5,
        steps=10,
        update_every=1,
        freeze=5,
        dense_steps=1,
        when=None,
        pretrained=None,
    )
    method = build(stand_in)
    return not hasattr(method, "saliency") or "grad" in asks(method.saliency)


def place(options: Options) -> list[str]:
    """Where the trainer finds its data."""
    return [] if options.data is None else ["--data", str(options.data)]


def run(problem: Problem, job: Job, options: Options, source: Source) -> dict[str, Any]:
    """Do a run, or read what it gave.

    Raises:
        ValueError: If its folder holds a run with other options.
    """
    where = [*place(options), "--out", str(job.out), "--resume"]
    own = parse(problem, [*options.rest, *job.arguments, *where])
    path = job.out / "results.json"
    if not path.exists():
        with redirect_stdout(io.StringIO()):
            train(problem, own, source)
        for name in ("checkpoint.pt", "best.pt"):
            (job.out / name).unlink()
    found = checkpoints.results(path)
    with checkpoints.usable():
        theirs = {name: part.plain() for name, part in found["options"].mapping().items()}
        told: dict[str, Any] = found.plain()
    for name, value in json.loads(json.dumps(comparable(own))).items():
        if theirs.get(name) != value:
            raise checkpoints.UnusableError(
                f"{job.out} holds a run with --{name.replace('_', '-')} {theirs.get(name)}. Got "
                f"{value}. Choose another --out."
            )
    return told


# What came out.


def summarize(
    runs: Mapping[Entry, Mapping[int, Mapping[str, Any]]],
    dense: Mapping[int, Mapping[str, Any]],
    options: Options,
) -> list[dict[str, Any]]:
    """A row for each entry that has runs."""
    rows = []
    for entry, found in runs.items():
        reference = Entry(options.reference, entry.sparsity, entry.scaled)
        against = runs.get(reference) or runs.get(Entry(options.reference, entry.sparsity))
        row = judging.row(found, dense, None if entry.spec == options.reference else against)
        rate = next(iter(found.values()))["options"]["lr"]
        head = {"method": entry.spec, "sparsity": entry.sparsity, "scaled": entry.scaled}
        rows.append({**head, "rate": rate, **row})
    return rows


def table(rows: Sequence[Mapping[str, Any]], options: Options) -> str:
    """Markdown: mean and standard deviation over seeds, and the paired differences."""
    tasks = list(rows[0]["tasks"])
    comparisons = max(1, sum("behind" in row for row in rows))
    head = ["zeros", "method", "rate", "seeds", "Delta_T, %", f"minus {options.reference}"]
    head += ["worst task", f"minus {options.reference}", "by loss", *tasks]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        exact = all(zeros == round(row["sparsity"] * row["weights"]) for zeros in row["zeros"])
        zeros = f"{row['sparsity']:.1%}" if exact else f"{row['zeros']} of {row['weights']}"
        behind = row.get("behind", {})
        name = row["method"]
        if row["scaled"]:
            name += ", " + ", ".join(f"{task} x{x:g}" for task, x in options.loss_scale)
        cells = [zeros, name, f"{row['rate']:g}", f"{len(row['seeds'])}"]
        for what in ("delta", "worst"):
            cells += [spread(row[what])]
            cells += [str(Difference(tuple(behind[what]), comparisons)) if behind else ""]
        cells += [f"{statistics.fmean(row['loss']):.2f}"]
        cells += [f"{statistics.fmean(row['tasks'][task]):.1f}" for task in tasks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dense_table(dense: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown: the dense net's test metrics, mean over seeds."""
    lines = ["| task | metric | dense |", "|---|---|---|"]
    for task, metrics in judging.judged(next(iter(dense.values()))).items():
        for name in metrics:
            values = [found["test"][task][name] for found in dense.values()]
            lines.append(f"| {task} | {name} | {statistics.fmean(values):.4g} |")
    return "\n".join(lines)


def draw(rows: Sequence[Mapping[str, Any]], options: Options) -> Figure:
    """Delta_T over sparsity, a line for each method; dashed with a loss scaled."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["tab20"].colors
    for i, spec in enumerate(options.methods):
        for scaled in (False, True):
            mine = [row for row in rows if row["method"] == spec and row["scaled"] == scaled]
            if not mine:
                continue
            means = [statistics.fmean(row["delta"]) for row in mine]
            spreads = [statistics.pstdev(row["delta"]) for row in mine]
            label, color = spec + ", a loss scaled" * scaled, colors[i % 20]
            if spec == TUNED:
                axes.axhline(means[0], color=color, label=label)
                continue
            aside = 0.15 * (i - len(options.methods) / 2)  # so that bars do not hide each other
            places = [100 * row["sparsity"] + aside for row in mine]
            style: dict[str, Any] = {"ls": "--" if scaled else "-", "marker": "o", "ms": 4}
            axes.errorbar(places, means, spreads, color=color, label=label, capsize=2, **style)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_yscale("symlog", linthresh=10)
    low, high = axes.get_ylim()
    ticks = [-1000, -300, -100, -30, -10, -5, 0, 5, 10, 30, 100]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_xticks([100 * sparsity for sparsity in options.sparsities])
    axes.set(xlabel="zeros, %", ylabel="Delta_T, % (0 = dense)")
    axes.set_title(f"{options.trainer}: mean and standard deviation of {options.seeds} seed(s)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


# The command line.


def read(arguments: Sequence[str] | None) -> Options:
    """The options; what is not known here is the trainer's."""
    parser = argparse.ArgumentParser(
        description="Compare pruning methods on one of the trainers.",
        epilog="Other options go to the trainer: python census.py --help.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("trainer", choices=TRAINERS, help="what to train")
    add("--data", type=Path, metavar="DIR", help="folder of the data set, if it is not packaged")
    add("--methods", nargs="+", default=["vote", "joint", "magnitude"], help="what to compare")
    add("--reference", help="the method that the others are held against; the first unless given")
    add("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95], help="shares of zeros")
    add("--seeds", type=positive, default=3, help="how many")
    add("--steps", type=positive, default=2000, help="of the dense net's training")
    add(
        "--scratch-steps",
        type=positive,
        help="of sparse training from scratch; as many as of the dense net and after it together, "
        "unless given",
    )
    add("--tune-steps", type=positive, default=500, help="of training from the dense net")
    for group in ("tune", "scratch"):
        add(
            f"--{group}-rates",
            type=positive_float,
            nargs="+",
            metavar="LR",
            help="learning rates to choose from; unless given, the trainer's",
        )
    add("--rate-seeds", type=positive, default=2, help="how many other seeds choose the rate")
    add("--tell", action="store_true", help="run nothing, and tell what is there so far")
    add("--rounds", type=positive, default=3, help="of imp and lth")
    add("--distil", type=positive_float, nargs="?", const=1.0, metavar="W", help="see above")
    add("--temperature", type=positive_float, default=2.0, help="of --distil")
    add("--loss-scale", nargs="+", type=assignment, default=[], metavar="TASK=X", help="see above")
    add("--out", type=Path, default=Path("compare_out"), help="folder for runs and results")
    options, options.rest = parser.parse_known_args(arguments)
    options.reference = options.reference or options.methods[0]
    options.scratch_steps = options.scratch_steps or options.steps + options.tune_steps
    for spec in options.methods:
        if spec.split(":")[0] not in (*METHODS, *CHAINS, TUNED):
            known = ", ".join([*METHODS, *CHAINS, TUNED])
            parser.error(f"there is no method '{spec}'. There is {known}.")
        if spec.split(":")[0] in (*CHAINS, TUNED) and (*spec.split(":"), "")[1]:
            parser.error(f"when to prune does not apply to '{spec}'.")
    if options.reference not in options.methods:
        parser.error(f"--reference {options.reference} is none of --methods.")
    return options


def do(
    problem: Problem, options: Options, source: Source
) -> tuple[dict[Entry, dict[int, dict[str, Any]]], dict[int, dict[str, Any]]]:
    """All runs of all entries and seeds, and the dense ones; those that there are with --tell."""
    dense: dict[int, dict[str, Any]] = {}
    lines = entries(options)
    bar = tqdm(total=(len(lines) + 1) * options.seeds, unit="run", disable=None)

    def finished(steps: Sequence[Job]) -> dict[str, Any] | None:
        found = None
        for job in steps:
            if options.tell and not (job.out / "results.json").exists():
                return None
            bar.set_description(str(job.out.relative_to(options.out)))
            found = run(problem, job, options, source)
        return found

    def take(entry: Entry, rate: float | None, seeds: Iterable[int]) -> dict[int, dict[str, Any]]:
        runs = {}
        for seed in seeds:
            if seed not in dense and (found := finished([dense_job(seed, options)])):
                dense[seed] = found
            if seed in dense and (found := finished(jobs(entry, seed, options, rate))):
                runs[seed] = found
        return runs

    chosen: dict[Entry, float | None] = {}
    trials = range(RATE_SEEDS, RATE_SEEDS + options.rate_seeds)
    for entry in lines:
        candidates = rates(entry.spec, options)
        if len(candidates) == 1:
            chosen[entry] = candidates[0]
            continue
        tries = {rate: take(entry, rate, trials) for rate in candidates}
        if all(len(tried) == len(trials) for tried in tries.values()):
            chosen[entry] = judging.best_rate(tries, dense)
    runs: dict[Entry, dict[int, dict[str, Any]]] = {entry: {} for entry in chosen}
    for seed in range(options.seeds):
        for entry, rate in chosen.items():
            runs[entry] |= take(entry, rate, [seed])
            bar.update()
    reported = {seed: found for seed, found in dense.items() if seed < RATE_SEEDS}
    return {entry: found for entry, found in runs.items() if found}, reported


def check(problem: Problem, options: Options) -> None:
    """Look at all options: what is wrong should show before hours have passed."""
    for entry in entries(options):
        for rate in rates(entry.spec, options):
            for job in jobs(entry, 0, options, rate):
                make_method(parse(problem, [*options.rest, *job.arguments, *place(options)]))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Do what is not done yet, and tell what came out."""
    options = read(arguments)
    problem: Problem = import_module(options.trainer).PROBLEM
    check(problem, options)
    dense = dense_job(0, options)
    first = parse(problem, [*options.rest, *dense.arguments, *place(options)])
    try:
        runs, base = do(problem, options, open_or_exit(problem, first))
    except (OSError, checkpoints.UnusableError) as error:
        raise SystemExit(f"compare: {error}") from None
    if not runs:
        raise SystemExit(f"compare: {options.out} holds no finished run of these methods.")
    rows = summarize(runs, base, options)
    command = " ".join(["python compare.py", *(sys.argv[1:] if arguments is None else arguments)])
    text = f"{dense_table(base)}\n\n{table(rows, options)}\n"
    print(f"\n{text}")
    write_text(options.out / "compare.md", f"`{command}`\n\n{text}")
    write_text(options.out / "compare.json", json.dumps(rows, indent=1) + "\n")
    draw(rows, options).savefig(options.out / "compare.png", dpi=130)
    print(f"Wrote compare.md, compare.json and compare.png to {options.out}.")
    return rows


if __name__ == "__main__":
    main()
