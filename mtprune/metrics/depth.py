"""Depth, or disparity: errors, and how often the ratio to the truth is small."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtprune.metrics.base import Compat, Metric, integers, reals, single

__all__ = ["Depth"]

_RATIOS = (1.25, 1.25**2, 1.25**3)


class Depth(Metric):
    r"""Absolute, relative and root mean square error, and the share of inliers in percent.

    Outputs and targets are ``[B, 1, H, W]`` or ``[B, H, W]``. Targets that are not positive mark
    pixels without a measurement. With p predicted and t true, over all valid pixels:

    .. math:: \text{absolute} = \overline{|p - t|} \quad \text{relative} = \overline{|p - t| / t}
        \quad \text{rmse} = \sqrt{\overline{(p - t)^2}} \quad
        \delta_i = 100 \cdot \overline{[p > 0 \wedge \max(p/t, t/p) < 1.25^i]}

    (Eigen et al., "Depth map prediction from a single image using a multi-scale deep network",
    NeurIPS 2014).

    Args:
        skip_nonfinite: Take NaN and infinite targets for missing ones; otherwise they are an error.
        compat: See `mtprune.metrics`. Under both, a negative prediction is an inlier, and so is a
            ratio of exactly ``1.25**i``. ``absolute`` and ``relative`` are means over images of
            each image's mean (``"disparse"``), or over batches of each batch's mean, weighted by
            its number of images (``"adapmtl"``, which therefore does depend on batches).

    Example:
        >>> metric = Depth()
        >>> metric.update(torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[[2.0, 3.0, 0.0]]]))
        >>> results = metric.compute()
        >>> results["absolute"], results["relative"], round(results["rmse"], 3), results["delta1"]
        (0.5, 0.25, 0.707, 50.0)
    """

    _flaws_are: ClassVar[Mapping[str, str]] = {
        "target": (
            "{count} targets are NaN or infinite. Write 0 where there is no measurement, or pass "
            "skip_nonfinite=True."
        ),
        "output": "{count} predictions are NaN or infinite where there is a target.",
    }

    def __init__(self, skip_nonfinite: bool = False, compat: Compat | None = None) -> None:
        sums = {
            "pixels": integers(),
            "absolute": reals(),
            "relative": reals(),
            "square": reals(),
            "inliers": integers(len(_RATIOS)),
        }
        if compat is not None:
            sums |= {"absolute_means": reals(), "relative_means": reals(), "images": integers()}
        super().__init__(compat, sums)
        self.skip_nonfinite = skip_nonfinite

    def _update(self, outputs: Tensor, targets: Tensor) -> None:
        outputs, targets = single(self, outputs, targets)
        if not self.skip_nonfinite:
            self._flag("target", ~targets.isfinite())
        valid = (targets > 0) & targets.isfinite()
        self._flag("output", valid & ~outputs.isfinite())
        truth = torch.where(valid, targets, 1)
        guess = torch.where(valid, outputs, 1)
        off = (guess - truth).abs()
        ratio = torch.maximum(guess / truth, truth / guess)
        if self.compat is None:
            inliers = [(guess > 0) & (ratio < limit) for limit in _RATIOS]
        else:
            inliers = [ratio <= limit for limit in _RATIOS]
        self._add(
            pixels=valid.sum(),
            absolute=off.sum(),
            relative=(off / truth).sum(),
            square=off.square().sum(),
            inliers=torch.stack([(valid & inlier).sum() for inlier in inliers]),
        )
        if self.compat is not None:
            self._add_means(off, off / truth, valid)

    def _add_means(self, off: Tensor, relative: Tensor, valid: Tensor) -> None:
        """Each image's mean, or the batch's as often as it has images, unless of no pixel."""
        axes = (1, 2) if self.compat == "disparse" else (0, 1, 2)
        pixels = valid.sum(dim=axes)
        images = (pixels > 0) * (1 if self.compat == "disparse" else len(valid))
        weight = images / pixels.clamp(min=1).double()
        self._add(
            absolute_means=(off.sum(dim=axes) * weight).sum(),
            relative_means=(relative.sum(dim=axes) * weight).sum(),
            images=images.sum(),
        )

    def compute(self) -> dict[str, float]:
        """``absolute``, ``relative``, ``rmse``; ``delta1``, ``delta2``, ``delta3`` in percent."""
        pixels = self._total("pixels", "no pixel has a depth")
        sums = {name: held.cpu() for name, held in self._sums.items()}
        suffix, count = ("", pixels) if self.compat is None else ("_means", int(sums["images"]))
        return {
            "absolute": float(sums[f"absolute{suffix}"]) / count,
            "relative": float(sums[f"relative{suffix}"]) / count,
            "rmse": (float(sums["square"]) / pixels) ** 0.5,
            **{f"delta{i}": 100 * int(n) / pixels for i, n in enumerate(sums["inliers"], start=1)},
        }
