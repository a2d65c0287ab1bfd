"""Networks that give a score per class and pixel, with torch's batch norm throughout."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anybatch.tools.residual import Basic, Bottleneck, conv

_BINS = (1, 2, 3, 6)
_WIDTHS = (16, 32, 64, 128, 256)  # of the U-Net, from fine to coarse
_COARSEST = 2 ** (len(_WIDTHS) - 1)  # pixels of the image to one there


@dataclass(frozen=True)
class _Encoder:
    """The residual network before a pyramid.

    Attributes:
        block: Of which it is made.
        depths: Blocks per stage.
        widths: Of the stages.
        strides: Of the stages.
        dilations: Of the stages.
        large: Whether the stem makes images four times smaller, else twice.
    """

    block: type[Basic] | type[Bottleneck]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    large: bool


_DILATED = ((64, 128, 256, 512), (1, 2, 1, 1), (1, 1, 2, 4), True)  # an eighth of the image
# Segmenters of torchvision; `DenseScores` makes their output one tensor.
TORCHVISION_NAMES = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "fcn_resnet50",
    "fcn_resnet101",
    "lraspp_mobilenet_v3_large",
)
PSPNETS = {
    "pspnet8": _Encoder(Basic, (1, 1, 1), (16, 32, 64), (1, 2, 1), (1, 1, 2), False),
    "pspnet50": _Encoder(Bottleneck, (3, 4, 6, 3), *_DILATED),
    "pspnet101": _Encoder(Bottleneck, (3, 4, 23, 3), *_DILATED),
}


def pspnet(name: str, classes: int, channels: int) -> nn.Module:
    """Build a PSPNet.

    A residual network that is dilated instead of getting smaller, a pyramid of its output's means
    over 1, 2 x 2, 3 x 3 and 6 x 6 parts of the image, and a convolution over all of them. The
    pyramid's coarsest norm sees one value per image and channel.

    Args:
        name: One of `PSPNETS`: "pspnet50" and "pspnet101" have those of ResNet-50 and 101, at an
            eighth of the image's size; "pspnet8" one block in each of three stages, at a fourth.
        classes: Outputs per pixel.
        channels: Of the images.

    Returns:
        The network: ``(N, channels, H, W)`` to ``(N, classes, H, W)``.

    Source: Zhao et al. 2017. Its second loss, amid the residual network, and its dropout before
    the last layer are left out.
    """
    return _PSPNet(PSPNETS[name], classes, channels)


class _PSPNet(nn.Module):
    def __init__(self, encoder: _Encoder, classes: int, channels: int) -> None:
        super().__init__()
        inputs = encoder.widths[0]
        first = conv(channels, inputs, 7 if encoder.large else 3, 2)
        layers: list[nn.Module] = [first, nn.BatchNorm2d(inputs), nn.ReLU()]
        if encoder.large:
            layers.append(nn.MaxPool2d(3, 2, 1))
        stages = zip(
            encoder.depths, encoder.widths, encoder.strides, encoder.dilations, strict=True
        )
        for depth, width, stride, dilation in stages:
            for index in range(depth):
                layers.append(encoder.block(inputs, width, 1 if index else stride, dilation))
                inputs = width * encoder.block.expansion
        self.encoder = nn.Sequential(*layers)
        part = inputs // len(_BINS)
        self.pyramid = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(size), conv(inputs, part, 1), nn.BatchNorm2d(part), nn.ReLU()
            )
            for size in _BINS
        )
        self.head = nn.Sequential(
            conv(inputs + part * len(_BINS), part, 3),
            nn.BatchNorm2d(part),
            nn.ReLU(),
            nn.Conv2d(part, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.encoder(x)
        parts = [_resized(level(y), y) for level in self.pyramid]
        return _resized(self.head(torch.cat([y, *parts], 1)), x)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


def unet(classes: int, channels: int) -> nn.Module:
    """Build MONAI's U-Net, with batch norm, two convolutions a residual unit, 16 to 256 channels.

    Args:
        classes: Outputs per pixel.
        channels: Of the images.

    Returns:
        The network: ``(N, channels, H, W)`` to ``(N, classes, H, W)``, of any height and width.

    Raises:
        ValueError: If MONAI is not installed.

    Source: Ronneberger et al. 2015, Kerfoot et al. 2018 for the residual units.
    """
    try:
        from monai.networks.nets.unet import UNet
    except ImportError as error:
        raise ValueError("model='unet': it is MONAI's; pip install 'anybatch[papers]'") from error
    # Its last layer ends in a norm: scores come from a convolution after it.
    net = UNet(
        spatial_dims=2,
        in_channels=channels,
        out_channels=_WIDTHS[0],
        channels=_WIDTHS,
        strides=(2,) * (len(_WIDTHS) - 1),
        num_res_units=2,
        norm="BATCH",
    )
    return _Padded(nn.Sequential(net, nn.Conv2d(_WIDTHS[0], classes, 1)))


class _Padded(nn.Module):
    """A U-Net for images of any size: each way down halves them, and there are no halves left."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y: Tensor = self.net(F.pad(x, (0, -width % _COARSEST, 0, -height % _COARSEST)))
        return y[:, :, :height, :width]


class DenseScores(nn.Module):
    """A network of torchvision, whose scores are the entry "out" of what it puts out.

    Args:
        net: The network.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x)["out"]
        return scores
