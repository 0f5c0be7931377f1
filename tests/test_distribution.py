"""What is released: both archives hold what they must and nothing else, and the wheel works."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; print(b.build_{what}(r'{out}'))"
ABSOLUTE = re.compile(r"\]\((?!https?://|mailto:|#)")


def config():
    found = ConfigParser()
    found.read(ROOT / "setup.cfg")
    return found


def python(*arguments, cwd, **environment):
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("release")
    checkout = place / "checkout"
    leave = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*_out")
    shutil.copytree(ROOT, checkout, ignore=leave)
    python("-c", BUILD.format(what="sdist", out=place), cwd=checkout)
    (sdist,) = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (source,) = place.glob("mtprune-*[0-9]")
    python("-c", BUILD.format(what="wheel", out=place), cwd=source)
    (wheel,) = place.glob("*.whl")
    return sdist, wheel


def modules():
    files = (ROOT / "mtprune").rglob("*")
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(archives):
    names = set(zipfile.ZipFile(archives[1]).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert package == modules()
    sources = ("sparse.c", "block.c", "panel.h", "packed.h")
    native = {f"mtprune/compression/forms/{name}" for name in sources}
    assert {"mtprune/py.typed", *native} <= package
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_archive_holds_what_the_wheel_is_built_from(archives):
    with tarfile.open(archives[0]) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    top = {"setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    assert modules() | top | {"SECURITY.md", "CITATION.cff"} <= names
    assert not {name for name in names if name.startswith(("tests/", "examples/", "docs/"))}


@pytest.mark.slow
def test_the_metadata(archives):
    wheel = zipfile.ZipFile(archives[1])
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    told = Parser().parsestr(wheel.read(name).decode())
    assert told["Version"] == config()["metadata"]["version"]
    assert set(told.get_all("Provides-Extra")) == set(config()["options.extras_require"])
    assert told["Description-Content-Type"] == "text/markdown"
    page = told.get_payload()
    assert page.startswith("# mtprune")
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    assert ABSOLUTE.search(prose) is None
    if importlib.util.find_spec("twine"):  # the checklist of a release has it in any case
        python("-m", "twine", "check", "--strict", *map(str, archives), cwd=ROOT)


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(archives, tmp_path):
    zipfile.ZipFile(archives[1]).extractall(tmp_path / "site")
    code = (
        "import doctest, mtprune; print(mtprune.__file__); "
        "assert all(getattr(mtprune, name) is not None for name in mtprune.__all__); "
        "found = doctest.testmod(mtprune); assert found.attempted and not found.failed"
    )
    where = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(where.strip()) == tmp_path / "site" / "mtprune" / "__init__.py"


# The long description.


def described(*arguments):
    spec = importlib.util.spec_from_file_location("mtprune_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.described(*arguments)


README = """See [the guide](docs/guide.md#loops) and [the
`choose` page](docs/choose.md), [here](#here) or [there](https://example.org/a.md).
![A picture](docs/a.png)

```python
table["vote"](0.9)
```

`names[0](x)` stays, and `f(a,
b)[0](x)` too, before [a link](docs/b.md).
"""


def test_links_lead_to_the_repository():
    assert described(README, "https://example.org/mt/", "v1") == (
        README.replace("docs/guide.md#loops", "https://example.org/mt/blob/v1/docs/guide.md#loops")
        .replace("(docs/choose.md", "(https://example.org/mt/blob/v1/docs/choose.md")
        .replace("(docs/b.md", "(https://example.org/mt/blob/v1/docs/b.md")
        .replace("(docs/a.png", "(https://example.org/mt/raw/v1/docs/a.png")
    )


def test_without_an_address_no_link_leads_nowhere():
    text = described(README, None, "v1")
    assert "See the guide and the\n`choose` page, [here](#here) or [there](https://" in text
    assert "A picture" not in text
    assert 'table["vote"](0.9)' in text
    assert "`names[0](x)` stays, and `f(a,\nb)[0](x)` too, before a link." in text


# What stands beside the package.


def test_all_is_every_extra_that_a_user_of_the_package_has():
    extras = config()["options.extras_require"]
    others = {"all", "encoder", "examples", "test", "dev", "docs", "peers"}
    used = {line for extra in set(extras) - others for line in extras[extra].split()}
    assert set(extras["all"].split()) == used


def test_issue_forms_and_citation_are_what_their_readers_take():
    yaml = pytest.importorskip("yaml")
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [path for path in folder.glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert (
            {"name", "description", "body"}
            <= set(form)
            <= {"name", "description", "labels", "body"}
        )
        fields = [part for part in form["body"] if part["type"] != "markdown"]
        assert {part["type"] for part in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
        names = [part["id"] for part in fields]
        assert len(set(names)) == len(names)
        assert all(part["attributes"]["label"] for part in fields)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["license"] == config()["metadata"]["license"]
    assert cited["version"] == config()["metadata"]["version"]
    dated = f"## [{cited['version']}] - {cited['date-released']}\n"
    assert dated in (ROOT / "CHANGELOG.md").read_text()
