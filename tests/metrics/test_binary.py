import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from mtprune.metrics import Binary


def measure(metric, outputs, targets):
    metric.update(torch.as_tensor(outputs), torch.as_tensor(targets))
    return metric.compute()


def test_by_hand():
    # Pairs (positive, negative): 2 > 1, 2 > -1, 0.5 < 1, 0.5 > -1, and two more with a tie.
    result = measure(Binary(), [2.0, 0.5, -1.0, 1.0, -1.0], [1, 1, 1, 0, 0])
    assert result == {
        "accuracy": 3 / 5,
        "balanced_accuracy": pytest.approx((2 / 3 + 1 / 2) / 2),
        "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1)),
        "roc_auc": pytest.approx(3.5 / 6),
    }


def test_labels_that_do_not_vary_are_left_out_of_means():
    outputs = [[1.0, 1.0], [-1.0, 1.0]]
    result = measure(Binary(2), outputs, [[1, 0], [0, 0]])
    assert result == {"accuracy": 0.5, "balanced_accuracy": 1, "f1": 1, "roc_auc": 1}


def test_nothing_varies():
    with pytest.raises(ValueError, match=r"^Binary: no label has both positive and negative"):
        measure(Binary(2), [[1.0, 1.0]], [[1, 0]])


def test_the_threshold_of_probabilities():
    result = measure(Binary(threshold=0.5), [0.9, 0.4], [1.0, 0.0])
    assert result["accuracy"] == 1
    assert measure(Binary(), [0.9, 0.4], [1.0, 0.0])["accuracy"] == 0.5


def test_a_tiny_score_is_above_zero():
    # It is 0 in float16.
    assert measure(Binary(), [1e-9, -1e-9], [1, 0])["accuracy"] == 1


def test_pixels_are_answers():
    torch.manual_seed(0)
    outputs, targets = torch.randn(2, 1, 4, 5), torch.randint(2, (2, 1, 4, 5))
    result = measure(Binary(), outputs, targets)
    assert measure(Binary(), outputs.squeeze(1), targets.squeeze(1)) == result
    assert measure(Binary(), outputs.flatten(), targets.flatten()) == result


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_agrees_with_scikit_learn(dtype):
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 2, (400, 3))
    outputs = torch.tensor(draw.normal(size=targets.shape) + targets).to(dtype)
    result = measure(Binary(3), outputs, targets)
    scores = outputs.double().numpy()
    picked = scores > 0
    by_label = [(targets[:, i], picked[:, i]) for i in range(3)]
    assert result["accuracy"] == pytest.approx(accuracy_score(targets.ravel(), picked.ravel()))
    assert result["balanced_accuracy"] == pytest.approx(
        np.mean([balanced_accuracy_score(*pair) for pair in by_label])
    )
    assert result["f1"] == pytest.approx(np.mean([f1_score(*pair) for pair in by_label]))
    exact = roc_auc_score(targets, scores)
    assert result["roc_auc"] == pytest.approx(exact, abs=1e-12 if dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1, 1e4])
def test_the_area_is_within_its_bound(scale):
    draw = np.random.default_rng(1)
    targets = draw.integers(0, 2, 500)
    scores = torch.tensor(scale * (draw.normal(size=500) + targets), dtype=torch.float32)
    rounded = scores.half().double().numpy()
    exact, plus, minus = scores.double().numpy(), targets == 1, targets == 0
    alike = (rounded[plus][:, None] == rounded[minus]) & (exact[plus][:, None] != exact[minus])
    error = abs(measure(Binary(), scores, targets)["roc_auc"] - roc_auc_score(targets, exact))
    assert error <= alike.mean() / 2 + 1e-12


def test_all_float16_values_are_in_order():
    # Pairs of neighbours, of which the larger one is the positive.
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()].float().unique()
    assert len(values) > 63_000
    below_zero = int((values < 0).sum())
    for index in (*range(0, len(values) - 1, 997), below_zero - 1, below_zero, len(values) - 2):
        pair = values[index : index + 2]
        assert measure(Binary(), pair, torch.tensor([0, 1]))["roc_auc"] == 1
    assert measure(Binary(), torch.tensor([0.0, -0.0]), torch.tensor([1, 0]))["roc_auc"] == 0.5


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        pytest.param([0.0, 0.0], [0, 2], "1 targets are neither 0 nor 1, nor ign", id="target"),
        pytest.param([0.0, 0.0], [0.0, float("nan")], "1 targets are neither", id="nan target"),
        pytest.param([0.0, float("nan")], [0, 1], "1 scores are NaN", id="nan score"),
        pytest.param([0.0], [[0]], r"`labels`=1. Got \[1\] and \[1, 1\]", id="other shape"),
        pytest.param(0.0, 0, r"`labels`=1. Got \[\] and \[\]", id="scalar"),
    ],
)
def test_what_is_not_yes_or_no_is_refused(outputs, targets, message):
    with pytest.raises(ValueError, match=f"^Binary: .*{message}"):
        Binary().update(torch.tensor(outputs), torch.tensor(targets))


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match=r"`labels`=3. Got \[4, 2\] and \[4, 2\]"):
        Binary(3).update(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"`labels` must be at least 1. Got 0"):
        Binary(0)
