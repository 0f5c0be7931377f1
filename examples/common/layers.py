"""What nets are built from."""

from torch import nn


def scaled(channels: int, width: float) -> int:
    """That many channels, times the width; never fewer than 4."""
    return max(4, round(channels * width))


def conv_bn(
    inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the picture's size but for the stride, batch norm, ReLU6."""
    padding = dilation * (size // 2)
    convolution = nn.Conv2d(
        inputs, outputs, size, stride, padding, dilation, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())
