from fractions import Fraction

import pytest
import torch

from mtprune import testing, votes
from tests import oracles

VOTES = {
    "unanimous": votes.unanimous,
    "majority": votes.majority,
    "at_least(1)": votes.at_least(1),
    "at_least(2)": votes.at_least(2),
    "at_least(3)": votes.at_least(3),
    "at_least(4)": votes.at_least(4),
    "mean": votes.mean,
    "intersection": votes.intersection,
}
EVERY_VOTE = pytest.mark.parametrize("name", VOTES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unanimous", [0.75, 0.5, 0.75]),
        ("majority", [0.25, 0.5, 0.5]),
        ("at_least(1)", [0.0, 0.5, 0.0]),
        ("at_least(2)", [0.25, 0.5, 0.5]),
        ("at_least(3)", [0.75, 0.5, 0.75]),
        ("at_least(4)", [0.75, 0.5, 0.75]),  # asks for all where there are fewer
        ("intersection", [0.0, 0.5, 0.0]),
    ],
)
def test_three_tasks_vote_on_three_weights(name, expected, device):
    percentiles = torch.tensor([[0.75, 0.5, 0.0], [0.0, 0.5, 0.75], [0.25, 0.5, 0.5]])
    assert VOTES[name](percentiles.to(device)).tolist() == expected


def test_mean_is_the_average():
    percentiles = torch.tensor([[0.75, 0.5, 0.0], [0.0, 0.5, 0.75], [0.0, 0.5, 0.0]])
    assert votes.mean(percentiles).tolist() == [0.25, 0.5, 0.25]


def test_an_even_split_is_no_majority():
    # Two of four would prune at any cut in (0.25, 0.5]: not more than half, so it stays worth 0.5.
    assert votes.majority(torch.tensor([[0.0], [0.25], [0.5], [0.75]])).item() == 0.5


@EVERY_VOTE
@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 12])
def test_every_vote_is_what_counting_marks_at_every_cut_gives(name, voters, device):
    # Sixteenths, so that fractions and floats are the same numbers.
    generator = torch.Generator().manual_seed(voters)
    marks = torch.randint(0, 16, (voters, 40), generator=generator)
    worth = VOTES[name](marks.to(device, torch.float64) / 16)
    expected = [
        float(oracles.VOTES[name](tuple(Fraction(m, 16) for m in column)))
        for column in marks.T.tolist()
    ]
    assert worth.tolist() == pytest.approx(expected, abs=1e-13)


@EVERY_VOTE
def test_no_vote_depends_on_the_order_of_the_tasks_by_a_single_bit(name):
    percentiles = torch.rand(5, 200, dtype=torch.float64)
    worth = VOTES[name](percentiles)
    for _ in range(10):
        assert torch.equal(VOTES[name](percentiles[torch.randperm(5)]), worth)


@EVERY_VOTE
def test_every_vote_is_a_vote(name):
    testing.check_vote(VOTES[name])


@EVERY_VOTE
def test_a_single_voter_has_its_way(name):
    percentiles = torch.rand(1, 50, dtype=torch.float64)
    assert torch.equal(VOTES[name](percentiles), percentiles[0])


@pytest.mark.parametrize("m", [0, -1, 1.0, True, "2", None])
def test_at_least_wants_a_whole_positive_number(m):
    with pytest.raises(ValueError, match=r"`m` must be a whole number of tasks, at least 1\. Got"):
        votes.at_least(m)
