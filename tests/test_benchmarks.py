"""Every benchmark runs, at the size of a toy; what it measures is for `docs/results/speed.md`."""

import json
from importlib import import_module
from math import isfinite

import pytest

from tests.benchmarks.__main__ import NAMES
from tests.benchmarks.harness import TOY, report
from tests.long import few


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", few(NAMES, *(set(NAMES) - {"compress", "step", "growth", "architectures"}))
)
def test_a_benchmark_runs_and_its_rows_print(name, tmp_path, capsys):
    rows = import_module(f"tests.benchmarks.{name}").run(TOY)
    assert rows
    assert all(isfinite(row.value) for row in rows)
    report(rows, TOY, str(tmp_path / "rows.json"))
    assert rows[0].what in capsys.readouterr().out
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(rows)
