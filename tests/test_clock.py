import pytest

from mtprune import Cubic, Linear, OneShot, Regrow
from mtprune.observing.clock import Clock


def clock(schedule, step, done=-1, opening=False):
    result = Clock(schedule, opening)
    result.step, result.done = step, done
    return result


def test_a_new_clock_stands_at_zero_with_nothing_done():
    fresh = Clock(OneShot(), opening=False)
    assert (fresh.step, fresh.done, fresh.next, fresh.due()) == (0, -1, 0, 0)


@pytest.mark.parametrize(
    ("step", "done", "due"),
    [
        pytest.param(9, -1, None, id="before begin"),
        pytest.param(10, -1, 10, id="on time"),
        pytest.param(10, 10, None, id="once only"),
        pytest.param(19, 10, None, id="between"),
        pytest.param(23, 10, 20, id="late"),
        pytest.param(34, -1, 30, id="late ones coalesce"),
        pytest.param(99, -1, 35, id="all of them, into the last"),
        pytest.param(99, 35, None, id="all done"),
    ],
)
@pytest.mark.parametrize("kind", [Linear, Cubic])
def test_which_update_is_due(kind, step, done, due):
    # Updates at 10, 20, 30 and 35.
    assert clock(kind(begin=10, end=35, every=10), step, done).due() == due


@pytest.mark.parametrize(
    ("step", "done", "due"),
    [
        pytest.param(0, -1, 0, id="the draw"),
        pytest.param(57, -1, 0, id="the draw is never skipped, however late"),
        pytest.param(57, 0, 50, id="but late exchanges coalesce"),
        pytest.param(57, 50, None, id="once only"),
        pytest.param(500, 50, 90, id="the last below end"),
    ],
)
def test_catching_up_makes_the_first_update_on_its_own(step, done, due):
    assert clock(Regrow(every=10, end=100), step, done, opening=True).due() == due


def test_without_catching_up_a_late_first_update_coalesces_too():
    assert clock(Regrow(every=10, end=100), 57).due() == 50


def test_a_run_makes_every_update_once():
    schedule = Cubic(begin=3, end=20, every=5)
    running = Clock(schedule, opening=False)
    made = []
    for _ in range(40):
        running.step += 1
        if (update := running.due()) is not None:
            made.append((running.step, update))
            running.done = update
    assert made == [(3, 3), (8, 8), (13, 13), (18, 18), (20, 20)]
    assert running.next is None


@pytest.mark.parametrize(
    ("step", "lead", "near"),
    [(96, 3, False), (97, 3, True), (100, 0, True), (99, 0, False), (140, 0, True)],
)
def test_near_is_within_the_lead_or_due(step, lead, near):
    assert clock(OneShot(100), step).near(lead) is near


def test_nothing_is_near_when_all_is_done():
    assert not clock(OneShot(100), 100, done=100).near(10)


@pytest.mark.parametrize(
    ("schedule", "step", "done", "overdue"),
    [
        pytest.param(OneShot(100), 1_099, -1, False, id="single: 999 steps late"),
        pytest.param(OneShot(100), 1_100, -1, True, id="single: 1,000 steps late"),
        pytest.param(OneShot(100), 9_999, 100, False, id="single: done"),
        pytest.param(Cubic(10, 35, 10), 29, 10, False, id="the next has not come"),
        pytest.param(Cubic(10, 35, 10), 30, 10, True, id="the next has come"),
        pytest.param(Cubic(10, 35, 10), 34, 20, False, id="before the last"),
        pytest.param(Cubic(10, 35, 10), 35, 20, True, id="the last has come"),
        pytest.param(Cubic(10, 35, 10), 1_034, 30, False, id="the last: 999 steps late"),
        pytest.param(Cubic(10, 35, 10), 1_035, 30, True, id="the last: 1,000 steps late"),
    ],
)
def test_an_update_is_overdue_when_the_next_arrives_or_after_a_thousand_steps(
    schedule, step, done, overdue
):
    assert clock(schedule, step, done).overdue() is overdue
