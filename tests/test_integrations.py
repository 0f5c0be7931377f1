"""Integrations without what they integrate."""

import importlib.util
import re
import subprocess
import sys

import pytest
from torch import nn

from mtprune import MultitaskPruner
from mtprune.integrations import lightning
from mtprune.integrations import transformers as integration


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = importlib.util.spec_from_file_location("without", integration.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    pruner = MultitaskPruner(nn.Linear(2, 2), ["a"])
    with pytest.raises(ImportError, match=re.escape("pip install 'mtprune[transformers]'")):
        without.PruningCallback(pruner)


def test_without_lightning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", None)
    spec = importlib.util.spec_from_file_location("without", lightning.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    pruner = MultitaskPruner(nn.Linear(2, 2), ["a"])
    with pytest.raises(ImportError, match=re.escape("pip install 'mtprune[lightning]'")):
        without.PruningCallback(pruner)


@pytest.mark.slow
def test_nothing_is_imported_unasked():
    code = "import sys, mtprune; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
