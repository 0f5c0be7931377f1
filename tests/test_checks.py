"""Checks of arguments: what passes, and what an error says."""

import math

import pytest
import torch

from mtprune import Cubic, OneShot, checks


@pytest.mark.parametrize(
    ("interval", "values"),
    [
        ("[0, 1)", [0, 0.0, 0.5, 0.999]),
        ("(0, 1]", [1e-300, 1, torch.tensor(0.5)]),
        ("[1, inf)", [1, 1e300]),
        ("(-inf, inf)", [-1e300, 0]),
        ("(0, inf]", [math.inf]),
    ],
)
def test_inside_an_interval(interval, values):
    for value in values:
        checks.inside("x", value, interval)


@pytest.mark.parametrize(
    ("interval", "values"),
    [
        ("[0, 1)", [-1e-300, 1, 1.0, math.nan, False, "0.5", None, [0.5]]),
        ("(0, 1]", [0, 0.0, 1.0001, True]),
        ("[1, inf)", [0.999, math.inf]),
        ("(-inf, inf)", [math.inf, -math.inf, math.nan]),
    ],
)
def test_outside_an_interval(interval, values):
    for value in values:
        with pytest.raises(ValueError, match="`x` must be in") as caught:
            checks.inside("x", value, interval)
        assert str(caught.value) == f"`x` must be in {interval}. Got {value!r}."


def test_true_is_no_number():
    checks.whole("x", 1, least=1)
    checks.number("x", 1)
    with pytest.raises(ValueError, match=r"^`x` must be a whole number, at least 1\. Got True\.$"):
        checks.whole("x", True, least=1)
    with pytest.raises(TypeError, match=r"^`x` must be a number\. Got True\.$"):
        checks.number("x", True)


@pytest.mark.parametrize(
    ("value", "hint"),
    [(90, " Did you mean 0.9?"), (2, " Did you mean 0.02?"), (1.5, ""), (1, ""), (-1, "")],
)
def test_a_percentage_is_answered_with_the_share(value, hint):
    with pytest.raises(ValueError, match="must be in") as caught:
        checks.sparsity("x", value)
    assert str(caught.value) == f"`x` must be in [0, 1). Got {value!r}.{hint}"


def test_a_class_is_no_object():
    checks.object_with("x", OneShot(), "next_update", "progress", must="must be a schedule")
    for value in (Cubic, None, "cubic"):
        with pytest.raises(TypeError, match=r"^`x` must be a schedule\. Got"):
            checks.object_with("x", value, "next_update", must="must be a schedule")


def test_which_entry_is_meant_and_what_to_know():
    with pytest.raises(ValueError, match=r"^`x` of task 'a' is a share\. Got 2: 1 is all\.$"):
        checks.inside("x", 2, "[0, 1]", of=" of task 'a'", must="is a share", why="1 is all")


def test_a_mapping_that_must_not_be_empty():
    checks.mapping("x", {}, "task -> factor")
    with pytest.raises(TypeError, match=r"^`x` must be a mapping task -> factor\. Got \[\]\.$"):
        checks.mapping("x", [], "task -> factor")
    with pytest.raises(ValueError, match=r"^`x` must be a mapping task -> size\. Got {}\.$"):
        checks.mapping("x", {}, "task -> size", filled=True)


def test_names_are_listed_as_people_list_them():
    checks.either("x", None, (None, "a", "b"))
    with pytest.raises(ValueError, match=r"^`x` must be None, 'a' or 'b'\. Got 'c'\.$"):
        checks.either("x", "c", (None, "a", "b"))
    with pytest.raises(ValueError, match=r"^`x` must be 'a', 'b' or a number\. Got 'c'\.$"):
        checks.either("x", "c", ("a", "b"), other="a number")
