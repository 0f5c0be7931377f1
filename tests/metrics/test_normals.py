import math

import numpy as np
import pytest
import torch

from mtprune.metrics import Normals, decode_normals

X, Y, Z = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


def vectors(*rows):
    """As an image one pixel high: [1, 3, 1, pixels]."""
    return torch.tensor(rows).T[None, :, None]


def tilted(degrees):
    angle = math.radians(degrees)
    return [math.sin(angle), 0.0, math.cos(angle)]


def measure(metric, outputs, targets):
    metric.update(outputs, targets)
    return metric.compute()


def test_by_hand():
    outputs = vectors(tilted(0), tilted(10), tilted(20), tilted(90), X)
    result = measure(Normals(), outputs, vectors(Z, Z, Z, Z, [0.0, 0.0, 0.0]))
    assert result == {
        "mean": pytest.approx(30, abs=1e-4),
        "median": pytest.approx(15, abs=1e-6),
        "within_11.25": 50,
        "within_22.5": 75,
        "within_30": 75,
    }


@pytest.mark.parametrize("degrees", [0, 1e-4, 1e-2, 1, 45, 90, 135, 179.9, 180])
def test_angles_are_precise_from_end_to_end(degrees):
    result = measure(Normals(), vectors(tilted(degrees)), vectors(Z))
    assert result["mean"] == pytest.approx(degrees, rel=1e-6, abs=1e-5)
    assert result["median"] == pytest.approx(degrees, abs=0.0005 + 1e-5)


@pytest.mark.parametrize("length", [1e-30, 1e-3, 1, 1e30])
def test_the_length_of_a_prediction_does_not_matter(length):
    result = measure(Normals(), length * vectors(tilted(30), tilted(60)), vectors(Z, Z))
    assert result["mean"] == pytest.approx(45, abs=1e-4)


def test_a_prediction_without_a_direction_is_a_right_angle_off():
    assert measure(Normals(), vectors([0.0, 0.0, 0.0]), vectors(Z))["mean"] == 90


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [30, 31])
def test_agrees_with_numpy(seed, size):
    draw = np.random.default_rng(seed)
    targets = draw.normal(size=(4, 3, size, size))
    outputs = targets + draw.normal(size=targets.shape)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    valid = draw.random((4, size, size)) > 0.25
    targets *= valid[:, None]
    metric = Normals()
    for p, t in zip(outputs, targets, strict=True):
        metric.update(torch.tensor(p[None]).float(), torch.tensor(t[None]).float())
    cosine = (outputs * targets).sum(1) / np.linalg.norm(outputs, axis=1)
    angles = np.degrees(np.arccos(np.clip(cosine[valid], -1, 1)))
    result = metric.compute()
    assert result.pop("median") == pytest.approx(np.median(angles), abs=0.0005 + 1e-5)
    assert result == pytest.approx(
        {
            "mean": angles.mean(),
            "within_11.25": 100 * (angles <= 11.25).mean(),
            "within_22.5": 100 * (angles <= 22.5).mean(),
            "within_30": 100 * (angles <= 30).mean(),
        },
        abs=1e-5,
    )


@pytest.mark.parametrize("angles", [[10, 20], [10, 20, 40], [10, 20, 20, 90], [0, 0, 180, 180]])
def test_the_median_is_the_mean_of_the_middle_two(angles):
    result = measure(Normals(), vectors(*map(tilted, angles)), vectors(*[Z] * len(angles)))
    assert result["median"] == pytest.approx(np.median(angles), abs=1e-3)


def test_turning_everything_changes_nothing():
    torch.manual_seed(0)
    outputs, targets = torch.randn(2, 1, 3, 8, 8).double()
    targets /= targets.norm(dim=1, keepdim=True)
    turn = torch.linalg.qr(torch.randn(3, 3).double()).Q
    turned = [torch.einsum("ij,bjhw->bihw", turn, x) for x in (outputs, targets)]
    plain = measure(Normals(), outputs, targets)
    assert measure(Normals(), *turned) == pytest.approx(plain, abs=1e-3)


