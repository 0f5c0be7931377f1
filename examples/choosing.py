r"""Does `mtprune.choose` pick what a whole study finds best? It is asked for each dense net of one.

    python compare.py census --data DIR --out DIR --seeds 8 --methods best joint best:gradual ...
    python choosing.py census --data DIR --out DIR --seeds 8 --methods best joint best:gradual ...

The command line is that of `compare.py`, whose runs must lie in ``--out``. Candidates are all
methods that start from the dense net and prune it in one run. A choice rests on short trials on
the validation split, all with the rate of ``--trial-rate``, and on nothing from the study. What it
is worth is what the study has on the test split for that method and seed, held against the method
with the best mean over seeds. Choices that were made are not made again.
"""

import argparse
import copy
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import islice
from typing import Any

import compare
import torch
from analyses.bench import Bench, State
from common import checkpoints, judging, losses
from common.loop import batches_from, evaluate, forward, open_or_exit
from common.options import ROUNDS, Options, Problem, make_method, parse, positive_float
from compare import CHAINS, TUNED, Entry, dense_job, is_tuned, jobs, place
from torch import nn

import mtprune
from mtprune import MultitaskPruner
from mtprune.files import write_text
from mtprune.methods import Method
from mtprune.paired import Difference, spread

Found = dict[str, Any]
Seeds = Mapping[int, Found]


@dataclass(frozen=True)
class Chooser:
    """The dense net of a seed, and the methods that it may be pruned by.

    Attributes:
        bench: The problem with its data, and how its nets are tuned.
        specs: The methods, as `compare.py` names them.
        sparsity: Share of zeros.
    """

    bench: Bench
    specs: Sequence[str]
    sparsity: float

    def candidate(self, spec: str, steps: int) -> Method[Any]:
        """A method as the study has it, for so many steps."""
        study = copy.copy(self.bench.options)
        study.tune_steps = steps
        [job] = jobs(Entry(spec, self.sparsity), 0, study, study.trial_rate)
        arguments = [*study.rest, *job.arguments, *place(study)]
        method: Method[Any] = make_method(parse(self.bench.problem, arguments))
        return method

    def choose(self, seed: int, dense: State) -> Found:
        """What short trials say, as plain values."""
        plain = self.bench.run(seed, start=dense)
        plain.pruner.finalize()
        options, tasks = plain.options, plain.tasks
        number = ROUNDS * min(options.observations, 4)
        batches = islice(batches_from(self.bench.problem, plain, 0, number), number)

        def train(model: nn.Module, pruner: MultitaskPruner, steps: int) -> None:
            theirs = copy.copy(options)
            theirs.steps = steps
            adam = torch.optim.Adam(model.parameters(), options.lr, weight_decay=options.decay)
            run = replace(plain, options=theirs, model=model, optimizer=adam, pruner=pruner)
            self.bench.train(run)

        def on_validation(model: nn.Module) -> Found:
            found = evaluate(replace(plain, model=model), "val")
            return {
                name: {metric: found[name][metric] for metric in task.judge(found[name])}
                for name, task in tasks.items()
            }

        choice = mtprune.choose(
            plain.model,
            {name: losses.task_loss(name, task) for name, task in tasks.items()},
            [plain.to_device(batch) for batch in batches],
            plain.model.shared_modules(),
            sparsity=self.sparsity,
            steps=options.steps,
            train=train,
            evaluate=on_validation,
            candidates={spec: partial(self.candidate, spec) for spec in self.specs},
            forward=forward,
            progress=False,
            backend=options.backend,
        )
        trials = [
            {"method": t.name, "steps": t.steps, "mean": t.mean, "worst": t.worst, "error": t.error}
            for t in choice.trials
        ]
        return {"seed": seed, "picked": choice.name, "why": choice.why, "trials": trials}


def candidates(options: Options) -> list[str]:
    """The methods that start from the dense net and prune it in one run."""
    tuned = (spec for spec in options.methods if is_tuned(spec))
    return [spec for spec in tuned if spec.split(":")[0] not in (*CHAINS, TUNED)]


