"""What code does that looks for batch norms, and its counterpart on these layers."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

import anybatch
from anybatch.core.norm_layer import NormLayer
from method_cases import NAMES, VIRTUAL, batch, make


def network(method: str | None = None) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(6, 4, 2), nn.BatchNorm2d(4), nn.ReLU())
    for _ in range(3):
        net(batch(4))
    return net if method is None else anybatch.convert(net, method)


def adapt(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """A step of test-time adaptation: batch statistics, and entropy by scale and shift alone."""
    net.requires_grad_(False)
    norms = [module for module in net.modules() if isinstance(module, _NormBase)]
    for norm in norms:
        norm.requires_grad_(True)
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = None
    optimizer = torch.optim.SGD([p for norm in norms for p in norm.parameters()], 0.1)
    probability = net(x).mean((2, 3)).softmax(1)
    (-(probability * probability.log()).sum()).backward()
    optimizer.step()
    return {name: p.detach() for name, p in net.named_parameters()}


@pytest.mark.few(1)
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("method", ["bn", "mbn", "brn"])
def test_test_time_adaptation_is_that_of_batch_norm(method: str, mode: bool) -> None:
    x = batch(8)
    found = adapt(network(method).train(mode), x)
    for name, value in adapt(network().train(mode), x).items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in VIRTUAL])
def test_freeze_is_the_evaluation_mode_of_norms_alone(name: str) -> None:
    layer = make(name)
    layer(batch(4))
    x, before = batch(4), copy.deepcopy(layer.state_dict())
    expected = copy.deepcopy(layer).eval()(x)
    anybatch.freeze(layer.train())
    torch.testing.assert_close(layer(x), expected)
    after = layer.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_code_that_looks_for_batch_norms_leaves_the_layers_as_they_are() -> None:
    net = network("mbn")
    before = copy.deepcopy(net.state_dict())
    assert not any(isinstance(module, _BatchNorm) for module in net.modules())
    torch.optim.swa_utils.update_bn([batch(4)], net)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(net)[1], NormLayer)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
