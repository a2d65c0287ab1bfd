"""Networks in the form that CIFAR experiments use, with torch's batch norm throughout."""

import torch
from torch import Tensor, nn

_BASIC = {"resnet8": 1, "resnet20": 3, "resnet56": 9}  # blocks a stage
_DEEP = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
_VGG = {
    "vgg11": (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
}


def build(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a network.

    Args:
        name: One of `anybatch.experiments.config.MODELS`.
        classes: Outputs.
        shape: Of one example: ``(features,)`` for "mlp", else ``(channels, height, width)``.

    Returns:
        The network, freshly initialized.

    Raises:
        ValueError: If the network does not take such examples.
    """
    if name == "mlp":
        return _mlp(int(torch.Size(shape).numel()), classes)
    if len(shape) != 3:
        raise ValueError(f"model={name!r}: it takes pictures, and an example here is {shape}")
    if name in _BASIC:
        net: nn.Module = _ResNet(_Basic, (_BASIC[name],) * 3, (16, 32, 64), classes, shape[0])
    elif name in _DEEP:
        block = _Bottleneck if name == "resnet50" else _Basic
        net = _ResNet(block, _DEEP[name], (64, 128, 256, 512), classes, shape[0])
    else:
        net = _vgg(_VGG[name], classes, shape)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _mlp(features: int, classes: int, width: int = 128, depth: int = 4) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (features, *(width,) * (depth - 1)):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class _Block(nn.Module):
    """A residual block: what a subclass makes, plus the input or its projection."""

    expansion = 1

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            projection = _conv(inputs, outputs, 1, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Basic(_Block):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        body = nn.Sequential(
            _conv(inputs, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv(width, width, 3),
            nn.BatchNorm2d(width),
        )
        super().__init__(body, inputs, width, stride)


class _Bottleneck(_Block):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        body = nn.Sequential(
            _conv(inputs, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv(width, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv(width, 4 * width, 1),
            nn.BatchNorm2d(4 * width),
        )
        super().__init__(body, inputs, 4 * width, stride)


class _ResNet(nn.Sequential):
    def __init__(
        self,
        block: type[_Basic] | type[_Bottleneck],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        classes: int,
        channels: int,
    ) -> None:
        inputs = widths[0]
        layers: list[nn.Module] = [_conv(channels, inputs, 3), nn.BatchNorm2d(inputs), nn.ReLU()]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for index in range(depth):
                layers.append(block(inputs, width, 2 if stage and not index else 1))
                inputs = width * block.expansion
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _vgg(widths: tuple[int, ...], classes: int, shape: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = shape[0]
    for width in widths:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [_conv(inputs, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
