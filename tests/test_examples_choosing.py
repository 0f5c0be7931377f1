"""Choices for the dense nets of a study, held against the study."""

import argparse
import json

import choosing
import compare
import pytest
from common import fixture, results
from common.options import make_method
from matplotlib.figure import Figure

import mtprune
from mtprune import Rounds

pytestmark = pytest.mark.slow

TRAINER = ["--width", "0.02", "--batch", "8", "--observations", "2", "--save-every", "4"]
FEW = ["--seeds", "2", "--steps", "4", "--tune-steps", "8", "--rounds", "2", "--sparsities", "0.8"]
METHODS = ["best", "joint", "lamp:gradual", "imp", "random:init"]


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(results, "draw", lambda found: Figure())


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("census")
    fixture.write("census", root)
    out = tmp_path_factory.mktemp("out")
    arguments = ["census", "--data", str(root), "--out", str(out), "--methods", *METHODS]
    return [*arguments, *FEW, *TRAINER], out


def method_of(study, name):
    """That of a run of the study."""
    path = next((study[1] / f"{name.replace(':', '-')}-0.8").glob("**/seed1/results.json"))
    options = argparse.Namespace(**json.loads(path.read_text())["options"])
    return make_method(options)


def test_choices_are_worth_what_the_study_has_for_them(study, monkeypatch, capsys):
    arguments, out = study
    ours = [*arguments, "--trial-rate", "1e-3"]
    with pytest.raises(SystemExit, match=r"choosing: There is no .*model\.pt\. Run compare\.py"):
        choosing.main(ours)
    rows = {row["method"]: row for row in compare.main(arguments)}
    (row,) = choosing.main(ours)
    candidates = ("best", "joint", "lamp:gradual")
    picked = [one["picked"] for one in row["choices"]]
    assert set(picked) <= set(candidates)
    assert row["delta"] == [rows[name]["delta"][seed] for seed, name in enumerate(picked)]
    means = {name: sum(rows[name]["delta"]) for name in candidates}
    assert row["leader"] == max(means, key=means.__getitem__)
    theirs = rows[row["leader"]]["delta"]
    assert row["behind"]["delta"] == [a - b for a, b in zip(row["delta"], theirs, strict=True)]
    asked = []
    plain = mtprune.choose

    def heard(*args, **options):
        asked.append({name: make(8) for name, make in options["candidates"].items()})
        return plain(*args, **options)

    (out / "choosing" / "0.8-seed1.json").unlink()
    monkeypatch.setattr(mtprune, "choose", heard)
    assert choosing.main(ours) == [row]
    assert asked == [{name: method_of(study, name) for name in candidates}]
    assert isinstance(asked[0]["best"].schedule, Rounds)
    for one in row["choices"]:
        first = [trial["method"] for trial in one["trials"]][: len(candidates)]
        assert sorted(first) == sorted(candidates)
        assert not any(trial["error"] for trial in one["trials"])
    monkeypatch.setattr(mtprune, "choose", None)  # what was chosen is not chosen again
    assert choosing.main(ours) == [row]
    assert json.loads((out / "choosing.json").read_text()) == json.loads(json.dumps([row]))
    told = (out / "choosing.md").read_text()
    assert told.startswith("`python choosing.py census")
    assert picked[0] in told
    assert "| 80% | 2 |" in capsys.readouterr().out


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit) as left:
        choosing.main(["--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "--trial-rate LR" in told
    assert "compare.py --help" in told
