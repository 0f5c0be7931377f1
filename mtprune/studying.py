"""Studying: methods x sparsities x seeds with a trainer of your own, and what they say."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, nan
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any

from mtprune import checks, distributed
from mtprune.files import read_json, write_text
from mtprune.methods import Method, describe
from mtprune.methods.base import check_method
from mtprune.metrics import delta_t
from mtprune.named import METHODS, dense
from mtprune.paired import Difference, spread
from mtprune.progress import bar
from mtprune.reading import Entry
from mtprune.results import Results, directions, read, read_dense
from mtprune.text import columns
from mtprune.trials import random_state_kept, seed_all

__all__ = ["Line", "Study", "study"]

Train = Callable[[Method[Any], int], Mapping[str, Any]]
"""``train(method, seed)`` -> ``{task: {metric: value}}``."""

_FORMAT = 1
_DENSE = "dense"
_ADVICE = "Remove it, and the run is made again."


@dataclass(frozen=True)
class Line:
    """A method at a sparsity, over all seeds; changes are in percent, and below 0 is worse.

    Attributes:
        method: Its name.
        sparsity: The share of zeros that was asked for.
        means: For each seed the mean change over tasks; NaN if a result was not finite.
        worsts: For each seed the change of the task that lost most.
        tasks: For each task its change with each seed.
        behind: The difference of the means to the reference; None for the reference itself.
        worst_behind: The same of the task that lost most.
    """

    method: str
    sparsity: float
    means: tuple[float, ...]
    worsts: tuple[float, ...]
    tasks: Mapping[str, tuple[float, ...]]
    behind: Difference | None = None
    worst_behind: Difference | None = None


@dataclass(frozen=True)
class Study:
    """What came out. It prints as a table.

    Attributes:
        lines: A line for each sparsity and method.
        reference: The method that the others are held against.
        seeds: The seeds.
        dense: For each seed the results without pruning.
        results: ``{(method, sparsity): results for each seed}``.
    """

    lines: tuple[Line, ...]
    reference: str
    seeds: tuple[int, ...]
    dense: tuple[Results, ...]
    results: Mapping[tuple[str, float], tuple[Results, ...]]

    def __getitem__(self, key: tuple[str, float]) -> Line:
        """The line of a method at a sparsity."""
        for line in self.lines:
            if (line.method, line.sparsity) == key:
                return line
        raise KeyError(f"The study has no {key}. It has {list(self.results)}.")

    def __str__(self) -> str:
        """The table, and how to read it."""
        return "\n".join([*columns(self._rows(), left=2), "", *self._words()])

    def markdown(self) -> str:
        """The table as Markdown, with the dense model's results."""
        head, *rows = self._rows()
        lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
        lines.insert(1, "|" + "---|" * len(head))
        told = ["| task | metric | dense |", "|---|---|---|"]
        for task, metrics in self.dense[0].items():
            for metric in metrics:
                mean = fmean(found[task][metric] for found in self.dense)
                told.append(f"| {task} | {metric} | {mean:.4g} |")
        return "\n".join([*told, "", *lines, "", *self._words()]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All numbers of all seeds, for JSON; None stands for what is not finite."""
        lines = []
        for line in self.lines:
            own: dict[str, Any] = {
                "method": line.method,
                "sparsity": line.sparsity,
                "means": _plain(line.means),
                "worsts": _plain(line.worsts),
                "tasks": _plain(line.tasks),
                "results": _plain(self.results[line.method, line.sparsity]),
            }
            for name in ("behind", "worst_behind"):
                found = getattr(line, name)
                if found is not None:
                    numbers = {x: getattr(found, x) for x in ("values", "mean", "alone", "among")}
                    own[name] = _plain({**numbers, "comparisons": found.comparisons})
            lines.append(own)
        return {
            "format": _FORMAT,
            "reference": self.reference,
            "seeds": list(self.seeds),
            "dense": _plain(self.dense),
            "lines": lines,
        }

    def save(self, folder: str | PathLike[str], *, picture: bool = False) -> None:
        """Write ``study.md`` and ``study.json``, and ``study.png`` if a picture is wanted.

        Args:
            folder: Made if it does not exist.
            picture: See `figure`.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / "study.md", self.markdown())
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_text(place / "study.json", f"{text}\n")
        if picture:
            self.figure().savefig(place / "study.png", dpi=130)

    def figure(self) -> Any:
        """Mean change and worst task over sparsity, a line for each method, as matplotlib has it.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "A picture needs matplotlib. Install the extra: pip install 'mtprune[plots]'."
            ) from error
        figure = Figure(figsize=(10, 4.5), layout="constrained")
        plots = figure.subplots(1, 2, sharey=True)
        parts = (("mean over tasks", "means"), ("the task that loses most", "worsts"))
        for axes, (title, what) in zip(plots, parts, strict=True):
            for name in dict.fromkeys(line.method for line in self.lines):
                mine = [line for line in self.lines if line.method == name]
                places = [100 * line.sparsity for line in mine]
                values = [getattr(line, what) for line in mine]
                (drawn,) = axes.plot(places, list(map(fmean, values)), marker="o", label=name)
                for place, seeds in zip(places, values, strict=True):
                    axes.scatter([place] * len(seeds), seeds, s=8, color=drawn.get_color())
            axes.axhline(0, color="black", lw=0.8)
            axes.set(title=title, xlabel="zeros, %")
            axes.spines[["top", "right"]].set_visible(False)
        plots[0].set_ylabel("change against dense, %")
        plots[0].legend(frameon=False, fontsize=8)
        return figure

    def _rows(self) -> list[list[str]]:
        tasks = list(self.dense[0])
        minus = f"minus {self.reference}"
        rows = [["zeros", "method", "Delta_T, %", minus, "worst task", minus, *tasks]]
        for line in self.lines:
            cells = [spread(line.means), str(line.behind or "")]
            cells += [spread(line.worsts), str(line.worst_behind or "")]
            cells += [f"{fmean(line.tasks[task]):.2f}" for task in tasks]
            rows.append([f"{line.sparsity:.1%}", line.method, *cells])
        return rows

    def _words(self) -> list[str]:
        seeds = len(self.seeds)
        lines = [
            "Change in percent against the model that was trained without pruning, by "
            f"{seeds} seed{'s' * (seeds > 1)}: mean \N{PLUS-MINUS SIGN} standard deviation."
        ]
        compared = [line.behind for line in self.lines if line.behind]
        if compared and seeds > 1:
            lines.append(
                "Differences are paired by seed: mean \N{PLUS-MINUS SIGN} half the 95 % interval; "
                f"in brackets half of that which holds for all {compared[0].comparisons} together, "
                "with a star where it leaves out 0."
            )
        if seeds == 1:
            lines.append("With one seed nothing is known of chance.")
        if any(isnan(value) for line in self.lines for value in line.means):
            lines.append("nan: with some seed a result was not a finite number.")
        return lines


def study(
    train: Train,
    methods: Mapping[str, Callable[[float], Method[Any]]],
    sparsities: Sequence[float],
    seeds: int | Sequence[int] = 3,
    *,
    reference: str | None = None,
    lower_is_better: bool | Mapping[str, Iterable[str]] | None = None,
    folder: str | PathLike[str] | None = None,
    progress: bool = True,
) -> Study:
    """Compare methods with your own trainer: all of them, at all sparsities, with all seeds.

    For each seed the model is also trained with a method that prunes nothing, against which all
    results are held. Before each run the random state of torch, numpy and Python is seeded; it is
    left as it was. What is finished lies in ``folder`` and is not done again, so a study that was
    stopped goes on, and can be asked for more methods, sparsities or seeds.

    Choose learning rates and all else on validation data, for every method alike, before; and let
    `train` return results on test data.

    Args:
        train: ``train(method, seed)``: builds the model and its batches for the seed, makes a
            pruner with the method, trains, and returns ``{task: {metric: value}}`` or
            ``{task: value}``.
        methods: ``{name: function of sparsity -> method}``, for instance ``recipes.magnitude``.
            Of `mtprune.METHODS`, which ask for the length of the run too:
            ``functools.partial(mtprune.METHODS["joint"], steps=2_000)``.
        sparsities: Shares of zeros.
        seeds: How many seeds, from 0, or which.
        reference: The method that the others are held against; the first unless given.
        lower_is_better: As for `mtprune.choose`.
        folder: Where each run is kept when it is finished; nothing is kept unless given. A run is
            told from another by name, sparsity, seed and what its method says of itself: if `train`
            or a function of yours has changed, take another folder.
        progress: Show a progress bar, if tqdm is installed.

    Raises:
        ValueError: If an argument is wrong, the folder holds a run of another method under the same
            name, or `train` returns something other than results of the same tasks and metrics,
            finite where nothing is pruned.
        RuntimeError: If there are several processes.

    Example:
        >>> import mtprune
        >>> def train(method, seed):  # in place of an hour's work
        ...     lost = method.sparsity * (2 if method.disentangled else 3)
        ...     return {"seg": {"miou": 1 - lost / 10 + seed / 100}, "depth": {"rmse": 2.0}}
        >>> methods = {name: lambda s, name=name: mtprune.METHODS[name](s, 100)
        ...            for name in ("vote", "joint")}
        >>> found = study(train, methods, [0.5], seeds=2, progress=False)
        >>> round(found["vote", 0.5].means[0], 2), round(found["joint", 0.5].behind.mean, 2)
        (-5.0, -2.49)
    """
    checks.function("train", train)
    if distributed.world() > 1:
        raise RuntimeError(
            f"study() runs in one process, and there are {distributed.world()}. Let `train` start "
            "its own."
        )
    numbers = _seeds(seeds)
    cells = _cells(methods, sparsities)
    against = next(iter(methods)) if reference is None else reference
    checks.one_of("reference", against, tuple(methods))
    shelf = _Shelf(None if folder is None else Path(folder), list(methods))
    plain: dict[int, Results] = {}
    found: dict[tuple[str, float], list[Results]] = {key: [] for key in cells}
    runs = [(seed, key) for seed in numbers for key in (None, *cells)]
    with random_state_kept():
        for seed, key in bar(runs, progress, "studying"):
            method = dense() if key is None else cells[key]
            name = _DENSE if key is None else key[0]
            told = shelf.take(train, name, method, 0.0 if key is None else key[1], seed)
            if key is None:
                tasks = list(plain[numbers[0]]) if plain else None
                which = f"that was not pruned, seed {seed}"
                plain[seed] = read_dense(told, tasks, which, by="train")
                lower = directions(plain[seed], lower_is_better)
                delta_t(plain[seed], plain[seed], lower)  # which refuses a 0 to compare with
            else:
                found[key].append(_alike(told, plain[seed], key, seed))
    runs_of = {key: tuple(results) for key, results in found.items()}
    lines = _lines(runs_of, [plain[seed] for seed in numbers], lower, against)
    return Study(lines, against, numbers, tuple(plain[seed] for seed in numbers), runs_of)


def _seeds(seeds: Any) -> tuple[int, ...]:
    if checks.is_whole(seeds):
        checks.whole("seeds", seeds, least=1)
        return tuple(range(seeds))
    must = "must be a number of seeds, or a list of different ones"
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or not seeds:
        raise TypeError(checks.message("seeds", seeds, must))
    for seed in seeds:
        checks.whole("seeds", seed, least=0, must=must)
    if len(set(seeds)) < len(seeds):
        raise ValueError(checks.message("seeds", seeds, must))
    return tuple(seeds)


def _cells(
    methods: Mapping[str, Callable[[float], Method[Any]]], sparsities: Sequence[float]
) -> dict[tuple[str, float], Method[Any]]:
    """Every method at every sparsity, made before hours have passed."""
    form = "name -> function of sparsity -> method"
    checks.mapping("methods", methods, form, filled=True)
    must = "must be different shares of zeros, at least one"
    if not isinstance(sparsities, Sequence) or not sparsities:
        raise TypeError(checks.message("sparsities", sparsities, must))
    for sparsity in sparsities:
        checks.sparsity("sparsities", sparsity)
    if len(set(sparsities)) < len(sparsities):
        raise ValueError(checks.message("sparsities", sparsities, must))
    found = {}
    for name, make in methods.items():
        if name == _DENSE:
            raise ValueError(f"`methods` names '{_DENSE}', which is trained anyway. Leave it out.")
        if hasattr(make, "decide") or not callable(make):
            must = "must be a function of sparsity -> method, such as recipes.magnitude"
            raise TypeError(checks.message("methods", make, must, f" '{name}'"))
        if id(make) in map(id, METHODS.values()):
            raise TypeError(
                f"`methods` '{name}' is one of METHODS, which want a number of steps too. Take "
                f"functools.partial(mtprune.METHODS['{name}'], steps=...)."
            )
        for sparsity in sparsities:
            check_method(method := make(sparsity))
            found[name, float(sparsity)] = method
    return found


def _alike(told: Any, plain: Results, key: tuple[str, float], seed: int) -> Results:
    """Results of a pruned model, of the same tasks and metrics as without pruning."""
    results = read(told, list(plain), "train")
    for task, metrics in results.items():
        if metrics.keys() != plain[task].keys():
            raise ValueError(
                f"`train` returned {list(metrics)} for task '{task}' with '{key[0]}' at "
                f"{key[1]:g}, seed {seed}, and {list(plain[task])} without pruning. Both must be "
                "the same."
            )
    return results


def _lines(
    found: Mapping[tuple[str, float], Sequence[Results]],
    plain: Sequence[Results],
    lower: Mapping[str, set[str]],
    reference: str,
) -> tuple[Line, ...]:
    """The lines of the table, sparsity by sparsity."""
    lines = {}
    for (name, sparsity), runs in found.items():
        changes = [delta_t(run, base, lower) for run, base in zip(runs, plain, strict=True)]
        tasks = {task: tuple(change.tasks[task] for change in changes) for task in plain[0]}
        worsts = tuple(
            nan if isnan(change.overall) else min(change.tasks.values()) for change in changes
        )
        means = tuple(change.overall for change in changes)
        lines[name, sparsity] = Line(name, sparsity, means, worsts, tasks)
    comparisons = sum(name != reference for name, _ in lines)

    def held(line: Line) -> Line:
        rival = lines[reference, line.sparsity]
        if rival is line:
            return line
        pairs = ((line.means, rival.means), (line.worsts, rival.worsts))
        differences = (
            Difference(tuple(a - b for a, b in zip(*pair, strict=True)), comparisons)
            for pair in pairs
        )
        return Line(line.method, line.sparsity, line.means, line.worsts, line.tasks, *differences)

    order = dict.fromkeys(sparsity for _, sparsity in lines)
    return tuple(held(line) for s in order for line in lines.values() if line.sparsity == s)


class _Shelf:
    """Finished runs in a folder.

    Args:
        folder: The folder; None to keep nothing.
        names: The methods, whose names become those of files.
    """

    def __init__(self, folder: Path | None, names: Sequence[str]) -> None:
        self._folder = None if folder is None else folder / "runs"
        self._names = {name: re.sub(r"[^\w.+-]+", "-", name) for name in (_DENSE, *names)}
        files = [written.lower() for written in self._names.values()]
        for name, file in zip(self._names, files, strict=True):
            if folder is not None and files.count(file) > 1:
                raise ValueError(
                    f"The runs of '{name}' and of another method would have the same files in "
                    "`folder`. Give them names that differ in letters or digits."
                )
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def take(
        self, train: Train, name: str, method: Method[Any], sparsity: float, seed: int
    ) -> Mapping[str, Any]:
        """What a run gave, which is made if it is not there."""
        if self._folder is None:
            seed_all(seed)
            return train(method, seed)
        path = self._folder / f"{self._names[name]}-{sparsity:g}-seed{seed}.json"
        said = describe(method)
        if path.exists():
            return _read_run(path, said)
        seed_all(seed)
        results = read(train(method, seed), None, "train")
        run = {"format": _FORMAT, "method": said, "seed": seed, "results": _plain(results)}
        write_text(path, json.dumps(run, indent=1, allow_nan=False) + "\n")
        return results


def _read_run(path: Path, said: str) -> Results:
    """The results of a finished run of this method."""
    parts = Entry(read_json(path), f"'{path}'", _ADVICE).fields(
        ["format", "method", "seed", "results"]
    )
    if parts["format"].whole() != _FORMAT:
        raise parts["format"].wrong(f"must be {_FORMAT}")
    theirs = parts["method"].text()
    if theirs != said:
        raise ValueError(
            f"'{path}' holds a run of another method: {theirs}. Got {said}. Take another `folder`, "
            "or remove the file."
        )
    return {
        task: {
            metric: nan if value.value is None else value.number()
            for metric, value in metrics.mapping().items()
        }
        for task, metrics in parts["results"].mapping().items()
    }


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if not isinstance(value, float) or isfinite(value) else None
