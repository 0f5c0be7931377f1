"""The quickstart, with few steps: it runs, and shows what it says it shows."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
TINY = ["--steps", "20", "--tune-steps", "4", "--seeds", "1", "--threads", "1"]
OPTIONS = [
    "--method",
    *("--sparsity", "--scale", "--scaled-task", "--allocation", "--one-shot", "--backend"),
    *("--steps", "--tune-steps", "--seeds", "--seed", "--threads", "--out"),
]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_shows_what_it_says_each_time(quickstart, tmp_path, capsys):
    # 32 is a power of two: scaling by it is exact, so the vote cannot move even by rounding.
    out = tmp_path / "new" / "folder"
    arguments = [*TINY, "--scale", "32", "--out", str(out)]
    results = quickstart.main(arguments)
    assert json.loads((out / "quickstart.json").read_text()) == json.loads(json.dumps(results))
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    runs = {(run["method"], run["scale"]): run for run in results["runs"]}
    assert list(runs) == [("vote", 1), ("vote", 32), ("joint", 1), ("joint", 32)]
    for run in runs.values():
        assert run["zeros"] == round(0.9 * run["weights"])
        assert set(run["pruned"]) == set(run["tuned"]) == {"left", "right", "parity"}
    assert runs["vote", 32]["differ"] == 0
    assert runs["vote", 32]["tuned"] == runs["vote", 1]["tuned"]
    assert runs["joint", 32]["differ"] > 0
    said = capsys.readouterr().out
    for words in ("want left", "vote, x32", "joint, x32", "Delta_T", "quickstart.png", "behind"):
        assert words in said
    assert quickstart.main(arguments) == results


@pytest.mark.long
def test_one_shot_inplace_global(quickstart, tmp_path):
    how = ["--one-shot", "--backend", "inplace", "--allocation", "global", "--sparsity", "0.75"]
    results = quickstart.main([*TINY, *how, "--scale", "32", "--out", str(tmp_path)])
    for run in results["runs"]:
        assert run["zeros"] == round(0.75 * run["weights"])
        assert run["method"] == "joint" or run["differ"] == 0


@pytest.mark.long
def test_adapmtl_takes_the_place_of_the_vote(quickstart, tmp_path, capsys):
    arguments = [*TINY, "--method", "adapmtl", "--scale", "32", "--out", str(tmp_path)]
    results = quickstart.main(arguments)
    assert [run["method"] for run in results["runs"]] == ["adapmtl"] * 2 + ["joint"] * 2
    for run in results["runs"]:
        assert run["zeros"] == round(0.9 * run["weights"])
    # What losses are multiplied by in the scoring reaches neither thresholds nor weights of tasks.
    assert results["runs"][1]["differ"] == 0
    assert "Where adapmtl is behind joint" in capsys.readouterr().out


def test_digits_do_not_leak(quickstart):
    training, test = quickstart.make_data(0)
    # The left digit's first five columns are never overlapped.
    seen, unseen = (
        {tuple(row) for row in data["image"][:, 0, :, :5].flatten(1).tolist()}
        for data in (training, test)
    )
    assert len(seen) > 2000
    assert not seen & unseen
    assert torch.equal(test["parity"], (test["left"] + test["right"]) % 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "90"], r"Did you mean 0\.9"),
        (["--scale", "1"], "--scale must be positive, and not 1"),
        (["--seeds", "0"], "must be at least 1"),
        (["--one-shot", "--method", "adapmtl"], "no time to rise"),
    ],
)
def test_refuses(quickstart, capsys, arguments, message):
    with pytest.raises(SystemExit):
        quickstart.parse(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_help(quickstart, capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.parse(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in OPTIONS:
        assert f"  {option} " in said or f"  {option}\n" in said


def test_missing_package_names_the_extra():
    code = (
        "import runpy, sys; sys.modules['sklearn.datasets'] = None; "
        f"runpy.run_path({SCRIPT.as_posix()!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'pip install "mtprune[examples]"' in done.stderr
