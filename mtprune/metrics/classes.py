"""Classes: how often the right one is picked, per pixel or per example."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtprune import checks
from mtprune.metrics.base import Compat, Metric, integers, reals

__all__ = ["Accuracy", "Segmentation"]


class _Confusion(Metric):
    """Counts of target class against predicted class, in ``confusion[target, predicted]``."""

    _flaws_are: ClassVar[Mapping[str, str]] = {
        "target": (
            "{count} targets are no class, the highest of them {value}. "
            "Classes are 0 to `classes` - 1 with `classes`={classes}, and {ignore} is ignored."
        ),
        "predicted": (
            "{count} predictions are no class, the highest of them {value}. "
            "Classes are 0 to `classes` - 1 with `classes`={classes}."
        ),
        "nan": "{count} predictions have NaN among their logits.",
    }

    def __init__(
        self, classes: int, ignore: int | None, compat: Compat | None, **sums: Tensor
    ) -> None:
        checks.inside("classes", classes, "[1, inf)", must="must be at least 1")
        super().__init__(compat, {"confusion": integers(classes, classes), **sums})
        self.classes = classes
        self.ignore = ignore

    def _picked(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted class, target class and which to look at, all of the target's shape."""
        expected = (targets.shape[0], self.classes, *targets.shape[1:]) if targets.ndim else ()
        logits = outputs.is_floating_point()
        if targets.dtype.is_floating_point or targets.dtype == torch.bool:
            raise self._refuse(f"targets must be integer classes. Got {targets.dtype}.")
        if outputs.shape != (expected if logits else targets.shape):
            raise self._refuse(
                f"outputs must be logits {list(expected)} or integer classes {list(targets.shape)} "
                f"for targets {list(targets.shape)}. Got {list(outputs.shape)}, {outputs.dtype}."
            )
        targets = targets.long()
        looked_at = torch.ones_like(targets, dtype=torch.bool)
        if self.ignore is not None:
            looked_at = targets != self.ignore
        self._flag("target", looked_at & ~self._is_class(targets), targets)
        if logits:
            highest, predicted = outputs.max(dim=1)
            self._flag("nan", looked_at & highest.isnan())
        else:
            predicted = outputs.long()
            self._flag("predicted", looked_at & ~self._is_class(predicted), predicted)
        return predicted, targets, looked_at

    def _is_class(self, values: Tensor) -> Tensor:
        return (values >= 0) & (values < self.classes)

    def _confuse(self, predicted: Tensor, targets: Tensor, looked_at: Tensor) -> None:
        known = looked_at & self._is_class(targets) & self._is_class(predicted)
        places = torch.where(known, targets * self.classes + predicted, 0)
        self._count("confusion", places, known)

    def _per_class(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hits, pixels in the targets and pixels in the predictions, of each class."""
        confusion = self._sums["confusion"].double().cpu()
        return confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)


class Segmentation(_Confusion):
    r"""Mean intersection over union and pixel accuracy, as fractions.

    Outputs are logits ``[B, classes, H, W]`` or classes ``[B, H, W]``, targets classes
    ``[B, H, W]``.

    .. math:: \text{mIoU} = \operatorname{mean}_{c \text{ present}}
        \frac{|P_c \cap T_c|}{|P_c \cup T_c|}

    A class is present if at least one pixel that is not ignored has it as its target, in all that
    was added, not in each batch. A present class that is never hit counts as 0. Predicting a class
    that is not present is an error of the class that should have been there, but adds no class to
    the mean. Ignored pixels count nowhere.

    Args:
        classes: How many there are; targets are 0 to ``classes - 1``.
        ignore: The target of pixels to leave out; None if there is none.
        compat: See `mtprune.metrics`. ``"disparse"`` and ``"adapmtl"`` leave classes without a hit
            out of the mean; ``"disparse"`` also averages pixel accuracy over images, where ignored
            pixels count as errors if ``ignore`` is negative.

    Example:
        >>> metric = Segmentation(classes=3)
        >>> metric.update(torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([[[0, 1], [1, 255]]]))
        >>> metric.compute()
        {'miou': 0.5, 'pixel_accuracy': 0.6666666666666666}
    """

    def __init__(
        self, classes: int, ignore: int | None = 255, compat: Compat | None = None
    ) -> None:
        images = {"image_accuracy": reals(), "images": integers()} if compat == "disparse" else {}
        super().__init__(classes, ignore, compat, **images)

    def _update(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.ndim != 3:
            raise self._refuse(f"targets must be [B, H, W]. Got {list(targets.shape)}.")
        predicted, targets, looked_at = self._picked(outputs, targets)
        self._confuse(predicted, targets, looked_at)
        if self.compat == "disparse":
            counted = (targets < self.classes).sum(dim=(1, 2))
            hits = ((predicted == targets) & looked_at).sum(dim=(1, 2))
            self._add(
                image_accuracy=(hits / counted.clamp(min=1).double()).sum(),
                images=(counted > 0).sum(),
            )

    def compute(self) -> dict[str, float]:
        """``miou`` and ``pixel_accuracy``, in [0, 1]."""
        total = self._total("confusion", "no pixel is labelled")
        hits, actual, predicted = self._per_class()
        averaged = actual > 0 if self.compat is None else hits > 0
        iou = hits[averaged] / (actual + predicted - hits)[averaged]
        accuracy = float(hits.sum()) / total
        if self.compat == "disparse":
            accuracy = float(self._sums["image_accuracy"] / self._sums["images"])
        return {"miou": float(iou.mean()) if len(iou) else 0.0, "pixel_accuracy": accuracy}


class Accuracy(_Confusion):
    """Accuracy, and its mean over classes, as fractions: for one class per example.

    Outputs are logits ``[B, classes]`` or classes ``[B]``, targets classes ``[B]``.

    Balanced accuracy is the mean, over the classes that targets have, of the share of the class's
    examples that is right; always picking one of two classes gives 0.5.

    Args:
        classes: How many there are; targets are 0 to ``classes - 1``.
        ignore: The target of examples to leave out; None if there is none.

    Example:
        >>> metric = Accuracy(classes=2)
        >>> metric.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute()
        {'accuracy': 0.75, 'balanced_accuracy': 0.5}
    """

    def __init__(self, classes: int, ignore: int | None = None) -> None:
        super().__init__(classes, ignore, None)

    def _update(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.ndim != 1:
            raise self._refuse(f"targets must be [B]. Got {list(targets.shape)}.")
        self._confuse(*self._picked(outputs, targets))

    def compute(self) -> dict[str, float]:
        """``accuracy`` and ``balanced_accuracy``, in [0, 1]."""
        total = self._total("confusion", "no example is labelled")
        hits, actual, _ = self._per_class()
        recall = hits[actual > 0] / actual[actual > 0]
        return {"accuracy": float(hits.sum()) / total, "balanced_accuracy": float(recall.mean())}