def test_decoding_undoes_encoding():
    torch.manual_seed(0)
    truth = torch.randn(2, 3, 16, 16)
    truth /= truth.norm(dim=1, keepdim=True)
    image = ((truth + 1) * 127.5).round().to(torch.uint8)
    image[:, :, 0] = 255
    decoded = decode_normals(image)
    assert not decoded[:, :, 0].any()
    assert decoded[:, :, 1:].norm(dim=1) == pytest.approx(1)
    assert measure(Normals(), decoded, truth.where(decoded != 0, 0))["mean"] < 0.5
    assert torch.equal(decode_normals(image[0]), decoded[0])


def test_where_everything_is_valid_white_is_a_direction():
    white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
    assert decode_normals(white, invalid=None).flatten().tolist() == pytest.approx([3**-0.5] * 3)


def encoded(*rows):
    return (vectors(*rows) + 1) * 127.5


def test_targets_that_were_not_decoded_are_told():
    with pytest.raises(
        ValueError,
        match=r"^Normals: 2 targets have a component beyond 1, so they are not decoded\. "
        r"Call mtprune\.metrics\.decode_normals",
    ):
        Normals().update(vectors(X, Y), encoded(Y, Z))


def test_published_disparse_angles_are_between_encoded_normals():
    # A prediction of what a surface to the left looks like encoded, for one that faces us: a right
    # angle in truth, 60 degrees as published.
    left, front = [-1.0, 0.0, 0.0], [0.0, 0.0, -1.0]
    assert measure(Normals(), vectors(left), vectors(front))["mean"] == pytest.approx(90)
    result = measure(Normals(compat="disparse"), encoded(left), encoded(front))
    assert result["mean"] == pytest.approx(60, abs=1e-4)
    # The gray of no direction at all is at most 54.7 degrees from any of them.
    gray = encoded([0.0, 0.0, 0.0])
    opposite = measure(Normals(compat="disparse"), gray, encoded([-(3**-0.5)] * 3))
    assert opposite["mean"] == pytest.approx(0, abs=1e-3)
    assert measure(Normals(compat="disparse"), gray, encoded(left))["mean"] < 36


def test_published_disparse_drops_white_pixels():
    outputs, targets = vectors(X, X), torch.cat([encoded([-1.0, 0.0, 0.0]), encoded(X)], dim=3)
    targets[..., 1] = torch.full((3, 1), 255.0)
    metric = Normals(compat="disparse")
    metric.update(outputs, targets)
    assert metric.state_dict()["sums"]["pixels"] == 1


@pytest.mark.parametrize(("prediction", "error"), [(Z, 1), (X, 0), ([0.0, 0.0, -1.0], -1)])
def test_published_adapmtl_error_is_lowest_for_the_worst_normals(prediction, error):
    result = measure(Normals(compat="adapmtl"), vectors(prediction), vectors(Z))
    assert result.pop("error") == pytest.approx(error, abs=1e-7)
    assert result == measure(Normals(), vectors(prediction), vectors(Z))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_told(bad):
    with pytest.raises(ValueError, match=r"^Normals: 1 targets are NaN or infinite. Write 0"):
        Normals().update(vectors(X, X), vectors(X, [0.0, bad, 0.0]))
    with pytest.raises(ValueError, match=r"^Normals: 1 predictions are NaN or infinite where"):
        Normals().update(vectors([0.0, bad, 0.0], X), vectors(X, X))
    hidden = vectors(X, [0.0, 0.0, 0.0])
    assert measure(Normals(), vectors(X, [0.0, bad, 0.0]), hidden)["mean"] == 0


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [((2, 3, 4, 5), (2, 3, 5, 4)), ((2, 4, 4, 5), (2, 4, 4, 5)), ((3, 4, 5), (3, 4, 5))],
)
def test_other_shapes_are_refused(outputs, targets):
    with pytest.raises(ValueError, match=r"^Normals: outputs and targets must both be \[B, 3, H,"):
        Normals().update(torch.ones(outputs), torch.ones(targets))
