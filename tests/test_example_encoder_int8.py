"""Pruned and quantized: one table of what each is worth."""

import json

import pytest

for _package in ("transformers", "onnxruntime", "onnxscript", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(_package, exc_type=ImportError)

import encoder_int8 as example  # noqa: E402

from tests import sentences  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore"),  # the exporter's
]


def test_one_table_tells_latency_and_results(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    data = sentences.write(tmp_path / "text")
    few = ["--dense-steps", "4", "--steps", "6", "--batch", "4", "--random", "--seeds", "1"]
    where = ["--data", str(data), "--tasks", "mood", "topic", "--out", str(tmp_path)]
    rows = example.main([*where, *few])
    assert [row["name"] for row in rows] == [
        *(
            f"{model}, {runtime}"
            for model in ("dense", "50% of units")
            for runtime in ("torch", "ONNX Runtime", "int8")
        ),
        "75% of weights, torch",
        "90% of weights, torch",
    ]
    assert all(set(row["tasks"]) == {"mood", "topic"} for row in rows)
    assert all(ms > 0 for row in rows for ms in row["ms"])
    torch_rows, onnx_rows = rows[:6:3], rows[1:6:3]
    for a, b in zip(torch_rows, onnx_rows, strict=True):
        assert b["tasks"] == pytest.approx(a["tasks"], abs=0.02)
    assert "50% of units, int8" in capsys.readouterr().out
    assert json.loads((tmp_path / "int8.json").read_text()) == rows
