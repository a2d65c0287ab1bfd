"""Residual networks with a feature pyramid: the part of a detector that its norms are in."""

import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.tools import networks
from anybatch.tools.residual import conv

_HEAD = 3  # pooling, flattening and the linear layer of a classifier


def normed(inputs: int, outputs: int, size: int) -> nn.Sequential:
    """A convolution and its norm."""
    return nn.Sequential(conv(inputs, outputs, size), nn.BatchNorm2d(outputs))


class Pyramid(nn.Module):
    """The maps of a residual network's four stages, each mixed with the coarser ones.

    ::

        p_4 = lateral_4(c_4),   p_k = lateral_k(c_k) + upsampled p_{k+1},   out_k = smooth_k(p_k)

    with a norm behind each convolution. Sides of images are multiples of 32.

    Args:
        name: Of the network, as `anybatch.tools.networks.build` knows it.
        depths: Blocks in each stage.
        widths: Channels of each stage.
        channels: Of the pyramid.
    """

    def __init__(
        self, name: str, depths: tuple[int, ...], widths: tuple[int, ...], channels: int
    ) -> None:
        super().__init__()
        layers = list(networks.build(name, 1, (3, 224, 224)).children())[:-_HEAD]
        first = len(layers) - sum(depths)
        self.stem = nn.Sequential(*layers[:first])
        self.stages = nn.ModuleList()
        for depth in depths:
            self.stages.append(nn.Sequential(*layers[first : first + depth]))
            first += depth
        self.lateral = nn.ModuleList(normed(width, channels, 1) for width in widths)
        self.smooth = nn.ModuleList(normed(channels, channels, 3) for _ in widths)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps, finest first."""
        x = self.stem(x)
        maps = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for place in range(len(maps) - 2, -1, -1):
            maps[place] = maps[place] + F.interpolate(maps[place + 1], scale_factor=2.0)
        return tuple(smooth(m) for smooth, m in zip(self.smooth, maps, strict=True))


def resnet50() -> Pyramid:
    """ResNet-50 with a pyramid of 256 channels, as Mask R-CNN has it."""
    return Pyramid("resnet50", (3, 4, 6, 3), (256, 512, 1024, 2048), 256)
