"""Networks by name, with torch's batch norm throughout.

Images of up to 64 pixels meet the stem that CIFAR experiments use; larger ones meet the stem for
ImageNet.
"""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from anybatch.tools.residual import Basic, Bottleneck, conv

LIBRARIES = ("torchvision", "timm")  # their networks are named LIBRARY:NAME
SEGMENTERS_OF_TORCHVISION = ("deeplabv3_", "fcn_", "lraspp_")  # prefixes of their names
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions
Builder = Callable[[int, tuple[int, ...]], nn.Module]

_BASIC = {"resnet8": 1, "resnet20": 3, "resnet56": 9}  # blocks per stage
_DEEP = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
_VGG = {
    "vgg11": (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
}
_LARGEST_SMALL_IMAGE = 64
_WITH_AUXILIARY_CLASSIFIER = ("googlenet", "inception_v3")


def build(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a network.

    Args:
        name: One of `BUILDERS`, or ``torchvision:NAME`` or ``timm:NAME``.
        classes: Number of outputs.
        shape: Shape of one example: ``(features,)`` for "mlp", else ``(channels, height, width)``.

    Raises:
        ValueError: If the network does not take such examples, or its library is not installed.
    """
    if name != "mlp" and len(shape) != 3:
        raise ValueError(f"model={name!r}: it takes images, and an example here is {shape}")
    if name in BUILDERS:
        return BUILDERS[name](classes, shape)
    return from_library(name, classes, shape[0])


def is_large(shape: tuple[int, ...]) -> bool:
    """True if images of a shape ``(channels, height, width)`` meet the stem for ImageNet."""
    return shape[2] > _LARGEST_SMALL_IMAGE


def set_channels_last(net: nn.Module) -> None:
    """Lay the weights of 4 and 5 dimensions out with channels last; outputs follow them."""
    for parameter in net.parameters():
        if parameter.dim() in CHANNELS_LAST:
            form = CHANNELS_LAST[parameter.dim()]
            parameter.data = parameter.data.contiguous(memory_format=form)


def with_he_weights(net: nn.Module) -> nn.Module:
    """Initialize the convolutions of a network as He et al. (2015) do."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def from_library(name: str, classes: int, channels: int, **options: object) -> nn.Module:
    """Build a network of another library, as that library initializes it.

    Raises:
        ValueError: If there is no such network, or its library is not installed.
    """
    library, _, own = name.partition(":")
    try:
        module = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError as error:
        raise ValueError(f"model={name!r}: {library} is not installed") from error
    try:
        if library == "timm":
            net: nn.Module = module.create_model(own, num_classes=classes, in_chans=channels)
        else:
            if own in _WITH_AUXILIARY_CLASSIFIER:  # with it the output would be a pair
                options["aux_logits"] = False
            net = module.get_model(own, weights=None, num_classes=classes, **options)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"model={name!r}: {library} has no such network ({error})") from error
    return net


def _mlp(classes: int, shape: tuple[int, ...], width: int = 128, depth: int = 4) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    features = int(torch.Size(shape).numel())
    for inputs in (features, *(width,) * (depth - 1)):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _resnet(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    if name in _BASIC:
        block: type[Basic] | type[Bottleneck] = Basic
        depths: tuple[int, ...] = (_BASIC[name],) * 3
        widths: tuple[int, ...] = (16, 32, 64)
        large = False
    else:
        block = Bottleneck if name == "resnet50" else Basic
        depths, widths, large = _DEEP[name], (64, 128, 256, 512), is_large(shape)
    inputs = widths[0]
    first = conv(shape[0], inputs, 7, 2) if large else conv(shape[0], inputs, 3)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(inputs), nn.ReLU()]
    if large:
        layers.append(nn.MaxPool2d(3, 2, 1))
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for index in range(depth):
            layers.append(block(inputs, width, 2 if stage and not index else 1))
            inputs = width * block.expansion
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    return with_he_weights(nn.Sequential(*layers, *head))


def _vgg(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    inputs, large = shape[0], is_large(shape)
    for width in _VGG[name]:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [conv(inputs, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
    layers += [nn.AdaptiveAvgPool2d(7 if large else 1), nn.Flatten()]
    if large:
        for features in (49 * inputs, 4096):
            layers += [nn.Linear(features, 4096), nn.ReLU(), nn.Dropout()]
        inputs = 4096
    return with_he_weights(nn.Sequential(*layers, nn.Linear(inputs, classes)))


# Networks by name. Whoever has more of them adds their builders here.
BUILDERS: dict[str, Builder] = {
    "mlp": _mlp,
    **{name: partial(_resnet, name) for name in (*_BASIC, *_DEEP)},
    **{name: partial(_vgg, name) for name in _VGG},
}
MODELS = tuple(BUILDERS)
