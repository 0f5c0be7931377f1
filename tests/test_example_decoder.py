"""The example of a decoder: half of its heads and neurons, both tasks learned, a plain Llama."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_half_of_a_decoder(tmp_path):
    decoder = pytest.importorskip("decoder", exc_type=ImportError)
    out = tmp_path / "results.json"
    small = ["--steps", "80", "--hidden", "32", "--layers", "2", "--repeats", "2"]
    found = decoder.main([*small, "--folder", str(tmp_path / "saved"), "--out", str(out)])
    assert json.loads(out.read_text()) == found
    assert (found["plain"], found["heads"], found["neurons"]) == (True, [4, 2], 64)
    dense, small = found["parameters"]
    embeddings = 2 * 50 * 32
    norms = 5 * 32
    assert small - embeddings - norms == (dense - embeddings - norms) / 2
    for _, pruned, loaded in found["right"].values():
        assert pruned == loaded >= 0.8
