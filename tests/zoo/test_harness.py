"""What all networks go through finds what is wrong, and the lists fit networks as documented."""

import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anybatch.core.norm_layer import NormLayer
from anybatch.registry import METHODS
from zoo import smp_networks, timm_networks, torchvision_networks
from zoo.checks import check_batch_of_one, check_conversion, require
from zoo.listing import Call, Listed, image, named


class Small(nn.Module):
    """Two convolutions with batch norm and a head."""

    def __init__(self, classes: int = 3, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.norms = nn.ModuleList([norm(4), norm(6)])
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        return self.head(self.norms[1](self.second(x)).relu().mean((2, 3)))


class LooksAtItsNorm(Small):
    """Its inference turns on the class of a norm, which conversion changes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + float(isinstance(self.norms[0], NormLayer))


class LosesItsGradient(Small):
    """The gradient of its first convolution is not a number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.first.weight * 0.0).sqrt().sum()


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


def small(build: Any, **other: Any) -> Listed:
    return Listed(build, image(3, 8, 8), **other)


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_network_passes(method: str) -> None:
    check_conversion(small(Small), method)


def test_a_batch_of_one_passes() -> None:
    check_batch_of_one(small(Small), "mabn")


def test_another_inference_is_found() -> None:
    with pytest.raises(AssertionError):
        check_conversion(small(LooksAtItsNorm), "brn")


def test_a_gradient_that_is_not_finite_is_found() -> None:
    with pytest.raises(AssertionError, match=r"not finite: \['first.weight'\]"):
        check_conversion(small(LosesItsGradient), "brn")


def test_a_network_without_batch_norm_is_no_case() -> None:
    with pytest.raises(AssertionError, match="no batch norm"):
        check_conversion(small(lambda: Small(norm=nn.Identity)), "brn")


def test_a_network_that_is_refused_by_name() -> None:
    network = small(lambda: Small(norm=OwnNorm), refused={"brn": r"norms\.0: .*OwnNorm"})
    check_conversion(network, "brn")
    with pytest.raises(ValueError, match=r"norms\.1"):
        check_conversion(small(lambda: Small(norm=OwnNorm)), "brn")
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check_conversion(small(Small, refused={"brn": "OwnNorm"}), "brn")


def test_inputs_by_name_and_a_look_inside() -> None:
    class Named(Small):
        def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:
            return {"classes": super().forward(pixels)}

    network = Listed(
        Named, named(pixels=(3, 8, 8)), look=lambda model, inputs: model(**inputs)["classes"]
    )
    check_conversion(network, "mabn")


# --- libraries that may not be there ----------------------------------------------------


class Detector(nn.Module):
    """Losses in training, boxes in inference, with the parts that torchvision's have."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = Maps(), nn.Module(), nn.Module()
        self.rpn.head = Heads()
        self.roi_heads.box_head = nn.Sequential(nn.Flatten(1), nn.Linear(6 * 7 * 7, classes))

    def forward(self, pictures: list[Tensor], targets: Any = None) -> Any:
        assert isinstance(pictures, list)
        maps = list(self.backbone(torch.stack(pictures)).values())
        scores, boxes = self.rpn.head(maps)
        if self.training:
            assert {"boxes", "labels", "masks", "keypoints"} <= set(targets[0])
            return {"loss_objectness": scores[0].mean(), "loss_box": boxes[0].square().mean()}
        return [{"scores": score.flatten()[:3], "boxes": torch.zeros(3, 4)} for score in scores[0]]


class Maps(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3, 4), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict({"0": super().forward(x)})


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(6, 1, 1), nn.Conv2d(6, 4, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.scores(x) for x in maps], [self.boxes(x) for x in maps]


def library(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members, __version__="9.9")
    return module


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the libraries, which take what their documentation says."""

    def resnet18(*, weights: Any = None, progress: bool = True, num_classes: int = 1000) -> Small:
        assert weights is None
        return Small(num_classes)

    def detector(
        *, weights: Any, weights_backbone: Any, num_classes: int, min_size: int, max_size: int
    ) -> Detector:
        assert weights is None
        assert weights_backbone is None
        return Detector(num_classes)

    def create_model(name: str, pretrained: bool = False, *, num_classes: int) -> Small:
        assert name == "resnet18"
        assert not pretrained
        return Small(num_classes)

    def fpn(*, encoder_name: str, encoder_weights: Any, in_channels: int, classes: int) -> Small:
        assert encoder_weights is None
        return Small(classes)

    found = {
        "torchvision": library("torchvision"),
        "torchvision.models": library("torchvision.models", resnet18=resnet18),
        "torchvision.models.detection": library(
            "torchvision.models.detection", fasterrcnn_resnet50_fpn=detector
        ),
        "timm": library("timm", create_model=create_model),
        "segmentation_models_pytorch": library("segmentation_models_pytorch", FPN=fpn),
    }
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("torchvision", torchvision_networks.NETWORKS["resnet18"]),
        ("torchvision", torchvision_networks.NETWORKS["fasterrcnn_resnet50_fpn"]),
        ("timm", timm_networks.NETWORKS["resnet18"]),
        ("segmentation_models_pytorch", smp_networks.NETWORKS["FPN"]),
    ],
)
def test_lists_of_other_libraries_fit_what_they_document(
    libraries: None, name: str, network: Listed
) -> None:
    require(network, name)
    for method in ("bn", "mabn", "gn"):
        check_conversion(network, method)
    check_batch_of_one(network, "mabn")
    assert ("vdn" in network.methods) == (network.look is None)


def test_what_another_version_does_not_have_is_skipped_with_the_reason(libraries: None) -> None:
    gone = Listed(Call("timm", "no_such_function"), image(3, 8, 8))
    with pytest.raises(pytest.skip.Exception, match=r"timm 9\.9: AttributeError.*no_such_function"):
        require(gone, "timm")
    with pytest.raises(pytest.skip.Exception, match="no_such_package"):
        require(small(Small, needs=("no_such_package",)), "timm")
    require(gone, "timm", "9")  # the version that the list is of: the test itself will say
    with pytest.raises(AttributeError):
        check_conversion(gone, "bn")
