"""What is saved comes back bitwise, in a new process too, and nowhere else unnoticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mtprune
from tests import compression as package
from tests import nets
from tests.compression.fakes import leaves, prefer, zero_
from tests.tampered_models import resealed


class Small(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.lin = nn.Linear(6, width)
        self.out = nn.Linear(width, 4)

    def forward(self, x):
        return self.out(self.lin(x).relu())


class Outer:
    class Inner(nn.Linear):
        pass


def compressed(model, x, choice="csr"):
    torch.manual_seed(5)
    return mtprune.compress(zero_(model, 0.8, rows=0.2, cols=0.2), x, measure=prefer(choice))


@pytest.mark.parametrize("choice", ["sparse", "csr", "rows", "thin", "dense"])
@pytest.mark.parametrize(
    "name", ["plain", "tied", "conv_bn", "channels_last", "bfloat16", "attention"]
)
def test_round_trip_is_bitwise(name, choice, tmp_path):
    net = nets.build(name)
    x = net.make_batch(0)["x"]
    fast = compressed(net.model, x, choice)
    mtprune.save(fast, tmp_path)
    fresh = nets.build(name, seed=3).model
    loaded = mtprune.load(tmp_path, fresh)
    assert loaded is fresh
    assert mtprune.plan_of(loaded) == mtprune.plan_of(fast)
    with torch.no_grad():
        for a, b in zip(leaves(fast(x)), leaves(loaded(x)), strict=True):
            assert torch.equal(a, b)
    if name == "tied":
        assert loaded.trunk.first.weight is loaded.trunk.last.weight


@pytest.mark.slow
def test_a_new_process(tmp_path):
    x = torch.randn(3, 6)
    fast = compressed(Small(8), x)
    mtprune.save(fast, tmp_path, arguments={"width": 8})
    torch.save({"x": x, "y": fast(x)}, tmp_path / "pair.pt")
    code = (
        "import sys, torch, mtprune\n"
        "torch.set_num_threads(1)\n"
        "where = sys.argv[1]\n"
        "pair = torch.load(where + '/pair.pt')\n"
        "model = mtprune.load(where)\n"
        "assert torch.equal(model(pair['x']), pair['y'])\n"
        "assert model.lin.choice == 'csr'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_stored(tmp_path):
    x = torch.randn(3, 6)
    mtprune.save(compressed(Small(), x), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]
    tensors = load_file(tmp_path / "model.safetensors")
    assert {"lin.weight_crow", "lin.weight_col", "lin.weight_values"} <= tensors.keys()
    assert "lin.weight" not in tensors
    with pytest.raises(RuntimeError, match=r"Missing key.*lin.weight"):
        Small().load_state_dict(tensors)


def test_building_without_a_model(tmp_path, monkeypatch):
    for name, text in (("ends", "raise SystemExit(7)"), ("fails", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    x = torch.randn(3, 6)
    mtprune.save(compressed(Small(), x), tmp_path / "default")
    assert isinstance(mtprune.load(tmp_path / "default"), Small)

    class Local(Small):
        pass

    mtprune.save(compressed(Local(), x), tmp_path / "local")
    with pytest.raises(ValueError, match=r"cannot be imported.*load\(directory, model="):
        mtprune.load(tmp_path / "local")
    model = nn.Sequential(nn.Linear(6, 4))
    mtprune.save(compressed(model, x), tmp_path / "sequential")
    with pytest.raises(ValueError, match="plan is for another model"):
        mtprune.load(tmp_path / "sequential")
    mtprune.save(compressed(Small(8), x), tmp_path / "other", arguments={"height": 8})
    with pytest.raises(ValueError, match=r"cannot be built with {'height': 8}.*model="):
        mtprune.load(tmp_path / "other")
    meta = json.loads((tmp_path / "local" / "plan.json").read_text())
    for name, match in (
        ("__main__:Net", "in the script"),
        ("torch.nn:Linear.forward", "not a torch.nn.Module"),
        ("os:system", "'system' cannot be imported: no model is defined in 'os', which runs"),
        ("tests.fuzz.__main__:main", r"no model is defined in 'tests.fuzz.__main__'"),
        ("tests.compression.ends:Net", "'Net' cannot be imported: 7"),
        ("tests.compression.fails:Net", "'Net' cannot be imported: division by zero"),
        ("", "'' and '' are no names"),
        (".nets:Net", r"'\.nets' and 'Net' are no names"),
        ("torch.nn:\ud800", "are no names"),
        ("x" * 100_000 + ":Net", r"'Net' cannot be imported: No module named 'x{1,200}\.\.\."),
    ):
        (tmp_path / "local" / "plan.json").write_text(json.dumps({**meta, "class": name}))
        resealed(tmp_path / "local")
        with pytest.raises(ValueError, match=match):
            mtprune.load(tmp_path / "local")


def test_errors(tmp_path, monkeypatch):
    x = torch.randn(3, 6)
    fast = compressed(Small(), x)
    with pytest.raises(ValueError, match="has no plan"):
        mtprune.save(Small(), tmp_path)
    with pytest.raises(TypeError, match=r"`arguments` must be what JSON can hold"):
        mtprune.save(fast, tmp_path, arguments={"width": torch.ones(1)})
    with pytest.raises(FileNotFoundError, match=r"holds no plan.json"):
        mtprune.load(tmp_path / "nowhere")
    mtprune.save(fast, tmp_path)
    with pytest.raises(ValueError, match="it has 'lin' with shape"):
        mtprune.load(tmp_path, Small(8))

    class More(Small):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

    with pytest.raises(ValueError, match=r"another model: missing \['norm.bias'"):
        mtprune.load(tmp_path, More())
    meta = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        mtprune.load(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"mtprune\[safetensors\]"):
        mtprune.save(fast, tmp_path)
    with pytest.raises(ImportError, match=r"mtprune\[safetensors\]"):
        mtprune.load(tmp_path)
