"""Two ranks under `torchrun`: one is killed, all start anew, and the end is as if none had been."""

import sys

import pytest

from tests import elastic

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL"),
]


def test_a_rank_is_killed_in_the_midst_of_an_update(tmp_path):
    assert elastic.run(tmp_path, [(1, "update", 4)], "fsdp") == (1, True)


@pytest.mark.long
@pytest.mark.parametrize("way", elastic.SPREAD)
def test_either_rank_is_killed_25_times_in_whatever_it_does(way, capsys):
    assert elastic.main(["--kills", "25", "--way", way]) == 0
    assert "25 kills" in capsys.readouterr().out
