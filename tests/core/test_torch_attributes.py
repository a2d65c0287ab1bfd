"""Arguments and attributes of torch's batch norm have torch's meaning."""

import copy

import pytest
import torch
from torch import nn

import anybatch
from method_cases import NAMES, batch, make, state

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("name", NAMES)
def test_track_running_stats_off_leaves_the_buffers_and_evaluates_by_them(name: str) -> None:
    layer = make(name)
    layer(batch(4))
    before = {key: value for key, value in state(layer).items() if key in BUFFERS}
    layer.track_running_stats = False
    layer(batch(4)).sum().backward()
    after = state(layer)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    if name != "bgn":
        norm = nn.BatchNorm2d(6).eval()
        norm.load_state_dict({k: v for k, v in after.items() if k in norm.state_dict()})
        norm.eps = layer.eps
        x = batch(4)
        torch.testing.assert_close(layer.eval()(x), norm(x))
    layer.train().track_running_stats = True
    layer(batch(4))
    assert not torch.equal(layer.running_var, before["running_var"])


@pytest.mark.parametrize("name", ["bn", "mbn", "mabn", "brn", "ghost"])
def test_conversion_keeps_statistics_that_are_not_tracked(name: str) -> None:
    norm = nn.BatchNorm2d(6)
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    norm.track_running_stats = False
    x = batch(4)
    wanted = copy.deepcopy(norm).eval()(x)
    net = anybatch.convert(nn.Sequential(norm), name)
    assert net[0].track_running_stats is False
    torch.testing.assert_close(net.eval()(x), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_without_its_running_statistics_uses_the_batch(name: str) -> None:
    layer = make(name)
    layer(batch(4))
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    for training in (True, False):
        y = layer.train(training)(batch(4))
        y.sum().backward()
        assert bool(y.isfinite().all())
    if name in ("mabn", "brn"):
        x = batch(4)
        mean = x.mean((0, 2, 3), keepdim=True) if name == "brn" else torch.zeros(1, 6, 1, 1)
        y = (x - mean) / ((x - mean).square().mean((0, 2, 3), keepdim=True) + layer.eps).sqrt()
        wanted = y * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_buffer_is_no_assertion(name: str) -> None:
    for missing in BUFFERS:
        layer = make(name)
        setattr(layer, missing, None)
        layer(batch(4)).sum().backward()
    layer = make(name, outlier_limit=100.0)
    layer.running_mean = layer.running_var = None
    layer(batch(4))


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_takes_bias(name: str) -> None:
    layer = anybatch.registry.METHODS[name].layer(2)(32, bias=False, **_needed(name))
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    y = layer(torch.randn(4, 32, 3, 3))
    y.sum().backward()


def _needed(name: str) -> dict[str, object]:
    needed = {"cbn": {"order": 0}, "vdn": {"sample": "virtual", "num_virtual": 1}}
    return dict(needed.get(name, {}))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch's batch norm has no bias= before")
def test_norms_without_a_bias_are_converted_and_folded() -> None:
    norm = nn.BatchNorm2d(4, bias=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    x = torch.randn(2, 3, 5, 5)
    net(x)
    wanted = copy.deepcopy(net).eval()(x)
    torch.testing.assert_close(anybatch.fold(copy.deepcopy(net).eval())(x), wanted)
    for name in ("bn", "mbn", "brn"):
        new = anybatch.convert(copy.deepcopy(net), name).eval()
        torch.testing.assert_close(new(x), wanted)
        torch.testing.assert_close(anybatch.to_batchnorm(copy.deepcopy(new))(x), wanted)
        torch.testing.assert_close(anybatch.fold(new)(x), wanted)
    with pytest.raises(ValueError, match="bias=False with a running mean"):
        anybatch.convert(copy.deepcopy(net), "mabn")
    norm.running_mean.zero_()
    torch.testing.assert_close(anybatch.convert(net, "mabn").eval()(x), net.eval()(x))
