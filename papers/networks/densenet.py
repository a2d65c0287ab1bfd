"""DenseNet (Huang et al. 2017): every layer sees the outputs of all layers of its block."""

import torch
from torch import Tensor, nn

DEPTHS = {"densenet121": (6, 12, 24, 16)}
_GROWTH, _BOTTLENECK, _COMPRESSION = 32, 4, 2


class _Layer(nn.Module):
    """A bottleneck whose output is put beside its input."""

    def __init__(self, inputs: int) -> None:
        width = _BOTTLENECK * _GROWTH
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, _GROWTH, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet(depths: tuple[int, ...], classes: int, channels: int, large: bool) -> nn.Sequential:
    """Build a DenseNet.

    Args:
        depths: Layers in each block.
        classes: Outputs.
        channels: Of the images.
        large: Whether the stem makes images four times smaller, as for ImageNet; that of small
            images leaves their size.

    Returns:
        The network.
    """
    inputs = 2 * _GROWTH
    layers: list[nn.Module] = [nn.Conv2d(channels, inputs, 3, padding=1, bias=False)]
    if large:
        layers = [
            nn.Conv2d(channels, inputs, 7, 2, 3, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
    for block, depth in enumerate(depths):
        for _ in range(depth):
            layers.append(_Layer(inputs))
            inputs += _GROWTH
        if block < len(depths) - 1:
            outputs = inputs // _COMPRESSION
            layers += [
                nn.BatchNorm2d(inputs),
                nn.ReLU(),
                nn.Conv2d(inputs, outputs, 1, bias=False),
                nn.AvgPool2d(2),
            ]
            inputs = outputs
    layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
