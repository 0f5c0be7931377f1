"""A report as a page: its numbers are the report's, and it needs nothing beside itself."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

from mtprune import MultitaskPruner, Plan, Sizes, SoftThreshold, Vote, affinity, saliency
from mtprune.affinity import Affinity, LayerAffinity
from mtprune.compression.forms import CHOICES
from mtprune.compression.plan import Measured
from mtprune.compression.plan import Row as PlanRow
from mtprune.report import Moment, Row
from mtprune.schedule import Cubic
from mtprune.showing.style import STYLE

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds: tables by caption, tags, attributes, and whether all is closed."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.attributes, self.open = {}, [], [], []
        self.text = ""
        self._caption, self._rows = None, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "caption":
            self._caption += data
        elif self.open and self.open[-1] in ("td", "th"):
            self._rows[-1][-1] += data


@pytest.fixture(scope="module")
def voted():
    """A small net of three tasks, pruned by vote."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"trunk": nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))}
        | {task: nn.Linear(8, 3) for task in ("a", "b", "c")}
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = {
        task: lambda outputs, batch, task=task: outputs[task].square().mean()
        for task in ("a", "b", "c")
    }
    method = Vote(0.7, schedule=Cubic(0, 6, 2), voters=(saliency.magnitude,))
    pruner = MultitaskPruner(model, losses, [model["trunk"]], method=method, optimizer=optimizer)
    for _ in range(8):
        hidden = model["trunk"](torch.randn(16, 6))
        outputs = {task: model[task](hidden) for task in losses}
        optimizer.zero_grad()
        sum(pruner.observe(outputs, None).values()).backward()
        optimizer.step()
        pruner.step()
    return pruner


def test_parts_add_up_to_what_is_kept(voted):
    report = voted.report()
    for row in (*report.layers, *report.components):
        if len(row.tasks) == 1:
            assert row.single == row.unanimity == row.want[row.tasks[0]]
        assert row.unanimity + row.single * (len(row.tasks) > 1) + row.nobody <= 1 + 1e-12
    masks, alone = voted.masks, voted.task_masks
    for row in report.layers:
        wishes = torch.stack([alone[task][row.name] for task in row.tasks]).sum(0)
        kept = masks[row.name]
        assert row.single == pytest.approx(float((wishes[kept] == 1).float().mean()))
        assert row.nobody == pytest.approx(float((wishes[kept] == 0).float().mean()))


def test_tables_hold_the_numbers_of_the_report(voted, tmp_path):
    report = voted.report()
    path = report.save(tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    told = json.loads(json.dumps(report.to_dict()))
    for what in ("components", "layers"):
        table = page.tables[f"{what.capitalize()}, in numbers."]
        assert table[0][1:4] == ["weights", "kept", "pruned"]
        wants = ["want a", "want b", "want c", "want magnitude"]
        assert table[0][4:] == [*wants, "unanimity", "one task's", "no task's"]
        for cells, row in zip(table[1:-1], told[what], strict=True):
            assert cells[:4] == [
                row["name"],
                f"{row['parameters']:,}",
                f"{row['kept']:,}",
                f"{row['sparsity']:.2%}",
            ]
            want = [row["want"].get(voter) for voter in ("a", "b", "c", "magnitude")]
            parts = [row["unanimity"], row["single"], row["nobody"]]
            assert cells[4:] == ["" if w is None else f"{w:.1%}" for w in [*want, *parts]]
    history = page.tables["Every update that is remembered."]
    assert [row[0] for row in history[1:]] == [str(m["step"]) for m in told["history"]]
    assert f"{report.kept:,} of {report.parameters:,} weights are left" in page.text
    assert report.method in page.text


def test_it_needs_nothing_beside_itself(voted, tmp_path):
    beside = {
        "masks": {name: voted.masks[name] for name in list(voted.masks)[:2]},
        "affinity": {"all": affinity.compare(voted.task_masks)},
        "plan": "trunk.0  dense",
        "before": {task: {"accuracy": 0.9} for task in "abc"},
        "after": {"a": {"accuracy": 0.9}, "b": {"accuracy": 0.81}, "c": {"accuracy": 0.99}},
    }
    text = voted.report().save(tmp_path / "report.html", **beside).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "srcset", "action")
        if name == "src":
            assert value.startswith("data:image/png;base64,")
    assert "url(" not in text
    assert "@import" not in text
    assert [name for name, _ in page.attributes].count("alt") == 2
    [change] = [caption for caption in page.tables if caption.startswith("Against the dense")]
    assert "+0.00 % on average, b changed most for the worse, by -10.00 %" in change
    overlap = page.tables["Overlap of masks, that of unrelated tasks, and the excess."]
    all_ = beside["affinity"]["all"]
    told = [all_.iou, all_.chance]
    assert overlap[-1][1:3] == [f"{value:.3f}" for value in told]
    assert overlap[-1][3] == f"{all_.iou - all_.chance:+.3f}"
    assert "trunk.0  dense" in page.text


