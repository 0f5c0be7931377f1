"""Tasks: what each is trained on, judged by, and weighs.

A loss compares the output with the label brought to the output's resolution, as the DeepLab
trainers of the literature do; a metric compares the output, brought to the label's resolution.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    cross_entropy,
    interpolate,
    mse_loss,
)

from common import distilling
from common.data import IGNORE, resized
from mtprune import metrics

Loss = Callable[[Tensor, Tensor], Tensor]


class Metric(Protocol):
    """Streams over batches."""

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        ...

    def compute(self) -> dict[str, float]:
        """What came out."""
        ...


@dataclass(frozen=True)
class Task:
    """One task of a net.

    Which of its metrics are errors, `mtprune.metrics.lower_is_better` knows.

    Attributes:
        loss: ``loss(output, target)``, a mean over what is valid.
        metric: Makes a `Metric`.
        imitate: How outputs are held against those of another net.
        weight: Of the loss in the training total.
        judged: Which metrics count in Delta_T; all but the loss unless given.
        padding: What is put around labels.
        normals: Whether labels are directions, whose x a mirror turns round.
    """

    loss: Loss
    metric: Callable[[], Metric]
    imitate: distilling.Imitation
    weight: float = 1.0
    judged: tuple[str, ...] = ()
    padding: float = 0.0
    normals: bool = False

    def judge(self, results: Mapping[str, float]) -> dict[str, float]:
        """The metrics that count."""
        names = self.judged or tuple(name for name in results if name != "loss")
        return {name: results[name] for name in names}


def task_loss(name: str, task: Task, scale: float = 1.0) -> Callable[[Any, Any], Tensor]:
    """``loss(outputs, batch)``, as the pruner takes it."""
    return lambda outputs, batch: scale * task.loss(outputs[name].float(), batch[name])


# Losses.


def classes_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy where there is a class.

    Args:
        output: Logits, ``[B, C, h, w]``.
        target: Classes, ``[B, H, W]``; 255 is ignored.
        weight: Of each class, ``[C]``.
    """
    target = _fit(target, output)
    if weight is not None:
        weight = weight.to(output.device)
    total = cross_entropy(output, target, weight, ignore_index=IGNORE, reduction="sum")
    valid = target != IGNORE
    share = valid if weight is None else weight[target.masked_fill(~valid, 0)] * valid
    return total / share.sum().clamp(min=1e-6)


def normals_loss(output: Tensor, target: Tensor) -> Tensor:
    """One less the mean cosine.

    Args:
        output: Directions of any length, ``[B, 3, h, w]``.
        target: Unit vectors, ``[B, 3, H, W]``; zero is ignored.
    """
    target = _fit(target, output)
    valid = target.abs().sum(1) > 0
    cosines = cosine_similarity(output, target, dim=1)
    return ((1 - cosines) * valid).sum() / valid.sum().clamp(min=1)


def depth_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference where there is depth, ``[B, 1, H, W]``; 0 is ignored."""
    target = _fit(target, output)
    return _l1(output, target, target > 0)


def response_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of keypoints or edges, ``[B, 1, H, W]``; 255 is ignored."""
    target = _fit(target, output)
    return _l1(output, target, target != IGNORE)


def marks_loss(output: Tensor, target: Tensor, weight: float = 1.0) -> Tensor:
    """Binary cross-entropy of yes and no.

    Args:
        output: Logits, ``[B, C, h, w]``.
        target: 0 or 1, ``[B, C, H, W]``, or ``[B, C]`` of whole pictures; 255 is ignored.
        weight: Of a yes.
    """
    if target.dim() == 2:
        output = output.mean((2, 3))
    else:
        target = _fit(target, output)
    valid = target != IGNORE
    losses = binary_cross_entropy_with_logits(
        output, target * valid, pos_weight=output.new_tensor(weight), reduction="none"
    )
    return (losses * valid).sum() / valid.sum().clamp(min=1)


def numbers_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of ``[B, 1]`` and ``[B]``."""
    return mse_loss(output.squeeze(1), target)


def _fit(target: Tensor, output: Tensor) -> Tensor:
    """The target at the output's resolution."""
    size = (output.shape[-2], output.shape[-1])
    if target.shape[-2:] == size:
        return target
    if target.dim() == 3:
        return resized(target, size)
    return interpolate(target, size=size, mode="nearest-exact")


