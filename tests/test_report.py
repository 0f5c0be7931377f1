import json

import pytest
import torch

from mtprune.facts import Count, Facts, Subject, count
from mtprune.reading import Entry
from mtprune.report import make_report

COUNTS = (
    Count("seg.head", "seg", 200, 50, {"seg": 50}, 50),
    Count("trunk.0", "trunk", 1_000, 100, {"seg": 80, "depth": 50}, 40),
    Count("trunk.1", "trunk", 3_000, 300, {"seg": 240, "depth": 250}, 200),
    Count("depth.head", "depth", 800, 50, {"depth": 25}, 25),
)


def build(**changes):
    facts = {
        "counts": COUNTS,
        "step": 300,
        "tasks": ["seg", "depth"],
        "observations": {"seg": 2, "depth": 2},
        "stable": None,
        "discarded": {},
        "left_alone": {},
    }
    given = facts | changes
    own = {name: given.pop(name) for name in [*given] if name in Facts.__dataclass_fields__}
    return make_report(Facts(**own), **given)


def test_counting_a_layer(device):
    mask, one, two = (
        torch.tensor(row, dtype=torch.bool, device=device)
        for row in ([1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1])
    )
    subject = Subject("a", "trunk", (5,), ("x", "y"))
    assert count(subject, mask, {"x": one, "y": two}) == Count(
        "a",
        "trunk",
        parameters=5,
        kept=3,
        wanted={"x": 2, "y": 2},
        unanimous=1,
        tasks=("x", "y"),
        single=2,
        nobody=0,
    )
    empty = torch.zeros_like(mask)
    found = count(subject, mask, {"x": one, "y": empty})
    assert (found.single, found.nobody) == (2, 1)
    assert count(subject, ~mask, {}) == Count("a", "trunk", 5, 2, {}, 2, tasks=("x", "y"))
    assert mask.int().tolist() == [1, 1, 1, 0, 0]


def test_totals_and_shares():
    report = build()
    assert (report.step, report.tasks) == (300, ("seg", "depth"))
    assert (report.parameters, report.kept, report.sparsity) == (5_000, 500, 0.9)
    assert report.head_share == 0.2
    assert [row.name for row in report.layers] == [c.name for c in COUNTS]


def test_components_pool_their_layers_and_shared_ones_come_first():
    trunk, seg, depth = build().components
    assert (trunk.name, seg.name, depth.name) == ("trunk", "seg", "depth")
    assert (trunk.parameters, trunk.kept, trunk.sparsity) == (4_000, 400, 0.9)
    assert trunk.tasks == ("seg", "depth")
    assert trunk.want == {"seg": 0.8, "depth": 0.75}
    assert trunk.unanimity == 0.6
    assert (depth.tasks, depth.want, depth.sparsity) == (("depth",), {"depth": 0.5}, 0.9375)


def test_a_task_that_skips_a_layer_is_counted_where_it_is_used():
    counts = (
        Count("trunk.0", "trunk", 100, 40, {"a": 20, "b": 30}, 10),
        Count("trunk.1", "trunk", 100, 60, {"b": 60}, 60),
    )
    [row] = build(counts=counts, tasks=["a", "b", "c"]).components
    assert row.tasks == ("a", "b")
    assert row.want == {"a": 0.5, "b": 0.9}
    assert row.unanimity == 0.7


def test_an_empty_component_has_shares_of_zero():
    [row] = build(counts=(Count("t", "t", 10, 0, {"seg": 0}, 0),)).components
    assert (row.sparsity, row.want, row.unanimity) == (1.0, {"seg": 0.0}, 0.0)
    assert build(counts=()).sparsity == 0.0


def test_the_table_of_components():
    expected = """\
component  weights  kept  sparsity  want seg  want depth  unanimity
trunk        4,000   400    90.00%     80.0%       75.0%      60.0%
seg            200    50    75.00%    100.0%           -     100.0%
depth          800    50    93.75%         -       50.0%      50.0%
total        5,000   500    90.00%
20.0% of the weights are private to one task.
Update of step 300, 2 observation(s) per task."""
    assert build().table() == expected
    assert str(build()) == expected


