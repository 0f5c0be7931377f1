"""Checkpoints of a pruner: what belongs together, and older versions as the present one."""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["VERSION", "check_same", "upgraded"]

VERSION = 2


def upgraded(state: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A state of any version as one of the present version.

    Args:
        state: The state.
        method: The description of the method that is to go on.

    Raises:
        ValueError: If it is of no version that we know.
    """
    version = state["version"]
    if version == VERSION:
        return dict(state)
    if version != 1:
        raise ValueError(
            f"This checkpoint is of a pruner with other version: it has {version}, this one "
            f"{VERSION}. Load it with the version of mtprune that wrote it, or with a later one."
        )
    new = {
        name: value
        for name, value in state.items()
        if name not in ("masks", "soft", "loose", "ranks")
    }
    for name in ("evidence", "kept"):
        evidence = dict(state[name])
        scores = evidence.pop("scores")
        new[name] = {**evidence, "statistics": {"saliency": scores} if scores else {}}
    soft = dict(state["soft"])
    if soft:
        soft["noted"] = soft.pop("seen")
    new["hold"] = {
        "open": bool(soft) or state["loose"],
        "masks": state["masks"],
        **soft,
        **state["ranks"],
    }
    if _without_sparsity(state["method"]) == _without_sparsity(method):
        new["method"] = method
    new["version"] = VERSION
    return new


def _without_sparsity(method: str) -> str:
    """A vote whose sparsity its pattern fixes, which version 1 wrote out and later ones do not."""
    fixed = "granularity=NM(" in method
    return re.sub(r"^Vote\(sparsity=[^,]+, ", "Vote(", method) if fixed else method


def check_same(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other tasks, layers or another method.

    Args:
        state: The checkpoint.
        mine: The entries in which it must agree with the pruner that loads it.

    Raises:
        ValueError: If it does not.
    """
    for key, own in mine.items():
        if state[key] != own:
            difference = _difference(state[key], own)
            raise ValueError(f"This checkpoint is of a pruner with other {key}: {difference}")


def _difference(theirs: object, mine: object) -> str:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        theirs = {k: v for k, v in theirs.items() if mine.get(k) != v} or sorted(theirs)
        mine = {k: mine.get(k) for k in theirs} if isinstance(theirs, dict) else sorted(mine)
    return f"it has {theirs}, this one {mine}."
