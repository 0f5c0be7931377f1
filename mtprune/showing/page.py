"""A report as one page: what was pruned, for whom, and what every number means.

The page is a file of its own: style, pictures and numbers are in it, no script, nothing from
elsewhere. Each picture has its numbers in a table below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING

from torch import Tensor

from mtprune.affinity import Affinity, LayerAffinity
from mtprune.metrics import delta_t, lower_is_better
from mtprune.showing import svg
from mtprune.showing.html import Element, element, table, void

if TYPE_CHECKING:
    from mtprune.report import Report, Row

__all__ = ["Beside", "fragment", "page"]

Results = Mapping[str, Mapping[str, float]]

_PARTS = {
    "all its tasks": "c0",
    "several": "c1",
    "one of several": "c2",
    "no task alone": "c3",
    "pruned": "c4",
}
_PLAIN = {"kept": "c0", "pruned": "c4"}  # where no task has a say of its own
_MOST = 100  # layers in a picture; the table has all
_BY_CHANCE = ("overlap", "by chance")
_BY_NULL = ("unrelated", "excess", "95 % interval")


@dataclass(frozen=True)
class Beside:
    """What a page shows beside the report.

    Attributes:
        before: ``{task: {metric: value}}`` of the dense model.
        after: The same of the pruned one.
        masks: Masks by layer, to be drawn.
        affinity: The overlap of the masks of tasks, by what it is the overlap of.
        plan: What `mtprune.compress` did, as text.
    """

    before: Results = field(default_factory=dict)
    after: Results = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    affinity: Mapping[str, Affinity] = field(default_factory=dict)
    plan: str = ""


def page(report: "Report", beside: Beside) -> str:
    """The whole file."""
    head = element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"Pruning report: {_headline(report)}"),
        element("style", Element(_STYLE)),
    )
    body = element("body", element("main", *_sections(report, beside), class_="mtprune"))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def fragment(report: "Report") -> str:
    """The page as a part of another one, as notebooks show it."""
    style = element("style", Element(_STYLE.replace("body{", ".mtprune-none{")))
    return element("div", style, *_sections(report, Beside()), class_="mtprune")


def _sections(report: "Report", beside: Beside) -> list[Element]:
    found = [_head(report, beside)]
    if report.step is None:
        return found
    found += [_components(report), _layers(report), _wanted(report), _groups(report)]
    found += [_history(report), _affinity(beside.affinity), _masks(beside.masks)]
    found += [_uncovered(report), _plan(beside.plan), _words(report)]
    return [section for section in found if section]


def _headline(report: "Report") -> str:
    if report.step is None:
        return "nothing pruned yet"
    return f"{report.sparsity:.1%} of {report.parameters:,} weights"


def _head(report: "Report", beside: Beside) -> Element:
    tasks = ", ".join(report.tasks)
    if report.step is None:
        told = f"{report.parameters:,} weights in {len(report.layers)} layers, for {tasks}."
        return element("header", element("h1", "Nothing pruned yet"), element("p", told))
    lead = (
        f"{report.kept:,} of {report.parameters:,} weights are left, for {len(report.tasks)} "
        f"task{'s' if len(report.tasks) > 1 else ''}: {tasks}."
    )
    cards = [
        _card(f"{report.sparsity:.2%}", "of the weights are pruned"),
        _card(f"{report.coverage:.1%}", "of the model's matrices take part"),
        _card(f"{report.head_share:.1%}", "of the weights are private to one task"),
    ]
    if report.macs_sparsity is not None:
        cards.append(_card(f"{report.macs_sparsity:.1%}", "of the multiply-adds fall on zeros"))
    parts = [element("h1", f"{report.sparsity:.1%} pruned"), element("p", lead, class_="lead")]
    parts.append(element("div", *cards, class_="cards"))
    if beside.before and beside.after:
        parts.append(_change(beside.before, beside.after))
    about = [f"After step {report.step}."]
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


def _parts(row: "Row") -> list[float]:
    """The shares of a row's weights: kept for all, several, one, no task alone; pruned."""
    kept = 1.0 - row.sparsity
    if row.single is None or row.nobody is None:
        return [0.0, 0.0, 0.0, kept, row.sparsity]
    single = 0.0 if len(row.tasks) == 1 else row.single  # the only one is all
    several = max(0.0, 1.0 - row.unanimity - single - row.nobody)
    return [*(part * kept for part in (row.unanimity, several, single, row.nobody)), row.sparsity]


