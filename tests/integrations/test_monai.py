"""MONAI's networks train on what MONAI's loaders deliver: tensors of its own class."""

from typing import Any

import pytest
import torch

import anybatch
from method_cases import NAMES

data = pytest.importorskip("monai.data")
nets = pytest.importorskip("monai.networks.nets")
transforms = pytest.importorskip("monai.transforms")

NETWORKS: dict[str, Any] = {
    "SegResNet": lambda: nets.SegResNet(
        spatial_dims=2, init_filters=8, out_channels=2, norm="batch", blocks_down=(1,), blocks_up=()
    ),
    "DynUNet": lambda: nets.DynUNet(
        2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 4], norm_name="batch"
    ),
    "BasicUNet": lambda: nets.BasicUNet(2, 1, 2, features=(4, 4, 4, 4, 4, 4), norm="batch"),
    "UNet": lambda: nets.UNet(
        2, 1, 2, (4, 4, 4), (2, 2), norm="batch", act=("RELU", {"inplace": True})
    ),
}


def _loader() -> Any:
    load = transforms.Compose(
        [
            transforms.EnsureChannelFirst(channel_dim="no_channel"),
            transforms.RandFlip(prob=1.0),
            transforms.ScaleIntensity(),
        ]
    )
    return data.DataLoader(data.Dataset(list(torch.randn(4, 32, 32)), load), batch_size=2)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", NAMES)
def test_a_network_of_monai_trains_on_its_loader(network: str, method: str) -> None:
    if method == "sync":
        pytest.skip("torch's SyncBatchNorm needs a GPU")
    torch.manual_seed(0)
    net = NETWORKS[network]()
    net = anybatch.convert(net, method, example_inputs=torch.randn(2, 1, 32, 32))
    if anybatch.registry.METHODS[method].wraps:
        net = anybatch.VirtualDataset(net, 0.0, 1.0)
    for x in _loader():
        assert type(x) is data.MetaTensor
        y = net(x)
        assert type(y) is data.MetaTensor
        y.square().mean().backward()
    assert type(net.eval()(x)) is data.MetaTensor


def test_diagnose_reads_a_loader_of_monai() -> None:
    found = anybatch.diagnose(NETWORKS["BasicUNet"](), _loader())
    assert found.batch_size == 2
