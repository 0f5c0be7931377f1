"""The comparison runs, does nothing twice, and counts right."""

import json
import re
import statistics

import compare
import pytest
from common import fixture, results
from matplotlib.figure import Figure

pytestmark = pytest.mark.slow

TRAINER = ["--width", "0.02", "--batch", "8", "--observations", "2", "--save-every", "2"]
FEW = ["--seeds", "2", "--steps", "4", "--tune-steps", "4", "--rounds", "2", "--sparsities", "0.8"]


@pytest.fixture(scope="module")
def census(tmp_path_factory):
    root = tmp_path_factory.mktemp("census")
    fixture.write("census", root)
    return str(root)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch):
    monkeypatch.setattr(results, "draw", lambda found: Figure())


def test_a_method_in_the_loop_of_one_training_from_scratch(census, tmp_path):
    arguments = ["census", "--data", census, "--out", str(tmp_path), "--methods", "best:loop"]
    [row] = compare.main([*arguments, "--scratch-steps", "12", *FEW, *TRAINER])
    assert row["zeros"] == [round(0.8 * row["weights"])]
    path = tmp_path / "best-loop-0.8" / "seed1" / "results.json"
    told = json.loads(path.read_text())
    options = told["options"]
    assert (options["steps"], options["pretrained"]) == (12, None)
    sparsities = [line["sparsity"] for line in told["history"]["train"]]
    assert sparsities[0] == 0.0
    assert sorted(sparsities) == sparsities
    assert sparsities[6:] == [pytest.approx(0.8, abs=1e-3)] * 6
    assert 2 < len(set(sparsities)) < 7


def test_compares_and_does_nothing_twice(census, tmp_path, monkeypatch, capsys):
    methods = ["vote", "joint:init", "random:init:erk", "imp", "lth", "dense_tuned"]
    arguments = ["census", "--data", census, "--out", str(tmp_path), "--methods", *methods]
    arguments += [*FEW, *TRAINER, "--loss-scale", "college=32"]
    rows = compare.main(arguments)
    lines = [(row["method"], row["sparsity"], row["scaled"]) for row in rows]
    assert lines == [
        ("dense_tuned", 0.0, False),
        *(("vote", 0.8, False), ("vote", 0.8, True)),
        *(("joint:init", 0.8, False), ("joint:init", 0.8, True)),
        *((name, 0.8, False) for name in ("random:init:erk", "imp", "lth")),
    ]
    for row in rows:
        assert row["zeros"] == [round(row["sparsity"] * row["weights"])]
        assert len(row["delta"]) == 2
        for seed, delta in enumerate(row["delta"]):
            tasks = [row["tasks"][task][seed] for task in row["tasks"]]
            assert delta == pytest.approx(statistics.fmean(tasks))
    named = {(row["method"], row["scaled"]): row for row in rows}
    vote, joint = named["vote", False], named["joint:init", False]
    assert named["vote", True]["delta"] == vote["delta"]
    assert named["joint:init", True]["delta"] != joint["delta"]
    assert "behind" not in vote
    behind = [a - b for a, b in zip(joint["delta"], vote["delta"], strict=True)]
    assert joint["behind"]["delta"] == pytest.approx(behind)
    worst = [min(row[seed] for row in vote["tasks"].values()) for seed in range(2)]
    assert vote["worst"] == worst
    # On this data set the loss is what counts.
    assert vote["loss"] == pytest.approx(vote["delta"])
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(rows))
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "| 80.0% | joint:init, college x32 |" in said
    assert (tmp_path / "compare.md").read_text().startswith("`python compare.py census")

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(compare, "train", refuse)
    assert compare.main(arguments) == rows
    with pytest.raises(SystemExit, match=r"holds a run with --lr 0\.001\. Got 0\.5\. Choose"):
        compare.main([*arguments, "--lr", "0.5"])


def test_a_packaged_data_set_needs_no_folder(tmp_path, capsys):
    arguments = ["digits", "--out", str(tmp_path), "--methods", "magnitude"]
    arguments += [*FEW, *TRAINER, "--seeds", "1", "--batch", "100"]
    rows = compare.main(arguments)
    assert [row["method"] for row in rows] == ["magnitude"]
    assert set(rows[0]["tasks"]) == {"digit", "odd", "large", "ink", "center"}
    for wrong, message in (
        (["census", "--out", str(tmp_path)], "required: --data"),
        ([*arguments, "--data", "x"], "unrecognized arguments: --data x"),
    ):
        with pytest.raises(SystemExit):
            compare.main(wrong)
        assert message in capsys.readouterr().err


