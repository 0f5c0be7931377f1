"""The site: it builds without a warning, the reference is whole, the tutorials run."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mtprune
from tests.long import few
from tests.site import reference, tutorials

ROOT = Path(__file__).parent.parent
NAMES = sorted(reference.public_names())

LONGEST = ("encoder_to_int8", "first_prune", "own_score", "vision_transformer", "your_trainer")


def test_the_reference_has_every_public_name() -> None:
    values = {name: getattr(mtprune, name) for name in mtprune.__all__}
    modules = {value.__name__ for value in values.values() if isinstance(value, ModuleType)}
    names = {
        f"mtprune.{name}" for name, value in values.items() if inspect.ismodule(value) is False
    }
    assert names <= set(NAMES)
    assert modules <= {page.module for page in reference.pages()}
    assert {"mtprune.methods.Method", "mtprune.saliency.taylor"} <= set(NAMES)


def test_the_reference_has_every_module_that_a_page_imports_from() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    imported = set(re.findall(r"^(?:from|import) (mtprune\.[\w.]+)", text, re.MULTILINE))
    assert len(imported) > 5
    assert imported <= {page.module for page in reference.pages()}


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for name in (name for page in reference.pages() for name in page.names):
        missing += [] if name.doc else [name.path]
        for member, value in vars(name.value).items() if inspect.isclass(name.value) else ():
            plain = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if member.startswith("_") or not inspect.isfunction(plain):
                continue
            missing += (
                [] if inspect.getdoc(getattr(name.value, member)) else [f"{name.path}.{member}"]
            )
    assert missing == []


def test_a_script_is_taken_apart_and_run_cell_by_cell(tmp_path: Path) -> None:
    script = tmp_path / "small.py"
    script.write_text(
        "# ---\n# ---\n\n# %% [markdown]\n# # A title\n#\n# And text.\n\n"
        "# %%\nx = 2\nprint(x)\n\n# %% [markdown]\n# More.\n\n# %%\nx += 1\nprint(x)\n"
    )
    assert [cell.prose for cell in tutorials.cells(script)] == [True, False, True, False]
    assert tutorials.cells(script)[0].text == "# A title\n\nAnd text."
    tutorials.keep(script)
    page = tutorials.page(script)
    assert page.startswith("# A title\n\nAnd text.\n\n```{code-block} python\nx = 2\nprint(x)\n```")
    assert "text\n:class: printed\n2\n```\n\nMore." in page
    assert "text\n:class: printed\n3\n```" in page
    assert tutorials.is_current(script)
    script.write_text(script.read_text().replace("x += 1", "x += 2"))
    assert not tutorials.is_current(script)


@pytest.mark.parametrize("script", tutorials.scripts(), ids=lambda script: script.stem)
def test_what_a_tutorial_shows_was_printed_by_its_code(script: Path) -> None:
    assert tutorials.is_current(script), f"Run python -m tests.site --tutorials {script.stem}."
    pictures = re.findall(r"\]\((\S+\.png)\)", tutorials.page(script))
    assert all((script.parent / name).exists() for name in pictures)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    few(tutorials.scripts(), *(s for s in tutorials.scripts() if s.stem not in LONGEST)),
    ids=lambda script: script.stem,
)
def test_tutorial_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"onnxruntime": ("onnxruntime", "onnxscript"), "timm": ("timm",)}
    for name in (name for word in needs if word in script.read_text() for name in needs[word]):
        pytest.importorskip(name)
    monkeypatch.setenv("MPLBACKEND", "agg")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    for name in ("sphinx", "furo", "myst_parser", "latex2mathml"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "tests.site", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    from sphinx.util.inventory import InventoryFile

    with (tmp_path / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    found = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    assert set(NAMES) <= found
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        loaded = re.findall(
            r'<(?:script|link|img)\b[^>]*(?:src|href)="(https?:[^"]+)', page.read_text()
        )
        assert loaded == [], f"{page.name} loads {loaded}"
    assert "taylor_magnitude" in (tmp_path / "searchindex.js").read_text()


def test_pictures_show_what_a_pruner_does(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.site import pictures

    pictures.main(tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"vote", "kept", "loop"}


def test_pages_are_short_enough_to_be_read() -> None:
    """Less than 1,500 words of prose; tables and code are looked up rather than read."""
    long = {}
    for path in (ROOT / "docs").rglob("*.md"):
        prose = re.sub(r"^```.*?^```|^\|.*?$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        if len(prose.split()) >= 1500:
            long[path.name] = len(prose.split())
    assert not long
