"""Checkpoints of runs: written whole or not at all, and looked at before they are used."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtprune.files import digest, read_json, read_torch, remove_drafts, write_torch
from mtprune.reading import Entry

SEAL = "digest"
ADVICE = "Take a copy of before, or move it away to start anew."


class UnusableError(ValueError):
    """A file of an earlier run that this one cannot go on from."""


@contextmanager
def usable() -> Iterator[None]:
    """Let whatever is wrong with a file that is read be an `UnusableError`."""
    try:
        yield
    except ValueError as error:
        raise UnusableError(str(error)) from error


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a state with the fingerprint of all that it holds."""
    write_torch(path, {**state, SEAL: digest(state)})


def begin(folder: Path) -> None:
    """Make the folder of a run, without what a run that was killed had begun to write there."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder)


def read(path: Path, device: str = "cpu") -> Any:
    """What `torch.save` wrote.

    Raises:
        UnusableError: If it did not, or the file is damaged.
    """
    with usable():
        return read_torch(path, device)


def results(path: Path) -> Entry:
    """The results of a finished run.

    Raises:
        UnusableError: If the file holds none.
    """
    with usable():
        return Entry(read_json(path), f"'{path}'", "Move it away to do that run again.")


def load(path: Path, names: Collection[str], device: str) -> dict[str, Entry]:
    """The entries of the state that `save` wrote.

    Args:
        path: The file.
        names: Of the parts that it must have.
        device: Where tensors go.

    Raises:
        UnusableError: If it is damaged, or was never that.
    """
    state = read(path, device)
    if not isinstance(state, dict) or set(state) != {*names, SEAL}:
        raise UnusableError(f"'{path}' is no checkpoint of this trainer. {ADVICE}")
    seal = state.pop(SEAL)
    try:
        whole = digest(state) == seal
    except (RuntimeError, RecursionError, NotImplementedError):  # of what has no fingerprint
        whole = False
    if not whole:
        raise UnusableError(f"'{path}' is damaged: it is not as it was saved. {ADVICE}")
    with usable():
        return Entry(state, f"'{path}'", ADVICE).mapping()


def differing(theirs: Entry, mine: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a mapping that are not as they are here.

    Raises:
        UnusableError: If it is no mapping of plain values.
    """
    with usable():
        values = {name: part.plain() for name, part in theirs.mapping().items()}
    return {n: value for n, value in values.items() if digest(value) != digest(mine.get(n))}


def random_states(entry: Entry) -> dict[str, Tensor]:
    """The states of the global generators, by kind of device."""
    states = {"cpu": entry["cpu"].tensor()}
    for kind, part in entry.mapping(["cpu", "cuda"]).items():
        states[kind] = part.tensor((part.size(),), torch.uint8).cpu()
        if kind == "cpu" or torch.cuda.is_available():
            try:
                torch.Generator(kind).set_state(states[kind])
            except RuntimeError as error:
                raise part.wrong("must be the state of a torch.Generator") from error
    return states


def restore(parts: Mapping[str, Any], entries: Mapping[str, Entry], path: Path) -> None:
    """Let parts go on from their states.

    Raises:
        UnusableError: If the states are of other parts.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(entries[name].value)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UnusableError(f"'{path}' is of another {name}: {error} {ADVICE}") from error
