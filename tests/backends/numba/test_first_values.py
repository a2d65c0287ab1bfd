"""Statistics where the first values of a channel are far from the others.

Sums are of differences from the first values' mean, in part in float32: what comes first must not
cost the others their digits.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import anybatch
from anybatch.backends import use_fused
from method_cases import make

pytest.importorskip("numba")


def zeros() -> Tensor:
    """Zeros behind one value."""
    x = torch.zeros(2, 1, 640, 640)
    x[0, :, 0, 0] = 3.3333
    return x


def sparse() -> Tensor:
    """What a ReLU leaves, behind its largest value."""
    x = (torch.randn(16, 1, 224, 224) - 2.5).relu()
    x[0, :, 0, 0] = 13.3
    return x


def far() -> Tensor:
    """Values far from zero, behind one much farther."""
    x = torch.randn(2, 1, 400, 500) + 30
    x[0, 0, 0, 0] = 1000
    return x


def small() -> Tensor:
    """Many short planes of small values."""
    return torch.randn(64, 1, 16, 16) * 0.01


@pytest.fixture(autouse=True)
def _loops_serve() -> Iterator[None]:
    use_fused("auto")
    yield
    use_fused("auto")


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch", [zeros, sparse, far, small])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_whatever_comes_first(
    dtype: torch.dtype, last: bool, masked: bool, batch: Callable[[], Tensor]
) -> None:
    torch.manual_seed(0)
    x, layer = batch().to(dtype).expand(-1, 2, -1, -1), anybatch.BatchNorm2d(2, momentum=1.0)
    form = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=form).requires_grad_()
    dy = torch.rand(x.shape).to(dtype).contiguous(memory_format=form)
    valid = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
    if masked:
        valid[:, -x.shape[2] // 4 :] = False
    y = layer(x, mask=valid) if masked else layer(x)
    assert y.grad_fn.how[0].name == "numba"
    y.backward(dy)
    exact = x.detach().double().transpose(0, 1)[:, valid]
    mean, var = exact.mean(1), exact.var(1)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-4, atol=0)
    scale = (exact.var(1, correction=0) + layer.eps).rsqrt()
    apart = (x.detach().double().transpose(0, 1).flatten(1) - mean[:, None]) * scale[:, None]
    whole = dy.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        layer.weight.grad.double(), (whole * apart).sum(1), rtol=1e-3, atol=0.1
    )
    torch.testing.assert_close(layer.bias.grad.double(), whole.sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", ["bs", "ns", "vdn"])
def test_zeros_behind_one_value_in_each_example(name: str, last: bool) -> None:
    layer = make(name, 2, momentum=1.0)
    x = torch.zeros(4, 2, 256, 256)
    x[:, :, 0, 0] = 3.3333
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = layer(x.requires_grad_())
    assert y.grad_fn.how[0].name == "numba"
    var = x.detach()[0].double().flatten(1).var(1)  # of any number of examples, but for 1 in 65,536
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-4, atol=0)
