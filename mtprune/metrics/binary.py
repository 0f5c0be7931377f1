"""Yes or no, for one label or several: presence of objects, a click, an edge pixel."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtprune import checks
from mtprune.metrics.base import Metric, integers

__all__ = ["Binary"]

_SCORES = 1 << 16


class Binary(Metric):
    r"""Accuracy, balanced accuracy, F1 and area under the ROC curve, as fractions.

    Outputs are scores ``[B, labels, ...]`` and targets 0 or 1 of the same shape; the axis of labels
    may be left out if there is one label.

    Accuracy is over all answers. The others are means over the labels whose targets are not
    constant. Constant ones are left out: no ranking of theirs is right or wrong.

    .. math:: \text{AUC} = P(s^+ > s^-) + \tfrac12 P(s^+ = s^-)

    The area is taken from counts per float16 value of the score, so two scores that round to the
    same float16 count as equal. It is exact for float16 scores, and otherwise off by at most half
    the share of pairs (one positive, one negative) that are equal only after rounding.

    Args:
        labels: How many there are.
        ignore: The target of answers to leave out; None if there is none.
        threshold: The answer is yes for scores above it: 0 for logits, 0.5 for probabilities.

    Example:
        >>> metric = Binary()
        >>> metric.update(torch.tensor([2.0, 1.0, -1.0, -2.0]), torch.tensor([1, 0, 1, 0]))
        >>> metric.compute()
        {'accuracy': 0.5, 'balanced_accuracy': 0.5, 'f1': 0.5, 'roc_auc': 0.75}
    """

    _flaws_are: ClassVar[Mapping[str, str]] = {
        "target": "{count} targets are neither 0 nor 1, nor ignored (`ignore`={ignore}).",
        "output": "{count} scores are NaN.",
    }

    def __init__(self, labels: int = 1, ignore: int | None = None, threshold: float = 0.0) -> None:
        checks.inside("labels", labels, "[1, inf)", must="must be at least 1")
        super().__init__(
            None, {"answers": integers(labels, 2, 2), "scores": integers(labels, 2, _SCORES)}
        )
        self.labels = labels
        self.ignore = ignore
        self.threshold = threshold

    def _update(self, outputs: Tensor, targets: Tensor) -> None:
        plain = outputs.ndim == 1 or (outputs.ndim > 1 and outputs.shape[1] != 1)
        if self.labels == 1 and plain and outputs.shape == targets.shape:
            outputs, targets = outputs.unsqueeze(1), targets.unsqueeze(1)
        if outputs.shape != targets.shape or outputs.ndim < 2 or outputs.shape[1] != self.labels:
            raise self._refuse(
                f"outputs and targets must both be [B, labels, ...] with `labels`={self.labels}. "
                f"Got {list(outputs.shape)} and {list(targets.shape)}."
            )
        valid = torch.ones_like(targets, dtype=torch.bool)
        if self.ignore is not None:
            valid = targets != self.ignore
        self._flag("target", valid & (targets != 0) & (targets != 1))
        outputs = outputs.float()
        self._flag("output", valid & outputs.isnan())
        truth = (targets == 1).long()
        label = torch.arange(self.labels, device=outputs.device)
        row = 2 * label.view(-1, *[1] * (outputs.ndim - 2)) + truth
        self._count("answers", 2 * row + (outputs > self.threshold), valid)
        self._count("scores", _SCORES * row + _rank(outputs), valid)

    def compute(self) -> dict[str, float]:
        """``accuracy``, ``balanced_accuracy``, ``f1`` and ``roc_auc``, in [0, 1]."""
        total = self._total("answers", "no answer is labelled")
        answers = self._sums["answers"].double().cpu()
        varies = (answers.sum(dim=2) > 0).all(dim=1)
        if not varies.any():
            raise self._refuse("no label has both positive and negative targets.")
        wrong_no, right_yes = answers[varies, 1].unbind(dim=1)
        right_no, wrong_yes = answers[varies, 0].unbind(dim=1)
        recall, rejection = right_yes / (right_yes + wrong_no), right_no / (right_no + wrong_yes)
        f1 = 2 * right_yes / (2 * right_yes + wrong_no + wrong_yes)
        negative, positive = self._sums["scores"].double().cpu()[varies].unbind(dim=1)
        below = negative.cumsum(dim=1) - negative / 2
        area = (below * positive).sum(dim=1) / (negative.sum(dim=1) * positive.sum(dim=1))
        return {
            "accuracy": float(answers[:, 0, 0].sum() + answers[:, 1, 1].sum()) / total,
            "balanced_accuracy": float((recall + rejection).mean()) / 2,
            "f1": float(f1.mean()),
            "roc_auc": float(area.mean()),
        }


def _rank(scores: Tensor) -> Tensor:
    """The place of each score among all float16 values, 0 to 65535, in order; -0 is 0."""
    bits = (scores.half() + 0.0).view(torch.int16).long()
    return torch.where(bits < 0, -bits - 1, bits + (1 << 15))
