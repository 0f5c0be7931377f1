"""Trainers that are killed while they write end as if they were not."""

import sys

import pytest

from tests import kills


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_trainer_killed_while_writing_ends_the_same(capsys):
    assert kills.main(["--kills", "1", "--seed", "1"]) == 0
    assert "kills while writing: 0 runs ended otherwise than without" in capsys.readouterr().out
