"""The gradient through the compensation is that of equations 9 to 11."""

import pytest
import torch
from torch import Tensor, nn

import anybatch
from papers.studies.cross_iteration.own_weights import OwnWeights, joint_statistics


def networks(kind: str) -> tuple[nn.Module, Tensor]:
    """A bound pair in float64, and a batch for it."""
    options = {"window": 3, "gradient_sample": None, "dtype": torch.float64}
    if kind == "linear":
        layer: nn.Module = nn.Linear(5, 4, dtype=torch.float64)
        norm: nn.Module = anybatch.CrossIterationBatchNorm1d(4, **options).bind(layer)
        return nn.Sequential(layer, norm), torch.randn(6, 5, dtype=torch.float64)
    layer = nn.Conv2d(4, 6, 3, groups=2, bias=kind == "with bias", dtype=torch.float64)
    norm = anybatch.CrossIterationBatchNorm2d(6, **options).bind(layer)
    return nn.Sequential(layer, norm), torch.randn(3, 4, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["linear", "with bias", "without bias"])
def test_it_is_what_autograd_says_of_the_whole_expression(kind: str) -> None:
    model, x = networks(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    own = OwnWeights(model, optimizer)
    target = torch.randn_like(model(x))
    own.seen.clear()
    for _ in range(4):  # the weights move, so that compensation has something to do
        optimizer.zero_grad()
        ((model(x + 0.3 * torch.randn_like(x)) - target) ** 2).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    ((model(x) - target) ** 2).sum().backward()
    (pair,), (layer, norm) = own.pairs, model
    seen = own.seen[norm]
    plain = layer.weight.grad.clone()
    own.add()

    weight = layer.weight.detach().requires_grad_()
    if kind == "linear":
        out = nn.functional.linear(x, weight, layer.bias.detach())
    else:
        bias = None if layer.bias is None else layer.bias.detach()
        out = nn.functional.conv2d(x, weight, bias, groups=2)
    mean, var, steps = joint_statistics(pair, seen._replace(x=out), weight)
    shape = (1, -1, *(1,) * (out.dim() - 2))
    y = (out - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
    y = y * norm.weight.detach().view(shape) + norm.bias.detach().view(shape)
    ((y - target) ** 2).sum().backward()
    assert steps == 2
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain, weight.grad, rtol=1e-2)


def test_a_norm_without_old_steps_adds_nothing() -> None:
    model, x = networks("linear")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    own = OwnWeights(model, optimizer)
    model(x).square().sum().backward()
    before = model[0].weight.grad.clone()
    own.add()
    assert torch.equal(model[0].weight.grad, before)
