"""Quantized inference and quantization-aware training, from a network of these layers."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anybatch
from zoo.listing import randomize

METHODS = ["bn", "mbn", "mabn", "cbn", "brn", "ghost", "fs"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao moves to a package of its own
        yield


class Network(nn.Module):
    """With the stubs that eager quantization asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = (
            torch.ao.quantization.QuantStub(),
            torch.ao.quantization.DeQuantStub(),
        )
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2, self.relu2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(self.quant(x))))
        x = self.relu2(self.norm2(self.conv2(x)))
        return self.dequant(self.head(x.mean((2, 3))))


PARTS = [["conv1", "norm1", "relu1"], ["conv2", "norm2", "relu2"]]


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 10, 10, generator=generator)
    return x, torch.randint(4, (8,), generator=generator)


def trained(method: str) -> nn.Module:
    """A few steps with a method, in evaluation."""
    torch.manual_seed(0)
    options = {"mabn": {"warmup_steps": 2, "renorm_warmup_steps": 4, "window": 3}}.get(method, {})
    model = anybatch.convert(randomize(Network()), method, batch_size=8, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for step in range(6):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def quantized(model: nn.Module) -> nn.Module:
    """Static quantization by observed ranges."""
    model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    prepared = torch.ao.quantization.prepare(model)
    for step in range(4):
        prepared(data(100 + step)[0])
    return torch.ao.quantization.convert(prepared)


@pytest.mark.parametrize("method", METHODS)
def test_folded_quantizes_as_torchs_fusion_does(method: str) -> None:
    model = trained(method)
    x = data(200)[0]
    expected = model(x).detach()
    folded = quantized(anybatch.fold(copy.deepcopy(model)))
    plain = anybatch.to_batchnorm(copy.deepcopy(model))
    fused = quantized(torch.ao.quantization.fuse_modules(plain, PARTS))
    span = expected.max() - expected.min()
    assert (folded(x) - expected).abs().max() < 0.05 * span
    assert (folded(x) - fused(x)).abs().mean() < 0.02 * span  # a rounding moves single values more
    assert isinstance(folded.conv1, torch.ao.nn.quantized.Conv2d)


@pytest.mark.parametrize("method", METHODS)
def test_quantization_aware_training_goes_on_from_plain_batch_norms(method: str) -> None:
    """The same losses as a network that was torch's all along, with the same numbers."""
    model = anybatch.to_batchnorm(trained(method))
    twin = Network()
    twin.load_state_dict(model.state_dict())
    twin.norm1.momentum, twin.norm2.momentum = model.norm1.momentum, model.norm2.momentum
    losses = []
    for network in (model, twin):
        network.train()
        network.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        fused = torch.ao.quantization.fuse_modules_qat(network, PARTS)
        prepared = torch.ao.quantization.prepare_qat(fused)
        optimizer = torch.optim.SGD(prepared.parameters(), 0.02)
        course = []
        for step in range(4):
            x, y = data(step)
            loss = F.cross_entropy(prepared(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        int8 = torch.ao.quantization.convert(prepared.eval())
        assert int8(data(200)[0]).isfinite().all()
        losses.append(course)
    assert losses[0] == losses[1]


class Rounded(nn.Module):
    """Weights rounded to a few bits, each output channel by itself."""

    def forward(self, weight: Tensor) -> Tensor:
        scale = weight.flatten(1).abs().amax(1).view(-1, *(1,) * (weight.dim() - 1)) / 3
        return weight + ((weight / scale).round() * scale - weight).detach()


@pytest.mark.parametrize("method", ["bn", "brn", "ghost"])
def test_a_network_trains_on_with_rounded_weights(method: str) -> None:
    """Fake quantization by parametrization, under the layers themselves: they see what is used."""
    model = trained(method).train()
    for conv in (model.conv1, model.conv2):
        torch.nn.utils.parametrize.register_parametrization(conv, "weight", Rounded())
    x, y = data(0)
    F.cross_entropy(model(x), y).backward()
    model.eval()
    expected = model(x).detach()
    torch.testing.assert_close(anybatch.to_batchnorm(copy.deepcopy(model))(x), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("method", ["torch", *METHODS])
def test_recalibration_mends_rounded_weights(method: str) -> None:
    model = trained("bn" if method == "torch" else method)
    model = anybatch.to_batchnorm(model) if method == "torch" else model
    batches = [data(step)[0] for step in range(20)]
    anybatch.recalibrate(model, batches)
    x = torch.cat([data(300 + n)[0] for n in range(8)])
    expected = model(x).detach()
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for conv in (rounded.conv1, rounded.conv2):
            conv.weight.copy_(Rounded()(conv.weight))
    before = (rounded(x) - expected).square().mean()
    anybatch.recalibrate(rounded, batches)
    after = (rounded(x) - expected).square().mean()
    assert after < 0.8 * before