def _rows_picture(rows: Sequence["Row"], says: str) -> Element:
    told = [f"{row.kept:,} kept" for row in rows]
    if all(row.single is None for row in rows):
        shares = {row.name: [1.0 - row.sparsity, row.sparsity] for row in rows}
        return svg.bars(shares, _PLAIN, told, says=says)
    return svg.bars({row.name: _parts(row) for row in rows}, _PARTS, told, says=says)


def _rows_table(report: "Report", rows: Sequence["Row"], what: str, caption: str) -> Element:
    voters = list(dict.fromkeys(voter for row in rows for voter in row.want))
    soft = any(row.threshold is not None for row in rows)
    ranks = any(row.rank is not None for row in rows)
    macs = any(row.macs is not None for row in rows)
    head = [what, "weights", "kept", "pruned"]
    head += ["rank"] * ranks + ["threshold"] * soft + ["multiply-adds left"] * macs
    head += [*(f"want {voter}" for voter in voters), "unanimity"]
    body = []
    for row in rows:
        cells = [row.name, f"{row.parameters:,}", f"{row.kept:,}", f"{row.sparsity:.2%}"]
        cells += [f"{row.rank} of {row.full_rank}" if row.rank is not None else ""] * ranks
        cells += [f"{row.threshold:.3g}" if row.threshold is not None else ""] * soft
        cells += [f"{row.macs_kept:,.0f}" if row.macs_kept is not None else ""] * macs
        cells += [f"{row.want[v]:.1%}" if v in row.want else "" for v in voters]
        body.append([*cells, f"{row.unanimity:.1%}"])
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
        _rows_table(report, report.layers, "layer", "Layers, in numbers."),
    )


def _wanted(report: "Report") -> Element:
    voters = list(dict.fromkeys(voter for row in report.layers for voter in row.want))
    if len(voters) < 2:
        return Element("")
    rows = {row.name: [row.want.get(voter) for voter in voters] for row in report.layers[:_MOST]}
    return element(
        "section",
        element("h2", "Who wanted it"),
        element(
            "p",
            "Of the weights that a layer keeps, the share that each voter alone would keep. The "
            "numbers stand in the table of layers.",
        ),
        svg.heat(rows, voters, says="For each layer and voter the share of the kept weights."),
    )


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
    moments = report.history
    if len(moments) < 2:
        return Element("")
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
    if any(len({w for _, w in points}) > 1 for points in weights.values()):
        parts.append(element("h3", "What each task's loss counts"))
        parts.append(
            svg.lines(weights, unit="number", across="step", says="Weight of each task's loss.")
        )
    tau = bool(thresholds)
    head = ["step", "pruned", *names, *(f"threshold {name}" for name in names if tau)]
    head += [f"weight {task}" for task in moments[-1].weights]
    rows = []
    for m in moments:
        own = [m.components.get(name, {}) for name in names]
        cells = [f"{m.step:,}", f"{m.sparsity:.2%}"]
        cells += [f"{x['sparsity']:.2%}" if "sparsity" in x else "" for x in own]
        cells += [f"{x['threshold']:.3g}" if "threshold" in x else "" for x in own if tau]
        rows.append([*cells, *(f"{w:.3g}" for w in m.weights.values())])
    parts.append(table(head, rows, caption="Every update that is remembered."))
    return element("section", *parts)


