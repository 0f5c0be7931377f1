"""The example that measures refitting runs on every problem it knows."""

import json

import pytest
import refitting
from common import fixture

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("name", "rest"), [("census", []), ("camvid", ["--crop", "32", "32"])])
def test_every_way_is_measured(name, rest, tmp_path):
    fixture.write(name, tmp_path / "data", (32, 48))
    numbers = {"steps": 3, "observations": 1, "fit": 1, "rounds": 2, "sparsity": 0.5}
    given = [word for key, value in numbers.items() for word in (f"--{key}", str(value))]
    tiny = ["--batch", "2", "--width", "0.05", *rest]
    out = tmp_path / "results.json"
    found = refitting.main(
        [name, "--data", str(tmp_path / "data"), "--out", str(out), *given, *tiny]
    )
    assert json.loads(out.read_text()) == found
    assert len(found["0"]) == 6
    assert all(set(row) == {"loss", "worst task", "metrics"} for row in found["0"].values())
