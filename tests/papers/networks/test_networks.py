"""The papers' networks: their sizes, their maps, and a step of each."""

import pytest
import torch

from anybatch.tools import networks
from papers.networks import CLASSIFIERS

# Parameters of the CIFAR form with 10 classes and of the ImageNet form with 1,000.
PARAMETERS = {
    "densenet121": (6_956_298, 7_978_856),
    "mobilenetv2": (2_236_682, 3_504_872),
    "inceptionv3": (None, 23_834_568),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_papers_networks_are_as_large_as_the_literature_has_them(name: str) -> None:
    for counted, classes, side in zip(PARAMETERS[name], (10, 1000), (32, 224), strict=True):
        if counted is not None:
            with torch.device("meta"):
                net = networks.build(name, classes, (3, side, side))
            assert sum(p.numel() for p in net.parameters()) == counted


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "side", "left"),
    [
        ("densenet121", 32, 4),
        ("densenet121", 224, 7),
        ("mobilenetv2", 32, 4),
        ("mobilenetv2", 224, 7),
        ("inceptionv3", 32, 7),
        ("inceptionv3", 299, 8),
    ],
)
def test_maps_of_the_papers_networks_shrink_as_the_papers_have_them(
    name: str, side: int, left: int
) -> None:
    sizes = []
    with torch.device("meta"):
        net = networks.build(name, 10, (3, side, side))
        last = next(m for m in net.modules() if isinstance(m, torch.nn.AdaptiveAvgPool2d))
        last.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[-1]))
        net(torch.randn(2, 3, side, side))
    assert sizes == [left]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_papers_networks_train_on_two_images(name: str) -> None:
    net = networks.build(name, 7, (3, 32, 32))
    y = net(torch.randn(2, 3, 32, 32))
    assert y.shape == (2, 7)
    y.backward(torch.randn_like(y))
