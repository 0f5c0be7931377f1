"""Long runs are flat in memory, but for a row of the history at each update."""

import pytest

from tests import endless


def check_flat(found, steps):
    first, *_, last = found[1:]
    updates = (last.step - first.step) // endless.EVERY
    assert last.tensors <= first.tensors
    # Torch has some to itself, and does not tell when it makes them.
    assert last.objects - first.objects <= 2 * updates + 400
    return last.resident - first.resident


@pytest.mark.parametrize("name", endless.methods(1))
def test_a_run_keeps_nothing_of_its_steps_but_its_history(name):
    check_flat(endless.run(name, 1000, 5), 1000)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", endless.methods(1))
def test_a_hundred_thousand_steps_are_flat(name):
    assert check_flat(endless.run(name, 100_000, 10), 100_000) < 32  # MiB