def _affinity(found: Mapping[str, Affinity]) -> Element:
    if not found:
        return Element("")
    layers = list(dict.fromkeys(layer.name for a in found.values() for layer in a.layers))
    places = {what: {layer.name: layer for layer in a.layers} for what, a in found.items()}
    shown = layers[:_MOST]
    cells = {
        name: [
            places[what][name].iou
            if name in places[what] and not places[what][name].empty
            else None
            for what in found
        ]
        for name in shown
    }
    beside = {what: [*_BY_CHANCE, *(_BY_NULL if a.null else ())] for what, a in found.items()}
    head = ["layer", *(f"{what}: {x}" for what in found for x in beside[what])]
    rows = []
    for name in layers:
        row = [name]
        for what in found:
            layer = places[what].get(name)
            row += [""] * len(beside[what]) if layer is None else _overlap(layer)
        rows.append(row)
    total = ["all", *(cell for a in found.values() for cell in _overlap(a))]
    return element(
        "section",
        element("h2", "Where tasks agree"),
        element(
            "p",
            "How much the masks that tasks would have alone overlap: intersection over union. "
            "Masks that have nothing to do with each other overlap, too, by chance.",
        ),
        svg.heat(cells, list(found), says="For each layer the overlap of the tasks' masks."),
        table(head, [*rows, total], caption="Overlap of masks, and that of independent ones."),
    )


def _overlap(found: Affinity | LayerAffinity) -> list[str]:
    """An overlap and what it is held against."""
    cells = ["empty" if isnan(found.iou) else f"{found.iou:.3f}", f"{found.chance:.3f}"]
    if found.interval is not None:
        low, high = found.interval
        cells += [f"{found.expected:.3f}", f"{found.excess:+.3f}", f"{low:+.3f} to {high:+.3f}"]
    return cells


def _masks(masks: Mapping[str, Tensor]) -> Element:
    if not masks:
        return Element("")
    pictures = [
        element(
            "figure",
            svg.mask(kept, says=f"Mask of {name}: rows are outputs, dark is kept."),
            element(
                "figcaption",
                f"{name}, {' x '.join(map(str, kept.shape))}: "
                f"{int(kept.sum()):,} of {kept.numel():,} kept",
            ),
        )
        for name, kept in masks.items()
    ]
    return element("section", element("h2", "Masks"), element("div", *pictures, class_="figures"))


def _uncovered(report: "Report") -> Element:
    if not report.left_alone and report.coverage >= 1.0:
        return Element("")
    rows = [[name, why] for name, why in report.left_alone.items()]
    told = f"{report.coverage:.1%} of the model's matrices take part."
    parts = [element("h2", "What was left alone"), element("p", told)]
    if rows:
        parts.append(table(["layer", "why"], rows, caption="Layers that are not pruned."))
    return element("section", *parts)


def _plan(plan: str) -> Element:
    if not plan:
        return Element("")
    return element("section", element("h2", "Compressed"), element("pre", plan, tabindex="0"))


def _words(report: "Report") -> Element:
    words = {
        "pruned": "Share of the weights that are held at zero.",
        "want": "Of the kept weights, the share that this task alone, given the same budget, "
        "would keep.",
        "unanimity": "Of the kept weights, the share that each of the tasks which use the layer "
        "would keep alone.",
        "component": "'shared' is what you declared as shared; a task's own is what no other task "
        "uses; 'undeclared' is used by several, and was not declared.",
    }
    if any(row.threshold is not None for row in report.components):
        words["threshold"] = "Weights smaller than this, in size, were pruned."
    if any(row.rank is not None for row in report.components):
        words["rank"] = "Singular directions kept, of those there were."
    items = [e for w, told in words.items() for e in (element("dt", w), element("dd", told))]
    return element("section", element("h2", "Words"), element("dl", *items))


