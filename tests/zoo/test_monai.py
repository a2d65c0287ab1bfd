"""All networks of MONAI that have, or can be given, batch norm."""

import inspect

import pytest
from torch import nn

from zoo.checks import check_batch_of_one, check_conversion, require
from zoo.listing import Listed, cases, each
from zoo.monai_networks import LEFT_OUT, NETWORKS, VERSION

nets = pytest.importorskip("monai.networks.nets")

pytestmark = pytest.mark.filterwarnings("ignore")  # MONAI's own


@pytest.mark.parametrize(("network", "method"), cases(NETWORKS))
def test_a_monai_network_converts_trains_and_goes_back(network: Listed, method: str) -> None:
    require(network, "monai", VERSION)
    check_conversion(network, method)


@pytest.mark.parametrize("method", ["bn", "mabn"])
@pytest.mark.parametrize("network", each(NETWORKS))
def test_a_monai_network_trains_at_batch_1(network: Listed, method: str) -> None:
    require(network, "monai", VERSION)
    check_batch_of_one(network, method)


def test_every_network_is_listed_or_left_out_with_a_reason() -> None:
    import monai

    there = {
        value.__name__
        for value in vars(nets).values()
        if inspect.isclass(value) and issubclass(value, nn.Module)
    }
    listed = {network.build.name for network in NETWORKS.values()} | set(LEFT_OUT)
    if not monai.__version__.startswith(f"{VERSION}."):
        pytest.skip(f"the list is of MONAI {VERSION}; new here: {sorted(there - listed)}")
    assert there - listed == set()
    assert listed - there == set()