def test_the_table_of_layers():
    assert build().table(layers=True).splitlines()[:3] == [
        "layer       weights  kept  sparsity  want seg  want depth  unanimity",
        "seg.head        200    50    75.00%    100.0%           -     100.0%",
        "trunk.0       1,000   100    90.00%     80.0%       50.0%      40.0%",
    ]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        pytest.param(
            {"observations": {"seg": 2, "depth": 5}},
            "Update of step 300, 2 to 5 observation(s) per task.",
            id="unequal observations",
        ),
        pytest.param(
            {"stable": True},
            "Update of step 300, 2 observation(s) per task, until masks were stable.",
            id="stable",
        ),
        pytest.param(
            {"stable": False},
            "Update of step 300, 2 observation(s) per task, masks not stable yet.",
            id="not stable",
        ),
        pytest.param(
            {"discarded": {"seg": 3}},
            "Discarded because a scaled gradient overflowed: {'seg': 3}.",
            id="discarded",
        ),
        pytest.param(
            {"left_alone": {"aux": "no task uses it"}},
            "Left alone: aux (no task uses it).",
            id="left alone",
        ),
        pytest.param(
            {"counts": (Count("x", "undeclared", 9, 3, {"seg": 1, "depth": 1}, 0),)},
            "'undeclared': used by several tasks, but not in `shared_modules`.",
            id="undeclared",
        ),
    ],
)
def test_notes_are_there_when_there_is_something_to_say(changes, note):
    assert note in build(**changes).table().splitlines()
    assert note not in build().table().splitlines()


def test_before_the_first_change_the_table_is_a_sentence():
    assert str(build(step=None)) == "Nothing pruned yet: 5,000 weights in 4 layers, 2 tasks."


def test_a_report_is_data():
    report = build(left_alone={"aux": "no task uses it"}, discarded={"seg": 1}, stable=True)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["sparsity"] == 0.9
    assert data["components"][0]["name"] == "trunk"
    assert data["components"][0]["want"] == {"seg": 0.8, "depth": 0.75}
    assert data["left_alone"] == {"aux": "no task uses it"}
    assert set(data) == set(report.__dataclass_fields__)


def test_a_report_does_not_follow_the_caller():
    observations = {"seg": 2, "depth": 2}
    report = build(observations=observations)
    observations["seg"] = 99
    assert report.observations == {"seg": 2, "depth": 2}


def test_facts_survive_their_state_dict(tmp_path):
    facts = Facts(COUNTS, {"seg": 4, "depth": 4}, stable=True, discarded={"seg": 1})
    torch.save(facts.state_dict(), tmp_path / "facts")
    state = torch.load(tmp_path / "facts", weights_only=True)
    sizes = {one.name: one.parameters for one in COUNTS}
    for saved, expected in ((state, facts), (Facts().state_dict(), Facts())):
        entry = Entry(saved, "This checkpoint", "Take another.")
        assert Facts.read(entry, sizes, ["seg", "depth"]) == expected


def test_overall_sparsity_weighs_components_by_their_size():
    """The published MobileNetV2 row: heads hold 98.6 % of the weights, and so of the sparsity."""
    published = {
        "backbone": (2_189_760, 0.5274),
        "seg": (51_544_064, 0.8618),
        "normals": (51_392_512, 0.9472),
        "depth": (51_384_320, 0.9076),
    }
    counts = [
        Count(name, name, size, round(size * (1 - sparsity)), {}, 0)
        for name, (size, sparsity) in published.items()
    ]
    tasks = ["seg", "normals", "depth"]
    report = make_report(Facts(tuple(counts)), step=1, tasks=tasks, left_alone={})
    assert round(100 * report.sparsity, 2) == 90.02
    assert round(report.head_share, 3) == 0.986
