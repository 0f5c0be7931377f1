"""Nets of the multitask literature, from torch alone.

Every net takes images ``[B, 3, H, W]`` (`MMoE` and `mlp`: features ``[B, F]``), returns
``{task: output}`` and has ``shared_modules()``: what its tasks share, as the pruner wants to know.
"""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, max_unpool2d, pad, relu

from common.layers import conv_bn, scaled
from common.trunks import convnet, mlp
from mtprune.files import read_torch

SCENES = ("deeplab_resnet34", "mobilenetv2", "mtan_segnet", "unet")
NETS = (*SCENES, "mmoe", "mlp", "convnet")


def build(net: str, outputs: Mapping[str, int], width: float, inputs: int = 3) -> nn.Module:
    """A net by name.

    Args:
        net: One of `NETS`.
        outputs: How many channels each task's head puts out.
        width: Factor on all numbers of channels; 1 is as published.
        inputs: Features per row, for ``"mmoe"`` and ``"mlp"``; channels, for ``"convnet"``.
    """
    if net == "deeplab_resnet34":
        return DeepLab(ResNet34(width), outputs, width)
    if net == "mobilenetv2":
        return DeepLab(MobileNetV2(width), outputs, width)
    if net == "mtan_segnet":
        return MTAN(outputs, width)
    if net == "unet":
        return UNet(outputs, width)
    if net == "convnet":
        return convnet(inputs, outputs, width)
    if net == "mlp":
        return mlp(inputs, outputs, width)
    return MMoE(inputs, outputs, width)


# DeepLab: a backbone at an eighth of the resolution, and a head of dilated convolutions per task.


class DeepLab(nn.Module):
    """A shared backbone and one ASPP head per task; outputs are ``[B, C, H / 8, W / 8]``.

    Args:
        backbone: Has ``channels``.
        outputs: Channels of each task's head.
        width: Factor on the heads' hidden channels.
    """

    def __init__(self, backbone: nn.Module, outputs: Mapping[str, int], width: float) -> None:
        super().__init__()
        self.backbone = backbone
        hidden = scaled(1024, width)
        self.heads = nn.ModuleDict(
            {task: ASPP(backbone.channels, hidden, count) for task, count in outputs.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``{task: [B, C, H / 8, W / 8]}``."""
        features = self.backbone(images)
        return {task: head(features) for task, head in self.heads.items()}

    def shared_modules(self) -> list[nn.Module]:
        """The backbone."""
        return [self.backbone]


class ASPP(nn.Module):
    """The sum of four branches that look 6, 12, 18 and 24 pixels far.

    Chen et al., "DeepLab: semantic image segmentation with deep convolutional nets, atrous
    convolution, and fully connected CRFs", TPAMI 2018.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, hidden, 3, padding=rate, dilation=rate),
                *(nn.ReLU(), nn.Dropout(0.5)),
                nn.Conv2d(hidden, hidden, 1),
                *(nn.ReLU(), nn.Dropout(0.5)),
                nn.Conv2d(hidden, outputs, 1),
            )
            for rate in (6, 12, 18, 24)
        )

    def forward(self, features: Tensor) -> Tensor:
        """``[B, C, h, w]``."""
        return torch.stack([branch(features) for branch in self.branches]).sum(0)


