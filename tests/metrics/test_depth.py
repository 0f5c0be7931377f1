import numpy as np
import pytest
import torch

from mtprune.metrics import Depth

BOTH = pytest.mark.parametrize("compat", ["disparse", "adapmtl"])


def measure(metric, outputs, targets):
    metric.update(torch.tensor(outputs), torch.tensor(targets))
    return metric.compute()


def test_two_by_two():
    # Off by 1, 0 and 2; a target of 0 is no measurement. Ratios 1.5, 1 and 2.
    result = measure(Depth(), [[[1.0, 3.0], [2.0, 9.0]]], [[[1.5, 3.0], [4.0, 0.0]]])
    assert result == {
        "absolute": pytest.approx(2.5 / 3),
        "relative": pytest.approx((1 / 3 + 0 + 1 / 2) / 3),
        "rmse": pytest.approx((4.25 / 3) ** 0.5),
        "delta1": pytest.approx(100 / 3),
        "delta2": pytest.approx(200 / 3),
        "delta3": pytest.approx(200 / 3),
    }


@pytest.mark.parametrize("prediction", [-5.0, -3.0, 0.0])
def test_no_prediction_below_zero_is_an_inlier(prediction):
    result = measure(Depth(), [[[prediction]]], [[[3.0]]])
    assert [result[f"delta{i}"] for i in (1, 2, 3)] == [0, 0, 0]


@BOTH
def test_published_negative_predictions_are_inliers(compat):
    result = measure(Depth(compat=compat), [[[-5.0]]], [[[3.0]]])
    assert [result[f"delta{i}"] for i in (1, 2, 3)] == [100, 100, 100]


@BOTH
def test_published_thresholds_are_inclusive(compat):
    assert measure(Depth(), [[[1.25]]], [[[1.0]]])["delta1"] == 0
    assert measure(Depth(compat=compat), [[[1.25]]], [[[1.0]]])["delta1"] == 100


# An image with one pixel that is off by 3, one with three pixels that are right, one without any.
UNEVEN = (
    [[[4.0, 1.0, 1.0]], [[2.0, 2.0, 2.0]], [[7.0, 7.0, 7.0]]],
    [[[1.0, 0.0, 0.0]], [[2.0, 2.0, 2.0]], [[0.0, 0.0, 0.0]]],
)


def test_pixels_weigh_the_same():
    assert measure(Depth(), *UNEVEN)["absolute"] == 3 / 4


def test_disparse_averages_images():
    result = measure(Depth(compat="disparse"), *UNEVEN)
    assert (result["absolute"], result["relative"]) == (3 / 2, 3 / 2)
    assert result["delta1"] == 75


def test_adapmtl_weighs_batches_by_their_images():
    metric = Depth(compat="adapmtl")
    outputs, targets = (torch.tensor(x) for x in UNEVEN)
    metric.update(outputs[:2], targets[:2])
    assert metric.compute()["absolute"] == 3 / 4
    # Off by 3 in the only pixel of a third image.
    metric.update(torch.tensor([[[5.0]]]), torch.tensor([[[2.0]]]))
    result = metric.compute()
    assert result["absolute"] == pytest.approx((2 * 3 / 4 + 1 * 3) / 3)
    assert result["relative"] == pytest.approx((2 * 3 / 4 + 1 * 3 / 2) / 3)
    metric.update(outputs[2:], targets[2:])
    assert metric.compute() == result


def test_a_channel_more_or_less():
    torch.manual_seed(0)
    outputs, targets = torch.rand(2, 3, 4, 5) + 1
    plain, mixed = Depth(), Depth()
    plain.update(outputs, targets)
    mixed.update(outputs[:, None], targets)
    assert mixed.compute() == plain.compute()


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_numpy(seed):
    draw = np.random.default_rng(seed)
    targets = draw.uniform(0.1, 10, (4, 1, 9, 11)).astype(np.float32)
    outputs = (targets * draw.uniform(-0.2, 2.2, targets.shape)).astype(np.float32)
    targets[draw.random(targets.shape) < 0.3] = 0
    metric = Depth()
    for p, t in zip(outputs, targets, strict=True):
        metric.update(torch.tensor(p[None]), torch.tensor(t[None]))
    p, t = outputs[targets > 0].astype(float), targets[targets > 0].astype(float)
    with np.errstate(divide="ignore"):
        ratio = np.where(p > 0, np.maximum(p / t, t / p), np.inf)
    expected = {
        "absolute": np.abs(p - t).mean(),
        "relative": (np.abs(p - t) / t).mean(),
        "rmse": np.sqrt(np.square(p - t).mean()),
        **{f"delta{i}": 100 * (ratio < 1.25**i).mean() for i in (1, 2, 3)},
    }
    assert metric.compute() == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_million_small_errors_are_not_lost():
    # A float32 sum stops growing at 2^24 times its step.
    metric = Depth()
    for _ in range(20):
        metric.update(torch.full((1, 1000, 1000), 1.1), torch.ones(1, 1000, 1000))
    assert metric.compute()["absolute"] == pytest.approx(0.1, rel=1e-6)


def test_missing_values_can_be_not_finite():
    metric = Depth(skip_nonfinite=True)
    nan, inf = float("nan"), float("inf")
    result = measure(metric, [[[1.0, nan, 7.0]]], [[[2.0, nan, inf]]])
    assert result["absolute"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_targets_that_are_not_finite_are_told(bad):
    with pytest.raises(ValueError, match=r"^Depth: 2 targets are NaN or infinite\. Write 0 where"):
        measure(Depth(), [[[1.0, 1.0, 1.0]]], [[[2.0, bad, bad]]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("skip", [False, True])
def test_predictions_that_are_not_finite_are_told_where_they_count(bad, skip):
    metric = Depth(skip_nonfinite=skip)
    with pytest.raises(ValueError, match=r"^Depth: 1 predictions are NaN or infinite where there"):
        measure(metric, [[[1.0, bad, bad]]], [[[2.0, 1.0, 0.0]]])
    assert measure(metric, [[[1.0, bad]]], [[[2.0, 0.0]]])["absolute"] == 1


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((2, 1, 3, 4), (2, 1, 4, 3)), ((2, 2, 3, 4), (2, 2, 3, 4)), ((3, 4), (3, 4)), ((2,), (2,))],
)
def test_other_shapes_are_refused(outputs, targets):
    with pytest.raises(ValueError, match=r"^Depth: outputs and targets must both be \[B, 1, H, W"):
        Depth().update(torch.ones(outputs), torch.ones(targets))
