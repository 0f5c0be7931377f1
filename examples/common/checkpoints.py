"""Checkpoints of runs: written whole or not at all, and looked at before they are used."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mtprune.files import digest, read_torch, write_torch

SEAL = "digest"
ADVICE = "Take a copy of before, or move it away to start anew."


class UnusableError(ValueError):
    """A file of an earlier run that this one cannot go on from."""


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a state with the fingerprint of all that it holds."""
    write_torch(path, {**state, SEAL: digest(state)})


def read(path: Path, device: str = "cpu") -> Any:
    """What `torch.save` wrote.

    Raises:
        UnusableError: If it did not, or the file is damaged.
    """
    try:
        return read_torch(path, device)
    except ValueError as error:
        raise UnusableError(str(error)) from error


def load(path: Path, names: Collection[str], device: str) -> dict[str, Any]:
    """The state that `save` wrote.

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
    return state


@contextmanager
def usable(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with what a checkpoint holds into one kind of error.

    Raises:
        UnusableError: If something goes wrong.
    """
    try:
        yield
    except UnusableError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnusableError(
            f"'{path}' is no checkpoint of this trainer: {error} {ADVICE}"
        ) from error


def restore(parts: Mapping[str, Any], state: Mapping[str, Any], path: Path) -> None:
    """Let parts go on from their states.

    Raises:
        UnusableError: If the states are of other parts.
    """
    for name, part in parts.items():
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UnusableError(f"'{path}' is of another {name}: {error} {ADVICE}") from error
