"""A slice of the matrix of architectures, and the page that it writes."""

import json
import sys

import pytest
import torch

from tests.matrix import __main__ as program
from tests.matrix.checks import COLUMNS, NO, NONE, WRONG, YES, try_all
from tests.matrix.models import ENTRIES
from tests.matrix.page import is_green, page

QUICK = [column for column in COLUMNS if column != "ONNX"]

SLICE = {
    "opt": ("heads", "neurons", "generate"),
    "gpt neox": ("heads", "neurons", "generate"),
    "bart": ("heads", "neurons", "generate"),
    "distilbert": ("heads", "neurons"),
    "deberta": ("heads", "neurons"),
    "vit": ("heads", "neurons"),
    "segformer": ("heads",),
    "resnet": ("channels",),  # its head reads channels that leave
}
"""What must work of some families that are tried in no other test of every run."""


def tried(name, columns=QUICK):
    rows = []
    with torch.random.fork_rng(devices=[]):
        try_all(ENTRIES[name], columns, rows.append)
    return rows[-1]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # older transformers
@pytest.mark.parametrize("name", SLICE)
def test_a_slice(name):
    pytest.importorskip("transformers", exc_type=ImportError)
    row = tried(name, ["elements", *SLICE[name], "compress", "save, load", "from_pretrained"])
    assert {column: cell for column, cell in row["cells"].items() if cell["state"] != YES} == {}
    assert is_green(row)


def row(name, library="timm", **states):
    cells = {column: {"state": state, "why": why} for column, (state, why) in states.items()}
    return {"name": name, "library": library, "cells": cells, "parameters": 9}


def test_the_page_tells_what_works_and_why_not():
    fine = dict.fromkeys(("elements", "heads", "compress", "save, load"), (YES, ""))
    rows = [
        row("b", **fine, channels=(NONE, "")),
        row("a", **{**fine, "heads": (NO, "it is | so"), "elements": (YES, "98 %")}),
        {"name": "c", "library": "timm", "cells": {}, "broken": "no such model"},
    ]
    text = page(rows, {"timm": "1.0"})
    assert "| family | elements | heads | channels | compress | save, load |" in text
    assert "| a | yes (98 %) | no |  | yes | yes |\n| b | yes | yes | - | yes | yes |" in text
    assert "* a, heads: it is \\| so" in text
    assert "* c (timm): no such model" in text
    assert text.count("1 of 2 families came from pruning") == 1
    assert "heads 1 of 2, channels 0 of 0" in text
    assert "No cell went through with a wrong result" in text
    wrong = page([row("a", **{**fine, "heads": (WRONG, "off")})], {})
    assert "1 cells went through with another result than expected" in wrong
    assert "| a | yes | WRONG | yes | yes |" in wrong
    assert not is_green(row("a", **{**fine, "compress": (WRONG, "off")}))


def test_what_has_a_result_is_not_tried_again(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(program, "_run", lambda names, *_: asked.append(names))
    given = ["llama", "opt", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "page.md")]
    done = {"name": "opt", "library": "transformers", "parameters": 1}
    done["cells"] = {column: {"state": YES, "why": ""} for column in COLUMNS}
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "opt.json").write_text(json.dumps(done))
    program.main(given)
    program.main([*given, "--fresh"])
    assert asked == [["llama"], ["llama", "opt"]]
    assert "| opt | yes |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("then", "why"), [("sleep(99)", "not within 0 s"), ("exit(3)", "the process ended with 3")]
)
def test_a_family_that_takes_too_long_or_ends_the_process_says_so(then, why, tmp_path):
    code = f"from time import sleep; print('begin opt', flush=True); {then}"
    worker = (sys.executable, "-c", code)
    done = {"cells": {"elements": {"state": YES, "why": ""}}}
    (tmp_path / "opt.json").write_text(json.dumps(done))
    names = ["llama", "opt", "vit"]
    assert program._run(names, tmp_path, ["elements", "heads"], 0.1, worker) == ["vit"]
    cells = json.loads((tmp_path / "opt.json").read_text())["cells"]
    assert cells == {"elements": {"state": YES, "why": ""}, "heads": {"state": NO, "why": why}}


def test_a_worker_that_tries_nothing_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="No family was tried: the process ended with 1"):
        program._run(["opt"], tmp_path, ["heads"], 9.0, (sys.executable, "-c", "exit(1)"))
