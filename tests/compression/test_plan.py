import json

import pytest

from mtprune.compression import Measured, Plan, Row, Sizes
from mtprune.compression.plan import Cut, Removal

PLAN = Plan(
    (
        Row("a", (4, 8), "csr", (Measured("dense", 2.0, 128), Measured("csr", 0.5, 60))),
        Row("b", (4, 3, 1, 1), "dense", (Measured("dense", None, 48),), "no zeros"),
    ),
    dense_ms=3.0,
    ms=1.25,
    note="A note.",
)


def test_it_prints_as_a_table():
    assert str(PLAN).splitlines() == [
        "layer  shape    choice  dense ms  chosen ms  dense bytes  bytes",
        "a      4x8      csr         2.00       0.50          128     60",
        "b      4x3x1x1  dense          -          -           48     48  no zeros",
        "whole model: 3.00 ms dense, 1.25 ms compressed (cpu, threads: 1)",
        "A note.",
    ]


def test_it_travels_as_json():
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN


def test_what_was_removed_travels_too():
    cuts = (
        Cut("m.up.weight", (4, 2), ((0, 3), None)),
        Cut("m.down.weight", (2, 4), (None, ())),
        Cut("other.bias", (3000,), (tuple(range(0, 3000, 7)),)),
    )
    removal = Removal(cuts, (("m.num_heads", 2), ("num_heads", 1)))
    plan = Plan((), removal=removal, sizes=Sizes(5, 5, 5, 5, 20, 20))
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["removal"]["cuts"][0]["kept"] == ["0x9", None]
    assert Plan.from_dict(data) == plan
    part = plan.part("m")
    assert [cut.tensor for cut in part.removal.cuts] == ["up.weight", "down.weight"]
    assert part.removal.counts == (("num_heads", 2),)
    assert part.under("m").removal == Removal(cuts[:2], (("m.num_heads", 2),))
    assert plan.part("") is plan
    data["removal"]["cuts"][0]["kept"] = ["all", None]
    with pytest.raises(ValueError, match=r"not a plan as Plan.to_dict"):
        Plan.from_dict(data)


def test_an_edit_is_another_plan():
    edited = PLAN.replace("a", "thin")
    assert (PLAN["a"].choice, edited["a"].choice, edited["a"].chosen) == ("csr", "thin", None)
    assert edited.ms is None
    assert {row.choice for row in PLAN.replace("*", "dense").rows} == {"dense"}


def test_errors():
    with pytest.raises(KeyError, match=r"no layer 'c'. It has \['a', 'b'\]"):
        PLAN.replace("c", "dense")
    with pytest.raises(ValueError, match=r"`choice` must be one of .*Got 'fast'"):
        PLAN.replace("a", "fast")
    with pytest.raises(ValueError, match=r"not a plan as Plan.to_dict"):
        Plan.from_dict({"rows": [{"layer": "a"}]})
    data = PLAN.to_dict()
    data["rows"][0]["choice"] = "magic"
    with pytest.raises(ValueError, match=r"'rows\.0\.choice' must be one of .*'magic'"):
        Plan.from_dict(data)
