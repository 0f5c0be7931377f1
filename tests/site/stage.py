"""The sources of the site: ``docs/``, the pages beside README, and what is made from the code."""

import os
import re
import shutil
from pathlib import Path

from tests.site import reference, tutorials

ROOT = Path(__file__).parent.parent.parent
BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")
LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)#\s]+)")


def stage(folder: Path) -> None:
    """Fill an empty folder with what Sphinx reads."""
    docs = ROOT / "docs"
    for path in sorted(docs.rglob("*")):
        of_tutorial = path.parent == tutorials.FOLDER and path.suffix == ".json"
        if path.is_file() and path.suffix != ".pyc" and not of_tutorial:
            put(path, folder / path.relative_to(docs), folder)
    for name in BESIDE:
        put(ROOT / name, folder / name, folder)
    for page in reference.pages():
        write(folder / "reference" / page.file, page.text())
    write(folder / "reference" / "index.rst", reference.contents())
    for tutorial in tutorials.scripts():
        write(folder / "tutorials" / f"{tutorial.stem}.md", tutorials.page(tutorial))


def put(source: Path, target: Path, folder: Path) -> None:
    """One file; the links of a page lead to the same things as before."""
    if source.suffix != ".md":
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return

    scripts = tutorials.scripts()

    def moved(match: re.Match[str]) -> str:
        aim = (source.parent / match[2]).resolve()
        if not aim.is_relative_to(ROOT / "docs"):
            place = folder / aim.relative_to(ROOT)
            if not place.exists():
                put(aim, place, folder)
        else:
            place = folder / aim.relative_to(ROOT / "docs")
            if aim in scripts:
                place = place.with_suffix(".md")
        return match[1] + os.path.relpath(place, target.parent)

    target.parent.mkdir(parents=True, exist_ok=True)
    target.touch()  # so that two pages may link to each other
    target.write_text(LINK.sub(moved, source.read_text()))


def write(path: Path, text: str) -> None:
    """A page that is made and not copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