def test_lottery_tickets_start_where_they_began(census, tmp_path):
    options = compare.read(["census", "--data", census, "--out", str(tmp_path), "--rounds", "2"])
    first, second = compare.jobs(compare.Entry("lth::erk", 0.75), 3, options)
    assert "--rewind" in first.arguments
    assert "--rewind" in second.arguments
    sparsities = [job.arguments[job.arguments.index("--sparsity") + 1] for job in (first, second)]
    assert [float(sparsity) for sparsity in sparsities] == pytest.approx([0.5, 0.75])
    assert first.arguments[-1] == str(tmp_path / "dense" / "seed3" / "model.pt")
    assert second.arguments[-1] == str(first.out / "model.pt")
    assert second.arguments[second.arguments.index("--allocation") + 1] == "erk"


def test_what_starts_from_the_dense_net_has_a_rate_of_its_own():
    arguments = ["census", "--data", "x", "--tune-rates", "0.25", "--rounds", "1"]
    options = compare.read(arguments)
    rates = {}
    for spec in ("vote", "magnitude", "imp", "dense_tuned", "lth", "snip", "rigl", "vote:init"):
        (rate,) = compare.rates(spec, options)
        (job,) = compare.jobs(compare.Entry(spec, 0.75), 3, options, rate)
        rates[spec] = dict(zip(job.arguments, job.arguments[1:], strict=False)).get("--lr")
    tuned = ("vote", "magnitude", "imp", "dense_tuned")
    assert rates == {spec: "0.25" if spec in tuned else None for spec in rates}


@pytest.mark.long
def test_rates_are_chosen_on_validation_with_other_seeds(census, tmp_path, capsys):
    arguments = ["census", "--data", census, "--out", str(tmp_path), "--methods", "vote", "joint"]
    arguments += [*FEW, *TRAINER, "--tune-rates", "1e-9", "1e-3", "--rate-seeds", "1"]
    with pytest.raises(SystemExit, match="holds no finished run of these methods"):
        compare.main([*arguments, "--tell"])
    rows = compare.main(arguments)
    assert {row["rate"] for row in rows} == {1e-3}
    assert [row["seeds"] for row in rows] == [[0, 1]] * 2
    folder = tmp_path / "vote-0.8"
    assert sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("results.json")) == [
        *("rate0.001/seed0", "rate0.001/seed1", "rate0.001/seed1000"),
        "rate1e-09/seed1000",
    ]
    assert "| 0.001 | 2 |" in capsys.readouterr().out
    (folder / "rate0.001" / "seed1" / "results.json").unlink()
    told = compare.main([*arguments, "--tell"])
    assert [row["seeds"] for row in told] == [[0], [0, 1]]
    assert [len(row.get("behind", {}).get("delta", ())) for row in told] == [0, 1]


def test_both_routes_have_as_many_steps():
    told = ["census", "--data", "x", "--steps", "8", "--tune-steps", "5", "--rounds", "2"]

    def steps(spec, *more):
        options = compare.read([*told, "--methods", spec, *more])
        found = compare.jobs(compare.Entry(spec, 0.8), 0, options)
        return [int(job.arguments[job.arguments.index("--steps") + 1]) for job in found]

    for spec in ("best", "best:gradual", "vote:trained", "dense_tuned"):
        assert steps(spec) == [5]
    assert steps("imp") == [2, 3]
    for spec in ("adapmtl", "rigl", "vote:init", "best:init"):
        assert steps(spec) == [13]
        assert steps(spec, "--scratch-steps", "7") == [7]
    assert steps("lth") == [8, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dispare_static"], "there is no method 'dispare_static'. There is dense, b"),
        (["--reference", "joint:init"], "--reference joint:init is none of --methods"),
        (["--methods", "lth:init"], "when to prune does not apply to 'lth:init'"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_refuses(capsys, arguments, message):
    with pytest.raises(SystemExit):
        compare.read(["census", "--data", "x", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_refuses_before_anything_has_run(census, tmp_path, capsys):
    arguments = ["census", "--data", census, "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--methods", "vote", "rigl:init"])
    assert "--when does not apply to --method rigl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        compare.main([*arguments, "--methods", "vote", "--no-such-option"])
    assert "unrecognized arguments" in capsys.readouterr().err
