"""Something follows an import: at once, later, or never; and only once."""

import importlib
import sys
from importlib.util import find_spec

import pytest

from mtprune.integrations.import_hook import when_imported


@pytest.fixture
def late(tmp_path, monkeypatch):
    """The name of a module that nobody has imported yet."""
    (tmp_path / "late_module.py").write_text("import math\nVALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "late_module"
    sys.modules.pop("late_module", None)


def test_what_is_there_is_there():
    seen = []
    when_imported("math", lambda: seen.append(1))
    assert seen == [1]


def test_what_comes_later(late):
    finders = list(sys.meta_path)
    seen = []
    when_imported(late, lambda: seen.append(sys.modules[late].VALUE))
    assert find_spec(late) is not None  # a look is no import
    importlib.import_module("decimal")
    assert seen == []
    module = importlib.import_module(late)
    assert seen == [3]
    assert sys.meta_path == finders
    importlib.reload(module)
    assert seen == [3]


def test_two_may_wait(late):
    seen = []
    for number in (1, 2):
        when_imported(late, lambda number=number: seen.append(number))
    importlib.import_module(late)
    assert sorted(seen) == [1, 2]


def test_a_module_that_is_not_there(late):
    when_imported("nowhere_to_be_found", lambda: pytest.fail("imported"))
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere_to_be_found'"):
        importlib.import_module("nowhere_to_be_found")


def test_a_module_that_fails_is_tried_again(late, tmp_path):
    seen = []
    (tmp_path / "late_module.py").write_text("raise OSError('no')\n")
    when_imported(late, lambda: seen.append(1))
    with pytest.raises(OSError, match="no"):
        importlib.import_module(late)
    (tmp_path / "late_module.py").write_text("VALUE = 'longer now'\n")
    importlib.invalidate_caches()
    importlib.import_module(late)
    assert seen == [1]
