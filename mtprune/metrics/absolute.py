"""Edges and keypoints: maps of how strongly there is one, so the error is a difference."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtprune.metrics.base import Metric, integers, reals, single

__all__ = ["Edges", "Keypoints"]


class _Absolute(Metric):
    """The mean absolute difference, over the pixels that are not ignored."""

    _flaws_are: ClassVar[Mapping[str, str]] = {
        "target": "{count} targets are NaN or infinite.",
        "output": "{count} predictions are NaN or infinite where there is a target.",
    }

    def __init__(self, ignore: float | None = None) -> None:
        super().__init__(None, {"pixels": integers(), "absolute": reals()})
        self.ignore = ignore

    def _update(self, outputs: Tensor, targets: Tensor) -> None:
        outputs, targets = single(self, outputs, targets)
        valid = torch.ones_like(targets, dtype=torch.bool)
        if self.ignore is not None:
            valid = targets != self.ignore
        self._flag("target", valid & ~targets.isfinite())
        self._flag("output", valid & ~outputs.isfinite())
        off = (outputs - targets).abs().where(valid, 0)
        self._add(pixels=valid.sum(), absolute=off.sum())

    def compute(self) -> dict[str, float]:
        """``absolute``."""
        pixels = self._total("pixels", "every pixel is ignored")
        return {"absolute": float(self._sums["absolute"]) / pixels}


class Edges(_Absolute):
    r"""The mean absolute error of how much of an edge each pixel is.

    Outputs and targets are ``[B, 1, H, W]`` or ``[B, H, W]``.

    .. math:: \text{absolute} = \overline{|p - t|}

    Args:
        ignore: The target of pixels to leave out; None if there is none.

    Example:
        >>> metric = Edges(ignore=255)
        >>> metric.update(torch.tensor([[[0.5, 0.0, 0.0]]]), torch.tensor([[[1.0, 0.0, 255.0]]]))
        >>> metric.compute()
        {'absolute': 0.25}
    """


class Keypoints(_Absolute):
    r"""The mean absolute error of how much of a keypoint each pixel is.

    Outputs and targets are ``[B, 1, H, W]`` or ``[B, H, W]``.

    .. math:: \text{absolute} = \overline{|p - t|}

    Args:
        ignore: The target of pixels to leave out; None if there is none.

    Example:
        >>> metric = Keypoints()
        >>> metric.update(torch.tensor([[[0.5, 0.0]]]), torch.tensor([[[1.0, 0.0]]]))
        >>> metric.compute()
        {'absolute': 0.25}
    """
