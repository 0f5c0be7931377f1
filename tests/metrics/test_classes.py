import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from mtprune.metrics import Accuracy, Segmentation
from tests.elsewhere import elsewhere


def image(*rows):
    return torch.tensor([rows])


def measure(metric, outputs, targets):
    metric.update(outputs, targets)
    return metric.compute()


def test_two_by_two():
    # Class 0: 1 hit of 2 pixels that are or are called 0; class 1: 2 of 3.
    result = measure(Segmentation(2), image([0, 1], [1, 1]), image([0, 0], [1, 1]))
    assert result == {"miou": pytest.approx((1 / 2 + 2 / 3) / 2), "pixel_accuracy": 0.75}


def test_ignored_pixels_count_nowhere():
    result = measure(Segmentation(2), image([0, 1], [1, 1]), image([0, 255], [255, 1]))
    assert result == {"miou": 1, "pixel_accuracy": 1}


def test_an_ignored_pixel_may_be_predicted_as_anything():
    result = measure(Segmentation(2), image([0, 255], [-7, 1]), image([0, 255], [255, 1]))
    assert result["miou"] == 1


def test_a_negative_class_can_be_ignored():
    targets = image([0, -1], [-1, 1])
    assert measure(Segmentation(2, ignore=-1), image([0, 1], [0, 1]), targets)["miou"] == 1


def test_an_absent_class_is_an_error_of_the_true_one_alone():
    # Class 2 is predicted once and never true: the mean is over classes 0 (1/2) and 1 (1).
    result = measure(Segmentation(4), image([0, 2], [1, 1]), image([0, 0], [1, 1]))
    assert result == {"miou": 0.75, "pixel_accuracy": 0.75}


def test_a_class_is_present_if_any_batch_has_it():
    metric = Segmentation(3)
    metric.update(image([0, 0]), image([0, 0]))
    assert metric.compute()["miou"] == 1
    metric.update(image([0, 0]), image([0, 1]))
    assert metric.compute()["miou"] == pytest.approx((3 / 4 + 0) / 2)


def constant():
    """2 of 64 pixels are class 0, the other 62 share classes 1 to 39; class 0 is all predicted."""
    targets = torch.cat([torch.zeros(2), 1 + torch.arange(62) % 39]).long().view(1, 8, 8)
    return torch.zeros_like(targets), targets


def test_a_class_without_a_hit_counts_as_zero():
    assert measure(Segmentation(40), *constant())["miou"] == pytest.approx(2 / 64 / 40)


@pytest.mark.parametrize("compat", ["disparse", "adapmtl"])
def test_published_miou_forgets_classes_without_a_hit(compat):
    metric = Segmentation(40, compat=compat)
    assert measure(metric, *constant())["miou"] == pytest.approx(2 / 64)  # 0.0312
    # One class right, two swapped: 1 where the truth is a third.
    outputs, targets = image([0, 0, 2, 1]), image([0, 0, 1, 2])
    assert measure(Segmentation(3), outputs, targets)["miou"] == pytest.approx(1 / 3)
    assert measure(Segmentation(3, compat=compat), outputs, targets)["miou"] == 1


@pytest.mark.parametrize("compat", ["disparse", "adapmtl"])
def test_published_miou_of_no_hit_at_all(compat):
    metric = Segmentation(2, compat=compat)
    assert measure(metric, image([0, 1]), image([1, 0])) == {"miou": 0, "pixel_accuracy": 0}


def test_published_accuracy_counts_negative_labels_as_errors():
    outputs, targets = image([0, 1], [1, 0]), image([0, 1], [0, -1])
    true = measure(Segmentation(2, ignore=-1), outputs, targets)
    assert true["pixel_accuracy"] == pytest.approx(0.667, abs=5e-4)
    disparse = measure(Segmentation(2, ignore=-1, compat="disparse"), outputs, targets)
    assert disparse["pixel_accuracy"] == 0.5
    assert disparse["miou"] == true["miou"]
    adapmtl = measure(Segmentation(2, ignore=-1, compat="adapmtl"), outputs, targets)
    assert adapmtl["pixel_accuracy"] == true["pixel_accuracy"]


def test_published_accuracy_averages_images():
    # 1 of 1 labelled pixels in one image, 0 of 3 in the other, none in the third.
    outputs = torch.tensor([[[0, 0, 0]], [[1, 1, 1]], [[0, 0, 0]]])
    targets = torch.tensor([[[0, 255, 255]], [[0, 0, 0]], [[255, 255, 255]]])
    assert measure(Segmentation(2), outputs, targets)["pixel_accuracy"] == 0.25
    assert measure(Segmentation(2, compat="disparse"), outputs, targets)["pixel_accuracy"] == 0.5


