"""The scripts for other people's trainers: they run, prune, and learn."""

import importlib

import pytest

pytest.importorskip("sklearn")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the trainers' own


@pytest.mark.parametrize(
    ("name", "package", "length"),
    [
        ("lightning", "lightning", ["--epochs", "6"]),
        ("accelerate", "accelerate", ["--epochs", "6"]),
        ("transformers", "transformers", ["--steps", "130"]),
    ],
)
def test_a_script_prunes_and_learns(name, package, length, tmp_path, capsys):
    pytest.importorskip(package)
    pytest.importorskip("accelerate" if name == "transformers" else package)
    script = importlib.import_module(f"with_{name}")
    results = script.main([*length, "--sparsity", "0.8", "--out", str(tmp_path)])
    assert results["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert results["accuracy"]["digit"] > 0.5
    assert results["accuracy"]["odd"] > 0.7
    assert "want odd" in capsys.readouterr().out
    assert list(tmp_path.iterdir())
