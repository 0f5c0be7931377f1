from math import isfinite, isnan, nan

import pytest
import torch

from mtprune.affinity import Contrast, chance, compare, contrast, iou, watershed


def curve(text):
    return [float(value) for value in text.split()]


# Overlaps of the 33 backbone layers as published, and under random images and labels.
PUBLISHED = {
    "NYUv2": (
        curve(
            ".968 .947 .939 .928 .913 .909 .893 .866 .755 .726 .670 .636 .575 .556 .471 .381"
            " .129 .101 .049 .044 .018 .022 .021 .014 .030 .030 .036 .061 .034 .028 .034 .063 .028"
        ),
        0.252,
    ),
    "Cityscapes": (
        curve(
            ".992 .981 .976 .971 .965 .964 .958 .949 .908 .899 .880 .867 .839 .829 .806 .760"
            " .598 .551 .467 .454 .346 .363 .238 .255 .164 .205 .128 .151 .047 .034 .051 .053 .047"
        ),
        0.162,
    ),
    "Taskonomy": (
        curve(
            ".989 .976 .973 .967 .964 .962 .954 .939 .894 .886 .864 .853 .820 .811 .771 .723"
            " .512 .477 .389 .355 .262 .248 .169 .170 .100 .117 .060 .066 .005 .007 .001 .000 .001"
        ),
        0.211,
    ),
}
NULL = curve(
    ".99 .98 .97 .97 .96 .96 .95 .95 .91 .90 .88 .87 .84 .83 .80 .76"
    " .61 .59 .53 .50 .43 .42 .36 .36 .30 .31 .25 .25 .12 .11 .08 .07 .05"
)


def bools(device, *rows):
    return [torch.tensor(row, dtype=torch.bool, device=device) for row in rows]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param([[1, 1, 0, 0], [1, 0, 1, 0]], 1 / 3, id="two: one of three"),
        pytest.param([[1, 1, 0, 0], [0, 0, 1, 1]], 0.0, id="two: disjoint"),
        pytest.param([[1, 0, 1, 0]] * 2, 1.0, id="two: identical"),
        pytest.param([[1, 0, 1, 0]] * 3, 1.0, id="three: identical"),
        pytest.param([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]], 1 / 3, id="three: one of three"),
        pytest.param([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]], 0.0, id="three: two agree"),
        pytest.param([[1, 0, 0, 0], [0, 0, 0, 0]], 0.0, id="one empty"),
    ],
)
def test_intersection_over_union(rows, expected, device):
    assert iou(bools(device, *rows)) == expected


@pytest.mark.parametrize("tasks", [2, 3])
def test_overlap_of_nothing_is_not_a_number(tasks, device):
    assert isnan(iou(bools(device, *[[0, 0, 0]] * tasks)))
    assert isnan(chance([0.0] * tasks))


@pytest.mark.parametrize("q", [0.05, 0.3, 0.5, 0.9])
def test_independent_masks_overlap_by_chance(q, device):
    masks = [(torch.rand(200_000) < q).to(device) for _ in range(3)]
    assert chance([q, q]) == pytest.approx(q / (2 - q), rel=1e-12)
    assert iou(masks[:2]) == pytest.approx(q / (2 - q), abs=0.01)
    assert iou(masks) == pytest.approx(chance([q, q, q]), abs=0.01)


def test_chance_of_unequal_densities():
    assert chance([0.2, 0.5]) == pytest.approx(0.1 / (0.2 + 0.5 - 0.1), rel=1e-12)
    assert chance([1.0, 1.0]) == 1.0
    assert chance([0.0, 0.5]) == 0.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_curves_drop_after_index_15(name):
    values, drop = PUBLISHED[name]
    found = watershed(values)
    assert found is not None
    assert (found.before, found.drop) == (15, pytest.approx(drop, abs=1e-9))


def test_random_labels_drop_there_too_but_not_beyond_their_null():
    alone = watershed(NULL)
    assert alone is not None
    assert alone.before == 15
    assert watershed(NULL, NULL) is None


def test_beyond_the_null_cityscapes_has_no_watershed():
    assert watershed(PUBLISHED["Cityscapes"][0], NULL) is None


def test_a_drop_beyond_the_null_is_found_where_it_is():
    found = watershed([0.9, 0.8, 0.4, 0.1], null=[0.5, 0.5, 0.4, 0.1])
    assert found is not None
    assert (found.before, found.drop) == (1, pytest.approx(0.3))


@pytest.mark.parametrize(
    ("values", "least", "before"),
    [
        pytest.param([0.9, 0.8], 0.1, 0, id="exactly the least"),
        pytest.param([0.9, 0.81], 0.1, None, id="less than the least"),
        pytest.param([0.9, 0.81], 0.05, 0, id="a smaller least"),
        pytest.param([0.1, 0.9], 0.1, None, id="a rise"),
        pytest.param([0.9, 0.6, 0.3], 0.1, 0, id="the first of equals"),
        pytest.param([0.9], 0.1, None, id="one layer"),
        pytest.param([], 0.1, None, id="no layer"),
    ],
)
def test_where_a_curve_drops(values, least, before):
    found = watershed(values, least=least)
    assert (found and found.before) == before


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([nan, 0.9, 0.8, 0.2], id="first"),
        pytest.param([0.9, 0.8, 0.2, nan], id="last"),
        pytest.param([0.95, nan, 0.9, 0.8, 0.2], id="between"),
    ],
)
def test_a_layer_where_nothing_is_kept_does_not_hide_the_drop(values):
    found = watershed(values)
    assert found is not None
    assert isfinite(found.drop)
    assert (values[found.before], found.drop) == (0.8, pytest.approx(0.6))


