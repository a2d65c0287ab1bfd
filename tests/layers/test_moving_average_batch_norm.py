"""The forms of moving average batch normalization, whose forward and backward averages differ."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anybatch

STATS = ("ema", "sma", "batch")


def gradients(options: dict, x: torch.Tensor, target: torch.Tensor, size: int) -> torch.Tensor:
    """The first layer's gradient at fixed weights, summed over the second half of the batches."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for channels in (3, *(8,) * 7):
        conv = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        with torch.no_grad():  # centred, as the uncentered form asks for
            conv.weight -= conv.weight.mean((1, 2, 3), keepdim=True)
        layers += [conv, anybatch.MovingAverageBatchNorm2d(8, **options), nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    net = nn.Sequential(*layers, *head).double()
    half = len(x) // 2
    with torch.no_grad():
        for part in x[:half].split(size):
            net(part)
    for part, classes in zip(x[half:].split(size), target[half:].split(size), strict=True):
        F.cross_entropy(net(part), classes, reduction="sum").backward()
    grad: torch.Tensor = net[0].weight.grad
    return grad.flatten()


@pytest.mark.exhaustive
def test_averages_forward_and_then_backward_come_closer_to_a_large_batchs_gradient() -> None:
    """Rows 5, 4 and 1 of the paper's table 4, by the gradient's direction through eight layers."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(0.5 * torch.randn(160, 1, 1, 1, generator=generator))
    x = (torch.randn(160, 3, 4, 4, generator=generator) * scale).double()
    target = torch.randint(5, (160,), generator=generator)
    own = {"forward_stats": "batch", "backward_stats": "batch"}
    wanted = gradients(own, x, target, 80)
    cosine = {}
    for forward_stats, backward_stats in product(STATS, STATS):
        found = gradients(
            {
                "momentum": 0.1,
                "window": 8,
                "warmup_steps": 4,
                "renorm_warmup_steps": 10,
                "forward_stats": forward_stats,
                "backward_stats": backward_stats,
            },
            x,
            target,
            2,
        )
        name = f"{forward_stats}, {backward_stats}"
        cosine[name] = float(F.cosine_similarity(found, wanted, 0))
        assert 0.4 < found.norm() / wanted.norm() < 2.5, name
    assert cosine["batch, batch"] < cosine["ema, batch"] < cosine["ema, sma"]
    assert cosine["ema, batch"] > 0.2
    assert cosine["ema, sma"] > 0.4


def test_with_the_batchs_own_statistics_the_gradient_is_exact() -> None:
    for centered in (False, True):
        norm = anybatch.MovingAverageBatchNorm1d(
            3, centered=centered, forward_stats="batch", backward_stats="batch", dtype=torch.float64
        )
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(norm, (x,))


def test_a_window_is_kept_only_where_it_is_read() -> None:
    for forward_stats, backward_stats in product(STATS, STATS):
        norm = anybatch.MovingAverageBatchNorm1d(
            3, forward_stats=forward_stats, backward_stats=backward_stats
        )
        read = forward_stats == "sma" or backward_stats != "batch"
        assert ("window" in norm.state_dict()) is read