_STYLE = """
:root{color-scheme:light dark}
body{margin:0;background:Canvas}
.mtprune{--ink:#1c2430;--soft:#5a6675;--paper:#fff;--line:#d9dfe7;--c0:#0b3c6f;--c1:#2f7fc1;
--c2:#e08a1e;--c3:#8b93a0;--c4:#e9edf2;--s0:#0b3c6f;--s1:#c2570c;--s2:#1f7a4d;--s3:#8a2f8f;
--s4:#7a5c00;--s5:#3f4a57;color:var(--ink);background:var(--paper);
font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:0 auto;padding:24px 20px}
@media (prefers-color-scheme:dark){.mtprune{--ink:#e8edf3;--soft:#a7b3c2;--paper:#14181d;
--line:#333c47;--c0:#9cc9f5;--c1:#4d93d6;--c2:#f0a548;--c3:#7d8794;--c4:#262d36;--s0:#9cc9f5;
--s1:#f39a5b;--s2:#6fd3a0;--s3:#d99be0;--s4:#e2c25c;--s5:#c6d0dc}}
.mtprune h1{font-size:30px;line-height:1.2;margin:0 0 4px}
.mtprune h2{font-size:19px;margin:34px 0 6px}
.mtprune h3{font-size:15px;margin:18px 0 4px}
.mtprune .lead{font-size:17px;margin:0 0 14px}
.mtprune .method{color:var(--soft);font-size:13px;overflow-wrap:anywhere}
.mtprune .cards{display:flex;flex-wrap:wrap;gap:10px;margin:0 0 14px}
.mtprune .card{border:1px solid var(--line);border-radius:8px;padding:8px 14px;flex:1 1 150px}
.mtprune .card b{display:block;font-size:20px}
.mtprune .card span{color:var(--soft);font-size:13px}
.mtprune .picture{overflow-x:auto;margin:8px 0}
.mtprune svg{display:block;width:100%;min-width:600px;height:auto}
.mtprune svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
.mtprune .c0{fill:var(--c0)}.mtprune .c1{fill:var(--c1)}.mtprune .c2{fill:var(--c2)}
.mtprune .c3{fill:var(--c3)}.mtprune .c4{fill:var(--c4)}
.mtprune .cell{fill:var(--c0);fill-opacity:calc(.06 + .94*var(--share));stroke:var(--line);
stroke-width:.5}
.mtprune svg text.on{fill:var(--paper)}
.mtprune .grid{fill:none;stroke:var(--line)}
.mtprune .line{fill:none;stroke-width:2}
.mtprune .line.s0{stroke:var(--s0)}.mtprune .line.s1{stroke:var(--s1)}
.mtprune .line.s2{stroke:var(--s2)}.mtprune .line.s3{stroke:var(--s3)}
.mtprune .line.s4{stroke:var(--s4)}.mtprune .line.s5{stroke:var(--s5)}
.mtprune text.s0{fill:var(--s0)}.mtprune text.s1{fill:var(--s1)}.mtprune text.s2{fill:var(--s2)}
.mtprune text.s3{fill:var(--s3)}.mtprune text.s4{fill:var(--s4)}.mtprune text.s5{fill:var(--s5)}
.mtprune .box{overflow:auto;max-height:420px;border:1px solid var(--line);border-radius:8px;
margin:8px 0}
.mtprune table{border-collapse:collapse;width:100%;font-size:13px}
.mtprune caption{text-align:left;color:var(--soft);padding:6px 10px}
.mtprune th,.mtprune td{padding:4px 10px;text-align:right;border-top:1px solid var(--line);
white-space:nowrap;background:none;color:inherit}
.mtprune thead th{position:sticky;top:0;background:var(--paper)}
.mtprune th:first-child{text-align:left}
.mtprune td:last-child{text-align:right}
.mtprune pre{overflow:auto;font-size:12px;border:1px solid var(--line);border-radius:8px;
padding:10px}
.mtprune .figures{display:flex;flex-wrap:wrap;gap:16px}
.mtprune figure{margin:0;max-width:100%}
.mtprune figcaption{font-size:12px;color:var(--soft);overflow-wrap:anywhere}
.mtprune .mask{image-rendering:pixelated;border:1px solid var(--line);max-width:100%}
.mtprune dt{font-weight:600}.mtprune dd{margin:0 0 8px;color:var(--soft)}
@media print{.mtprune .box{max-height:none;overflow:visible}.mtprune section{break-inside:auto}}
"""
