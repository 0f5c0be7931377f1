import pytest
import torch

from mtprune.bits import pack_bits
from mtprune.observing.stability import Stability, iou
from mtprune.reading import Entry

SIZE = 1_000


def mask(wrong=0, device="cpu"):
    """500 of 1,000 weights, ``wrong`` of them others than usual."""
    result = torch.zeros(SIZE, dtype=torch.bool, device=device)
    result[wrong : 500 + wrong] = True
    return result


def watch(masks_at, most=100):
    """Where masks are looked at, and at how many observations it is enough."""
    stability, looked = Stability(), []
    for n in range(1, most):

        def masks(n=n):
            looked.append(n)
            return [masks_at(n)]

        if stability.enough(n, masks):
            return stability, looked, n
    raise AssertionError("never enough")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        pytest.param(([1, 1, 0], [1, 1, 0]), 1.0, id="same"),
        pytest.param(([1, 1, 0], [0, 1, 1]), 1 / 3, id="one of three"),
        pytest.param(([1, 0, 0], [0, 1, 1]), 0.0, id="disjoint"),
        pytest.param(([0, 0, 0], [0, 0, 0]), 1.0, id="both empty"),
        pytest.param(([1] * 19, [1] * 18 + [0]), 18 / 19, id="more than one byte"),
    ],
)
def test_overlap_of_packed_masks(rows, expected, device):
    one, two = (torch.tensor(row, dtype=torch.bool, device=device) for row in rows)
    assert iou([pack_bits(one)], [pack_bits(two)]) == pytest.approx(expected)


def test_overlap_is_summed_over_layers():
    one = [torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool)]
    two = [torch.ones(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)]
    assert iou([pack_bits(m) for m in one], [pack_bits(m) for m in two]) == 0.5


def test_masks_that_never_change_are_enough_at_four(device):
    stability, looked, n = watch(lambda n: mask(device=device))
    assert (n, stability.stable) == (4, True)
    assert looked == [2, 3, 4]


def test_masks_that_settle_are_enough_when_they_equal_those_from_half_as_many():
    # Unsettled below 7: at 8 it is 8 against 4, at 12 it is 12 against 6, at 16 16 against 8.
    stability, looked, n = watch(lambda n: mask(wrong=0 if n >= 7 else 30 * n))
    assert (n, stability.stable) == (16, True)
    assert looked == [2, 3, 4, 6, 8, 12, 16]


def test_masks_that_never_settle_are_taken_at_64_and_said_not_to_be_stable():
    stability, looked, n = watch(lambda n: mask(wrong=7 * n))
    assert (n, stability.stable) == (64, False)
    assert looked == [2, 3, 4, 6, 8, 12, 16, 24, 32, 48]


@pytest.mark.parametrize(
    ("wrong", "stable"),
    [pytest.param(2, True, id="498 of 502"), pytest.param(3, False, id="497 of 503")],
)
def test_alike_is_more_than_99_percent(wrong, stable):
    stability = Stability()
    assert not stability.enough(2, lambda: [mask()])
    assert stability.enough(4, lambda: [mask(wrong)]) is stable
    assert stability.stable is stable


def test_once_stable_masks_are_not_asked_for_again():
    stability, _, _ = watch(lambda n: mask())
    assert stability.enough(6, lambda: pytest.fail("asked again"))


def test_asking_twice_at_the_same_number_compares_nothing_with_itself():
    stability = Stability()
    assert not stability.enough(4, lambda: [mask()])
    assert not stability.enough(4, lambda: pytest.fail("asked again"))
    assert stability.stable is None


def test_it_resumes_from_its_state_dict(tmp_path):
    first = Stability()
    for n in (2, 3, 4, 6, 8):
        first.enough(n, lambda n=n: [mask(wrong=0 if n >= 6 else 50 * n)])
    torch.save(first.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    second = Stability.read(Entry(state, "This checkpoint", ""))
    assert second.stable is False
    assert first.enough(12, lambda: [mask()])
    assert second.enough(12, lambda: [mask()])