def test_an_affinity_stands_beside_its_null(voted, tmp_path):
    layers = (
        affinity.LayerAffinity("l0", 0.5, 0.25, {}, null=(0.25, 0.25)),
        affinity.LayerAffinity("l1", float("nan"), 0.0, {}, null=(0.1, 0.2)),
    )
    found = {
        "with": affinity.Affinity(layers, 0.5, 0.25, null=(0.25, 0.25)),
        "without": affinity.Affinity(tuple(replace(x, null=()) for x in layers), 0.5, 0.25),
    }
    page = Page(voted.report().save(tmp_path / "r.html", affinity=found).read_text("utf-8"))
    caption = "Overlap of masks, that of unrelated tasks, and the excess."
    head, first, second, total = page.tables[caption]
    assert head[1:5] == ["with: overlap", "with: unrelated", "with: excess", "with: ±"]
    numbers = ["0.500", "0.250", "+0.250"]
    assert (first, total) == tuple([x, *numbers, "0.000", *numbers, ""] for x in ("l0", "all"))
    assert (second[0], second[1], second[5]) == ("l1", "empty", "empty")


def test_names_are_text(voted, tmp_path):
    report = voted.report()
    evil = "<script>alert('x')</script>&\""
    rows = tuple(replace(row, name=evil) for row in report.layers[:1])
    odd = replace(report, layers=rows, tasks=(evil,), method=evil, left_alone={evil: evil})
    page = Page(odd.save(tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.tables["Layers, in numbers."][1][0] == evil
    assert page.tables["Layers that are not pruned."][1] == [evil, evil]


def test_thresholds_ranks_and_groups_have_columns(voted, tmp_path):
    row = Row("x", 10, 4, 0.6, ("a",), {}, 1.0, threshold=0.25, rank=2, full_rank=5)
    report = replace(voted.report(), layers=(row,), components=(row,))
    page = Page(report.save(tmp_path / "r.html").read_text(encoding="utf-8"))
    table = page.tables["Layers, in numbers."]
    assert table[0] == ["layer", "weights", "kept", "pruned", "rank", "threshold", "unanimity"]
    assert table[1] == ["x", "10", "4", "60.00%", "2 of 5", "0.25", "100.0%"]
    assert "Weights smaller than this, in size, were pruned." in page.text


def large(report):
    """A hundred layers of twelve tasks, with all that a page can show."""
    tasks = tuple(f"task{i}" for i in range(12))
    names = ("shared", *tasks)
    want = dict.fromkeys(tasks, 0.5)
    rows = tuple(
        Row(f"encoder.block{i}.attention.weight", 9999, 999, 0.9, tasks, want, 0.1, 0.2, 0.3)
        for i in range(100)
    )
    numbers = {"sparsity": 0.123456, "share": 0.1, "threshold": 0.0123456}
    moments = tuple(
        Moment(100 * i, i / 512, dict.fromkeys(names, numbers), dict.fromkeys(tasks, 1 + i / 512))
        for i in range(512)
    )
    components = tuple(replace(rows[0], name=name) for name in names)
    parts = {"layers": rows, "components": components, "tasks": tasks, "history": moments}
    layers = tuple(LayerAffinity(row.name, 0.123, 0.045, {}) for row in rows)
    pairs = {f"{a}, {b}": Affinity(layers, 0.1, 0.2) for a, b in combinations(tasks, 2)}
    masks = {row.name: (torch.rand(512, 512) > 0.5, torch.rand(512, 512) > 0.9) for row in rows[:4]}
    measured = (Measured("dense", 1.5, 99999), Measured("csr", 0.5, 9999))
    plan = Plan(tuple(PlanRow(row.name, (64, 64, 3, 3), "csr", measured) for row in rows))
    results = {task: {"loss": 1.0, "accuracy": 0.5} for task in tasks}
    beside = {"masks": masks, "affinity": pairs, "plan": plan, "before": results}
    return replace(report, **parts), {**beside, "after": results, "sizes": SIZES}


SIZES = Sizes(
    120, 110, 120, 110, 480, 440, ms=0.5, against=Sizes(1000, 99, 1000, 98, 4000, 97, ms=2.0)
)


def test_a_hundred_layers_of_twelve_tasks_stay_below_a_megabyte(voted, tmp_path):
    report, beside = large(voted.report())
    path = report.save(tmp_path / "r.html", **beside)
    assert path.stat().st_size < 1_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.tables["Layers, in numbers."]) == 102
    assert len(page.tables["One of every 4 updates."]) == 129
    assert page.tables["One of every 4 updates."][-1][0] == "51,100"
    overlap = page.tables["Overlap of masks, that of unrelated tasks, and the excess."]
    assert (len(overlap), len(overlap[0])) == (102, 1 + 66 * 3)
    more = replace(
        report,
        layers=tuple(replace(row, name=f"{row.name}{i}") for i in "ab" for row in report.layers),
    )
    page = Page(more.save(tmp_path / "m.html").read_text(encoding="utf-8"))
    assert len(page.tables["Layers, in numbers."]) == 202
    assert "The first 100 are drawn; the table has all 200." in page.text


def test_sizes_and_plan_are_tables(voted, tmp_path):
    _, beside = large(voted.report())
    plan = beside["plan"]
    page = Page(voted.report().save(tmp_path / "r.html", plan=plan, sizes=SIZES).read_text())
    sizes = {row[0]: row[1:] for row in page.tables["Sizes, timed on cpu, threads: 1, 0 rounds."]}
    assert sizes["of the whole model"] == ["before", "after", "ratio"]
    assert sizes["multiply-adds"] == ["1,000", "120", "8.33x"]
    assert sizes["not with zeros"] == ["98", "110", "0.89x"]
    assert sizes["ms, median"] == ["2.000", "0.500", "4.00x"]
    forms = page.tables["The form of every layer."]
    assert forms[1][:5] == [plan.rows[0].layer, "64x64x3x3", "csr", "1.500", "0.500"]
    assert "'csr': only the weights that are not zero" in page.text
    own = replace(plan, sizes=SIZES, dense_ms=2.0, ms=0.5, note="All of it.")
    page = Page(voted.report().save(tmp_path / "r.html", plan=own).read_text())
    assert "Sizes, timed on cpu, threads: 1, 0 rounds." in page.tables
    assert "The whole model took 2.00 ms dense and 0.50 ms compressed" in page.text
    assert "All of it." in page.text


def test_every_form_a_plan_can_name_is_explained(voted, tmp_path):
    rows = tuple(PlanRow(f"layer{i}", (2, 2), choice, ()) for i, choice in enumerate(CHOICES))
    page = Page(voted.report().save(tmp_path / "r.html", plan=Plan(rows)).read_text())
    assert all(f"'{choice}': " in page.text for choice in CHOICES)


def test_masks_are_drawn_before_and_after(voted, tmp_path):
    kept = voted.masks["trunk.0.weight"]
    before = torch.ones_like(kept)
    page = Page(
        voted.report()
        .save(tmp_path / "r.html", masks={"trunk.0.weight": (before, kept)})
        .read_text()
    )
    assert page.tables["Masks, in numbers."][1:] == [
        ["trunk.0.weight, before", "12 x 6", "72", "72"],
        ["trunk.0.weight, after", "12 x 6", "72", str(int(kept.sum()))],
    ]
    alts = [value for name, value in page.attributes if name == "alt"]
    assert alts == [
        f"Mask of trunk.0.weight, {when}: rows are outputs, dark is kept."
        for when in ("before", "after")
    ]


@pytest.mark.parametrize(
    ("overlaps", "told"),
    [
        ((0.9, 0.8, 0.2), "from layer1 to layer2 the excess drops by 0.60"),
        ((0.9, 0.3, float("nan"), 0.2), "from layer0 to layer1 the excess drops by 0.60"),
        ((0.9, float("nan"), 0.2), "from layer0 to layer2 the excess drops by 0.70"),
        ((0.5, 0.45, 0.44), "Watershed of a, b: none. The excess never drops by 0.1."),
    ],
)
def test_the_page_tells_where_tasks_part(voted, tmp_path, overlaps, told):
    layers = tuple(LayerAffinity(f"layer{i}", x, 0.1, {}) for i, x in enumerate(overlaps))
    found = {"a, b": Affinity(layers, 0.5, 0.1)}
    text = voted.report().save(tmp_path / "r.html", affinity=found).read_text(encoding="utf-8")
    page = Page(text)
    assert told in page.text
    assert text.count('class="mark"') == (0 if "none" in told else 1)
    rows = page.tables["Overlap of masks, that of unrelated tasks, and the excess."][1:-1]
    assert [row[1] for row in rows] == ["empty" if x != x else f"{x:.3f}" for x in overlaps]
    assert [row[3] for row in rows] == ["" if x != x else f"{x - 0.1:+.3f}" for x in overlaps]


# For those who do not see it, or use keys.


def test_everything_that_is_drawn_or_scrolls_has_a_name(voted, tmp_path):
    report, beside = large(voted.report())
    text = report.save(
        tmp_path / "r.html",
        **beside,
    ).read_text(encoding="utf-8")
    for tag in re.findall(r"<(?:svg|img)[^>]*>", text):
        assert 'role="img" aria-label="' in tag or 'alt="' in tag
    boxes = re.findall(r'<div class="box"[^>]*>|<pre[^>]*>', text)
    assert len(boxes) > 6
    assert all('tabindex="0" role="region" aria-label="' in box for box in boxes)
    assert text.count("<h1>") == 1
    levels = [int(level) for level in re.findall(r"<h(\d)>", text)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert '<html lang="en">' in text
    assert text.count("<caption>") == text.count("<table>")
    assert set(re.findall(r'<th scope="(\w+)"', text)) == {"row", "col"}
    assert text.count("<th>") == 0


def colours(dark):
    """The variables of the style, in light or in dark."""
    sheet = STYLE[STYLE.index("prefers-color-scheme:dark") :] if dark else STYLE
    light = dict(re.findall(r"--(\w+):(#\w+)", STYLE[: STYLE.index("@media")]))
    return light | (dict(re.findall(r"--(\w+):(#\w+)", sheet[: sheet.index("}}")])) if dark else {})


def rgb(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def contrast(one, two):
    """The ratio of WCAG 2: of relative luminances."""

    def luminance(channels):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(f * c for f, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrasts_suffice(dark):
    found = {name: rgb(colour) for name, colour in colours(dark).items()}
    paper = found["paper"]
    for name in ("ink", "soft", *(f"s{i}" for i in range(6))):
        assert contrast(found[name], paper) >= 4.5, name
    for name in ("c0", "c1", "c2", "c3"):
        assert contrast(found[name], paper) >= 2.4, name
    base, slope = map(float, re.findall(r"calc\((\S+) \+ (\S+)\*var\(--share\)\)", STYLE)[0])
    for share in (0.0, 0.5, 1.0):
        part = base + slope * share
        cell = [part * c + (1 - part) * p for c, p in zip(found["c0"], paper, strict=True)]
        assert contrast(found["ink"], cell) >= 4.5, share


def test_before_the_first_update_there_is_little_to_say(tmp_path):
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), "a": nn.Linear(4, 2)})
    losses = {"a": lambda outputs, batch: outputs.sum()}
    report = MultitaskPruner(model, losses, [model["trunk"]], method=Vote(0.5)).report()
    page = Page(report.save(tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "Nothing pruned yet" in page.text
    assert page.tables == {}


def test_notebooks_show_a_part_of_a_page(voted):
    text = voted.report()._repr_html_()
    page = Page(text)
    assert page.tags[0] == "div"
    assert not {"html", "body", "script"} & set(page.tags)
    style = text[text.index("<style>") + 7 : text.index("</style>")]
    for rule in re.findall(r"([^{}]+)\{", re.sub(r"@media[^{]*\{", "", style)):
        assert all(".mtprune" in one or one.strip() == ":root" for one in rule.split(","))


def test_thresholds_without_votes_are_drawn_as_kept_and_pruned():
    torch.manual_seed(0)
    model = nn.ModuleDict({"trunk": nn.Linear(6, 6), "a": nn.Linear(6, 2), "b": nn.Linear(6, 2)})
    losses = {t: lambda outputs, batch, t=t: outputs[t].square().mean() for t in ("a", "b")}
    method = SoftThreshold(0.5, schedule=Cubic(0, 4, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = MultitaskPruner(model, losses, [model["trunk"]], method=method, optimizer=optimizer)
    for _ in range(5):
        hidden = model["trunk"](torch.randn(8, 6))
        sum(pruner.observe({t: model[t](hidden) for t in losses}, None).values()).backward()
        optimizer.step()
        pruner.step()
    text = Page(pruner.report()._repr_html_()).text
    assert "kept" in text
    assert "one of several" not in text
    assert "Thresholds" in text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "report.txt",
            {},
            "A report is saved as a page: its name ends in .html. Got '.*report.txt",
        ),
        ("r.html", {"before": {"a": {"x": 1.0}}}, "go together.* Got only `before`"),
        ("r.html", {"after": {"a": {"x": 1.0}}}, "go together.* Got only `after`"),
        (
            "r.html",
            {"before": {"a": {"x": 1.0}}, "after": {"b": {"x": 1.0}}},
            r"of the same tasks\. Got \['a'\] and \['b'\]",
        ),
    ],
)
def test_refuses(voted, tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        voted.report().save(tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Known(LayerAffinity):
    """A layer whose overlap was compared with that of unrelated tasks."""

    expected: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


def test_the_interval_of_an_excess_is_a_band(voted, tmp_path):
    layers = tuple(
        Known(f"layer{i}", 0.9 - i / 2, 0.1, {}, expected=0.3, interval=(0.4, 0.8))
        for i in range(2)
    )
    found = {"a, b": Affinity(layers, 0.5, 0.1)}
    text = voted.report().save(tmp_path / "r.html", affinity=found).read_text(encoding="utf-8")
    table = Page(text).tables["Overlap of masks, that of unrelated tasks, and the excess."]
    assert table[0][1:] == ["a, b: overlap", "a, b: unrelated", "a, b: excess", "a, b: ±"]
    assert table[1] == ["layer0", "0.900", "0.300", "+0.600", "0.200"]
    [band] = re.findall(r'<polygon points="([^"]*)" class="band"', text)
    heights = [float(point.split(",")[1]) for point in band.split()]
    assert heights == pytest.approx([228 - 216 * y for y in (0.5, 0.5, 0.1, 0.1)], abs=0.06)


# In a browser.


CHROMIUM = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]


def browse(folder, path, *words):
    """What Chromium says of a page."""
    command = [*CHROMIUM, "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    return subprocess.run(
        [*command, *words, path.as_uri()], capture_output=True, text=True, timeout=300, check=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_opens_it_without_a_complaint(voted, tmp_path):
    report, beside = large(voted.report())
    path = report.save(tmp_path / "report.html", **beside)
    done = browse(tmp_path, path, "--dump-dom")
    assert "CONSOLE" not in done.stderr
    tables = Page(done.stdout).tables
    assert tables == Page(path.read_text(encoding="utf-8")).tables
    told = report.to_dict()["layers"]
    assert [row[1:3] for row in tables["Layers, in numbers."][1:-1]] == [
        [f"{row['parameters']:,}", f"{row['kept']:,}"] for row in told
    ]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_it_is_light_or_dark_and_fits_a_phone(voted, tmp_path):
    image = pytest.importorskip("PIL.Image")
    report, beside = large(voted.report())
    path = report.save(tmp_path / "report.html", **beside)
    dark = "--blink-settings=preferredColorScheme=0"
    for name, words in (("light", ()), ("dark", (dark,))):
        for wide in (900, 500):  # the least that a window may be
            picture = tmp_path / f"{name}{wide}.png"
            size = f"--window-size={wide},1500"
            browse(tmp_path, path, f"--screenshot={picture}", size, *words)
            with image.open(picture) as shot:
                pixels = shot.convert("RGB")
                paper = tuple(round(255 * c) for c in rgb(colours(name == "dark")["paper"]))
                assert pixels.getpixel((3, 3)) == paper
                assert len(pixels.getcolors(1 << 20)) > 20
                # Nothing reaches over the edge: what is wider scrolls in a box of its own.
                edge = pixels.crop((wide - 8, 0, wide, 1500)).getcolors()
                assert edge == [(8 * 1500, paper)]
