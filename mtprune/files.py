"""Files: written whole or not at all, and read without trusting what they hold."""

import hashlib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = [
    "digest",
    "read_json",
    "read_torch",
    "remove_drafts",
    "replace",
    "write",
    "write_text",
    "write_torch",
]

_JSON_LIMIT = 1 << 28
_DEEPEST = 100


def write(path: str | PathLike[str], fill: Callable[[BinaryIO], object]) -> None:
    """Write a file so that, whatever happens, the old one or the new one is there, and is whole.

    The new one is written beside the old one, forced to the disk, and then renamed.

    Args:
        path: The file.
        fill: Writes the content to a binary file.

    Raises:
        OSError: If it cannot be written; the old file is as before.
    """
    path = Path(path)
    draft = ""
    out: _Remembering | None = None
    try:
        number, draft = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(number, "wb") as file:
            out = _Remembering(file)
            fill(out)  # type: ignore[arg-type]  # it has what a binary file has
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o666 & ~_umask())  # as `open` would have made it
        replace(draft, path)
    except BaseException as error:
        if draft:
            Path(draft).unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else out.error if out else None
        if cause is None:
            raise
        kept = "The file that was there is as before." if path.exists() else "No file was left."
        message = f"'{path}' could not be written: {cause.strerror or cause}. {kept}"
        raise OSError(cause.errno, message) from error


def replace(draft: str | PathLike[str], path: str | PathLike[str]) -> None:
    """Let a file that is written take the place of another, at once."""
    os.replace(draft, path)
    _sync(Path(path).parent)


def remove_drafts(folder: str | PathLike[str]) -> None:
    """Remove what processes that were killed in the midst of `write` have left in a folder.

    Nobody may be writing there.
    """
    for draft in Path(folder).glob(".*.part"):
        draft.unlink(missing_ok=True)


def write_torch(path: str | PathLike[str], state: object) -> None:
    """Write with `torch.save`, whole or not at all; see `write`."""
    write(path, lambda file: torch.save(state, file))


def write_text(path: str | PathLike[str], text: str) -> None:
    """Write text as UTF-8, whole or not at all; see `write`."""
    write(path, lambda file: file.write(text.encode()))


def read_torch(path: str | PathLike[str], device: str | torch.device | None = None) -> Any:
    """Read what `torch.save` wrote: tensors, numbers, strings and containers, never code.

    Args:
        path: The file.
        device: Where tensors go.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no such file, or a damaged one.
    """
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except FileNotFoundError:
        raise
    except (
        *(RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError),
        *(pickle.UnpicklingError, AssertionError, RecursionError, OverflowError, MemoryError),
    ) as error:
        if asked := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"'{path}' holds a {asked[1]}, and reading it would run code. Save "
                "model.state_dict() or pruner.state_dict(): tensors, numbers, strings, containers."
            ) from error
        raise ValueError(
            f"'{path}' is not a file that torch.save wrote, or is damaged: "
            f"{_first_line(error)} Take another file, or start anew without it."
        ) from error


def read_json(path: str | PathLike[str]) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no JSON, or more than any of ours.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise ValueError(f"It has {path.stat().st_size:,} bytes.")
        value = json.loads(path.read_bytes())
        if _is_deeper(value, _DEEPEST):
            raise ValueError(f"It is nested more than {_DEEPEST} times.")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"'{path}' holds no JSON that can be read: {_first_line(error)} Take the file as it "
            "was written."
        ) from error


def _is_deeper(value: object, most: int) -> bool:
    """Whether containers hold containers more often than so, found without recursion."""
    level = [value]
    for _ in range(most + 1):
        inner: list[object] = []
        for part in level:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
        level = [part for part in inner if isinstance(part, (dict, list))]
        if not level:
            return False
    return True


def digest(value: object) -> str:
    """A fingerprint of containers, tensors, numbers and strings: 64 hexadecimal digits.

    It shows damage. It does not show who wrote a value: anybody can compute it.

    Example:
        >>> digest({"a": 1, "b": torch.zeros(2)}) == digest({"b": torch.zeros(2), "a": 1})
        True
        >>> digest([1]) == digest([1.0]) or digest([True]) == digest([1])
        False
    """
    state = hashlib.sha256()
    _take_in(state, value)
    return state.hexdigest()


def _take_in(state: Any, value: object) -> None:
    """Every value as its kind, its length, and its parts, so that no two look alike."""
    if isinstance(value, Tensor):
        dense = value.detach().cpu().contiguous()
        state.update(f"tensor {dense.dtype} {tuple(dense.shape)}:".encode())
        state.update(dense.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        state.update(f"mapping {len(value)}:".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, repr(key))):
            _take_in(state, key)
            _take_in(state, value[key])
    elif isinstance(value, (list, tuple)):
        state.update(f"sequence {len(value)}:".encode())
        for part in value:
            _take_in(state, part)
    else:
        text = repr(value)
        state.update(f"{type(value).__name__} {len(text)}:{text}".encode())


class _Remembering:
    """A file that remembers why it could not be written, for whoever turns it into another error.

    Args:
        file: The file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hand on what is buffered."""
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(folder: Path) -> None:
    """Force a rename to the disk, where folders can be opened."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:  # as on Windows
        return
    try:
        os.fsync(number)
    except OSError:  # a file system without it
        pass
    finally:
        os.close(number)


def _first_line(error: BaseException) -> str:
    """What an error says, as one sentence."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")
    return f"{text}."
