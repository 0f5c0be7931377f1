"""Checkpoints that are damaged, or were never any: one error, and nothing has changed."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

import mtprune
from mtprune import recipes
from tests import checkpoints, hostile


@pytest.fixture(params=hostile.KINDS)
def kind(request):
    return request.param


@cache
def state_of(kind, backend="prune"):
    return hostile.checkpoint(kind, backend)


def test_as_it_was_saved_it_is_taken(kind, backend):
    run = hostile.start(kind, backend, seed=1)
    run.pruner.load_state_dict(state_of(kind, backend))
    assert hostile.alike(run.pruner.state_dict(), state_of(kind, backend))


@pytest.mark.slow
@pytest.mark.parametrize("sealed", [False, True], ids=["damaged", "hostile"])
def test_tampered_ones_are_refused_or_sound(kind, sealed):
    found = [hostile.outcome(kind, state_of(kind), seed, sealed=sealed) for seed in range(6)]
    assert [one for one in found if one[0] not in ("refused", "sound")] == []
    if not sealed:
        assert {what for what, _ in found} == {"refused"}


def refused(state, message, kind="gradual"):
    run = hostile.start(kind, seed=1).train(5)
    before = hostile.everything(run)
    with pytest.raises(ValueError, match=message):
        run.pruner.load_state_dict(state)
    assert hostile.alike(hostile.everything(run), before)


def test_damage_is_seen_and_named():
    state = copy.deepcopy(state_of("gradual"))
    state["step"] += 1
    refused(state, r"This checkpoint: 'digest' must be the fingerprint of all other entries")
    state["step"] -= 1
    bits = next(iter(state["hold"]["masks"].values()))
    bits[0] ^= 1
    message = r"'hold\.masks\.trunk\.0\.weight' must keep \d+ weights, as the last update did, not"
    refused(checkpoints.resealed(state), message)
    del state["digest"]
    refused(state, r"must be a mapping that has 'digest'")


def change(path, value):
    state = copy.deepcopy(state_of("gradual"))
    *way, last = path
    inner = state
    for key in way:
        inner = inner[key]
    inner[last] = value(inner[last]) if callable(value) else value
    return checkpoints.resealed(state)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("step",),
            "5",
            r"'step' must be a whole number, at least 0\. Got '5'\. Load the state_di",
        ),
        (("done",), -2, r"'done' must be a whole number, at least -1\. Got -2"),
        (("singly",), 1, r"'singly' must be True or False\. Got 1"),
        (("users", "a"), torch.ones(1), r"'users\.a' must be a dense bool tensor of shape"),
        (("led",), torch.ones(1), "'led' must be a dense bool tensor of shape"),
        (
            ("facts", "counts", 0, "kept"),
            -1,
            r"'facts\.counts\.0\.kept' must be a whole number, fr",
        ),
        (("facts", "counts", 0, "name"), "x", r"'facts\.counts\.0\.name' must be one of"),
        (("hold", "masks"), {}, r"'hold\.masks' must keep \d+ weights, as the last update did, no"),
        (
            ("hold", "masks", "trunk.0.weight"),
            lambda bits: bits[:-1],
            r"'hold\.masks\.trunk\.0\.weight' must be a dense uint8 tensor of shape \(\d+,\)",
        ),
        (("evidence", "counts"), {"c": 1}, r"'evidence\.counts' must have keys among \['a', 'b'\]"),
        (("evidence", "statistics"), {"x": {}}, r"'evidence\.statistics' must have keys among"),
        (
            ("generator",),
            torch.zeros(3, dtype=torch.uint8),
            r"'generator' must be the state of a t",
        ),
        (("memory",), [1], r"'memory' must be a mapping with strings for keys"),
        (("shapes",), {}, r"This checkpoint is of a pruner with other shapes: it has \[\]"),
    ],
)
def test_what_is_wrong_is_named(path, value, message):
    refused(change(path, value), message)


def test_bits_after_the_last_weight_are_no_room_for_anything():
    def pruner():
        model = nn.Linear(3, 3)
        return mtprune.MultitaskPruner(model, ["a"], method=recipes.magnitude(0.5)), model

    first, model = pruner()
    first.observe_losses({"a": model(torch.ones(2, 3)).sum()})
    first.step()
    state = first.state_dict()
    state["hold"]["masks"]["weight"][1] |= 128
    second, _ = pruner()
    with pytest.raises(
        ValueError, match=r"'hold\.masks\.weight' must have 9 bits, and zeros after"
    ):
        second.load_state_dict(checkpoints.resealed(state))
    assert second.sparsity == 0.0


def test_one_of_version_1_that_is_broken_is_refused_as_such():
    refused(
        {"version": 1, "method": 3, "evidence": None}, r"says that it is of version 1, and is n"
    )
