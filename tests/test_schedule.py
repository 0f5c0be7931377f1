import math

import pytest

from mtprune import Cubic, Linear, OneShot, Regrow

GRADUAL = pytest.mark.parametrize("kind", [Linear, Cubic])


def updates(schedule):
    steps, after = [], -1
    while (step := schedule.next_update(after)) is not None:
        assert step > after
        steps.append(step)
        after = step
    return steps


@pytest.mark.parametrize("at", [0, 1, 500])
def test_one_shot_is_one_update_with_all_of_it(at):
    schedule = OneShot(at)
    assert updates(schedule) == [at]
    assert schedule.progress(at) == 1.0


@GRADUAL
@pytest.mark.parametrize(
    ("begin", "end", "every", "expected"),
    [
        pytest.param(10, 30, 10, [10, 20, 30], id="end on the grid"),
        pytest.param(10, 35, 10, [10, 20, 30, 35], id="end off the grid"),
        pytest.param(0, 3, 1, [0, 1, 2, 3], id="every step"),
        pytest.param(5, 6, 100, [5, 6], id="fewer steps than every"),
        pytest.param(7, 7, 3, [7], id="begin is end"),
    ],
)
def test_gradual_schedules_update_from_begin_on_and_always_at_end(
    kind, begin, end, every, expected
):
    schedule = kind(begin=begin, end=end, every=every)
    assert updates(schedule) == expected
    assert schedule.progress(end) == 1.0
    for step in range(-1, end + 5):
        later = [t for t in expected if t > step]
        assert schedule.next_update(step) == (later[0] if later else None)


def test_linear_progress_is_the_share_of_the_way():
    schedule = Linear(begin=100, end=300, every=50)
    steps = (0, 100, 150, 200, 300, 10_000)
    assert [schedule.progress(t) for t in steps] == [0.0, 0.0, 0.25, 0.5, 1.0, 1.0]


def test_cubic_progress_has_its_closed_form():
    schedule = Cubic(begin=100, end=300, every=50)
    assert [schedule.progress(t) for t in (0, 100, 200, 300)] == [0.0, 0.0, 0.875, 1.0]
    for step in range(100, 301):
        left = (300 - step) / 200
        assert schedule.progress(step) == pytest.approx(1 - left**3, abs=1e-12)


@GRADUAL
def test_progress_never_falls(kind):
    schedule = kind(begin=3, end=57, every=7)
    ways = [schedule.progress(t) for t in range(70)]
    assert ways == sorted(ways)


@pytest.mark.parametrize(
    ("every", "end", "expected"),
    [
        pytest.param(10, 40, [0, 10, 20, 30], id="end on the grid is left out"),
        pytest.param(10, 41, [0, 10, 20, 30, 40], id="end off the grid"),
        pytest.param(50, 50, [0], id="only the first draw"),
        pytest.param(1, 3, [0, 1, 2], id="every step"),
    ],
)
def test_regrow_updates_at_zero_and_then_below_end(every, end, expected):
    schedule = Regrow(every=every, end=end)
    assert updates(schedule) == expected
    assert {schedule.progress(t) for t in expected} == {1.0}


@pytest.mark.parametrize("fraction", [0.3, 0.5, 1.0])
def test_what_regrow_exchanges_falls_to_zero_by_a_cosine(fraction):
    schedule = Regrow(every=10, end=1_000, fraction=fraction)
    assert schedule.fraction_at(0) == fraction
    assert schedule.fraction_at(500) == pytest.approx(fraction / 2, rel=1e-12)
    assert schedule.fraction_at(1_000) == 0.0
    assert schedule.fraction_at(2_000) == 0.0
    third = fraction / 2 * (1 + math.cos(math.pi / 4))
    assert schedule.fraction_at(250) == pytest.approx(third, rel=1e-12)


@pytest.mark.parametrize("value", [-1, 1.0, True, "10", None])
@pytest.mark.parametrize(
    ("name", "build"),
    [
        pytest.param("at", lambda v: OneShot(v), id="OneShot at"),
        pytest.param("begin", lambda v: Linear(v, 10, 1), id="Linear begin"),
        pytest.param("end", lambda v: Cubic(0, v, 1), id="Cubic end"),
        pytest.param("every", lambda v: Cubic(0, 10, v), id="Cubic every"),
        pytest.param("every", lambda v: Regrow(every=v, end=10), id="Regrow every"),
        pytest.param("end", lambda v: Regrow(every=1, end=v), id="Regrow end"),
    ],
)
def test_steps_are_whole_numbers(name, build, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be a whole number, at least \d\. Got"):
        build(value)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: Linear(0, 10, 0), id="Linear"),
        pytest.param(lambda: Cubic(0, 10, 0), id="Cubic"),
        pytest.param(lambda: Regrow(every=0, end=10), id="Regrow"),
    ],
)
def test_an_update_every_zero_steps_is_refused(build):
    with pytest.raises(ValueError, match=r"`every` must be a whole number, at least 1\. Got 0"):
        build()


@GRADUAL
def test_a_schedule_that_ends_before_it_begins_is_refused(kind):
    with pytest.raises(ValueError, match="ends before it begins: `begin` is 100, `end` is 10"):
        kind(begin=100, end=10, every=5)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_regrow_exchanges_a_positive_share(fraction):
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\]\. Got"):
        Regrow(every=10, end=100, fraction=fraction)
