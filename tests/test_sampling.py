"""Whose batch comes next."""

import re
from collections import Counter
from itertools import islice

import pytest
import torch

from mtprune.sampling import HOW, sample_tasks, shares

SIZES = {"big": 8100, "middle": 1600, "small": 100}
EVERY_WAY = pytest.mark.parametrize("how", HOW)


def first(n, *args, **options):
    return list(islice(sample_tasks(*args, **options), n))


@pytest.mark.parametrize(
    ("how", "temperature", "expected"),
    [
        ("proportional", 2.0, [81 / 98, 16 / 98, 1 / 98]),
        ("temperature", 1.0, [81 / 98, 16 / 98, 1 / 98]),
        ("temperature", 2.0, [9 / 14, 4 / 14, 1 / 14]),
        ("temperature", 4.0, [3 / 6, 2 / 6, 1 / 6]),
        ("temperature", 1e9, [1 / 3, 1 / 3, 1 / 3]),
        ("uniform", 2.0, [1 / 3, 1 / 3, 1 / 3]),
        ("round_robin", 2.0, [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_shares_are_as_written_down(how, temperature, expected):
    found = shares(SIZES, how, temperature=temperature)
    assert list(found) == list(SIZES)
    assert list(found.values()) == pytest.approx(expected, abs=1e-8)


@EVERY_WAY
def test_steps_come_in_these_shares(how):
    n = 20_000
    counts = Counter(first(n, SIZES, how))
    for task, share in shares(SIZES, how).items():
        assert abs(counts[task] - n * share) <= 4 * (n * share * (1 - share)) ** 0.5


def test_in_turn_is_exactly_in_turn():
    assert first(7, SIZES, "round_robin") == [*SIZES, *SIZES, "big"]
    assert set(Counter(first(999, SIZES, "round_robin")).values()) == {333}


@EVERY_WAY
@pytest.mark.parametrize("start", [0, 1, 17])
def test_a_run_goes_on_at_any_step(how, start):
    def seeded():
        return torch.Generator().manual_seed(3)

    whole = first(60, SIZES, how, generator=seeded())
    assert first(60 - start, SIZES, how, generator=seeded(), start=start) == whole[start:]


def test_the_generator_alone_decides():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = first(50, SIZES, "uniform")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert first(50, SIZES, "uniform") == one
    assert first(50, SIZES, "uniform", generator=torch.Generator().manual_seed(1)) != one


def test_one_task_is_always_next():
    for how in HOW:
        assert first(3, {"only": 5}, how) == ["only"] * 3


def test_huge_sizes_do_not_overflow():
    assert shares({"a": 10**400, "b": 10**400}, "proportional") == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "`sizes` must be a mapping task -> number of examples. Got {}."),
        ((["a"],), "`sizes` must be a mapping task -> number of examples. Got ['a']."),
        (({"rte": 0},), "`sizes` of task 'rte' must be a whole number of examples, at least 1."),
        (({"rte": 2.5},), "`sizes` of task 'rte' must be a whole number"),
        (({"rte": 2}, "random"), "`how` must be one of"),
    ],
)
def test_what_is_refused_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sample_tasks(*arguments)


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan"), True])
def test_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="`temperature` must be a positive number"):
        sample_tasks(SIZES, "temperature", temperature=temperature)


@pytest.mark.parametrize("start", [-1, 1.5, True])
def test_start_is_a_step(start):
    with pytest.raises(ValueError, match="`start` must be a whole number of steps"):
        sample_tasks(SIZES, start=start)