def test_a_null_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"`null` must have 3 values, one per layer\. Got 2"):
        watershed([0.9, 0.5, 0.1], null=[0.9, 0.5])


# --- Comparing tasks -----------------------------------------------------------------------------


def test_two_tasks_are_compared_on_the_layers_they_share(device):
    first = bools(device, [[1, 1, 0, 0]], [1, 1, 1, 0], [1, 1])
    second = bools(device, [[1, 0, 0, 0]], [0, 0, 0, 1], [1, 1])
    affinity = compare(
        {
            "seg": {"trunk.0": first[0], "trunk.1": first[1], "seg": first[2]},
            "depth": {"trunk.0": second[0], "trunk.1": second[1], "depth": second[2]},
        }
    )
    one, two = affinity.layers
    assert (one.name, one.iou, one.densities) == ("trunk.0", 0.5, {"seg": 0.5, "depth": 0.25})
    assert (two.name, two.iou, two.densities) == ("trunk.1", 0.0, {"seg": 0.75, "depth": 0.25})
    assert one.chance == pytest.approx(0.125 / 0.625)
    assert two.chance == pytest.approx(0.1875 / 0.8125)
    assert one.excess == pytest.approx(0.5 - 0.2)
    assert affinity.iou == 1 / 6  # 1 + 0 of 2 + 4
    assert affinity.chance == pytest.approx((0.125 + 0.1875) / (0.625 + 0.8125))


def test_identical_tasks_overlap_fully_and_empty_layers_do_not_count(device):
    masks = dict(zip(["a", "b"], bools(device, [1, 0, 1], [0, 0]), strict=True))
    affinity = compare({"x": masks, "y": masks, "z": masks})
    assert affinity.iou == 1.0
    assert affinity.layers[0].iou == 1.0
    assert isnan(affinity.layers[1].iou)
    assert isnan(affinity.layers[1].chance)


def test_independent_tasks_have_no_excess(device):
    def draw():
        return {f"l{i}": (torch.rand(50_000) < d).to(device) for i, d in enumerate((0.9, 0.1))}

    affinity = compare({"x": draw(), "y": draw(), "z": draw()})
    assert affinity.iou == pytest.approx(affinity.chance, abs=0.01)
    assert all(abs(layer.excess) < 0.01 for layer in affinity.layers)
    assert watershed([layer.iou for layer in affinity.layers]) is not None
    assert watershed(*zip(*((x.iou, x.chance) for x in affinity.layers), strict=True)) is None


def test_one_task_is_compared_with_nothing():
    with pytest.raises(ValueError, match=r"at least two tasks\. Got \['x'\]"):
        compare({"x": {"a": torch.ones(2, dtype=torch.bool)}})


def test_tasks_without_a_common_layer_are_refused():
    mask = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"No layer is used by all of the tasks \['x', 'y'\]"):
        compare({"x": {"a": mask}, "y": {"b": mask}})


# --- Beside nulls of one's own -------------------------------------------------------------------


def pair(first, second):
    """The affinity of two tasks with these masks, layer by layer."""
    masks = {
        task: {f"l{i}": torch.tensor(row, dtype=torch.bool) for i, row in enumerate(rows)}
        for task, rows in (("x", first), ("y", second))
    }
    return compare(masks)


def test_an_affinity_is_held_against_its_nulls_layer_by_layer():
    tasks = pair([[1, 1, 0, 0], [1, 1]], [[1, 0, 0, 0], [1, 0]])
    nulls = [
        pair([[1, 1, 0, 0], [1, 1]], [[0, 0, 1, 0], [1, 0]]),
        pair([[1, 1, 0, 0], [1, 1]], [[1, 1, 0, 0], [1, 1]]),
    ]
    found = contrast(tasks, nulls)
    assert list(found.layers) == ["l0", "l1"]
    assert found.layers["l0"] == Contrast(0.5, null=(0.0, 1.0))
    assert found.layers["l1"] == Contrast(0.5, null=(0.5, 1.0))
    assert found.overall == Contrast(0.5, null=(0.2, 1.0))
    assert found.layers["l1"].excess == -0.25
    assert (found.layers["l0"].p, found.layers["l1"].p) == (2 / 3, 1.0)


def test_what_no_null_reaches_has_the_smallest_p():
    assert Contrast(0.6, null=(0.5,) * 19).p == 1 / 20
    assert Contrast(0.4, null=(0.5,) * 19).p == 1.0


def test_layers_without_an_overlap_count_nowhere():
    assert isnan(Contrast(nan, null=(0.5,)).p)
    assert isnan(Contrast(nan, null=(0.5,)).excess)
    assert isnan(Contrast(0.5, null=(nan,)).expected)
    assert Contrast(0.5, null=(nan, 0.25)).excess == 0.25


def test_nulls_of_other_layers_are_refused():
    tasks = pair([[1, 0], [1, 1]], [[1, 0], [1, 1]])
    with pytest.raises(ValueError, match=r"be of the layers \['l0', 'l1'\]\. Got \['l0'\]"):
        contrast(tasks, [tasks, pair([[1, 0]], [[1, 0]])])
    with pytest.raises(ValueError, match=r"`nulls` must hold at least one affinity\. Got none"):
        contrast(tasks, [])
