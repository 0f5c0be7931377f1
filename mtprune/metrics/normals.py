"""Surface normals: the angle between the predicted and the true one."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mtprune.metrics.base import Compat, Metric, integers, reals

__all__ = ["Normals", "decode_normals"]

_WITHIN = (11.25, 22.5, 30)
_BINS_PER_DEGREE = 1000
_BINS = 180 * _BINS_PER_DEGREE + 1


def decode_normals(encoded: Tensor, invalid: int | None = 255) -> Tensor:
    """Unit normals from an image, where ``n`` was stored as ``(n + 1) * 127.5``.

    Args:
        encoded: Shape ``[..., 3, H, W]``, values 0 to 255.
        invalid: What all three channels hold where there is no normal; None if there always is one.

    Returns:
        Shape ``[..., 3, H, W]``, float32, length 1, or 0 where there is no normal.

    Example:
        >>> image = torch.tensor([[0, 255], [128, 255], [127, 255]], dtype=torch.uint8)
        >>> decode_normals(image[:, None]).round(decimals=2)[:, 0].T
        tensor([[-1.,  0., -0.],
                [ 0.,  0.,  0.]])
    """
    decoded = F.normalize(encoded.float() / 127.5 - 1, dim=-3)
    if invalid is None:
        return decoded
    return decoded.masked_fill((encoded == invalid).all(dim=-3, keepdim=True), 0)


class Normals(Metric):
    """Mean and median angle in degrees, and the shares of pixels within angles, in percent.

    Outputs and targets are ``[B, 3, H, W]``; lengths do not matter, but targets of length 0 mark
    pixels without a normal, and a prediction of length 0 is 90 degrees off. Targets must be decoded
    (`decode_normals`): components beyond 1 are an error, because angles between encoded normals are
    far too small.

    The median is that of angles rounded to 0.001 degree, so it is within 0.0005 degree of the exact
    one (the mean of the middle two, for an even number of pixels).

    Args:
        compat: See `mtprune.metrics`. ``"disparse"`` takes targets in [0, 255] as they are, and
            those with a channel at 255 for missing. ``"adapmtl"`` adds ``error``, the mean cosine.

    Example:
        >>> metric = Normals()
        >>> up, right = [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]
        >>> outputs, targets = torch.tensor([up, up]), torch.tensor([up, right])
        >>> metric.update(outputs.view(2, 3, 1, 1), targets.view(2, 3, 1, 1))
        >>> {name: round(value, 3) for name, value in metric.compute().items()}
        {'mean': 45.0, 'median': 45.0, 'within_11.25': 50.0, 'within_22.5': 50.0, 'within_30': 50.0}
    """

    _flaws_are: ClassVar[Mapping[str, str]] = {
        "target": "{count} targets are NaN or infinite. Write 0 where there is no normal.",
        "encoded": (
            "{count} targets have a component beyond 1, so they are not decoded. "
            "Call mtprune.metrics.decode_normals(image) first."
        ),
        "output": "{count} predictions are NaN or infinite where there is a target.",
    }

    def __init__(self, compat: Compat | None = None) -> None:
        super().__init__(
            compat,
            {
                "pixels": integers(),
                "degrees": reals(),
                "cosine": reals(),
                "within": integers(len(_WITHIN)),
                "histogram": integers(_BINS),
            },
        )

    def _update(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.shape != targets.shape or targets.ndim != 4 or targets.shape[1] != 3:
            raise self._refuse(
                f"outputs and targets must both be [B, 3, H, W]. "
                f"Got {list(outputs.shape)} and {list(targets.shape)}."
            )
        outputs, targets = outputs.double(), targets.double()
        self._flag("target", ~targets.isfinite().all(dim=1))
        longest = targets.abs().amax(dim=1)
        if self.compat == "disparse":
            valid = targets.amax(dim=1) < 255
        else:
            self._flag("encoded", longest > 1.01)
            valid = longest > 0
        self._flag("output", valid & ~outputs.isfinite().all(dim=1))
        degrees = torch.where(valid, _angle(outputs, targets), 0)
        self._add(
            pixels=valid.sum(),
            degrees=degrees.sum(),
            cosine=(degrees.deg2rad().cos() * valid).sum(),
            within=torch.stack([(valid & (degrees <= limit)).sum() for limit in _WITHIN]),
        )
        places = (degrees * _BINS_PER_DEGREE).round().long().clamp(0, _BINS - 1)
        self._count("histogram", places, valid)

    def compute(self) -> dict[str, float]:
        """``mean``, ``median`` in degrees; ``within_11.25``, ``_22.5``, ``_30`` in percent."""
        pixels = int(self._total("pixels", "no pixel has a normal"))
        below = self._sums["histogram"].cpu().cumsum(dim=0)
        middle = torch.tensor([(pixels - 1) // 2, pixels // 2])
        bins = torch.searchsorted(below, middle, right=True)
        result = {
            "mean": float(self._sums["degrees"]) / pixels,
            "median": float(bins.double().mean()) / _BINS_PER_DEGREE,
        }
        for limit, count in zip(_WITHIN, self._sums["within"].tolist(), strict=True):
            result[f"within_{limit}"] = 100 * count / pixels
        if self.compat == "adapmtl":
            result["error"] = float(self._sums["cosine"]) / pixels
        return result


def _angle(one: Tensor, other: Tensor) -> Tensor:
    """Degrees between vectors ``[B, 3, H, W]``, without the arc cosine: that is blind near 0.

    90 where one of them is 0.
    """
    sine, cosine = torch.linalg.cross(one, other, dim=1).norm(dim=1), (one * other).sum(dim=1)
    nothing = (sine == 0) & (cosine == 0)
    return torch.atan2(sine, cosine).rad2deg().masked_fill(nothing, 90)