class ResNet34(nn.Module):
    """ResNet-34 at an eighth of the resolution: the last two stages dilate instead of striding.

    He et al., "Deep residual learning for image recognition", CVPR 2016. Parameters go by
    torchvision's names, so that its weights load.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        widths = [scaled(channels, width) for channels in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        before = widths[0]
        stages = zip((3, 4, 6, 3), widths, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)
        for number, (depth, channels, stride, dilation) in enumerate(stages, 1):
            blocks = [BasicBlock(before, channels, stride, dilation)]
            blocks += [BasicBlock(channels, channels, 1, dilation) for _ in range(depth - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = channels
        self.channels = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.01)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, channels, H / 8, W / 8]``."""
        x = self.maxpool(relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[B, outputs, h, w]``."""
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        return relu(y + self.downsample(x))


class MobileNetV2(nn.Module):
    """MobileNet-v2 without its classifier, at an eighth of the resolution.

    Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018. Parameters
    go by torchvision's names (``features.*``), so that its weights load.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        before = scaled(32, width)
        layers: list[nn.Module] = [conv_bn(3, before, 3, stride=2)]
        at, dilation = 2, 1  # of the resolution, and what strides past an eighth have become
        for factor, channels, depth, stride in (
            *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ):
            for i in range(depth):
                step = stride if i == 0 else 1
                if at * step > 8:
                    dilation, step = dilation * step, 1
                at *= step
                after = scaled(channels, width)
                layers.append(InvertedResidual(before, after, step, dilation, factor))
                before = after
        self.channels = scaled(1280, width)
        self.features = nn.Sequential(*layers, conv_bn(before, self.channels, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: Tensor) -> Tensor:
        """``[B, channels, H / 8, W / 8]``."""
        return self.features(images)


class InvertedResidual(nn.Module):
    """Widen, filter each channel on its own, narrow; around it where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, dilation: int, factor: int) -> None:
        super().__init__()
        hidden = inputs * factor
        widen = [] if factor == 1 else [conv_bn(inputs, hidden, 1)]
        self.conv = nn.Sequential(
            *widen,
            conv_bn(hidden, hidden, 3, stride, dilation, groups=hidden),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.around = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``[B, outputs, h, w]``."""
        return x + self.conv(x) if self.around else self.conv(x)


# MTAN: one net for all tasks, through which each task looks with attention of its own.


class MTAN(nn.Module):
    """SegNet with attention per task; outputs are ``[B, C, H, W]``.

    Liu et al., "End-to-end multi-task learning with attention", CVPR 2019. What is shared is not
    one module: the trunk, and the convolutions that carry attended features from one block of the
    trunk to the next. Attention and the last layers are each task's own.

    Args:
        outputs: Channels of each task's head.
        width: Factor on all channels.
    """

    def __init__(self, outputs: Mapping[str, int], width: float = 1.0) -> None:
        super().__init__()
        down = [scaled(channels, width) for channels in (64, 128, 256, 512, 512)]
        deeper = [*down[1:], down[-1]]
        up = [down[0], *down[:-1]]
        sizes = (2, 2, 3, 3, 3)  # convolutions per block, as in VGG-16
        self.down = nn.ModuleList(map(_block, [3, *down[:-1]], down, sizes))
        self.up = nn.ModuleList(map(_block, down, up, sizes))
        self.carry_down = nn.ModuleList(
            conv_bn(here, there, 3) for here, there in zip(down, deeper, strict=True)
        )
        self.carry_up = nn.ModuleList(
            conv_bn(here, there, 3) for here, there in zip(down, up, strict=True)
        )
        self.look_down = nn.ModuleDict(
            {
                task: nn.ModuleList(
                    _attention(channels * (2 if i else 1), channels)
                    for i, channels in enumerate(down)
                )
                for task in outputs
            }
        )
        self.look_up = nn.ModuleDict(
            {
                task: nn.ModuleList(_attention(2 * channels, channels) for channels in up)
                for task in outputs
            }
        )
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Conv2d(up[0], up[0], 3, padding=1), nn.Conv2d(up[0], count, 1)
                )
                for task, count in outputs.items()
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``{task: [B, C, H, W]}``."""
        height, width = images.shape[-2:]
        x = pad(images, (0, -width % 32, 0, -height % 32))
        downs, places, ups = [], [], []
        for block in self.down:
            x = block(x)
            downs.append(x)
            x, place = max_pool2d(x, 2, return_indices=True)
            places.append(place)
        for block, place in zip(reversed(self.up), reversed(places), strict=True):
            x = block(max_unpool2d(x, place, 2))
            ups.append(x)
        return {
            task: head(self._attend(task, downs, ups[::-1]))[..., :height, :width]
            for task, head in self.heads.items()
        }

    def _attend(self, task: str, downs: list[Tensor], ups: list[Tensor]) -> Tensor:
        """The trunk's features ``[B, C, H, W]`` as a task sees them."""
        looks = self.look_down[task]
        y = looks[0](downs[0]) * downs[0]
        for i in range(1, len(downs)):
            y = max_pool2d(self.carry_down[i - 1](y), 2)
            y = looks[i](torch.cat([downs[i], y], 1)) * downs[i]
        y = max_pool2d(self.carry_down[-1](y), 2)
        for i in reversed(range(len(ups))):
            y = self.carry_up[i](interpolate(y, scale_factor=2, mode="nearest"))
            y = self.look_up[task][i](torch.cat([ups[i], y], 1)) * ups[i]
        return y

    def shared_modules(self) -> list[nn.Module]:
        """The trunk, and what carries attended features onwards."""
        return [self.down, self.up, self.carry_down, self.carry_up]


def _block(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """So many 3x3 convolutions."""
    return nn.Sequential(*(conv_bn(inputs if i == 0 else outputs, outputs, 3) for i in range(size)))


def _attention(inputs: int, outputs: int) -> nn.Sequential:
    """What a task lets through of each feature, in (0, 1)."""
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
        *(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.Sigmoid()),
    )


# U-Net: what the way down saw, handed to the way up at every resolution.


class UNet(nn.Module):
    """A small U-Net for training from scratch; outputs are ``[B, C, H / 2, W / 2]``.

    Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI
    2015; here with batch norm, strides instead of pooling, and a stem that halves the picture.

    Args:
        outputs: Channels of each task's head.
        width: Factor on all channels.
    """

    def __init__(self, outputs: Mapping[str, int], width: float = 1.0) -> None:
        super().__init__()
        sizes = [scaled(channels, width) for channels in (64, 128, 256, 512)]
        self.stem = conv_bn(3, sizes[0], 3, 2)
        self.down = nn.ModuleList(
            nn.Sequential(conv_bn(here, there, 3, stride), conv_bn(there, there, 3))
            for here, there, stride in zip(
                [sizes[0], *sizes[:-1]], sizes, (1, 2, 2, 2), strict=True
            )
        )
        self.up = nn.ModuleList(conv_bn(here + below, here, 3) for here, below in pairwise(sizes))
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    conv_bn(sizes[0], 2 * sizes[0], 3), nn.Conv2d(2 * sizes[0], count, 1)
                )
                for task, count in outputs.items()
            }
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``{task: [B, C, H / 2, W / 2]}``."""
        x, seen = self.stem(images), []
        for block in self.down:
            x = block(x)
            seen.append(x)
        for block, skip in zip(reversed(self.up), reversed(seen[:-1]), strict=True):
            x = block(torch.cat([skip, interpolate(x, size=skip.shape[-2:])], 1))
        return {task: head(x) for task, head in self.heads.items()}

    def shared_modules(self) -> list[nn.Module]:
        """The stem, the way down and the way up."""
        return [self.stem, self.down, self.up]


# MMoE: experts that all tasks share, and a gate and a tower for each.


class MMoE(nn.Module):
    """Multi-gate mixture of experts on a table; outputs are ``[B, C]``.

    Ma et al., "Modeling task relationships in multi-task learning with multi-gate
    mixture-of-experts", KDD 2018.

    Args:
        inputs: Features per row.
        outputs: Classes of each task.
        width: Factor on the experts' and towers' sizes.
        experts: How many.
    """

    def __init__(
        self, inputs: int, outputs: Mapping[str, int], width: float = 1.0, experts: int = 8
    ) -> None:
        super().__init__()
        first, second, tower = (scaled(size, width) for size in (128, 64, 32))
        self.experts = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(inputs, first), nn.ReLU()), *(nn.Linear(first, second), nn.ReLU())
            )
            for _ in range(experts)
        )
        self.gates = nn.ModuleDict({task: nn.Linear(inputs, experts) for task in outputs})
        self.towers = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(second, tower), nn.ReLU(), nn.Linear(tower, count))
                for task, count in outputs.items()
            }
        )

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """``{task: [B, C]}``."""
        known = torch.stack([expert(rows) for expert in self.experts], 1)
        return {
            task: tower((self.gates[task](rows).softmax(1).unsqueeze(2) * known).sum(1))
            for task, tower in self.towers.items()
        }

    def shared_modules(self) -> list[nn.Module]:
        """The experts."""
        return [self.experts]


# Weights from elsewhere.


def load_backbone(model: nn.Module, path: Path) -> None:
    """Load a file of torchvision's ImageNet weights into a DeepLab's backbone.

    Raises:
        ValueError: If the net has no such backbone, or the file holds other weights.
    """
    if not isinstance(model, DeepLab):
        raise ValueError(f"--imagenet is for nets with a backbone, not {type(model).__name__}.")
    state = read_torch(path, "cpu")
    own = model.backbone.state_dict()
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no weights by name, as torchvision saves them.")
    given = OrderedDict((k, v) for k, v in state.items() if not k.startswith(("fc.", "classifier")))
    wrong = [k for k in own if k not in given or given[k].shape != own[k].shape]
    wrong += [k for k in given if k not in own]
    if wrong:
        raise ValueError(
            f"{path} does not hold weights of {type(model.backbone).__name__}, as torchvision has "
            f"them: '{wrong[0]}' is missing, or too much, or of another shape."
        )
    model.backbone.load_state_dict(given)
