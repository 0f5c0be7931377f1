"""Reports: frozen facts after the fact. They print as a table and are data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtprune import files
from mtprune.facts import Count, Facts, GroupRow, Moment, mean, share, total
from mtprune.latency import Timing
from mtprune.text import columns

if TYPE_CHECKING:
    from mtprune.affinity import Affinity
    from mtprune.compression.measure import Sizes
    from mtprune.compression.plan import Plan
    from mtprune.showing.page import Drawn

__all__ = [
    "PARTS",
    "Count",
    "Facts",
    "GroupRow",
    "Moment",
    "Report",
    "Row",
    "check_page",
    "make_report",
]


PARTS = ("all its tasks", "several", "one of several", "no task alone", "kept", "pruned")
"""What becomes of weights, and how many of the tasks that use them would keep them alone."""


@dataclass(frozen=True)
class Row:
    """A component or a layer in a report.

    Attributes:
        name: The component or layer.
        parameters: How many weights it has.
        kept: How many of them the masks keep. A weight that is zero by itself counts as kept.
        sparsity: Share pruned.
        tasks: The tasks that use it.
        want: For each of these, and each voter that is no task, the share of the kept weights that
            this one alone would keep.
        unanimity: The share of the kept weights that every one of these tasks alone would keep.
        single: The share that exactly one of them alone would keep, if that is known.
        nobody: The share that none of them alone would keep, if that is known.
        threshold: The mean of its weights' thresholds, if they have any.
        macs: Its multiply-adds, if they were measured.
        macs_kept: Those of the kept weights.
        rank: How many components its matrices keep together, if ranks are pruned.
        full_rank: How many they had.
    """

    name: str
    parameters: int
    kept: int
    sparsity: float
    tasks: tuple[str, ...]
    want: Mapping[str, float]
    unanimity: float
    single: float | None = None
    nobody: float | None = None
    threshold: float | None = None
    macs: float | None = None
    macs_kept: float | None = None
    rank: int | None = None
    full_rank: int | None = None

    @property
    def parts(self) -> dict[str, float]:
        """The shares of its weights, by `PARTS`; they add up to 1.

        Kept weights are told apart by the tasks that want them, if that is known.
        """
        kept = 1.0 - self.sparsity
        if self.single is None or self.nobody is None:
            return {"kept": kept, "pruned": self.sparsity}
        single = 0.0 if len(self.tasks) == 1 else self.single  # the only one is all
        several = max(0.0, 1.0 - self.unanimity - single - self.nobody)
        shares = (self.unanimity, several, single, self.nobody)
        told = dict(zip(PARTS, (share * kept for share in shares), strict=False))
        return {**told, "pruned": self.sparsity}


@dataclass(frozen=True)
class Report:
    """What was pruned, for whom.

    Attributes:
        step: The step of the last update, or None before the first.
        tasks: All tasks.
        parameters: How many weights the pruner prunes among.
        kept: How many of them are kept.
        sparsity: Share pruned.
        components: One row each.
        layers: One row each.
        head_share: Share of all these weights that is private to one task.
        observations: Observations of each task behind the last update.
        stable: Whether ``observations="auto"`` stopped because masks no longer changed; None if
            the number was given.
        discarded: Observations thrown away because a scaled gradient overflowed.
        left_alone: Prunable layers that are not pruned, and why.
        method: What decided, as far as it differs from the defaults.
        weights: What each task's loss counts now; empty if they are summed as they are.
        history: Where pruning stood after each update, or after every second, fourth, ... if
            there were many.
        groups: Units kept, group by group, where they span layers.
        macs: The multiply-adds of all prunable layers, those left alone too, if measured.
        coverage: The share of the model's matrices, norms and embeddings apart, that takes part;
            None if that is not known.
        timing: The time of the pruned model, where the budget is one in time.
    """

    step: int | None
    tasks: tuple[str, ...]
    parameters: int
    kept: int
    sparsity: float
    components: tuple[Row, ...]
    layers: tuple[Row, ...]
    head_share: float
    observations: Mapping[str, int]
    stable: bool | None
    discarded: Mapping[str, int]
    left_alone: Mapping[str, str]
    method: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    history: tuple[Moment, ...] = ()
    groups: tuple[GroupRow, ...] = ()
    macs: float | None = None
    coverage: float | None = 1.0
    timing: Timing | None = None

    @property
    def macs_sparsity(self) -> float | None:
        """Share of multiply-adds that fall on pruned weights, if they were measured."""
        if any(row.macs is None for row in self.components) or not self.components:
            return None
        macs = sum(row.macs or 0.0 for row in self.components)
        left = sum(row.macs_kept or 0.0 for row in self.components)
        return (macs - left) / (macs if self.macs is None else self.macs)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, numbers and strings: what JSON gives back."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    def table(self, layers: bool = False) -> str:
        """The report as text, with a row per component, or per layer."""
        if self.step is None:
            return (
                f"Nothing pruned yet: {self.parameters:,} weights in {len(self.layers)} layers, "
                f"{len(self.tasks)} tasks."
            )
        rows = self.layers if layers else self.components
        head = ["layer" if layers else "component", "weights", "kept", "sparsity"]
        head += ["rank"] if any(row.rank is not None for row in rows) else []
        head += ["threshold"] if (soft := any(row.threshold is not None for row in rows)) else []
        found = dict.fromkeys(voter for row in rows for voter in row.want)
        others = [voter for voter in found if voter not in self.tasks]
        voters = [*self.tasks, *others] if found else []
        head += [*(f"want {task}" for task in voters), "unanimity"] if voters else []
        body = [_cells(row, voters, soft) for row in rows]
        total = ["total", f"{self.parameters:,}", f"{self.kept:,}", f"{self.sparsity:.2%}"]
        body.append(total + [""] * (len(head) - len(total)))
        lines = columns([head, *body])
        if self.groups:
            counts = [[g.name, f"{g.units:,}", f"{g.kept:,}"] for g in self.groups]
            lines += columns([["group", "units", "kept"], *counts])
        return "\n".join([*lines, *self._notes()])

    def __str__(self) -> str:
        """The table of components."""
        return self.table()

    def _repr_html_(self) -> str:
        """The report as notebooks show it."""
        from mtprune.showing.page import fragment

        return fragment(self)

    def save(
        self,
        path: str | PathLike[str],
        *,
        before: Mapping[str, Mapping[str, float]] | None = None,
        after: Mapping[str, Mapping[str, float]] | None = None,
        masks: Mapping[str, "Drawn"] | None = None,
        affinity: Mapping[str, "Affinity"] | None = None,
        plan: "Plan | str | None" = None,
        sizes: "Sizes | None" = None,
    ) -> Path:
        """Write the report as one HTML page that needs nothing beside itself.

        Args:
            path: The file, which is replaced. Its name ends in ``.html``.
            before: ``{task: {metric: value}}`` of the dense model, to show what each task lost.
            after: The same of the pruned model.
            masks: Masks to draw, for instance ``{name: pruner.masks[name]}``; or a pair of each,
                before and after: ``{name: (early[name], pruner.masks[name])}``.
            affinity: What `mtprune.affinity.compare` found, by what it compared, for instance
                ``{"all": compare(pruner.task_masks)}``.
            plan: The plan of `mtprune.compress`, or any text.
            sizes: What `mtprune.measure` found; those of the plan unless given.

        Returns:
            The file.

        Raises:
            ValueError: If ``path`` does not end in ``.html``, or only one of ``before`` and
                ``after`` is given, or they tell of different tasks.
        """
        from mtprune.showing.page import Beside, page

        target = check_page(path)
        if (before is None) != (after is None):
            given = "before" if after is None else "after"
            raise ValueError(
                f"`before` and `after` go together, to tell what tasks lost. Got only `{given}`."
            )
        if set(before or {}) != set(after or {}):
            raise ValueError(
                "`before` and `after` must be of the same tasks. "
                f"Got {sorted(before or {})} and {sorted(after or {})}."
            )
        beside = Beside(before or {}, after or {}, masks or {}, affinity or {}, plan, sizes)
        files.write_text(target, page(self, beside))
        return target

    def _notes(self) -> list[str]:
        notes = []
        if self.tasks:
            notes.append(f"{self.head_share:.1%} of the weights are private to one task.")
        if self.coverage is None:
            notes.append("Which share of the model's matrices takes part is not known.")
        elif self.coverage < 1.0:
            notes.append(f"{self.coverage:.1%} of the model's matrices take part.")
        if self.macs_sparsity is not None:
            notes.append(f"{self.macs_sparsity:.2%} of the multiply-adds fall on pruned weights.")
        if self.timing is not None:
            notes.append(str(self.timing))
        if self.weights:
            factors = ", ".join(f"{task} {weight:.3g}" for task, weight in self.weights.items())
            notes.append(f"Losses count {factors}.")
        if self.method:
            notes.append(f"By {self.method}.")
        if self.observations:
            least, most = min(self.observations.values()), max(self.observations.values())
            count = str(least) if least == most else f"{least} to {most}"
            until = {True: ", until masks were stable", False: ", masks not stable yet"}
            notes.append(
                f"Update of step {self.step}, {count} observation(s) per task"
                + (until[self.stable] if self.stable is not None else "")
                + "."
            )
        if any(row.name == "undeclared" for row in self.components):
            notes.append("'undeclared': used by several tasks, but not in `shared_modules`.")
        if self.discarded:
            notes.append(f"Discarded because a scaled gradient overflowed: {dict(self.discarded)}.")
        for why in dict.fromkeys(self.left_alone.values()):
            names = [name for name, reason in self.left_alone.items() if reason == why]
            notes.append(f"Left alone: {', '.join(names)} ({why}).")
        return notes


def check_page(path: str | PathLike[str]) -> Path:
    """A path, if it has the name of a page.

    Raises:
        ValueError: If it has not.
    """
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"A report is saved as a page: its name ends in .html. Got '{path}'.")
    return target


def make_report(
    facts: Facts,
    *,
    step: int | None,
    tasks: Sequence[str],
    left_alone: Mapping[str, str],
    method: str = "",
    weights: Mapping[str, float] | None = None,
    macs: float | None = None,
    coverage: float | None = 1.0,
    timing: Timing | None = None,
) -> Report:
    """The report of an update.

    Args:
        facts: The update, its counts in order of position.
        step: Its step; None if there was none.
        tasks: All tasks.
        left_alone: See `Report`.
        method: See `Report`.
        weights: See `Report`.
        macs: See `Report`.
        coverage: See `Report`.
        timing: See `Report`.
    """
    counts = facts.counts
    parameters = sum(c.parameters for c in counts)
    kept = sum(c.kept for c in counts)
    names = list(dict.fromkeys(c.component for c in counts))
    names.sort(key=lambda name: name in tasks)  # shared first, then each task's own
    private = sum(c.parameters for c in counts if c.component in tasks)
    return Report(
        step=step,
        tasks=tuple(tasks),
        parameters=parameters,
        kept=kept,
        sparsity=share(parameters - kept, parameters),
        components=tuple(
            _row(name, [c for c in counts if c.component == name], tasks) for name in names
        ),
        layers=tuple(_row(c.name, [c], tasks) for c in counts),
        head_share=share(private, parameters),
        observations=dict(facts.observations),
        stable=facts.stable,
        discarded=dict(facts.discarded),
        left_alone=dict(left_alone),
        method=method,
        weights=dict(weights or {}),
        history=facts.history,
        groups=facts.groups,
        macs=macs,
        coverage=coverage,
        timing=timing,
    )


def _row(name: str, counts: Sequence[Count], tasks: Sequence[str]) -> Row:
    parameters = sum(c.parameters for c in counts)
    kept = sum(c.kept for c in counts)
    using = tuple(task for task in tasks if any(task in (*c.tasks, *c.wanted) for c in counts))
    others = dict.fromkeys(voter for c in counts for voter in c.wanted if voter not in tasks)
    want = {}
    for task in (*using, *others):
        seen = [c for c in counts if task in c.wanted]
        if not seen:
            continue
        want[task] = share(sum(c.wanted[task] for c in seen), sum(c.kept for c in seen))
    return Row(
        name=name,
        parameters=parameters,
        kept=kept,
        sparsity=share(parameters - kept, parameters),
        tasks=using,
        want=want,
        unanimity=share(sum(c.unanimous for c in counts), kept),
        single=_part([c.single for c in counts], kept),
        nobody=_part([c.nobody for c in counts], kept),
        threshold=mean([(c.threshold, c.parameters) for c in counts]),
        macs=total([(c.cost, c.parameters) for c in counts]),
        macs_kept=total([(c.cost, c.kept) for c in counts]),
        rank=_whole([c.rank for c in counts]),
        full_rank=_whole([c.full_rank for c in counts]),
    )


def _part(numbers: Sequence[int | None], whole: int) -> float | None:
    known = _whole(numbers)
    return None if known is None else share(known, whole)


def _whole(numbers: Sequence[int | None]) -> int | None:
    """Their sum; None if there is one that is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _cells(row: Row, tasks: Sequence[str], soft: bool) -> list[str]:
    want = [f"{row.want[task]:.1%}" if task in row.want else "-" for task in tasks]
    counts = [f"{row.parameters:,}", f"{row.kept:,}", f"{row.sparsity:.2%}"]
    counts += [f"{row.rank:,} of {row.full_rank:,}"] if row.rank is not None else []
    counts += [f"{row.threshold:.3g}" if row.threshold is not None else "-"] if soft else []
    return [row.name, *counts, *want, *([f"{row.unanimity:.1%}"] if tasks else [])]