def make(bench: Bench, options: Options, sparsity: float) -> list[Found]:
    """A choice for each seed; from its file if it is there."""
    chooser, found = Chooser(bench, candidates(options), sparsity), []
    for seed in range(options.seeds):
        path = options.out / "choosing" / f"{sparsity:g}-seed{seed}.json"
        if not path.exists():
            net = dense_job(seed, options).out / "model.pt"
            if not net.exists():
                raise checkpoints.UnusableError(
                    f"There is no {net}. Run compare.py with these arguments first."
                )
            told = chooser.choose(seed, checkpoints.read(net))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(told, indent=1) + "\n")
        found.append(json.loads(path.read_text()))
    return found


def weigh(
    choices: Sequence[Found], runs: Mapping[str, Seeds], dense: Seeds, sparsity: float
) -> Found:
    """What choices are worth on the test split.

    Args:
        choices: A choice for each seed.
        runs: Each method's runs by seed.
        dense: The dense runs by seed.
        sparsity: Share of zeros.
    """
    picked = {one["seed"]: runs[one["picked"]][one["seed"]] for one in choices}

    def mean(spec: str) -> float:
        return statistics.fmean(
            judging.change(runs[spec][seed], dense[seed]).overall for seed in picked
        )

    leader = max(runs, key=mean)
    told = judging.row(picked, dense, {seed: runs[leader][seed] for seed in picked})
    return {"sparsity": sparsity, "leader": leader, "choices": list(choices), **told}


def table(rows: Sequence[Found]) -> str:
    """Markdown: a line for each sparsity."""
    head = ["zeros", "seeds", "picked", "mean", "worst task", "leads", "minus it", "its worst task"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        counts = Counter(one["picked"] for one in row["choices"]).most_common()
        behind = {what: Difference(tuple(row["behind"][what]), 1) for what in ("delta", "worst")}
        cells = [f"{row['sparsity']:.0%}", f"{len(row['seeds'])}"]
        cells += [", ".join(f"{name} {count}x" for name, count in counts)]
        cells += [spread(row["delta"]), spread(row["worst"]), row["leader"]]
        cells += [str(behind["delta"]), str(behind["worst"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(arguments: Sequence[str] | None) -> Options:
    """The options; all but one are those of `compare.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Other options are those of the study: python compare.py --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--trial-rate", type=positive_float, metavar="LR", required=True, help="of every trial"
    )
    own, others = parser.parse_known_args(arguments)
    options = compare.read(others)
    options.trial_rate, options.tell = own.trial_rate, True
    return options


def main(arguments: Sequence[str] | None = None) -> list[Found]:
    """Choose for each dense net, and tell what the choices are worth."""
    options = read(arguments)
    problem: Problem = import_module(options.trainer).PROBLEM
    trainer = ["--method", "dense", "--steps", str(options.steps)]
    own = parse(problem, [*options.rest, *trainer, *place(options)])
    source = open_or_exit(problem, own)
    options.tune_lr = options.trial_rate
    try:
        runs, dense = compare.do(problem, options, source)
        rows = []
        for sparsity in options.sparsities:
            choices = make(Bench(problem, source, options, own), options, sparsity)
            theirs = {e.spec: found for e, found in runs.items() if e.sparsity == sparsity}
            tried = {spec: theirs[spec] for spec in candidates(options)}
            rows.append(weigh(choices, tried, dense, sparsity))
    except KeyError as error:
        raise SystemExit(f"choosing: {options.out} lacks runs of {error}.") from None
    except (OSError, checkpoints.UnusableError) as error:
        raise SystemExit(f"choosing: {error}") from None
    command = " ".join(["python choosing.py", *(sys.argv[1:] if arguments is None else arguments)])
    text = table(rows)
    print(f"\n{text}")
    write_text(options.out / "choosing.md", f"`{command}`\n\n{text}\n")
    write_text(options.out / "choosing.json", json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
