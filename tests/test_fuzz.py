"""A hundred cases of the fuzz command, and that it sees what is wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mtprune
from mtprune.holding import MaskHold
from tests.fuzz import pruned, train
from tests.fuzz.__main__ import TARGETS, target_of
from tests.fuzz.cases import from_json, simpler, to_json
from tests.fuzz.engine import Outcome, alone, fuzz, judged, smallest
from tests.fuzz.outcomes import ChangedError, RefusedError, WrongError, differs, refusable
from tests.long import few

ROOT = Path(__file__).parents[1]

FEW = {
    "train": 30,
    "compress": 15,
    "pruned": 15,
    "files-states": 15,
    "files-models": 10,
    "files-plans": 5,
}


def run(*arguments):
    """The command in a process of its own, as anybody would run it."""
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", few(FEW, "files-plans"))
def test_nothing_is_wrong_in_a_few_cases(target, tmp_path):
    out = tmp_path / "out.jsonl"
    ran = run(target, "--cases", str(FEW[target]), "--seed", "5000", "--out", str(out))
    assert ran.returncode == 0, ran.stderr + ran.stdout
    assert f"{target}: {FEW[target]} cases: " in ran.stdout
    assert ", 0 wrong, 0 raw, 0 changed, 0 crash, 0 hang" in ran.stdout
    assert len(out.read_text().splitlines()) == FEW[target]
    # All are there: nothing is run again.
    again = run(target, "--cases", str(FEW[target]), "--seed", "5000", "--out", str(out))
    assert again.stdout == ran.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("target", "cases"), [("ranks", 4), ("files-trainers", 6)])
def test_nothing_is_wrong_in_a_few_cases_of_others(target, cases):
    ran = run(target, "--cases", str(cases), "--seed", "5000")
    assert ran.returncode == 0, ran.stderr + ran.stdout


class Made:
    """A target whose cases say what comes of them."""

    def draw(self, dice):
        return {"what": dice.choice(("passed", "wrong", "raise", "torch", "die", "sleep")), "n": 5}

    def run(self, case):
        if case["what"] == "raise":
            mtprune.Vote(90)
        if case["what"] == "torch":
            torch.zeros(2) @ torch.zeros(3)
        if case["what"] == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if case["what"] == "sleep":
            time.sleep(60)
        return Outcome(case["what"])

    def simpler(self, case):
        return [{**case, "n": case["n"] - 1}] if case["n"] else []


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("passed", "passed"),
        ("wrong", "wrong"),
        ("raise", "refused"),
        ("torch", "raw"),
        ("die", "crash"),
        ("sleep", "hang"),
    ],
)
def test_it_sees_what_comes_of_a_case(what, kind):
    found = alone(Made(), {"what": what, "n": 0}, limit=0.5 if what == "sleep" else 30.0)
    assert found.kind == kind


def test_failures_are_made_small_and_kept(tmp_path, capsys):
    assert smallest(Made(), {"what": "wrong", "n": 5}, Outcome("wrong"), 30.0) == {
        "what": "wrong",
        "n": 0,
    }

    class Wrong(Made):
        def draw(self, dice):
            return {"what": "wrong", "n": dice.randint(1, 3)}

    out = tmp_path / "out.jsonl"
    counts = fuzz(Wrong(), cases=2, seed=7, out=out)
    assert counts == {"wrong": 2}
    assert "again: --case" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["seed"], row["case"]["n"]) for row in rows] == [(7, 0), (8, 0)]
    out.write_text(out.read_text()[:-9])  # as where it was killed while writing
    assert fuzz(Wrong(), cases=2, seed=7, out=out) == {"wrong": 2}


def test_an_error_of_torch_is_not_ours():
    with pytest.raises(RuntimeError) as caught:
        mtprune.saliency.taylor(torch.zeros(2), torch.zeros(3))
    assert judged(caught.value).kind == "raw"


@pytest.mark.parametrize("name", ["train", "compress", "pruned", "ranks", "files-states"])
def test_cases_follow_from_their_seeds_and_are_json(name):
    target = target_of(name)
    first, second = (target.draw(random.Random(3)) for _ in range(2))
    assert json.loads(json.dumps(first)) == first == second
    assert name in TARGETS


@pytest.mark.parametrize("kind", [train.Case, pruned.Case])
def test_cases_are_made_simpler_until_all_is_by_default(kind):
    draw = {train.Case: train.draw, pruned.Case: pruned.draw}[kind]
    case = draw(random.Random(5))
    steps = 0
    while (simple := next(simpler(case), None)) is not None:
        assert simple != case
        case, steps = simple, steps + 1
    assert case == kind()
    assert to_json(case) == {}
    assert 0 < steps < 100


def test_neighbours_differ_in_one_place():
    net = {"blocks": ["tied", "bare"], "width": 8}
    case = from_json(train.Case, {"net": net, "method": {"options": {"min_keep": 2}}})
    told = [to_json(neighbour) for neighbour in simpler(case)]
    nets = [one.get("net", {}) for one in told]
    assert {"blocks": ["tied"], "width": 8} in nets
    assert {"blocks": ["linear", "bare"], "width": 8} in nets
    assert {"blocks": ["tied", "bare"], "width": 6} in nets
    assert {"net": net} in told
    assert all(one != to_json(case) for one in told)


def test_a_case_with_a_field_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"Case has no \['nets'\]"):
        from_json(train.Case, {"nets": {}})


def test_a_refusal_that_has_changed_something_is_seen():
    live = {"weight": torch.zeros(2)}

    def look():
        return {name: value.clone() for name, value in live.items()}

    with pytest.raises(RefusedError, match="sparsity"), refusable(look):
        mtprune.Vote(90)

    def spoil():
        live["weight"][0] = 1.0
        mtprune.Vote(90)

    with pytest.raises(ChangedError, match="/weight changed by a call"), refusable(look):
        spoil()
    with pytest.raises(RuntimeError, match="size of tensor"), refusable(look):
        mtprune.saliency.taylor(torch.zeros(2), torch.zeros(3))


def test_what_differs_is_told_by_its_place():
    one = {"a": [torch.tensor([0.0, float("nan")]), 1]}
    assert differs(one, {"a": [torch.tensor([-0.0, float("nan")]), 1]}) == ""
    assert differs(one, {"a": [torch.tensor([0.0, 2.0]), 1]}) == "/a/0"
    assert differs(one, {"a": [torch.tensor([0.0, float("nan")]), 2]}) == "/a/1 (1 and 2)"
    assert differs(one, {"b": one["a"]}) == " (keys ['a', 'b'])"


def test_planted_faults_are_found(monkeypatch):
    """What a training does not keep up is told, whatever it is."""
    run = train.Train().run
    case = {"backend": "inplace", "optimizer": "sgd", "net": {"tasks": 2}}
    assert run(case) == Outcome("passed")
    monkeypatch.setattr(MaskHold, "enforce", lambda self: None)
    with pytest.raises(WrongError, match=r"masked weights of '.*' are not zero"):
        run(case)
    monkeypatch.undo()
    observe = mtprune.MultitaskPruner.observe

    def noisy(self, *given, **named):
        torch.rand(1)
        return observe(self, *given, **named)

    monkeypatch.setattr(mtprune.MultitaskPruner, "observe", noisy)
    with pytest.raises(WrongError, match="observing changes /random state"):
        run(case)
