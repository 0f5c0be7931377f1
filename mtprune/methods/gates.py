r"""Gates: the hard concrete distribution, in closed form.

A gate z in [0, 1] with parameter :math:`\alpha` is a stretched and clipped logistic,

.. math:: s = \sigma(\log u - \log(1 - u) + \log\alpha), \quad
    z = \min(1, \max(0, s\,(\zeta - \gamma) + \gamma)),

with u uniform in (0, 1), :math:`\gamma = -0.1` and :math:`\zeta = 1.1`: it is 0 or 1 with positive
probability, and has a derivative in between. Louizos et al., "Learning sparse neural networks
through L0 regularization", ICLR 2018; at temperature 1, as in Wang et al., "Structured pruning of
large language models", EMNLP 2020.
"""

import math

import torch
from torch import Tensor

__all__ = ["GAMMA", "ZETA", "mean", "open_probability"]

GAMMA, ZETA = -0.1, 1.1
"""The ends to which a gate is stretched."""

_SHIFT = math.log(-ZETA / GAMMA)  # log 11: how far from a coin toss a gate is at log alpha = 0
_MIDDLE = 83 / 432  # the slope of the mean at log alpha = 0
_NEAR = 1e-3  # where the closed form of the mean divides zero by zero, its series is exact enough


def open_probability(log_alpha: Tensor) -> Tensor:
    r"""The probability that a gate is not zero, :math:`P(z > 0) = \sigma(\log\alpha + \log 11)`.

    Its sum over gates is their expected L0 norm. By symmetry, the probability that a gate is one is
    :math:`P(z = 1) = 1 - P(z > 0)` at :math:`-\log\alpha`.

    Example:
        >>> open_probability(torch.tensor(0.0))  # 11 / 12
        tensor(0.9167)
    """
    return torch.sigmoid(log_alpha + _SHIFT)


def mean(log_alpha: Tensor) -> Tensor:
    r"""The mean of a gate.

    With :math:`a = \alpha`, :math:`A = 1.1 a + 0.1` and :math:`B = 1 - a`,

    .. math:: E[z] = a \left(\frac{1.1 + A/B}{B} \log\frac{A + B}{A} - \frac1B\right),

    which is 1/2 at a = 1. Computed in float64.

    Args:
        log_alpha: Any shape.

    Returns:
        Same shape and type.

    Example:
        >>> mean(torch.tensor([-1.0, 0.0, 1.0, 4.0]))
        tensor([0.3152, 0.5000, 0.6848, 0.9681])
    """
    a = log_alpha.to(torch.float64).exp()
    top, rest = ZETA * a - GAMMA, 1.0 - a
    near = rest.abs() < _NEAR
    rest = torch.where(near, _NEAR, rest)
    exact = a * ((ZETA + top / rest) / rest * torch.log1p(rest / top) - 1.0 / rest)
    return torch.where(near, 0.5 + _MIDDLE * log_alpha, exact).to(log_alpha.dtype)
