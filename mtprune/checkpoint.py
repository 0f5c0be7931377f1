"""Checkpoints of a pruner: opened before they are read, and older versions as the present one.

A checkpoint carries a fingerprint of all that it holds, so that damage is seen. That does not make
it true: every part of it is then read entry by entry (`mtprune.reading`), into new objects, and
only when all is read does a pruner take them.
"""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from mtprune.facts import Facts, Subject
from mtprune.files import digest
from mtprune.holding.base import Held
from mtprune.reading import Entry
from mtprune.selection import Quota

__all__ = [
    "VERSION",
    "check_counts",
    "check_promise",
    "check_seal",
    "is_one",
    "opened",
    "parsed",
    "random_state",
    "sealed",
]

VERSION = 2

_IDENTITY = ("version", "tasks", "shapes", "method")
_FIELDS = (
    *_IDENTITY,
    *("step", "done", "users", "led", "facts", "hold", "weigher", "generator"),
    *("singly", "memory", "evidence", "kept", "stability"),
)
_ADVICE = "Load the state_dict() of a pruner as it was saved; this pruner is as it was."


def sealed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with the fingerprint of all its entries."""
    return {**state, "digest": digest(state)}


def is_one(value: object) -> bool:
    """Whether a value may be a checkpoint of a pruner, whole or damaged."""
    return isinstance(value, Mapping) and {"version", "method", "evidence"} <= set(value)


def parsed(state: object, method: str | None = None) -> dict[str, Entry]:
    """The entries of a checkpoint as those of the present version, whatever its own is.

    Args:
        state: What somebody says is a checkpoint.
        method: The method of the pruner that loads it, if one does.

    Raises:
        ValueError: If it is none, or is damaged.
    """
    whole = Entry(state, "This checkpoint", _ADVICE)
    if not isinstance(state, Mapping) or not is_one(state):
        raise ValueError(f"This is not a state_dict of a MultitaskPruner. {_ADVICE}")
    version = whole["version"].whole()
    if version == 1:
        try:
            state = _upgraded(state, state["method"] if method is None else method)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"This checkpoint says that it is of version 1, and is not: {error!r}. {_ADVICE}"
            ) from error
        whole = Entry(state, "This checkpoint", _ADVICE)
    elif version != VERSION:
        raise ValueError(
            f"This checkpoint is of a pruner with other version: it has {version}, this one "
            f"{VERSION}. Load it with the version of mtprune that wrote it, or with a later one."
        )
    entries = whole.fields(_FIELDS, optional=["digest"])
    if version == VERSION and "digest" not in entries:
        raise whole.wrong("must be a mapping that has 'digest'")
    return entries


def opened(state: object, mine: Mapping[str, Any]) -> dict[str, Entry]:
    """The entries of a checkpoint of the present version, whatever its own is.

    Args:
        state: What somebody says is a checkpoint.
        mine: The entries in which it must agree with the pruner that loads it.

    Raises:
        ValueError: If it is none, is damaged, or is of other tasks, layers or another method.
    """
    entries = parsed(state, mine["method"])
    _check_same(entries, mine)
    return entries


def check_seal(entries: Mapping[str, Entry]) -> None:
    """Refuse a checkpoint whose entries, all of which have been read, are not as they were saved.

    Raises:
        ValueError: If they are not.
    """
    values = {name: entry.value for name, entry in entries.items() if name != "digest"}
    # Those of version 1 have no fingerprint.
    if "digest" in entries and digest(values) != entries["digest"].text():
        raise entries["digest"].wrong(
            "must be the fingerprint of all other entries; some of them are not as they were saved"
        )


def check_counts(
    entries: Mapping[str, Entry], held: Held, facts: Facts, subjects: Sequence[Subject]
) -> None:
    """Refuse a checkpoint that keeps other numbers of weights than the update that it tells of.

    Args:
        entries: Its entries, of which those that tell of what holds, and when, have been read.
        held: What holds.
        facts: The numbers of the last update.
        subjects: The layers that are pruned.

    Raises:
        ValueError: If it does.
    """
    counts, masks, done = entries["facts"]["counts"], entries["hold"]["masks"], entries["done"]
    if done.whole(least=-1) < 0:
        if any(count.kept != count.parameters for count in facts.counts):
            raise counts.wrong("must tell that all is kept, as before the first update")
        sizes = {
            name: prod([size.whole() for size in shape.items()])
            for name, shape in entries["shapes"].mapping().items()
        }
        if any(kept != sizes[name] for name, kept in held.kept.items()):
            raise masks.wrong("must keep all weights, as before the first update")
        return
    if [(c.name, c.tasks) for c in facts.counts] != [(s.name, s.tasks) for s in subjects]:
        raise counts.wrong(f"must tell of the {len(subjects)} layers that are pruned, in order")
    if facts.history and facts.history[-1].step != done.value:
        raise entries["facts"]["history"].wrong(f"must end at step {done.value}, the last update")
    for count in facts.counts:
        kept = held.kept.get(count.name, count.parameters)
        if kept != count.kept:
            mask = masks.mapping().get(count.name, masks)
            raise mask.wrong(f"must keep {count.kept} weights, as the last update did, not {kept}")


def check_promise(entries: Mapping[str, Entry], facts: Facts, promised: Sequence[Quota]) -> None:
    """Refuse a checkpoint that keeps other numbers of weights than its method does.

    Args:
        entries: Its entries.
        facts: The numbers of the last update.
        promised: What the method promises of them.

    Raises:
        ValueError: If it does.
    """
    for quota in promised:
        rows = [facts.counts[place] for place in quota.layers]
        kept = sum(row.kept for row in rows)
        if kept != quota.keep:
            where = f"of '{rows[0].name}'" if len(rows) == 1 else f"in {len(rows)} layers"
            raise entries["hold"].wrong(
                f"must keep {quota.keep} weights {where}, as its method does at step "
                f"{entries['done'].value}, not {kept}"
            )


def random_state(entry: Entry) -> Tensor:
    """The state of a generator.

    Raises:
        ValueError: If no generator can go on from it.
    """
    state = entry.tensor((entry.size(),), torch.uint8).cpu()
    try:
        torch.Generator().set_state(state)
    except RuntimeError as error:
        raise entry.wrong("must be the state of a torch.Generator") from error
    return state


def _upgraded(state: Mapping[str, Any], method: str) -> dict[str, Any]:
    """A state of version 1 as one of the present version."""
    new = {
        name: value
        for name, value in state.items()
        if name not in ("masks", "soft", "loose", "ranks", "digest")
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
    new["led"] = None
    later = {"single": None, "nobody": None}
    new["facts"] = {
        **state["facts"],
        "counts": [{**later, **count} for count in state["facts"]["counts"]],
    }
    new["version"] = VERSION
    return new


def _without_sparsity(method: str) -> str:
    """A vote whose sparsity its pattern fixes, which version 1 wrote out and later ones do not."""
    fixed = "granularity=NM(" in method
    return re.sub(r"^Vote\(sparsity=[^,]+, ", "Vote(", method) if fixed else method


def _check_same(entries: Mapping[str, Entry], mine: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of other tasks, layers or another method."""
    theirs = {
        "version": entries["version"].whole(),
        "tasks": [task.text() for task in entries["tasks"].items()],
        "shapes": {
            name: [size.whole() for size in shape.items()]
            for name, shape in entries["shapes"].mapping().items()
        },
        "method": entries["method"].text(),
    }
    for key, own in mine.items():
        if theirs[key] != own:
            difference = _difference(theirs[key], own)
            raise ValueError(f"This checkpoint is of a pruner with other {key}: {difference}")


def _difference(theirs: object, mine: object) -> str:
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        theirs = {k: v for k, v in theirs.items() if mine.get(k) != v} or sorted(theirs)
        mine = {k: mine.get(k) for k in theirs} if isinstance(theirs, dict) else sorted(mine)
    return f"it has {theirs}, this one {mine}."
