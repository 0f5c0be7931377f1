"""What is read is looked at: each entry gives what is expected, or one kind of error."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtprune.reading import Entry

TREE = {
    "step": 3,
    "share": 0.5,
    "flag": True,
    "name": "seg",
    "none": None,
    "list": [1, 2],
    "mask": torch.tensor([5], dtype=torch.uint8),
    "deep": {"a": {"b": -1}},
}


def entry(value: object = TREE) -> Entry:
    return Entry(value, "This checkpoint", "Take another.")


def test_right_values_come_as_they_are() -> None:
    tree = entry()
    assert tree["step"].whole() == 3
    assert tree["share"].number(0, 1) == 0.5
    assert tree["step"].number() == 3.0
    assert tree["flag"].flag() is True
    assert tree["name"].text(("seg", "depth")) == "seg"
    assert tree["none"].optional(Entry.whole) is None
    assert tree["step"].optional(Entry.whole) == 3
    assert [part.whole() for part in tree["list"].items(2)] == [1, 2]
    assert tree["mask"].tensor((1,), torch.uint8) is TREE["mask"]
    assert set(tree.fields(["step"], optional=TREE)) == set(TREE)
    assert tree["deep"].mapping(["a"])["a"]["b"].whole(least=-2) == -1


WRONG: list[tuple[object, Callable[[Entry], Any], str]] = [
    (True, Entry.whole, "must be a whole number, at least 0. Got True."),
    (2.0, Entry.whole, "must be a whole number, at least 0. Got 2.0."),
    (-1, Entry.whole, "must be a whole number, at least 0. Got -1."),
    (9, lambda e: e.whole(1, 8), "must be a whole number, from 1 to 8. Got 9."),
    (1 << 70, Entry.whole, "must be a whole number, at least 0."),
    (1 << 9000, Entry.whole, "at least 0. Got a number of 9001 bits."),
    (math.nan, Entry.number, "must be a finite number. Got nan."),
    (math.inf, Entry.number, "must be a finite number. Got inf."),
    (-(10**400), Entry.number, "must be a finite number. Got a number of 1329 bits."),
    ("1", Entry.number, "must be a finite number. Got '1'."),
    (2, lambda e: e.number(0, 1), "must be a finite number in [0, 1]. Got 2."),
    (1, Entry.flag, "must be True or False. Got 1."),
    (b"seg", Entry.text, "must be a string. Got b'seg'."),
    ("x", lambda e: e.text(("seg",)), "must be one of ['seg']. Got 'x'."),
    ([1], Entry.mapping, "must be a mapping with strings for keys. Got [1]."),
    ({1: 2}, Entry.mapping, "must be a mapping with strings for keys. Got a mapping with ['1']."),
    ({"a": 1}, lambda e: e.mapping(["b"]), "must have keys among ['b'], not ['a']."),
    ({"a": 1}, lambda e: e["b"], "must be a mapping that has 'b'. Got a mapping with ['a']."),
    ({"a": 1}, lambda e: e.fields("b"), "must have ['b'] besides and none of ['a']."),
    ("ab", Entry.items, "must be a list. Got 'ab'."),
    ([1], lambda e: e.items(2), "must be a list of 2. Got [1]."),
    (list(range(99)), lambda e: e.items(2), "must be a list of 2. Got a list of 99."),
    ([1.0], Entry.tensor, "must be a dense tensor. Got [1.0]."),
    (
        torch.zeros(2),
        lambda e: e.tensor((3,)),
        "of shape (3,). Got a float32 tensor of shape (2,).",
    ),
    (torch.zeros(2), lambda e: e.tensor(dtype=torch.bool), "must be a dense bool tensor. Got"),
    (torch.eye(2).to_sparse(), Entry.tensor, "Got a sparse float32 tensor of shape (2, 2)."),
    (torch.zeros(2, device="meta"), Entry.tensor, "must be a dense tensor."),
    (torch.tensor([math.nan]), Entry.tensor, "must be finite in every entry."),
    ("x" * 500, Entry.whole, f"Got '{'x' * 99}… (str). Take another."),
]


@pytest.mark.parametrize(("value", "read", "message"), WRONG)
def test_wrong_values_are_one_kind_of_error(
    value: object, read: Callable[[Entry], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(entry({"deep": [value]})["deep"].items()[0])
    assert str(caught.value).startswith("This checkpoint: 'deep.0' must")
    assert str(caught.value).endswith("Take another.")


def test_numbers_may_be_infinite_where_a_reader_says_so() -> None:
    assert entry(torch.tensor([math.inf])).tensor(finite=False).tolist() == [math.inf]


def test_the_whole_of_it_has_no_path() -> None:
    with pytest.raises(
        ValueError, match=r"^This checkpoint: it must be a list\. Got 3\. Take another"
    ):
        entry(3).items()
