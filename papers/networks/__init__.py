"""The papers' networks beside those of `anybatch.tools.networks`, which builds both by name."""

from functools import partial

from torch import nn

from anybatch.tools.networks import BUILDERS, from_library, is_large, with_he_weights
from papers.networks.densenet import DEPTHS, densenet
from papers.networks.inception import inception_v3
from papers.networks.mobilenet import mobilenet_v2
from papers.networks.one_stage import OneStage
from papers.networks.segmenters import PSPNETS, TORCHVISION_NAMES, DenseScores, pspnet, unet
from papers.networks.two_stage import two_stage

TWO_STAGES = ("fasterrcnn50", "fasterrcnn101", "maskrcnn50", "maskrcnn101")
DETECTORS = ("onestage", *TWO_STAGES)
SEGMENTERS_OF_TORCHVISION = tuple(f"torchvision:{name}" for name in TORCHVISION_NAMES)
SEGMENTERS = ("unet", *PSPNETS, *SEGMENTERS_OF_TORCHVISION)
CLASSIFIERS = (*DEPTHS, "mobilenetv2", "inceptionv3")

Shape = tuple[int, ...]


def _densenet(name: str, classes: int, shape: Shape) -> nn.Module:
    return with_he_weights(densenet(DEPTHS[name], classes, shape[0], is_large(shape)))


def _mobilenet(classes: int, shape: Shape) -> nn.Module:
    return with_he_weights(mobilenet_v2(classes, shape[0], is_large(shape)))


def _inception(classes: int, shape: Shape) -> nn.Module:
    return with_he_weights(inception_v3(classes, shape[0], is_large(shape)))


def _pspnet(name: str, classes: int, shape: Shape) -> nn.Module:
    return with_he_weights(pspnet(name, classes, shape[0]))


def _unet(classes: int, shape: Shape) -> nn.Module:
    return unet(classes, shape[0])


def _segmenter_of_torchvision(name: str, classes: int, shape: Shape) -> nn.Module:
    return DenseScores(from_library(name, classes, shape[0], weights_backbone=None))


def _one_stage(classes: int, shape: Shape) -> nn.Module:
    return OneStage(classes)


BUILDERS.update(
    {
        **{name: partial(_densenet, name) for name in DEPTHS},
        "mobilenetv2": _mobilenet,
        "inceptionv3": _inception,
        **{name: partial(_pspnet, name) for name in PSPNETS},
        "unet": _unet,
        **{name: partial(_segmenter_of_torchvision, name) for name in SEGMENTERS_OF_TORCHVISION},
        "onestage": _one_stage,
        **{name: partial(two_stage, name) for name in TWO_STAGES},
    }
)
