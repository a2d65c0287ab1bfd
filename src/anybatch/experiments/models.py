"""Networks of the papers, with torch's batch norm throughout.

Pictures of up to 64 pixels are taken whole, as CIFAR experiments do; larger ones meet the stem that
the network has for ImageNet.
"""

import importlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from anybatch.experiments.config import LIBRARIES, SEGMENTERS_OF_TORCHVISION, TWO_STAGES, Run
from anybatch.experiments.densenet import DEPTHS, densenet
from anybatch.experiments.detectors import OneStage
from anybatch.experiments.inception import inception_v3
from anybatch.experiments.mobilenet import mobilenet_v2
from anybatch.experiments.residual import Basic, Bottleneck, conv
from anybatch.experiments.segmenters import PSPNETS, OutputAlone, pspnet, unet
from anybatch.experiments.two_stage import two_stage

_BASIC = {"resnet8": 1, "resnet20": 3, "resnet56": 9}  # blocks a stage
_DEEP = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
_VGG = {
    "vgg11": (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
}
_SMALL = 64
_AUXILIARY = ("googlenet", "inception_v3")
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def build(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a network.

    Args:
        name: One of `anybatch.experiments.config.MODELS`, `SEGMENTERS` or `DETECTORS` there, or
            ``torchvision:NAME`` or ``timm:NAME``.
        classes: Outputs; of a network for segmentation, outputs a pixel; of a detector, kinds of
            objects.
        shape: Of one example: ``(features,)`` for "mlp", else ``(channels, height, width)``.

    Returns:
        The network, freshly initialized.

    Raises:
        ValueError: If the network does not take such examples, or its library is not there.
    """
    if name == "mlp":
        return _mlp(int(torch.Size(shape).numel()), classes)
    if len(shape) != 3:
        raise ValueError(f"model={name!r}: it takes pictures, and an example here is {shape}")
    if name.partition(":")[0] in LIBRARIES:
        return _from_library(name, classes, shape[0])
    if name == "onestage":
        return OneStage(classes)
    if name in TWO_STAGES:
        return two_stage(name, classes, shape)
    if name == "unet":
        return unet(classes, shape[0])
    channels, large = shape[0], shape[2] > _SMALL
    if name in _BASIC:
        net: nn.Module = _ResNet(Basic, (_BASIC[name],) * 3, (16, 32, 64), classes, channels)
    elif name in _DEEP:
        block = Bottleneck if name == "resnet50" else Basic
        net = _ResNet(block, _DEEP[name], (64, 128, 256, 512), classes, channels, large)
    elif name in DEPTHS:
        net = densenet(DEPTHS[name], classes, channels, large)
    elif name in PSPNETS:
        net = pspnet(name, classes, channels)
    elif name == "mobilenetv2":
        net = mobilenet_v2(classes, channels, large)
    elif name == "inceptionv3":
        net = inception_v3(classes, channels, large)
    else:
        net = _vgg(_VGG[name], classes, channels, large)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def forward(run: Run, model: nn.Module, x: Tensor) -> Tensor:
    """What a network puts out, in the run's precision."""
    with precision(run):
        y: Tensor = model(x)
    return y.float()


def precision(run: Run) -> AbstractContextManager[None]:
    """What a network computes in, in the run's precision."""
    if run.precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(run.device).type, _AUTOCAST[run.precision])


def _from_library(name: str, classes: int, channels: int) -> nn.Module:
    """A network of another library, as it initializes it."""
    library, _, own = name.partition(":")
    try:
        module = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    except ImportError as error:
        raise ValueError(f"model={name!r}: {library} is not installed") from error
    try:
        if library == "timm":
            net: nn.Module = module.create_model(own, num_classes=classes, in_chans=channels)
        elif own.startswith(SEGMENTERS_OF_TORCHVISION):
            net = module.get_model(own, weights=None, weights_backbone=None, num_classes=classes)
            net = OutputAlone(net)
        else:  # an auxiliary classifier would make the output a pair
            own_options = {"aux_logits": False} if own in _AUXILIARY else {}
            net = module.get_model(own, weights=None, num_classes=classes, **own_options)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"model={name!r}: {library} has no such network ({error})") from error
    return net


def _mlp(features: int, classes: int, width: int = 128, depth: int = 4) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (features, *(width,) * (depth - 1)):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class _ResNet(nn.Sequential):
    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        classes: int,
        channels: int,
        large: bool = False,
    ) -> None:
        inputs = widths[0]
        first = conv(channels, inputs, 7, 2) if large else conv(channels, inputs, 3)
        layers: list[nn.Module] = [first, nn.BatchNorm2d(inputs), nn.ReLU()]
        if large:
            layers.append(nn.MaxPool2d(3, 2, 1))
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for index in range(depth):
                layers.append(block(inputs, width, 2 if stage and not index else 1))
                inputs = width * block.expansion
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _vgg(widths: tuple[int, ...], classes: int, channels: int, large: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = channels
    for width in widths:
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
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
