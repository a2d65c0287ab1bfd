"""MobileNetV2 (Sandler et al. 2018): inverted residuals with depthwise convolutions."""

from torch import Tensor, nn

# Expansion, outputs, blocks, stride of the first (table 2 of the paper).
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _HEAD, _DROPOUT = 32, 1280, 0.2


def _unit(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


class _Inverted(nn.Module):
    """Wider inside than outside, and linear at its end."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        width = inputs * expansion
        layers = _unit(inputs, width, 1) if expansion > 1 else []
        layers += _unit(width, width, 3, stride, groups=width)
        super().__init__()
        self.body = nn.Sequential(*layers, *_unit(width, outputs, 1)[:2])
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.residual else y


def mobilenet_v2(classes: int, channels: int, large: bool) -> nn.Sequential:
    """Build MobileNetV2.

    Args:
        classes: Outputs.
        channels: Of the images.
        large: Whether images are made smaller from the stem on, as for ImageNet; small ones keep
            their size up to the third stage.

    Returns:
        The network.
    """
    layers = _unit(channels, _STEM, 3, 2 if large else 1)
    inputs = _STEM
    for stage, (expansion, outputs, blocks, stride) in enumerate(_STAGES):
        for block in range(blocks):
            first = stride if block == 0 and (large or stage != 1) else 1
            layers.append(_Inverted(inputs, outputs, expansion, first))
            inputs = outputs
    layers += [*_unit(inputs, _HEAD, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(_DROPOUT), nn.Linear(_HEAD, classes))
