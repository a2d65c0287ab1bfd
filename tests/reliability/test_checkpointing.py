"""Activation checkpointing: backward gets a recomputed input, other in its last bits."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import anybatch
from anybatch.backends import use_fused
from method_cases import NAMES, SAMPLED, VIRTUAL, make


class Shaken(nn.Module):
    """A network whose second half gets an input that is another in its last bits when run again."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.runs = layer, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs > 1:
            bits = torch.arange(x.numel()).view(x.shape) % 3 - 1.0
            x = x + (torch.nextafter(x.detach(), x.detach() + bits) - x.detach())
        return self.layer(x)


def gradients(layer: nn.Module, run: object, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    run(x).backward(dy)
    return x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("fused", ["auto", "never"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SAMPLED])
def test_gradients_with_a_recomputed_input_are_those_without(
    name: str, ties: bool, fused: str
) -> None:
    layer = make(name)
    x = torch.randn(4, 6, 5, 7)
    x = (x * 2).round() / 2 + 0.1 if ties else x
    dy = torch.randn_like(x)
    use_fused(fused)
    try:
        plain = copy.deepcopy(layer)
        expected = gradients(plain, plain, x, dy)
        shaken = Shaken(layer)
        found = gradients(layer, lambda x: checkpoint(shaken, x, use_reentrant=False), x, dy)
    finally:
        use_fused("auto")
    assert shaken.runs == 2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["l1", "range"])
def test_two_norms_in_a_row_in_one_checkpoint(name: str) -> None:
    net = nn.Sequential(make("bn"), make(name))
    plain = copy.deepcopy(net)
    x, dy = torch.randn(8, 6, 9, 9), torch.randn(8, 6, 9, 9)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(a).backward(dy)
    checkpoint(net, b, use_reentrant=False).backward(dy)
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpointed_forward_without_updates_changes_nothing(
    name: str, use_reentrant: bool
) -> None:
    layer, x = make(name), torch.randn(4, 6, 5, 7, requires_grad=True)
    layer(x).sum().backward()
    before = copy.deepcopy(layer.state_dict())
    with anybatch.no_update():
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    after = layer.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


POLICIES = {
    "convolutions are kept": [torch.ops.aten.convolution.default],
    "all is kept": lambda ctx, operator, *_, **__: CheckpointPolicy.MUST_SAVE,
    "nothing is kept": [],
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in VIRTUAL])
def test_a_selective_checkpoint_changes_nothing(name: str, policy: str) -> None:
    contexts = partial(create_selective_checkpoint_contexts, POLICIES[policy])
    plain = nn.Sequential(nn.Conv2d(6, 6, 3), make(name), nn.ReLU(), nn.Conv2d(6, 6, 1))
    kept = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(4, 6, 7, 6)
        plain.zero_grad()
        kept.zero_grad()
        plain(x).square().mean().backward()
        y = checkpoint(kept, x, use_reentrant=False, context_fn=contexts)
        y.square().mean().backward()
        for one, other in zip(kept.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        dict(kept.state_dict()), dict(plain.state_dict()), rtol=1e-4, atol=1e-5
    )


def test_a_selective_checkpoint_of_fake_tensors_gives_fake_ones() -> None:
    contexts = partial(create_selective_checkpoint_contexts, [])
    with FakeTensorMode():
        net = nn.Sequential(nn.Conv2d(3, 6, 3), make("bn"))
        x = torch.randn(2, 3, 6, 6)
        y = checkpoint(net, x, use_reentrant=False, context_fn=contexts)
    assert isinstance(y, FakeTensor)
