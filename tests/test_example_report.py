"""The example that writes all that can be read of a pruned network."""

import json

import pytest
import report

from mtprune.inspecting import CHECKPOINT, compare, inspect
from tests.test_page import Page

pytestmark = pytest.mark.slow


def test_it_writes_what_it_says(tmp_path, capsys):
    pytest.importorskip("sklearn")
    page = report.main(["--steps", "20", "--tune-steps", "4", "--out", str(tmp_path)])
    tables = Page(page.read_text(encoding="utf-8")).tables
    assert any(caption.startswith("Against the dense model: ") for caption in tables)
    assert any(caption.startswith("Sizes, timed on cpu") for caption in tables)
    for caption in (
        "Layers, in numbers.",
        "Every update that is remembered.",
        "Overlap of masks, that of unrelated tasks, and the excess.",
        "Masks, in numbers.",
        "The form of every layer.",
    ):
        assert caption in tables
    swept = json.loads((tmp_path / "sweep.json").read_text())
    assert [point["sparsity"] for point in swept["points"]] == list(report.SPARSITIES)
    assert swept["batches"] == 10
    found = inspect(tmp_path / "pruner.pt")
    assert found.kind == CHECKPOINT
    assert round(found.report.sparsity, 3) == 0.9
    assert compare(inspect(tmp_path / "early.pt"), found).overlap > 0
    printed = capsys.readouterr().out
    assert all(f"\n{part}" in f"\n{printed}" for part in ("Sweep,", "Report:", "Plan:", "Sizes:"))