def _l1(output: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return ((output - target).abs() * valid).sum() / valid.sum().clamp(min=1)


# Metrics.


@dataclass
class Fitted:
    """A metric of pictures, fed with outputs at the labels' resolution.

    Attributes:
        metric: Of outputs and labels of one size.
    """

    metric: Any

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take a batch in."""
        size = target.shape[-2:]
        if target.dim() == 2:
            output = output.mean((2, 3))
        elif output.shape[-2:] != size:
            output = interpolate(output, size=size, mode="nearest-exact")
        self.metric.update(output, target)

    def compute(self) -> dict[str, float]:
        """What came out."""
        return dict(self.metric.compute())


class Rows:
    """Share of rows classified right, and mean cross-entropy."""

    def __init__(self) -> None:
        self.right = self.loss = self.count = 0.0

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take logits ``[B, C]`` and classes ``[B]`` in."""
        self.right += int((output.argmax(1) == target).sum())
        self.loss += float(cross_entropy(output, target, reduction="sum"))
        self.count += len(target)

    def compute(self) -> dict[str, float]:
        """``{"loss", "accuracy"}``."""
        return {"loss": self.loss / self.count, "accuracy": self.right / self.count}


class Numbers:
    """Root of the mean squared error, and the share of the variance that is explained."""

    def __init__(self) -> None:
        self.squares = self.total = self.total_squares = self.count = 0.0

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take predictions ``[B, 1]`` and numbers ``[B]`` in."""
        target = target.double()
        self.squares += float((output.squeeze(1).double() - target).square().sum())
        self.total += float(target.sum())
        self.total_squares += float(target.square().sum())
        self.count += len(target)

    def compute(self) -> dict[str, float]:
        """``{"rmse", "explained"}``."""
        error = self.squares / self.count
        variance = self.total_squares / self.count - (self.total / self.count) ** 2
        return {"rmse": error**0.5, "explained": 1 - error / max(variance, 1e-12)}


# Tasks.


def segmentation(count: int, weight: float = 1.0, classes: Tensor | None = None) -> Task:
    """Semantic segmentation; ``classes`` weighs them in the loss."""
    return Task(
        loss=partial(classes_loss, weight=classes),
        metric=lambda: Fitted(metrics.Segmentation(count)),
        imitate=distilling.classes,
        weight=weight,
        padding=IGNORE,
    )


def normals(weight: float = 1.0) -> Task:
    """Surface normals."""
    return Task(
        loss=normals_loss,
        metric=lambda: Fitted(metrics.Normals()),
        imitate=distilling.directions,
        weight=weight,
        normals=True,
    )


def depth(weight: float = 1.0) -> Task:
    """Depth, or inverse depth."""
    return Task(depth_loss, lambda: Fitted(metrics.Depth()), distilling.numbers, weight)


def keypoints(weight: float = 1.0) -> Task:
    """Keypoint responses."""
    return _responses(metrics.Keypoints, weight)


def edges(weight: float = 1.0) -> Task:
    """Edge responses."""
    return _responses(metrics.Edges, weight)


def _responses(metric: Callable[[int], metrics.Metric], weight: float) -> Task:
    return Task(
        loss=response_loss,
        metric=lambda: Fitted(metric(IGNORE)),
        imitate=distilling.numbers,
        weight=weight,
        padding=IGNORE,
    )


def edge_marks(weight: float = 1.0, yes: float = 1.0) -> Task:
    """Edges, yes or no; ``yes`` weighs the pixels that are one."""
    return Task(
        loss=partial(marks_loss, weight=yes),
        metric=lambda: Fitted(metrics.Binary(ignore=IGNORE)),
        imitate=distilling.marks,
        weight=weight,
        judged=("f1", "roc_auc"),
        padding=IGNORE,
    )


def presence(count: int, weight: float = 1.0) -> Task:
    """Which classes a picture holds."""
    return Task(
        loss=marks_loss,
        metric=lambda: Fitted(metrics.Binary(count)),
        imitate=distilling.pictures,
        weight=weight,
        judged=("roc_auc",),
    )


def row_classes(weight: float = 1.0, judged: str = "loss") -> Task:
    """Classification of rows; judged by its loss, which tells small changes apart, or accuracy."""
    return Task(cross_entropy, Rows, distilling.classes, weight, judged=(judged,))


def row_numbers(weight: float = 1.0) -> Task:
    """A number for each row."""
    return Task(numbers_loss, Numbers, distilling.numbers, weight, judged=("rmse",))
