"""A report as one page: what was pruned, for whom, and what every number means.

The page is a file of its own: style, pictures and numbers are in it, no script, nothing from
elsewhere. Each picture has its numbers in a table below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from mtprune.affinity import Affinity
from mtprune.compression.measure import Sizes
from mtprune.compression.plan import Plan
from mtprune.metrics import delta_t, lower_is_better
from mtprune.showing import svg
from mtprune.showing.agreement import agreement
from mtprune.showing.html import Element, element, table, void
from mtprune.showing.sizes import plan_section, sizes_section
from mtprune.showing.style import STYLE

if TYPE_CHECKING:
    from mtprune.report import Report, Row

__all__ = ["Beside", "Drawn", "fragment", "page", "plan_page"]

Results = Mapping[str, Mapping[str, float]]

Drawn = Tensor | tuple[Tensor, Tensor]
"""A mask to draw, or one before and one after."""

_PARTS = {
    "all its tasks": "c0",
    "several": "c1",
    "one of several": "c2",
    "no task alone": "c3",
    "kept": "c0",  # where no task has a say of its own
    "pruned": "c4",
}
_MOST = 100  # layers in a picture; the table has all
_MOMENTS = 128  # updates in a picture and its table


@dataclass(frozen=True)
class Beside:
    """What a page shows beside the report.

    Attributes:
        before: ``{task: {metric: value}}`` of the dense model.
        after: The same of the pruned one.
        masks: Masks by layer, to be drawn; or pairs of them, before and after.
        affinity: The overlap of the masks of tasks, by what it is the overlap of.
        plan: What `mtprune.compress` did, or any text.
        sizes: What `mtprune.measure` found; those of the plan unless given.
    """

    before: Results = field(default_factory=dict)
    after: Results = field(default_factory=dict)
    masks: Mapping[str, Drawn] = field(default_factory=dict)
    affinity: Mapping[str, Affinity] = field(default_factory=dict)
    plan: Plan | str | None = None
    sizes: Sizes | None = None


def page(report: "Report", beside: Beside) -> str:
    """The whole file."""
    return _whole(f"Pruning report: {_headline(report)}", _sections(report, beside))


def plan_page(plan: Plan) -> str:
    """The whole file, where only a plan is known."""
    head = element("header", element("h1", "A compressed model"))
    return _whole(
        "Compressed model", [head, *filter(None, (sizes_section(plan.sizes), plan_section(plan)))]
    )


def _whole(title: str, sections: Sequence[Element]) -> str:
    head = element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Element(STYLE)),
    )
    body = element("body", element("main", *sections, class_="mtprune"))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def fragment(report: "Report") -> str:
    """The page as a part of another one, as notebooks show it."""
    style = element("style", Element(STYLE.replace("body{", ".mtprune-none{")))
    return element("div", style, *_sections(report, Beside()), class_="mtprune")


def _sections(report: "Report", beside: Beside) -> list[Element]:
    found = [_head(report, beside)]
    if report.step is None:
        return found
    sizes = beside.sizes or (beside.plan.sizes if isinstance(beside.plan, Plan) else None)
    found += [_components(report), _layers(report), _groups(report), _history(report)]
    found += [agreement(beside.affinity, _MOST), _masks(beside.masks), _uncovered(report)]
    found += [sizes_section(sizes), plan_section(beside.plan), _words(report)]
    return [section for section in found if section]


def _headline(report: "Report") -> str:
    if report.step is None:
        return "nothing pruned yet"
    return f"{report.sparsity:.1%} of {report.parameters:,} weights"


def _head(report: "Report", beside: Beside) -> Element:
    tasks, number = ", ".join(report.tasks), len(report.tasks)
    if report.step is None:
        told = f"{report.parameters:,} weights in {len(report.layers)} layers, for {tasks}."
        return element("header", element("h1", "Nothing pruned yet"), element("p", told))
    lead = f"{report.kept:,} of {report.parameters:,} weights are left"
    lead += f", for {number} task{'s' if number > 1 else ''}: {tasks}." if number else "."
    cards = [_card(f"{report.sparsity:.2%}", "of the weights are pruned")]
    if report.coverage is not None:
        cards.append(_card(f"{report.coverage:.1%}", "of the model's matrices take part"))
    if number:
        cards.append(_card(f"{report.head_share:.1%}", "of the weights are private to one task"))
    if report.macs_sparsity is not None:
        cards.append(_card(f"{report.macs_sparsity:.1%}", "of the multiply-adds fall on zeros"))
    if report.timing is not None:
        cards.append(_card(f"{report.timing.share:.0%}", "of the dense model's time"))
    parts = [element("h1", f"{report.sparsity:.1%} pruned"), element("p", lead, class_="lead")]
    parts.append(element("div", *cards, class_="cards"))
    if beside.before and beside.after:
        parts.append(_change(beside.before, beside.after))
    about = [f"After step {report.step}."] if number else []
    about += [f"By {report.method}."] if report.method else []
    parts.append(element("p", " ".join(about), class_="method"))
    return element("header", *parts)


def _card(number: str, text: str) -> Element:
    return element("div", element("b", number), element("span", text), class_="card")


def _change(before: Results, after: Results) -> Element:
    """How much each task lost."""
    change = delta_t(after, before, lower_is_better(before))
    rows = [
        [task, f"{change.tasks[task]:+.2f} %", *_told(before[task]), *_told(after[task])]
        for task in change.tasks
    ]
    worst = min(change.tasks, key=lambda task: change.tasks[task])
    caption = (
        f"Against the dense model: {change.overall:+.2f} % on average, {worst} changed most for "
        f"the worse, by {change.tasks[worst]:+.2f} %. Above 0 is better."
    )
    return table(["task", "change", "before", "after"], rows, caption=caption)


def _told(metrics: Mapping[str, float]) -> list[str]:
    return [", ".join(f"{name} {value:.4g}" for name, value in metrics.items())]


def _rows_picture(rows: Sequence["Row"], says: str) -> Element:
    told = [f"{row.kept:,} kept" for row in rows]
    known = {name for row in rows for name in row.parts}
    parts = {name: kind for name, kind in _PARTS.items() if name in known}
    shares = {row.name: [row.parts.get(name, 0.0) for name in parts] for row in rows}
    return svg.bars(shares, parts, told, says=says)


def _rows_table(report: "Report", rows: Sequence["Row"], what: str, caption: str) -> Element:
    voters = list(dict.fromkeys(voter for row in rows for voter in row.want))
    soft = any(row.threshold is not None for row in rows)
    ranks = any(row.rank is not None for row in rows)
    macs = any(row.macs is not None for row in rows)
    head = [what, "weights", "kept", "pruned"]
    head += ["rank"] * ranks + ["threshold"] * soft + ["multiply-adds left"] * macs
    asked = any(row.tasks for row in rows)
    split = any(row.single is not None for row in rows)
    head += [f"want {voter}" for voter in voters]
    head += ["unanimity"] * asked + ["one task's", "no task's"] * split
    body = []
    for row in rows:
        cells = [row.name, f"{row.parameters:,}", f"{row.kept:,}", f"{row.sparsity:.2%}"]
        cells += [f"{row.rank} of {row.full_rank}" if row.rank is not None else ""] * ranks
        cells += [f"{row.threshold:.3g}" if row.threshold is not None else ""] * soft
        cells += [f"{row.macs_kept:,.0f}" if row.macs_kept is not None else ""] * macs
        cells += [f"{row.want[v]:.1%}" if v in row.want else "" for v in voters]
        cells += [f"{row.unanimity:.1%}"] * asked
        alone = ["" if part is None else f"{part:.1%}" for part in (row.single, row.nobody)]
        body.append(cells + alone * split)
    total = ["all", f"{report.parameters:,}", f"{report.kept:,}", f"{report.sparsity:.2%}"]
    body.append(total + [""] * (len(head) - len(total)))
    return table(head, body, caption=caption)


def _components(report: "Report") -> Element:
    return element(
        "section",
        element("h2", "Components"),
        element("p", "What tasks share, and what each has to itself."),
        _rows_picture(report.components, "How much of each component is kept, and for whom."),
        _rows_table(report, report.components, "component", "Components, in numbers."),
    )


def _layers(report: "Report") -> Element:
    shown = report.layers[:_MOST]
    told = "Of every layer: the weights kept"
    if any(row.single is not None for row in shown):
        told += ", by how many of the tasks that use it would keep them alone"
    told += "."
    if len(shown) < len(report.layers):
        told += f" The first {_MOST} are drawn; the table has all {len(report.layers)}."
    return element(
        "section",
        element("h2", "Layers"),
        element("p", told),
        _rows_picture(shown, "How much of each layer is kept, and for whom."),
        *_wanted(shown),
        _rows_table(report, report.layers, "layer", "Layers, in numbers."),
    )


def _wanted(rows: Sequence["Row"]) -> list[Element]:
    """Who wanted it: a heat map of voters, and of all tasks together."""
    voters = list(dict.fromkeys(voter for row in rows for voter in row.want))
    if len(voters) < 2:
        return []
    shares = {row.name: [*(row.want.get(v) for v in voters), row.unanimity] for row in rows}
    told = (
        "Of the weights that a layer keeps, the share that each voter alone would keep, and the "
        "share that every task which uses the layer would keep."
    )
    says = "For each layer and voter the share of the kept weights, and the unanimity."
    picture = svg.heat(shares, [*voters, "unanimity"], says=says)
    return [element("h3", "Who wanted it"), element("p", told), picture]


def _groups(report: "Report") -> Element:
    if not report.groups:
        return Element("")
    rows = [
        [g.name, f"{g.units:,}", f"{g.kept:,}", f"{1 - g.kept / max(1, g.units):.1%}"]
        for g in report.groups
    ]
    return element(
        "section",
        element("h2", "Groups of units"),
        table(["group", "units", "kept", "pruned"], rows, caption="Units that go together."),
    )


def _history(report: "Report") -> Element:
    if len(report.history) < 2:
        return Element("")
    every = -(-len(report.history) // _MOMENTS)
    moments = report.history[::-every][::-1]  # the last is among them
    names = list(dict.fromkeys(name for m in moments for name in m.components))

    def over(key: str) -> dict[str, list[tuple[float, float]]]:
        found = {
            name: [
                (float(m.step), m.components[name][key])
                for m in moments
                if key in m.components.get(name, {})
            ]
            for name in names
        }
        return {name: points for name, points in found.items() if points}

    parts = [
        element("h2", "Over training"),
        svg.lines(
            over("sparsity"), unit="share", across="step", says="Pruned share of each component."
        ),
    ]
    if thresholds := over("threshold"):
        parts.append(element("h3", "Thresholds"))
        parts.append(
            svg.lines(thresholds, unit="number", across="step", says="Threshold of each component.")
        )
    weights = {
        task: [(float(m.step), m.weights[task]) for m in moments if task in m.weights]
        for task in report.tasks
    }
    weighed = any(len({w for _, w in points}) > 1 for points in weights.values())
    if weighed:
        parts.append(element("h3", "What each task's loss counts"))
        parts.append(
            svg.lines(weights, unit="number", across="step", says="Weight of each task's loss.")
        )
    tau = bool(thresholds)
    head = ["step", "pruned", *names, *(f"threshold {name}" for name in names if tau)]
    head += [f"weight {task}" for task in moments[-1].weights if weighed]
    rows = []
    for m in moments:
        own = [m.components.get(name, {}) for name in names]
        cells = [f"{m.step:,}", f"{m.sparsity:.2%}"]
        cells += [f"{x['sparsity']:.2%}" if "sparsity" in x else "" for x in own]
        cells += [f"{x['threshold']:.3g}" if "threshold" in x else "" for x in own if tau]
        rows.append([*cells, *(f"{w:.3g}" for w in m.weights.values() if weighed)])
    told = "Every update that is remembered." if every == 1 else f"One of every {every} updates."
    parts.append(table(head, rows, caption=told))
    return element("section", *parts)


def _masks(masks: Mapping[str, Drawn]) -> Element:
    if not masks:
        return Element("")
    figures, rows = [], []
    for name, drawn in masks.items():
        pair = drawn if isinstance(drawn, tuple) else (drawn,)
        for when, kept in zip(("before", "after") if len(pair) > 1 else ("",), pair, strict=True):
            told = f"{name}, {when}" if when else name
            shape = " x ".join(map(str, kept.shape))
            numbers = f"{int(kept.sum()):,} of {kept.numel():,} kept"
            picture = svg.mask(kept, says=f"Mask of {told}: rows are outputs, dark is kept.")
            caption = element("figcaption", f"{told}, {shape}: {numbers}")
            figures.append(element("figure", picture, caption))
            rows.append([told, shape, f"{kept.numel():,}", f"{int(kept.sum()):,}"])
    return element(
        "section",
        element("h2", "Masks"),
        element("div", *figures, class_="figures"),
        table(["mask", "shape", "weights", "kept"], rows, caption="Masks, in numbers."),
    )


def _uncovered(report: "Report") -> Element:
    share = report.coverage
    if not report.left_alone and share is not None and share >= 1.0:
        return Element("")
    rows = [[name, why] for name, why in report.left_alone.items()]
    told = "Which share of the model's matrices takes part is not known."
    if share is not None:
        told = f"{share:.1%} of the model's matrices take part."
    parts = [element("h2", "What was left alone"), element("p", told)]
    if rows:
        parts.append(table(["layer", "why"], rows, caption="Layers that are not pruned."))
    return element("section", *parts)


def _words(report: "Report") -> Element:
    words = {
        "pruned": "Share of the weights that are held at zero.",
        "want": "Of the kept weights, the share that this task alone, given the same budget, "
        "would keep.",
        "unanimity": "Of the kept weights, the share that each of the tasks which use the layer "
        "would keep alone.",
        "one task's, no task's": "Of the kept weights, the share that exactly one of these tasks "
        "would keep alone, and the share that none of them would.",
        "component": "'shared' is what you declared as shared; a task's own is what no other task "
        "uses; 'undeclared' is used by several, and was not declared.",
    }
    if any(row.threshold is not None for row in report.components):
        words["threshold"] = "Weights smaller than this, in size, were pruned."
    if any(row.rank is not None for row in report.components):
        words["rank"] = "Singular directions kept, of those there were."
    items = [e for w, told in words.items() for e in (element("dt", w), element("dd", told))]
    return element("section", element("h2", "Words"), element("dl", *items))
