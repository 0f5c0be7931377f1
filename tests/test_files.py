"""Files are written whole or not at all, and what is damaged is one kind of error."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from mtprune.files import digest, read_json, read_torch, remove_drafts, write, write_torch


def test_a_file_comes_back(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pt", {"x": torch.arange(3)})
    assert read_torch(tmp_path / "a.pt")["x"].tolist() == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_it_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    write(tmp_path / "ours", lambda file: file.write(b"1"))
    (tmp_path / "plain").write_bytes(b"1")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    def fails(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("seg")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyError, match="seg"):
        write(tmp_path / "a", fails)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


FULL = """
import resource, signal, sys, torch
from mtprune.files import write_torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    write_torch(sys.argv[1], torch.zeros(1 << 20))
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
@pytest.mark.parametrize("old", [b"old", None])
def test_where_there_is_no_room_it_says_so(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "a.pt"
    if old is not None:
        path.write_bytes(old)
    run = [sys.executable, "-c", FULL, str(path)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "a.pt' could not be written: File too large." in printed
    if old is None:
        assert "No file was left." in printed
        assert list(tmp_path.iterdir()) == []
    else:
        assert "The file that was there is as before." in printed
        assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_drafts_of_who_was_killed_can_be_removed(tmp_path: Path) -> None:
    def dies(file: BinaryIO) -> None:
        file.write(b"half")
        draft, *_ = tmp_path.iterdir()
        draft.rename(draft.with_stem(draft.stem + "x"))  # as if nobody had been there to remove it

    with pytest.raises(OSError, match=r"'.*a' could not be written"):
        write(tmp_path / "a", dies)
    (tmp_path / "model.part").write_bytes(b"mine")
    write(tmp_path / "b", lambda file: file.write(b"1"))
    assert len(list(tmp_path.iterdir())) == 3
    remove_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "model.part"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere.a' could not be written: No such file"):
        write(tmp_path / "nowhere" / "a", lambda file: None)


DAMAGES = {
    "empty": lambda data: b"",
    "short": lambda data: data[: len(data) // 2],
    "text": lambda data: b"hello, world\n" * 9,
    "torn": lambda data: data[:40] + bytes(40) + data[80:],
    "pickle": lambda data: b"\x80\x02c__main__\nA\nq\x00.",
    "code": lambda data: b"cposix\nsystem\n(S'true'\ntR.",
}


DAMAGED = (
    r"a\.pt' (is not a file that torch\.save wrote, or is damaged|holds a \S+, and reading it)"
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_one_kind_of_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.pt"
    torch.save({"x": torch.zeros(9)}, path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=DAMAGED):
        read_torch(path)
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "other.pt")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", '{"a": 1}x'])
def test_what_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a' holds no JSON that can be read: .* Take the file as"):
        read_json(tmp_path / "a")


def test_json_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "a", lambda file: file.write(json.dumps({"a": [1]}).encode()))
    assert read_json(tmp_path / "a") == {"a": [1]}
    with (tmp_path / "a").open("wb") as file:
        os.truncate(file.fileno(), 1 << 29)
    with pytest.raises(ValueError, match=re.escape("It has 536,870,912 bytes.")):
        read_json(tmp_path / "a")


ALIKE: list[Any] = [
    *(None, 0, 0.0, -0.0, False, "", "0", b"", [], {}, [0], ["0"], [[0], 1], [[0, 1]]),
    *({"a": 1}, {"a": 1.0}, {"b": 1}, {"a": {"b": 1}}, {"a": "b"}, {1: 1}, {"1": 1}),
    *(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), torch.zeros(0), torch.zeros(())),
    *(torch.zeros(2, dtype=torch.int32), torch.zeros(2).bfloat16(), torch.tensor([False, False])),
    *(torch.tensor([-0.0, 0.0]), torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, -1.0]])),
]


def test_digests_tell_values_apart() -> None:
    digests = [digest(value) for value in ALIKE]
    assert len(set(digests)) == len(ALIKE)
    assert digests == [digest(value) for value in ALIKE]


def test_digests_do_not_see_order_of_keys_nor_memory() -> None:
    square = torch.arange(6.0).view(2, 3)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(square) == digest(square.t().contiguous().t()) != digest(square.t())
    assert digest((1, 2)) == digest([1, 2])
