"""The layers that every contract test runs over: one entry a method, by existing in the table."""

import copy

import torch
from torch import Tensor, nn

from anybatch.core.norm_layer import NormLayer
from anybatch.registry import METHODS

# Short memories, so that a few steps cross every boundary.
QUICK = {
    "mabn": {"window": 3, "warmup_steps": 4, "renorm_warmup_steps": 6},
    "brn": {"warmup_steps": 3},
    "cbn": {"window": 3, "order": 0, "burn_in": 0.0},  # what needs a convolution is tested with it
    "mbn": {"batch_size": 2},
    "ghost": {"ghost_size": 2},
    "bgn": {"num_groups": 1},
    "ns": {"ratio": 0.5},
    "bs": {"ratio": 0.5, "seed": 0},
    "fs": {"ratio": 0.5, "seed": 0},
    "points": {"ratio": 0.5, "seed": 0},
    # Who gives the number says that the first rows are virtual, without a VirtualDataset.
    "vdn": {"num_virtual": 1},
    "fs+vdn": {"num_virtual": 1, "ratio": 0.5, "seed": 0},
    "bs+vdn": {"num_virtual": 1, "ratio": 0.5, "seed": 0},
}
VIRTUAL = [name for name, method in METHODS.items() if method.wraps]
SAMPLED = ["ns", "bs", "fs", "points", *VIRTUAL]
UNPOOLED = ["l1", "range"]  # statistics of micro-batches do not make those of all
NAMES = [name for name, method in METHODS.items() if method.builder is None]
CENTRED = [name for name in NAMES if name != "mabn"]
SPATIAL = {1: (5,), 2: (4, 3), 3: (2, 3, 2)}


def make(name: str, channels: int = 6, dims: int = 2, **options: object) -> NormLayer:
    """A layer with random scale and shift, its schedule in the middle."""
    layer = METHODS[name].build(channels, dims, **{**QUICK.get(name, {}), **options})
    assert isinstance(layer, NormLayer)
    if layer.affine:
        nn.init.normal_(layer.weight, 1.0, 0.3)
        nn.init.normal_(layer.bias, 0.0, 0.3)
    layer.set_progress(2, 3)
    return layer


def batch(examples: int, channels: int = 6, dims: int = 2, **like: object) -> Tensor:
    """Random input whose channels differ in mean and spread."""
    x = torch.randn(examples, channels, *SPATIAL[dims], **like)
    column = torch.arange(1.0, channels + 1).view(1, -1, *(1,) * dims).to(x)
    return x * (0.5 + 0.2 * column) + 0.3 * column


def step(layer: nn.Module, x: Tensor, dy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One forward and backward with a random cotangent: output and gradient of the input."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(torch.randn_like(y) if dy is None else dy)
    assert x.grad is not None
    return y.detach(), x.grad


def train(layer: nn.Module, steps: int, examples: int = 2, **shape: int) -> None:
    """Some steps of training."""
    for _ in range(steps):
        step(layer, batch(examples, **shape))


def state(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of everything a checkpoint holds."""
    return copy.deepcopy(dict(layer.state_dict()))


def same(first: dict[str, Tensor], second: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    """Whether two states are equal bit for bit."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first if k not in but)


def finite(tensors: dict[str, Tensor]) -> bool:
    """Whether nothing in a state is infinite or NaN."""
    return all(bool(t.float().isfinite().all()) for t in tensors.values())
