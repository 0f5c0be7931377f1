"""The rows of the page on versions, and the command that makes it."""

import re
import sys
from configparser import ConfigParser

import pytest

from tests import versions
from tests.versions import ROOT, Combination, Outcome


def test_rows_of_the_workflow_are_those_of_the_command():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    rows = re.findall(r"^          - (\S.*)$", workflow, re.MULTILINE)
    assert rows == [each.name for each in versions.combinations("3.11")]


def test_pythons_and_torches_are_those_that_the_package_claims():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    classifiers = re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"])
    assert tuple(classifiers) == versions.PYTHONS
    assert config["options"]["python_requires"] == f">={versions.PYTHONS[0]}"
    assert f"torch>={versions.TORCHES[0]}" in config["options"]["install_requires"].split()
    pinned = (ROOT / "constraints.txt").read_text()
    assert f"\ntorch=={versions.TORCHES[-1]}." in pinned


def test_lower_bounds_are_those_of_every_extra():
    bounds = versions.lower_bounds()
    assert {"numpy==1.26.*", "transformers==5.12.*", "torch-pruning==1.6.*"} <= set(bounds)
    assert not any(each.startswith("torch==") for each in bounds)


def test_an_interpreter_that_is_not_here_is_a_row_that_says_so(tmp_path):
    outcome = versions.run(Combination("Python 3.2", "3.2"), tmp_path, ["tests"])
    assert outcome.reason == "there is no python3.2 here"
    assert "| Python 3.2 |  |  | not run: there is no python3.2 here |" in versions.page([outcome])


def test_what_failed_is_named_and_counted():
    output = (
        "FAILED tests/test_a.py::test_b[c] - assert 0\nERROR tests/test_d.py\n"
        "1 failed, 12 passed, 3 skipped, 1 error in 4.00s\n"
    )
    outcome = versions.read(output, "torch 2.6", "3.11.2", "2.6.0+cpu")
    assert outcome == Outcome(
        "torch 2.6", "3.11.2", "2.6.0+cpu", 12, 3, ("tests/test_a.py::test_b[c]", "tests/test_d.py")
    )
    page = versions.page([outcome])
    assert "| torch 2.6 | 3.11.2 | 2.6.0+cpu | 12 passed, 3 skipped, 2 failed |" in page
    assert "* torch 2.6: `tests/test_a.py::test_b[c]`" in page


def test_output_without_a_summary_is_no_success():
    assert versions.read("Traceback\nImportError: no", "a", "", "").reason == (
        "no test ran: ImportError: no"
    )


def test_rows_are_run_once_and_an_unknown_one_is_named(tmp_path, monkeypatch, capsys):
    ran = []

    def run(combination, folder, select):
        ran.append(combination.name)
        return Outcome(combination.name, "3.11", "2.6", passed=5)

    monkeypatch.setattr(versions, "run", run)
    arguments = ["torch 2.6", "--state", str(tmp_path), "--out", str(tmp_path / "page.md")]
    versions.main(arguments)
    versions.main(arguments)
    assert ran == ["torch 2.6"]
    assert "| torch 2.6 | 3.11 | 2.6 | 5 passed |" in (tmp_path / "page.md").read_text()
    with pytest.raises(SystemExit):
        versions.main(["torch 1.0"])
    assert "no rows ['torch 1.0']; there are ['torch 2.6'" in capsys.readouterr().err


def test_strict_fails_where_a_row_did(tmp_path, monkeypatch):
    monkeypatch.setattr(
        versions, "run", lambda row, *_: Outcome(row.name, passed=5, failed=("tests/test_a.py",))
    )
    with pytest.raises(SystemExit, match=r"torch 2\.6: 5 passed, 1 failed"):
        versions.main(
            ["torch 2.6", "--strict", "--state", str(tmp_path), "--out", str(tmp_path / "page.md")]
        )


def test_it_runs_a_test_in_an_environment_of_this_one(tmp_path, monkeypatch):
    """Without the installation, which needs a network."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o700)
    real = versions.subprocess.run

    def without_pip(command, **options):
        return real(["true"] if "pip" in command else command, **options)

    monkeypatch.setattr(versions.subprocess, "run", without_pip)
    select = ["tests/test_text.py", "-p", "no:cacheprovider"]
    outcome = versions.run(Combination("this", versions._HERE), tmp_path, select)
    assert outcome.passed > 0
    assert not outcome.failed
