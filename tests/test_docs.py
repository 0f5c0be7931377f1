"""Every code block of README and docs runs, in order, and every example in a docstring."""

import doctest
import importlib
import pkgutil
import re
import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mtprune
from tests.test_layout import ORDER

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


BRINGS = {
    "import lightning": "lightning",
    "import accelerate": "accelerate",
    "from torchjd": "torchjd",
    "utils.tensorboard": "tensorboard",
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({"seg": nn.Conv2d(16, 4, 1), "depth": nn.Conv2d(16, 1, 1)})

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.backbone(image)
        return {task: head(features) for task, head in self.heads.items()}


def namespace() -> dict[str, Any]:
    """What the pages take for granted: a model, its losses, an optimizer and some batches."""
    model = Net()

    def seg_loss(outputs: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs["seg"], batch["seg"])

    def depth_loss(outputs: Any, batch: Any) -> torch.Tensor:
        return F.l1_loss(outputs["depth"], batch["depth"])

    loader = [
        {
            "image": torch.randn(2, 3, 8, 8),
            "seg": torch.randint(4, (2, 6, 6)),
            "depth": torch.rand(2, 1, 6, 6),
        }
        for _ in range(20)
    ]
    return {
        "torch": torch,
        "nn": nn,
        "mtprune": mtprune,
        "Net": Net,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "seg_loss": seg_loss,
        "depth_loss": depth_loss,
        "loader": loader,
        "batch": loader[0],
    }


def blocks() -> list[Any]:
    found = []
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            found.append(pytest.param(match[1], id=f"{page.stem}-{number}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("code", blocks())
def test_code_block_runs(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "import transformers" in code:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    if "mtprune.Channel(" in code:
        pytest.importorskip("torch_pruning")
    if "torch.onnx" in code:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    for imported, package in BRINGS.items():
        if imported in code:
            pytest.importorskip(package)
    assert compile(code, "block", "exec")
    with warnings.catch_warnings():
        if any(name in code for name in ("torch.onnx", *BRINGS)):
            warnings.simplefilter("ignore")  # their own, of torch's internals and of workers
        exec(compile(code, "block", "exec"), namespace())


@pytest.mark.parametrize(
    "name",
    [m.name for m in pkgutil.walk_packages(mtprune.__path__, prefix="mtprune.")] + ["mtprune"],
)
def test_docstring_examples_are_true(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_walks_and_the_types_name_what_is_there() -> None:
    stops = re.findall(r"`([\w/]+)\.py` `([\w.]+)`", ARCHITECTURE)
    types = re.findall(r"\*\*`(\w+)`\*\* \(`([\w/]+)\.py`\)", ARCHITECTURE)
    assert len(stops) > 30
    assert len(types) > 10
    for path, name in [*stops, *((path, name) for name, path in types)]:
        attrgetter(name)(importlib.import_module(f"mtprune.{path.replace('/', '.')}"))
    assert all((ROOT / path).exists() for path in re.findall(r"`(tests/[\w/.]+)`", ARCHITECTURE))


def test_every_folder_and_every_file_beside_the_folders_is_explained() -> None:
    package = ROOT / "mtprune"
    folders = re.findall(r"^\| `(\w+)/` \|", ARCHITECTURE, re.MULTILINE)
    assert {path.parent.name for path in package.glob("*/__init__.py")} <= set(folders)
    assert [folder for folder in folders if folder in ORDER] == list(ORDER)
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert files <= set(re.findall(r"`(\w+\.py)`", ARCHITECTURE))


def test_import_is_cheap_in_packages() -> None:
    """Nothing beyond torch, numpy and typing-extensions is needed at run time."""
    source = "\n".join(path.read_text() for path in (ROOT / "mtprune").rglob("*.py"))
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    allowed = {"torch", "numpy", "typing_extensions", "mtprune"}
    import sys

    assert imported - allowed <= set(sys.stdlib_module_names)
