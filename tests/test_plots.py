"""Plots show the numbers of the report and of the sweep, and nothing else."""

import sys
from dataclasses import replace

import pytest
import torch

import mtprune
from mtprune import Cubic, SoftThreshold, Sweep, Vote, plots
from mtprune.curves import Alone, Point
from mtprune.intervals import Change
from mtprune.report import Moment, Row
from tests.test_inspecting import trained

pyplot = pytest.importorskip("matplotlib.pyplot")
pyplot.switch_backend("agg")


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


@pytest.fixture(scope="module")
def voted():
    return trained(Vote(0.75, schedule=Cubic(0, 3, 1)))[1]


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def rows(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def widths(axes):
    return [[bar.get_width() for bar in bars] for bars in axes.containers]


def test_kept_weights_are_split_by_who_wants_them(voted):
    report = voted.report()
    for components, told in ((False, report.layers), (True, report.components)):
        axes = plots.kept(report, components=components)
        assert rows(axes) == [row.name for row in told]
        assert labels(axes) == [
            "all its tasks",
            "several",
            "one of several",
            "no task alone",
            "pruned",
        ]
        for name, bars in zip(labels(axes), widths(axes), strict=True):
            assert bars == pytest.approx([row.parts[name] for row in told])
        assert [sum(bars) for bars in zip(*widths(axes), strict=True)] == pytest.approx(
            [1.0] * len(told)
        )


def test_rows_nobody_voted_on_are_kept_and_pruned(voted):
    row = Row("x", 10, 4, 0.6, (), {}, 1.0)
    axes = plots.kept(replace(voted.report(), layers=(row,)))
    assert (labels(axes), widths(axes)) == (["kept", "pruned"], [[0.4], [0.6]])


def test_unanimity_and_wishes(voted):
    report = voted.report()
    axes = plots.unanimity(report)
    shared = report.layers[:2]
    assert rows(axes) == [row.name for row in shared]
    assert widths(axes) == [[row.unanimity for row in shared]]
    axes = plots.wanted(report)
    cells = axes.images[0].get_array()
    assert cells.shape == (4, 2)
    assert cells[0, 1] == report.layers[0].want["b"]
    assert cells.mask.tolist() == [[False] * 2, [False] * 2, [False, True], [True, False]]


def test_affinity_beside_chance_and_where_tasks_part(voted):
    found = mtprune.affinity.compare(voted.task_masks)
    axes = plots.affinity(found)
    assert axes.images[0].get_array().tolist() == [[x.iou, x.chance] for x in found.layers]
    axes = plots.affinity({"one": found, "two": found})
    assert [t.get_text() for t in axes.get_xticklabels()] == [
        "one",
        "one, unrelated",
        "two",
        "two, unrelated",
    ]
    apart = replace(
        found, layers=tuple(replace(found.layers[0], iou=iou, chance=0.1) for iou in (0.9, 0.2))
    )
    for affinity, parts in ((found, 0), (apart, 1)):
        axes = plots.depth(affinity)
        overlap, chance = axes.get_lines()
        assert overlap.get_ydata().tolist() == [x.iou for x in affinity.layers]
        assert chance.get_ydata().tolist() == [x.chance for x in affinity.layers]
        assert len(axes.patches) == parts
    assert axes.patches[0].get_x() == 0


def test_what_changes_over_training():
    report = trained(SoftThreshold(0.5, schedule=Cubic(0, 3, 1)))[1].report()
    for draw, key in ((plots.sparsity, "sparsity"), (plots.thresholds, "threshold")):
        axes = draw(report)
        assert labels(axes) == list(report.history[0].components)
        for line, name in zip(axes.get_lines(), labels(axes), strict=True):
            assert line.get_ydata().tolist() == [m.components[name][key] for m in report.history]
            assert line.get_xdata().tolist() == [m.step for m in report.history]
    moments = (Moment(1, 0.1, {}, {"a": 1.0, "b": 1.0}), Moment(5, 0.2, {}, {"a": 0.5, "b": 1.5}))
    axes = plots.weights(replace(report, history=moments))
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[1.0, 0.5], [1.0, 1.5]]


def test_a_mask_is_a_picture_of_it(voted):
    kept = voted.masks["trunk.0.weight"]
    axes = plots.mask(kept)
    assert torch.equal(torch.tensor(axes.images[0].get_array()) == 1, kept)
    assert axes.get_title() == f"{int(kept.sum())} of {kept.numel()} kept"
    assert plots.mask(torch.ones(4, 3, 2, 2)).images[0].get_array().shape == (4, 12)
    assert plots.mask(torch.ones(5)).images[0].get_array().shape == (1, 5)


def swept(batches=1):
    error = 0.5 if batches > 1 else None
    points = tuple(
        Point(s, s, {"a": Change(a, error), "b": Change(b, error)})
        for s, a, b in ((0.5, -0.1, 0.2), (0.9, -3.0, float("-inf")))
    )
    alone = tuple(
        Alone(s, s, {"a": Change(-i - s, error), "b": Change(0.0, error)}, f"layer{i}", 10)
        for s in (0.5, 0.9)
        for i in range(3)
    )
    return Sweep(("a", "b"), points, alone, alone[:1], batches)


@pytest.mark.parametrize("batches", [1, 4])
def test_curves_of_a_sweep(batches):
    axes = plots.curves(swept(batches))
    one, two, _ = axes.get_lines()
    assert one.get_xydata().tolist() == [[0.5, -0.1], [0.9, -3.0]]
    assert two.get_xydata().tolist() == [[0.5, 0.2]]
    assert labels(axes) == ["a", "b"]
    assert len(axes.collections) == (2 if batches > 1 else 0)


def test_layers_alone():
    axes = plots.sensitivity(swept(4))
    assert rows(axes) == ["layer0", "layer1", "layer2"]
    assert labels(axes) == ["0.5 pruned", "0.9 pruned"]
    bars = [[bar.get_width() for bar in c] for c in axes.containers if hasattr(c, "patches")]
    assert bars == [[-0.5, -1.5, -2.5], [-0.9, -1.9, -2.9]]
    assert rows(plots.sensitivity(swept(), components=True)) == ["layer0"]


def test_axes_that_are_given_are_drawn_into(voted):
    figure, axes = pyplot.subplots(1, 2)
    assert plots.kept(voted.report(), axes=axes[0]) is axes[0]
    assert plots.curves(swept(), axes=axes[1]) is axes[1]
    assert figure.axes == list(axes)


@pytest.mark.parametrize(
    "draw",
    [
        lambda report: plots.thresholds(report),
        lambda report: plots.sparsity(replace(report, history=())),
        lambda report: plots.unanimity(replace(report, layers=report.layers[2:])),
        lambda report: plots.wanted(replace(report, layers=())),
        lambda report: plots.curves(Sweep(("a",), ())),
        lambda report: plots.sensitivity(Sweep(("a",), ())),
    ],
)
def test_nothing_to_draw_is_told(voted, draw):
    with pytest.raises(ValueError, match="nothing to draw: this was not measured, or nothing has"):
        draw(voted.report())
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_extra_is_named(voted, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Plots need matplotlib.*'mtprune\[plots\]'"):
        plots.kept(voted.report())
