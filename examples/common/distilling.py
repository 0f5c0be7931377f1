r"""Distillation: a net learns from the labels, and from what a trained net says.

Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015. With labels' loss
:math:`L_k` and imitation :math:`I_k` of the teacher's outputs, task k is trained, and scored, on
:math:`L_k + w I_k`. An imitation is 0 where the outputs are the teacher's; pixels without a label
count, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    kl_div,
    log_softmax,
    mse_loss,
)

Loss = Callable[[Any, Any], Tensor]
"""``f(outputs, batch)``."""

Imitation = Callable[[Tensor, Tensor, float], Tensor]
"""``f(output, taught, temperature)``, a mean over samples and pixels."""


def classes(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    r"""Divergence :math:`T^2 \sum_c p_c \log(p_c / q_c)` of softened classes.

    Args:
        output: Logits, ``[B, C]`` or ``[B, C, h, w]``; :math:`q` is the softmax of ``output / T``.
        taught: The teacher's; :math:`p` is the softmax of ``taught / T``.
        temperature: T. The factor keeps gradients as large as at T = 1.
    """
    q, p = (log_softmax(x / temperature, 1) for x in (output, taught))
    return temperature**2 * kl_div(q, p, reduction="none", log_target=True).sum(1).mean()


def marks(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """The same divergence of yes and no, for each logit; any shape."""
    q, p = output / temperature, taught / temperature
    yes = p.sigmoid()
    entropy = binary_cross_entropy_with_logits(p, yes)
    return temperature**2 * (binary_cross_entropy_with_logits(q, yes) - entropy)


def pictures(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """`marks` of whole pictures, ``[B, C, h, w]``, whose logits are means over pixels."""
    return marks(output.mean((2, 3)), taught.mean((2, 3)), temperature)


def numbers(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Mean squared difference; any shape. There is nothing to soften."""
    return mse_loss(output, taught)


def directions(output: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """One less the mean cosine of directions ``[B, 3, h, w]``. There is nothing to soften."""
    return 1 - cosine_similarity(output, taught, dim=1).mean()


@dataclass(frozen=True)
class Teacher:
    """A trained net, and how much its word counts.

    Attributes:
        net: The net.
        weight: Of the imitation, beside the labels' 1.
        temperature: Divides logits.
    """

    net: nn.Module
    weight: float
    temperature: float

    def __post_init__(self) -> None:
        """It learns nothing more: statistics and dropout rest."""
        self.net.eval().requires_grad_(False)

    @torch.no_grad()
    def teach(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch, with what the teacher says about it."""
        said = self.net(batch["input"])
        return {**batch, **{_taught(task): output.float() for task, output in said.items()}}

    def adds(self, task: str, loss: Loss, imitate: Imitation, scale: float = 1.0) -> Loss:
        """A task's loss on labels, and the imitation.

        Args:
            task: Its name.
            loss: On labels.
            imitate: How outputs are held against the teacher's.
            scale: Factor on the imitation, as there is one in the loss.
        """

        def both(outputs: Any, batch: Any) -> Tensor:
            said = imitate(outputs[task].float(), batch[_taught(task)], self.temperature)
            return loss(outputs, batch) + scale * self.weight * said

        return both


def _taught(task: str) -> str:
    return f"{task}, taught"
