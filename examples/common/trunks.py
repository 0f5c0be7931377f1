"""Shared-bottom nets: one trunk, and a small head for each task; outputs are ``[B, C]``.

Caruana, "Multitask learning", Machine Learning 1997.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from common.layers import conv_bn, scaled


class SharedBottom(nn.Module):
    """A trunk that all tasks share, and a head of two layers for each.

    Args:
        trunk: From inputs to features ``[B, F]``.
        features: How many.
        outputs: Of each task's head.
        hidden: Units of each head.
    """

    def __init__(
        self, trunk: nn.Module, features: int, outputs: Mapping[str, int], hidden: int
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, count)
                )
                for task, count in outputs.items()
            }
        )

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B, C]}``."""
        features = self.trunk(inputs)
        return {task: head(features) for task, head in self.heads.items()}

    def shared_modules(self) -> list[nn.Module]:
        """The trunk."""
        return [self.trunk]


def mlp(inputs: int, outputs: Mapping[str, int], width: float = 1.0) -> SharedBottom:
    """Three layers on rows ``[B, inputs]``, and heads."""
    sizes = [scaled(units, width) for units in (256, 256, 128)]
    layers: list[nn.Module] = []
    for before, after in zip([inputs, *sizes[:-1]], sizes, strict=True):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return SharedBottom(nn.Sequential(*layers), sizes[-1], outputs, scaled(32, width))


def convnet(channels: int, outputs: Mapping[str, int], width: float = 1.0) -> SharedBottom:
    """Four convolutions with batch norm on small pictures ``[B, channels, H, W]``, and heads.

    Three of them halve the picture; what is left is averaged in 3 x 3 fields, so that a head knows
    where something is.
    """
    sizes = [scaled(size, width) for size in (16, 32, 64, 64)]
    features = scaled(128, width)
    steps = zip([channels, *sizes[:-1]], sizes, (2, 2, 2, 1), strict=True)
    trunk = nn.Sequential(
        *(conv_bn(before, after, 3, stride) for before, after, stride in steps),
        *(nn.AdaptiveAvgPool2d(3), nn.Flatten()),
        *(nn.Linear(9 * sizes[-1], features), nn.ReLU()),
    )
    return SharedBottom(trunk, features, outputs, scaled(64, width))
