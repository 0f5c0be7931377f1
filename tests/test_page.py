"""A report as a page: its numbers are the report's, and it needs nothing beside itself."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from mtprune import MultitaskPruner, SoftThreshold, Vote, affinity, saliency
from mtprune.report import Row
from mtprune.schedule import Cubic

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
        assert table[0][4:] == ["want a", "want b", "want c", "want magnitude", "unanimity"]
        for cells, row in zip(table[1:-1], told[what], strict=True):
            assert cells[:4] == [
                row["name"],
                f"{row['parameters']:,}",
                f"{row['kept']:,}",
                f"{row['sparsity']:.2%}",
            ]
            want = [row["want"].get(voter) for voter in ("a", "b", "c", "magnitude")]
            assert cells[4:-1] == ["" if w is None else f"{w:.1%}" for w in want]
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
    overlap = page.tables["Overlap of masks, and that of independent ones."]
    assert overlap[-1][1] == f"{beside['affinity']['all'].iou:.3f}"
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
    head, first, second, total = page.tables["Overlap of masks, and that of independent ones."]
    assert head[3:6] == ["with: unrelated", "with: excess", "with: 95 % interval"]
    assert head[6:] == ["without: overlap", "without: by chance"]
    numbers = ["0.500", "0.250", "0.250", "+0.250", "+0.250 to +0.250", "0.500", "0.250"]
    assert (first, total) == (["l0", *numbers], ["all", *numbers])
    assert (second[0], second[1], second[6]) == ("l1", "empty", "empty")


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


def test_a_hundred_layers_of_twelve_tasks_stay_below_a_megabyte(voted, tmp_path):
    tasks = tuple(f"task{i}" for i in range(12))
    want = dict.fromkeys(tasks, 0.5)
    rows = tuple(
        Row(f"encoder.block{i}.attention.weight", 9999, 999, 0.9, tasks, want, 0.1, 0.2, 0.3)
        for i in range(140)
    )
    report = replace(voted.report(), layers=rows, tasks=tasks)
    path = report.save(tmp_path / "r.html")
    assert path.stat().st_size < 1_000_000
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.tables["Layers, in numbers."]) == 142
    assert "The first 100 are drawn; the table has all 140." in page.text


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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_opens_it_without_a_complaint(voted, tmp_path):
    path = voted.report().save(tmp_path / "report.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert Page(done.stdout).tables == Page(path.read_text(encoding="utf-8")).tables
