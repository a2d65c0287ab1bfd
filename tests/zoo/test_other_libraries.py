"""torchvision, timm and segmentation-models-pytorch, where they are installed (make test-zoo)."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from zoo import smp_networks, timm_networks, torchvision_networks
from zoo.checks import check_batch_of_one, check_conversion, require
from zoo.listing import Listed, cases, each

LIBRARIES = {
    "torchvision": torchvision_networks,
    "timm": timm_networks,
    "segmentation_models_pytorch": smp_networks,
}

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


def all_of(take: Callable[[Mapping[str, Listed]], list[Any]]) -> list[Any]:
    """Cases of every library, with its name first."""
    return [
        pytest.param(library, *case.values, id=f"{library}-{case.id}")
        for library, networks in LIBRARIES.items()
        for case in take(networks.NETWORKS)
    ]


@pytest.mark.parametrize(("library", "network", "method"), all_of(cases))
def test_a_network_of_another_library_converts_trains_and_goes_back(
    library: str, network: Listed, method: str
) -> None:
    pytest.importorskip(library)
    require(network, library)
    check_conversion(network, method)


@pytest.mark.parametrize(("library", "network"), all_of(each))
def test_a_network_of_another_library_trains_at_batch_1(library: str, network: Listed) -> None:
    pytest.importorskip(library)
    require(network, library)
    check_batch_of_one(network, "mabn")


def test_every_classifier_of_torchvision_is_listed_or_has_no_batch_norm() -> None:
    models = pytest.importorskip("torchvision").models
    for name in models.list_models(module=models):
        if name in torchvision_networks.PLAIN:
            continue
        family = name.split("_")[0].rstrip("0123456789")
        known = {n.split("_")[0].rstrip("0123456789") for n in torchvision_networks.NETWORKS}
        if family in known:
            continue
        with torch.device("meta"):
            model = models.get_model(name, weights=None)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert not norms, f"{name} has batch norm, and none of its family is tried"
