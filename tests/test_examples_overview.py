"""The overview of comparisons: who leads, who is not behind, and how sure that is."""

import json

import overview
import pytest
from matplotlib.image import imread

from mtprune.paired import Difference


def row(method, sparsity, delta, scaled=False):
    worst = [value - 1 for value in delta]
    seeds = list(range(len(delta)))
    about = {
        "method": method,
        "sparsity": sparsity,
        "scaled": scaled,
        "seeds": seeds,
        "rate": 0.004,
    }
    return {**about, "delta": delta, "worst": worst}


ROWS = [
    row("best", 0.9, [-1.0, -1.2, -0.9]),
    row("joint", 0.9, [-1.1, -1.0, -1.2]),
    row("magnitude", 0.9, [-9.0, -9.1, -8.9]),
    row("joint", 0.9, [5.0, 5.0, 5.0], scaled=True),
    row("best", 0.95, [-4.0, -4.2, -3.9]),
    row("imp", 0.95, [-2.0, -2.1, -2.0]),
    row("dense_tuned", 0.0, [1.0, 1.0, 1.0]),
]


def test_the_leader_and_those_that_are_not_behind():
    header, _, first, second = overview.table({"digits": ROWS}, "best").splitlines()
    assert header.startswith("| data | zeros | seeds | leads | mean | worst task | not behind it |")
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[:7] == ["digits", "90%", "3", "best", "-1.03", "-2.03", "joint"]
    assert cells[7:9] == ["-1.03", "-2.03"]
    assert cells[9].startswith("joint: +0.07 ± ")
    assert not cells[9].endswith("*")
    cells = [cell.strip() for cell in second.strip("|").split("|")]
    assert cells[3:7] == ["imp", "-2.03", "-3.03", "none"]
    assert cells[9].startswith("imp: -2.00 ± ")
    assert cells[9].endswith("*")


def test_details_have_every_method_the_best_first():
    lines = overview.details(ROWS, "best").splitlines()
    assert lines[0].startswith("| zeros | method | rate | seeds | mean | minus `best` | worst task")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [(c[0], c[1]) for c in cells] == [
        ("0%", "`dense_tuned`"),
        *(("90%", "`best`"), ("90%", "`joint`"), ("90%", "`magnitude`")),
        *(("95%", "`imp`"), ("95%", "`best`")),
    ]
    assert cells[0][2:] == ["0.004", "3", "1.00 ± 0.00", "", "0.00 ± 0.00", ""]
    assert cells[1][5] == cells[5][5] == ""
    assert cells[3][4:6] == ["-9.00 ± 0.10", str(Difference((-8.0, -7.9, -8.0), 3))]
    assert cells[3][7] == str(Difference((-8.0, -7.9, -8.0), 3))


def test_pairs_are_of_seeds_that_both_have():
    other = {"seeds": [2, 1], "delta": [10.0, 20.0]}
    assert overview.pairs(ROWS[0], other, "delta") == [-21.2, -10.9]


def test_the_command_draws_and_writes(tmp_path, capsys):
    files = [tmp_path / f"{name}.json" for name in ("a", "b")]
    for path, rows in zip(files, (ROWS, ROWS[:3]), strict=True):  # two sparsities, and one
        path.write_text(json.dumps(rows))
    of = [f"{path.stem}={path}" for path in files]
    arguments = ["--of", *of, "--draw", "best", "joint", "--without", "imp"]
    text = overview.main([*arguments, "--out", str(tmp_path / "out")])
    assert "imp" not in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "out" / "overview.md").read_text() == text + "\n"
    assert (tmp_path / "out" / "a.md").read_text() == overview.details(ROWS, "best") + "\n"
    assert (tmp_path / "out" / "b.md").read_text() == overview.details(ROWS[:3], "best") + "\n"
    assert imread(tmp_path / "out" / "overview.png").std() > 0.01


@pytest.mark.parametrize(
    ("told", "message"), [("a.json", "must look like census="), ("a=none.json", "there is no none")]
)
def test_refuses(told, message, capsys):
    with pytest.raises(SystemExit):
        overview.main(["--of", told])
    assert message in capsys.readouterr().err