def test_logits_are_the_class_of_the_largest():
    torch.manual_seed(1)
    logits, targets = torch.randn(3, 5, 4, 6), torch.randint(5, (3, 4, 6))
    picked = measure(Segmentation(5), logits.argmax(dim=1), targets)
    assert measure(Segmentation(5), logits, targets) == picked


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_is_a_class(dtype):
    outputs, targets = torch.zeros(1, 2, 2), torch.tensor([[[0, 1], [0, 255]]])
    result = measure(Segmentation(2), outputs.to(dtype), targets.to(dtype))
    assert result["pixel_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scikit_learn(seed):
    draw = np.random.default_rng(seed)
    targets, outputs = draw.integers(0, 7, (2, 6, 20, 30))
    targets[draw.random(targets.shape) < 0.1] = 255
    metric = Segmentation(8)  # class 7 never occurs
    for part in range(6):
        metric.update(torch.tensor(outputs[part : part + 1]), torch.tensor(targets[part][None]))
    kept = targets != 255
    matrix = confusion_matrix(targets[kept], outputs[kept], labels=range(8))
    hits = np.diag(matrix)[:7]
    union = (matrix.sum(0) + matrix.sum(1))[:7] - hits
    assert metric.compute() == {
        "miou": pytest.approx((hits / union).mean(), abs=1e-12),
        "pixel_accuracy": pytest.approx(hits.sum() / kept.sum(), abs=1e-12),
    }


def test_renaming_classes_changes_nothing():
    torch.manual_seed(2)
    outputs, targets = torch.randint(6, (2, 4, 9, 9))
    order = torch.randperm(6)
    plain = measure(Segmentation(6), outputs, targets)
    assert measure(Segmentation(6), order[outputs], order[targets]) == pytest.approx(plain)


def test_accuracy_by_hand():
    # Of three zeros two are right, of one 1 none, and class 2 does not occur.
    result = measure(Accuracy(3), torch.tensor([0, 0, 2, 0]), torch.tensor([0, 0, 0, 1]))
    assert result == {"accuracy": 0.5, "balanced_accuracy": pytest.approx(1 / 3)}


def test_accuracy_agrees_with_scikit_learn():
    torch.manual_seed(3)
    logits, targets = torch.randn(50, 6), torch.randint(6, (50,))
    picked = logits.argmax(dim=1)
    result = measure(Accuracy(6), logits, targets)
    assert result["accuracy"] == pytest.approx(float((picked == targets).float().mean()))
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, picked))


def test_accuracy_can_ignore():
    metric = Accuracy(2, ignore=-100)
    assert measure(metric, torch.tensor([0, 0]), torch.tensor([0, -100]))["accuracy"] == 1


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        pytest.param(
            torch.zeros(1, 40, 2, 2),
            image([0, 40], [40, 255]),
            r"^Segmentation: 2 targets are no class, the highest of them 40\. Classes are 0 to "
            r"`classes` - 1 with `classes`=40, and 255 is ignored",
            id="too high",
        ),
        pytest.param(
            torch.zeros(1, 40, 2, 2),
            image([0, -1], [1, 255]),
            "1 targets are no class, the highest of them -1",
            id="negative",
        ),
        pytest.param(
            image([0, 40], [0, 0]),
            image([0, 0], [0, 0]),
            "1 predictions are no class, the highest of them 40",
            id="prediction",
        ),
        pytest.param(
            torch.full((1, 40, 2, 2), torch.nan),
            image([0, 0], [0, 255]),
            "3 predictions have NaN among their logits",
            id="nan",
        ),
        pytest.param(
            torch.zeros(1, 40, 2, 3),
            image([0, 0], [0, 0]),
            r"outputs must be logits \[1, 40, 2, 2\] or integer classes \[1, 2, 2\] for targets "
            r"\[1, 2, 2\]\. Got \[1, 40, 2, 3\], torch.float32",
            id="other size",
        ),
        pytest.param(
            torch.zeros(1, 39, 2, 2),
            image([0, 0], [0, 0]),
            r"outputs must be logits \[1, 40, 2, 2\]",
            id="other number of classes",
        ),
        pytest.param(
            torch.zeros(1, 40, 2, 2),
            torch.zeros(1, 1, 2, 2).long(),
            r"targets must be \[B, H, W\]. Got \[1, 1, 2, 2\]",
            id="channel of targets",
        ),
        pytest.param(
            torch.zeros(1, 40, 2, 2),
            torch.zeros(1, 2, 2),
            "targets must be integer classes. Got torch.float32",
            id="float targets",
        ),
    ],
)
def test_what_is_no_segmentation_is_refused(outputs, targets, message):
    metric = Segmentation(40)
    with pytest.raises(ValueError, match=message):
        metric.update(outputs, targets)
    assert not metric.state_dict()["sums"]["confusion"].any()


def test_accuracy_is_of_examples():
    with pytest.raises(ValueError, match=r"Accuracy: targets must be \[B\]. Got \[1, 2\]"):
        Accuracy(2).update(torch.zeros(1, 2), torch.zeros(1, 2).long())


@pytest.mark.parametrize("make", [Segmentation, Accuracy])
def test_no_classes_are_refused(make):
    with pytest.raises(ValueError, match=r"`classes` must be at least 1. Got 0"):
        make(0)


def test_far_from_the_cpu_bad_values_are_told_when_computing():
    def there(*rows):
        return elsewhere(image(*rows))

    metric, other = Segmentation(3), Segmentation(3)
    metric.update(there([0, 0]), there([0, -1]))
    metric.update(there([0, 0]), there([-1, -2]))
    other.update(there([0, 0]), there([0, -3]))
    with pytest.raises(ValueError, match="3 targets are no class, the highest of them -1"):
        metric.compute()
    with pytest.raises(ValueError, match="4 targets are no class, the highest of them -1"):
        metric.merge(other).compute()
    metric.reset()
    metric.update(there([0]), there([0]))
    assert metric.compute()["miou"] == 1
    metric.update(elsewhere(torch.full((1, 3, 1, 1), torch.nan)), there([0]))
    with pytest.raises(ValueError, match="1 predictions have NaN among their logits"):
        metric.compute()
