"""Cards: what somebody who finds a saved model wants to know, as the README.md beside it.

A card is what the pruner knows, and what only you know: how well the model does. `save` and
`save_pretrained` write it with the plan of the compressed model. Its head is read by the hub of
Hugging Face.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import combinations
from typing import TYPE_CHECKING, Any

from mtprune import checks
from mtprune.affinity import compare
from mtprune.metrics import delta_t
from mtprune.report import Report
from mtprune.results import Results, directions, not_finite, read

if TYPE_CHECKING:
    from mtprune.compression.plan import Plan
    from mtprune.pruner import MultitaskPruner

__all__ = ["Card"]

_TAGS = ("mtprune", "pruning", "sparsity", "multitask")


@dataclass(frozen=True)
class Card:
    """What there is to know about a pruned model.

    Attributes:
        report: The pruner's report.
        method: Its method as data, see `mtprune.method_from`; empty if it has parts without a name.
        seed: The pruner's seed.
        before: The dense model's results; empty if not given.
        after: Those of the pruned one.
        changes: What became of each task, in percent; below 0 is worse. Empty without both.
        overlap: For each two tasks the overlap of their masks, and that of independent ones.
        head: Further entries of the card's head, such as ``{"license": "mit"}``.
    """

    report: Report
    method: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    before: Results = field(default_factory=dict)
    after: Results = field(default_factory=dict)
    changes: Mapping[str, float] = field(default_factory=dict)
    overlap: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    head: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pruner: "MultitaskPruner",
        *,
        after: Mapping[str, Any] | None = None,
        before: Mapping[str, Any] | None = None,
        lower_is_better: bool | Mapping[str, Iterable[str]] | None = None,
        own: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
    ) -> "Card":
        """The card of what a pruner has pruned.

        Args:
            pruner: The pruner, before or after ``finalize``.
            after: ``{task: value}`` or ``{task: {metric: value}}`` of the pruned model, on data
                that no choice was made on.
            before: The same of the dense model.
            lower_is_better: As for `mtprune.choose`, if metrics have names of your own.
            own: As for ``method.to_dict``. Without it a method with functions of your own is told
                in words.
            head: Entries for the card's head: ``license``, ``base_model``, ``datasets``.

        Raises:
            ValueError: If nothing is pruned yet, or results are of other tasks, or not finite.

        Example:
            >>> import torch, mtprune
            >>> model = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in "tab"})
            >>> pruner = mtprune.MultitaskPruner(
            ...     model, ["a", "b"], "t", method=mtprune.recipes.magnitude(0.5))
            >>> hidden = model["t"](torch.ones(1, 4))
            >>> _ = pruner.observe_losses({name: model[name](hidden).sum() for name in "ab"})
            >>> _ = pruner.step()
            >>> card = Card.of(pruner, before={"a": 0.8, "b": 0.9}, after={"a": 0.4, "b": 0.9},
            ...                lower_is_better=False)
            >>> dict(card.changes)
            {'a': -50.0, 'b': 0.0}
        """
        report = pruner.report()
        if report.step is None:
            raise ValueError(
                "This pruner has pruned nothing yet, so there is nothing to tell. Make the card "
                "when training is over."
            )
        checks.mapping("head", head or {}, "name -> value")
        if before is not None and after is None:
            raise ValueError("`before` is told beside `after`, the pruned model's. Give both.")
        was = {} if before is None else _told(before, report.tasks, "before")
        now = {} if after is None else _told(after, report.tasks, "after")
        changes: Mapping[str, float] = {}
        if was:
            changes = delta_t(now, was, directions(was, lower_is_better)).tasks
        try:
            method = pruner.method.to_dict(own)
        except ValueError:
            if own is not None:
                raise
            method = {}
        overlap = _overlap(pruner)
        return cls(report, method, pruner.seed, was, now, changes, overlap, dict(head or {}))

    def markdown(self, plan: "Plan | None" = None) -> str:
        """The card as Markdown, its head as YAML.

        Args:
            plan: What `mtprune.compress` has made of the model.
        """
        parts = [self._top(), self._tasks(), self._pruning(), self._masks(), _storage(plan), _LAST]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _top(self) -> str:
        head = {"library_name": "mtprune", "tags": list(_TAGS), **self.head}
        # Every line of JSON is one of YAML.
        lines = [f"{name}: {json.dumps(value)}" for name, value in head.items()]
        r = self.report
        return "\n".join(
            [
                *("---", *lines, "---", ""),
                f"# A network for {len(r.tasks)} tasks, {r.sparsity:.1%} of its weights pruned",
                "",
                f"It serves {', '.join(f'`{task}`' for task in r.tasks)}. Of {r.parameters:,} "
                f"weights that take part in pruning {r.kept:,} are kept.",
            ]
        )

    def _tasks(self) -> str:
        if not self.after:
            return "## Results\n\nNo results were given."
        rows = [["task", "metric", *(["dense"] if self.before else []), "pruned"]]
        for task, metrics in self.after.items():
            for metric, value in metrics.items():
                was = [f"{self.before[task][metric]:.4g}"] if self.before else []
                rows.append([task, metric, *was, f"{value:.4g}"])
        text = f"## Results\n\n{_table(rows)}"
        if not self.changes:
            return text
        worst = min(self.changes, key=lambda task: self.changes[task])
        mean = sum(self.changes.values()) / len(self.changes)
        changes = ", ".join(f"`{task}` {change:+.2f}" for task, change in self.changes.items())
        return (
            f"{text}\n\nChange in percent against the dense model, below 0 is worse: {changes}; "
            f"mean {mean:+.2f}, worst `{worst}` {self.changes[worst]:+.2f}."
        )

    def _pruning(self) -> str:
        lines = ["## Pruning", "", "```text", self.report.table(), "```", ""]
        lines += [f"Seed {self.seed}, mtprune {version('mtprune')}, torch {version('torch')}."]
        if self.method:
            lines += ["The method, for `mtprune.method_from`:", ""]
            lines += ["```json", json.dumps(self.method, indent=1), "```"]
        return "\n".join(lines)

    def _masks(self) -> str:
        if not self.overlap:
            return ""
        rows = [["tasks", "overlap", "by chance", "beyond"]]
        for (one, other), (found, chance) in self.overlap.items():
            numbers = [f"{found:.3f}", f"{chance:.3f}", f"{found - chance:+.3f}"]
            rows.append([f"{one}, {other}", *numbers])
        return (
            "## What tasks share\n\nIntersection over union of the masks that two tasks would have "
            "on their own, in the layers that both use, beside that of independent masks as "
            f"dense.\n\n{_table(rows)}"
        )


_LAST = (
    "## Before you use it\n\nThis page was written by mtprune from what it had measured and was "
    "told. It does not know what data the network has seen, or for whom it works less well; who "
    "trained it should say so here."
)


def _told(found: Mapping[str, Any], tasks: Sequence[str], name: str) -> Results:
    checks.mapping(name, found, "task -> value or task -> {metric: value}")
    if set(found) != set(tasks):
        raise ValueError(f"`{name}` must be of the tasks {list(tasks)}. Got {list(found)}.")
    results = read(found, tasks, name)
    for task, metrics in results.items():
        for metric, value in metrics.items():
            if not_finite({task: {metric: value}}):
                raise ValueError(f"`{name}` of task '{task}' has {value} for '{metric}'.")
    return results


def _overlap(pruner: "MultitaskPruner") -> dict[tuple[str, str], tuple[float, float]]:
    """For each two tasks that share a layer; empty where no task has masks of its own."""
    try:
        masks = pruner.task_masks
    except RuntimeError:  # resumed, and not updated since
        return {}
    if all(bool(mask.all()) for own in masks.values() for mask in own.values()):
        return {}
    found = {}
    for one, other in combinations(masks, 2):
        if masks[one].keys() & masks[other].keys():
            affinity = compare({one: masks[one], other: masks[other]})
            found[one, other] = affinity.iou, affinity.chance
    return found


def _storage(plan: "Plan | None") -> str:
    return "" if plan is None else f"## Compressed\n\n```text\n{plan}\n```"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, the first row its head."""
    written = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([written[0], "|" + "---|" * len(rows[0]), *written[1:]])
