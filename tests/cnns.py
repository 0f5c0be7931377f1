"""Random small multitask CNNs: skips, concats, grouped and depthwise convolutions, heads."""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtprune.structure import Group
from tests.oracles import unit_masks

SIZE = 8
"""Height and width of the images."""


class RandomCNN(nn.Module):
    """A trunk of random steps, each of them onto what is there, and two or three heads."""

    def __init__(self, seed: int, steps: int = 5) -> None:
        super().__init__()
        choose = random.Random(seed)
        torch.manual_seed(seed)
        self.width = choose.choice([4, 6, 8])
        self.stem = self._conv(choose, 3, self.width, 3)
        self.plan: list[str] = []
        self.steps = nn.ModuleList()
        width = self.width
        for _ in range(steps):
            kind = choose.choice(
                ["plain", "residual", "bottleneck", "concat", "depthwise", "grouped", "project"]
            )
            new = choose.choice([4, 6, 8, 12])
            if kind == "plain":
                step: nn.Module = self._conv(choose, width, new, choose.choice([1, 3]))
                width = new
            elif kind == "residual":
                step = self._conv(choose, width, width, 3)
            elif kind == "bottleneck":
                step = nn.Sequential(
                    self._conv(choose, width, new, 1), self._conv(choose, new, width, 3, act=False)
                )
            elif kind == "concat":
                step = self._conv(choose, width, new, 3)
                width += new
            elif kind == "depthwise":
                step = self._conv(choose, width, width, 3, groups=width)
            elif kind == "grouped":
                step = self._conv(choose, width, width, 3, groups=width // 2)
            else:
                step = nn.ModuleList(
                    [self._conv(choose, width, new, 3, act=False) for _ in range(2)]
                )
                width = new
            self.plan.append(kind)
            self.steps.append(step)
        self.heads = nn.ModuleDict({"dense": nn.Conv2d(width, 2, 1)})
        self.heads["up"] = nn.Sequential(
            nn.ConvTranspose2d(width, 5, 2, stride=2), nn.PReLU(5), nn.Conv2d(5, 1, 3, padding=1)
        )
        if choose.random() < 0.5:
            self.heads["flat"] = nn.Sequential(
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 6), nn.ReLU()
            )
        else:
            self.heads["flat"] = nn.Sequential(
                nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(width, 6), nn.Tanh()
            )
        self.heads["flat"].append(nn.Linear(6, 3))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)

    def _conv(
        self, choose: random.Random, ins: int, outs: int, size: int, *, groups: int = 1, act=True
    ) -> nn.Sequential:
        conv = nn.Conv2d(
            ins, outs, size, padding=size // 2, groups=groups, bias=choose.random() < 0.5
        )
        norm = nn.BatchNorm2d(outs) if choose.random() < 0.7 else nn.Identity()
        last = choose.choice([nn.ReLU(), nn.GELU(), nn.SiLU()]) if act else nn.Identity()
        return nn.Sequential(conv, norm, last)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for kind, step in zip(self.plan, self.steps, strict=True):
            if kind in ("residual", "bottleneck"):
                x = F.relu(x + step(x))
            elif kind == "concat":
                x = torch.cat([x, step(x)], 1)
            elif kind == "project":
                x = F.relu(step[0](x) + step[1](x))
            else:
                x = step(x)
        return {task: head(x) for task, head in self.heads.items()}


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE)


@torch.no_grad()
def mask_(model: nn.Module, groups: list[Group], masks: list[Tensor]) -> nn.Module:
    """Zeros in all weights of the units that go, and nowhere else."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    shapes = {name: tuple(p.shape) for name, p in weights.items()}
    for name, mask in unit_masks(groups, masks, shapes).items():
        weights[name].mul_(mask)
    return model


def draw(groups: list[Group], seed: int) -> list[Tensor]:
    """Which units stay: about half, and the first."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(group.size, generator=generator) > 0.5 for group in groups]
    for mask in masks:
        mask[0] = True
    return masks
