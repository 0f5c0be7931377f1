"""The example of rising thresholds, with few steps: it runs, and shows what it says it shows."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def thresholds(monkeypatch):
    for package in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = torch.get_num_threads()
    import thresholds

    yield thresholds
    torch.set_num_threads(before)
    for name in ("thresholds", "quickstart"):
        sys.modules.pop(name, None)


def test_ours_ends_on_the_number_and_the_published_rule_does_not(
    thresholds, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(thresholds, "RATES", (1e-3,))
    results = thresholds.main(["--steps", "8", "--sparsity", "0.8", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "thresholds.json").read_text())["runs"].keys() == {
        *("adapmtl", "published, s0 = -20", "published, s0 = -8", "published, s0 = -5")
    }
    for one in results["runs"]["adapmtl"]:
        assert one["sparsity"] == pytest.approx(0.8, abs=1e-5)
    for name in list(results["runs"])[1:]:
        assert all(one["sparsity"] < 0.5 for one in results["runs"][name])
    assert (tmp_path / "thresholds.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "published, s0 = -20" in said
    assert "parity" in said


def test_refuses(thresholds, capsys):
    with pytest.raises(SystemExit):
        thresholds.parse(["--sparsity", "90"])
    assert "Did you mean 0.9" in capsys.readouterr().err
