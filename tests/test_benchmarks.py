"""Every benchmark runs, at the size of a toy; what it measures is for `docs/results/speed.md`."""

import json
import os
import subprocess
import sys
from importlib import import_module
from math import isfinite

import pytest

from tests.benchmarks import peers
from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.harness import ROOT, TOY, machine, report
from tests.long import few


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", few(NAMES, *(set(NAMES) - {"compress", "latency", "step", "growth", "architectures"}))
)
def test_a_benchmark_runs_and_its_rows_print(name, tmp_path, capsys):
    rows = import_module(f"tests.benchmarks.{name}").run(TOY)
    assert rows
    assert all(isfinite(row.value) for row in rows)
    report(rows, TOY, str(tmp_path / "rows.json"))
    assert rows[0].what in capsys.readouterr().out
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(rows)


@pytest.mark.slow
@pytest.mark.long
def test_peers_run_and_their_page_is_written(tmp_path):
    rows = peers.run(TOY)
    assert not any("does not run" in row.against for row in rows)
    path = tmp_path / "page.md"
    peers.write(path, rows, machine())
    told = path.read_text()
    assert told.startswith("# Against other runtimes and int8")
    assert "| ours, 90 % | " in told


def test_benchmarks_start_from_the_root_of_a_checkout():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "import tests.benchmarks.compress"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_a_row_that_says_so(monkeypatch, tmp_path):
    def missing(*given):
        raise ImportError("No module named 'openvino'")

    monkeypatch.setitem(peers.DENSE, "OpenVINO", (peers.FP32, missing))
    ways = ("torch, eager", "OpenVINO")
    monkeypatch.setattr(peers, "DENSE", {name: peers.DENSE[name] for name in ways})
    monkeypatch.setattr(peers, "SMALLER", ways)
    rows = peers.rows_of(peers.subjects(TOY)[0], TOY)
    assert {row.against for row in rows if "ms" not in row.detail} == {
        "not here: No module named 'openvino'"
    }
    peers.write(tmp_path / "page.md", rows, machine())
    told = (tmp_path / "page.md").read_text()
    assert told.startswith("# Against other runtimes and int8")
    assert "* OpenVINO not here: No module named 'openvino'." in told
    assert "| ours, 90 % | " in told
