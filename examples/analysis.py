r"""The figures of the papers on your data, one command each.

    python make_fixture.py nyuv2 nyuv2_fixture
    python analysis.py iou --data nyuv2_fixture
    python analysis.py iou --data DIR --problem camvid --tasks label group edge

| command | figure |
|---|---|
| iou | mask IoU of tasks before training, beside that of unrelated tasks |
| branching | a trunk that branches where its masks say, or elsewhere, after training |
| watershed | the same over depth, and of nets trained for one task each |
| thresholds | hard against soft thresholds at equal sparsity |
| sensitivity | a trained net with one component pruned at a time |
| components | sparsity of trunk and heads while thresholds rise |
| arbiters | unanimous, majority, mean, intersection at matched sparsity |
| balancing | pruned nets against dense ones of multitask methods |

Each writes a picture and a JSON with all numbers, options and seeds to --out, and prints a table.
Options that are not known here go to the trainer: net, width, batch, rates. Nets are small and runs
short unless told otherwise.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from analyses import (
    arbiters,
    balancing,
    branching,
    components,
    overlap,
    sensitivity,
    thresholds,
    watershed,
)
from analyses.bench import Bench, Found, Study, UntrainedError
from common.loop import comparable, open_or_exit
from common.options import Options, Problem, parse, positive, positive_float

import mtprune
from mtprune.files import write_text

PROBLEMS = ("nyuv2", "cityscapes", "taskonomy", "camvid", "census")
STUDIES: tuple[Study, ...] = (
    overlap.STUDY,
    watershed.STUDY,
    branching.STUDY,
    thresholds.STUDY,
    sensitivity.STUDY,
    components.STUDY,
    arbiters.STUDY,
    balancing.STUDY,
)
DECIDED = ("--method", "--when", "--pretrained", "--rewind", "--dense-steps", "--allocation")
UNUSED = ("--seed", "--resume", "--save-every", "--amp", "--compile", "--loss-scale", "--sparsity")
SMALL = {
    "--width": ["0.125"],
    "--batch": ["4"],
    "--crop": ["64", "96"],
    "--lr": ["0.003"],
    "--lr-shape": ["line"],
    "--observations": ["8"],
    "--workers": ["0"],
    "--threads": ["1"],
}
"""The trainer's options unless given."""


def read(arguments: Sequence[str] | None) -> tuple[Study, Options]:
    """The figure, and the options; what is not known here is the trainer's."""
    parser = argparse.ArgumentParser(
        description="The figures of the papers on your data.",
        epilog="Other options go to the trainer: python nyuv2.py --help.",
    )
    commands = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    for study in STUDIES:
        command = commands.add_parser(
            study.name,
            help=study.about,
            description=study.about,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
        add = command.add_argument
        add("--data", type=Path, required=True, metavar="DIR", help="folder of the data set")
        add("--problem", choices=PROBLEMS, default="nyuv2", help="which trainer's data set it is")
        add("--seeds", type=positive, default=2, help="how many")
        add("--steps", type=positive, default=120, help="of training from scratch")
        add("--tune-steps", type=positive, default=40, help="of training what was trained before")
        add("--tune-lr", type=positive_float, default=0.001, help="its learning rate")
        add("--by", choices=("metrics", "loss"), default="metrics", help="what changes are of")
        add("--out", type=Path, default=Path("analysis_out"), help="folder for what comes out")
        study.add(command)
    options, options.rest = parser.parse_known_args(arguments)
    for option in (*DECIDED, *UNUSED):
        if option in options.rest:
            parser.error(f"{option} does not apply: the figure decides. Leave it out.")
    return next(study for study in STUDIES if study.name == options.figure), options


def trainer_options(problem: Problem, options: Options) -> Options:
    """The trainer's options: what was given, and what is small otherwise."""
    small = {k: v for k, v in SMALL.items() if problem.augment or k != "--crop"}
    given = [
        x for name, values in small.items() if name not in options.rest for x in (name, *values)
    ]
    own = ["--data", str(options.data), "--method", "dense", "--steps", str(options.steps)]
    return parse(problem, [*own, *given, *options.rest])


def main(arguments: Sequence[str] | None = None) -> Found:
    """Measure, tell, draw; the JSON's content."""
    study, options = read(arguments)
    problem: Problem = import_module(options.problem).PROBLEM
    trainer = trainer_options(problem, options)
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    bench = Bench(problem, open_or_exit(problem, trainer), options, trainer)
    try:
        found = study.measure(bench)
    except UntrainedError as error:
        raise SystemExit(f"{study.name}: {error}") from None
    print(f"{study.about}\n\n{study.table(found)}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / study.name
    results = {
        "command": command(sys.argv[1:] if arguments is None else arguments),
        "options": _plain({**vars(options), "seeds": list(bench.seeds)}),
        "trainer": _plain(comparable(trainer)),
        "versions": {"mtprune": mtprune.__version__, "torch": torch.__version__},
        **found,
    }
    write_text(path.with_suffix(".json"), json.dumps(_rounded(results)) + "\n")
    study.draw(found).savefig(path.with_suffix(".png"), dpi=100)
    print(f"Wrote {path.with_suffix('.json')} and {path.with_suffix('.png')}.")
    return results


def command(arguments: Sequence[str]) -> str:
    """The command line, without the places of files."""
    told = ["python analysis.py"]
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if "--out" in (before, argument):
            continue
        told.append("DIR" if before == "--data" else argument)
    return " ".join(told)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON has them, without the places of files."""
    return {name: x for name, x in options.items() if not isinstance(x, Path) and name != "rest"}


def _rounded(value: Any) -> Any:
    """Numbers to five digits, for looking up and drawing; null for what is no number."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
