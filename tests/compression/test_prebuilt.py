"""Wheels with native code: they run sparse models where there is no compiler."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from mtprune.compression.forms import building, prebuilt
from tests.compression.test_sparse import needs_compiler

ROOT = Path(__file__).parents[2]

RUN = """
import torch, mtprune
from torch import nn
from mtprune.compression.forms import Sparse, building
assert "site-packages" in mtprune.__file__
assert building._compiler() == []
assert building.unavailable() == "", building.unavailable()
assert "prebuilt" in building.library()._name
torch.manual_seed(0)
for layer, x in ((nn.Linear(64, 32), torch.randn(5, 64)), (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9))):
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) > 0.8)
        y = Sparse(layer, Sparse.parts(layer))(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)
print("native")
"""  # noqa: E501


@needs_compiler
@pytest.mark.slow
@pytest.mark.long
def test_a_wheel_runs_sparse_models_without_a_compiler(tmp_path):
    checkout = tmp_path / "checkout"
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*_out")
    shutil.copytree(ROOT, checkout, ignore=leave)
    build = f"from setuptools import build_meta as b; print(b.build_wheel(r'{tmp_path}'))"
    environment = {**os.environ, "MTPRUNE_PREBUILT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    venv.create(tmp_path / "env", with_pip=False)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    for name in ("torch", "numpy"):  # as they are installed here
        where = Path(__import__(name).__file__).parents[1]
        with (site / "here.pth").open("a") as file:
            file.write(f"{where}\n")
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", RUN],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "env" / "bin"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "native\n", done.stderr


def test_the_best_level_that_the_processor_has_is_taken(tmp_path, monkeypatch):
    (tmp_path / prebuilt.FOLDER).mkdir()
    for level in prebuilt.LEVELS:
        (tmp_path / prebuilt.FOLDER / f"{level}.so").touch()

    def found(machine, *features):
        monkeypatch.setattr(prebuilt, "_machine", lambda: machine)
        monkeypatch.setattr(prebuilt, "_features", lambda: set(features))
        return [path.stem for path in prebuilt.candidates(tmp_path)]

    two, three = (prebuilt.LEVELS[f"x86-64-v{i}"][2] for i in (2, 3))
    assert found("x86_64") == []
    assert found("x86_64", *two) == ["x86-64-v2"]
    assert found("x86_64", *two, *three) == ["x86-64-v3", "x86-64-v2"]
    assert found("aarch64") == ["aarch64"]
    assert found("riscv64", *two, *three) == []
    (tmp_path / prebuilt.FOLDER / "x86-64-v3.so").unlink()
    assert found("x86_64", *two, *three) == ["x86-64-v2"]


@needs_compiler
def test_a_library_that_is_none_is_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(building, "_compiled", lambda: "no C compiler was found")
    monkeypatch.setattr(prebuilt, "candidates", lambda here: [broken])
    building.library.cache_clear()
    try:
        assert building.unavailable() == "no C compiler was found"
    finally:
        building.library.cache_clear()
