"""Blocks of residual networks (He et al. 2016), dilated where a network asks for it."""

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias, whose output is as large as its input but for the stride."""
    padding = dilation * (size // 2)
    return nn.Conv2d(inputs, outputs, size, stride, padding, dilation, bias=False)


class _Block(nn.Module):
    """A residual block: what a subclass makes, plus the input or its projection."""

    expansion = 1

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = conv(inputs, outputs, 1, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Basic(_Block):
    """Two convolutions of 3x3 (He et al. 2016)."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int = 1) -> None:
        body = nn.Sequential(
            conv(inputs, width, 3, stride, dilation),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, width, 3, 1, dilation),
            nn.BatchNorm2d(width),
        )
        super().__init__(body, inputs, width, stride)


class Bottleneck(_Block):
    """A convolution of 3x3 between two of 1x1, the last one four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int = 1) -> None:
        body = nn.Sequential(
            conv(inputs, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, width, 3, stride, dilation),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv(width, 4 * width, 1),
            nn.BatchNorm2d(4 * width),
        )
        super().__init__(body, inputs, 4 * width, stride)
