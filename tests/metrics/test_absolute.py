import numpy as np
import pytest
import torch

from mtprune.metrics import Edges, Keypoints

BOTH = pytest.mark.parametrize("kind", [Edges, Keypoints])


@BOTH
def test_two_by_two(kind):
    metric = kind()
    metric.update(torch.tensor([[[0.5, 0.0], [1.0, 0.25]]]), torch.tensor([[[1.0, 0.0], [0, 0.0]]]))
    assert metric.compute() == {"absolute": 1.75 / 4}


@BOTH
@pytest.mark.parametrize("ignore", [255, -1, float("inf")])
def test_ignored_pixels_count_nowhere(kind, ignore):
    metric = kind(ignore=ignore)
    outputs, targets = torch.tensor([[[[0.5, 9.0]]]]), torch.tensor([[[[1.0, float(ignore)]]]])
    metric.update(outputs, targets)
    assert metric.compute() == {"absolute": 0.5}


@BOTH
def test_agrees_with_numpy(kind):
    draw = np.random.default_rng(0)
    outputs, targets = draw.random((2, 5, 1, 8, 9))
    targets[draw.random(targets.shape) < 0.3] = 255
    metric = kind(ignore=255)
    for p, t in zip(outputs, targets, strict=True):
        metric.update(torch.tensor(p[None]), torch.tensor(t[None]))
    kept = targets != 255
    expected = np.abs(outputs - targets)[kept].mean()
    assert metric.compute()["absolute"] == pytest.approx(expected, rel=1e-12)


@BOTH
def test_values_that_are_not_finite_are_told(kind):
    bad = torch.tensor([[[float("nan"), 0.0]]])
    with pytest.raises(ValueError, match=f"^{kind.__name__}: 1 targets are NaN or infinite"):
        kind().update(torch.zeros(1, 1, 2), bad)
    with pytest.raises(ValueError, match=f"^{kind.__name__}: 1 predictions are NaN or infinite"):
        kind().update(bad, torch.zeros(1, 1, 2))


@BOTH
def test_other_shapes_are_refused(kind):
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: outputs and targets must both be"):
        kind().update(torch.zeros(2, 4, 4), torch.zeros(2, 2, 4))
