"""Every public layer class, with an independent reference of its first training step."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import anybatch
import reference
from anybatch.core.norm_layer import NormLayer
from anybatch.layers import weight_centralization
from anybatch.registry import METHODS
from reference_cases import CHANNELS, flat, pair

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # from input and gradient of the output
CENTRALIZED = "Centralized layers"
CASES = {
    "BatchNorm": "bn",
    "MomentumBatchNorm": "mbn",
    "MovingAverageBatchNorm": "mabn",
    "CrossIterationBatchNorm": "",
    "BatchRenorm": "brn",
    "GhostBatchNorm": "ghost 2",
    "BatchGroupNorm": "bgn 3",
    "SampledBatchNorm": "bs {'size': 2, 'seed': 4, 'norm_batch_size': 3}",
    "L1BatchNorm": "l1",
    "RangeBatchNorm": "range",
}
SPATIAL = {0: (), 1: (5,), 2: (3, 2), 3: (2, 1, 3)}
PLAIN = {
    "CentralizedConv1d": lambda: nn.Conv1d(CHANNELS, 4, 2),
    "CentralizedConv2d": lambda: nn.Conv2d(CHANNELS, 4, 2),
    "CentralizedConv3d": lambda: nn.Conv3d(CHANNELS, 4, 1),
    "CentralizedConvTranspose1d": lambda: nn.ConvTranspose1d(CHANNELS, 4, 2),
    "CentralizedConvTranspose2d": lambda: nn.ConvTranspose2d(CHANNELS, 4, 2),
    "CentralizedConvTranspose3d": lambda: nn.ConvTranspose3d(CHANNELS, 4, 2),
    "CentralizedLinear": lambda: nn.Linear(CHANNELS, 4),
}
FROZEN = "FrozenBatchNorm"
NORMS = [f"{family}{dims}d" for family in (*CASES, FROZEN) for dims in (1, 2, 3)]
NAMES = [*NORMS, "RunningGroupNorm", *PLAIN]
FAMILIES = [*CASES, "RunningGroupNorm", FROZEN, CENTRALIZED]


class Made(NamedTuple):
    """A layer in float64, an input, a gradient of the output, and its first step's reference."""

    layer: nn.Module
    x: Tensor
    dy: Tensor
    step: Step


def family_of(name: str) -> str:
    """The column of the matrix that a class is in."""
    if name in PLAIN:
        return CENTRALIZED
    return name[:-2] if name[-2:] in ("1d", "2d", "3d") else name


def make(name: str) -> Made:
    """A layer of a class by its name."""
    torch.manual_seed(7)
    if name in PLAIN:
        return _centralized(name)
    dims = int(name[-2]) if name[-1] == "d" else 2
    if family_of(name) == FROZEN:
        return _frozen(name, dims)
    layer, other = _norm(name, dims)
    x = torch.randn(4, CHANNELS, *SPATIAL[dims], dtype=torch.float64)
    x = x * (1 + torch.arange(CHANNELS).view(1, -1, *(1,) * dims)) + 0.5

    def step(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, backward = other.forward(flat(x))
        return y.view(x.shape), backward(flat(dy))[0].view(x.shape)

    return Made(layer, x, torch.randn_like(x), step)


def _norm(name: str, dims: int) -> tuple[nn.Module, reference.Layer]:
    family = family_of(name)
    if CASES.get(family):
        layer, other = pair(CASES[family], dims, torch.float64)
        assert type(layer).__name__ == name
        return layer, other
    options: dict[str, int] = {}
    kind: type[reference.Layer] = reference.BatchNorm  # what the first step of an empty window is
    if family == "CrossIterationBatchNorm":
        layer = METHODS["cbn"].build(CHANNELS, dims, dtype=torch.float64, order=0)
    else:
        layer = anybatch.RunningGroupNorm(3, CHANNELS, dtype=torch.float64)
        kind, options = reference.BatchGroupNorm, {"num_groups": 3, "ghost_size": 1}
    assert isinstance(layer, NormLayer)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.bias)
    rows = layer.weight.detach().clone(), layer.bias.detach().clone()
    return layer, kind(CHANNELS, *rows, **options)


def _frozen(name: str, dims: int) -> Made:
    layer: nn.Module = getattr(anybatch, name)(CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        for row in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            row.copy_(torch.rand(CHANNELS) + 0.5)  # type: ignore[operator, union-attr]
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](CHANNELS).double().eval()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, CHANNELS, *SPATIAL[dims], dtype=torch.float64)

    def step(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return _differentiated(plain, x, dy)

    return Made(layer, x, torch.randn_like(x), step)


def _differentiated(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


def _centralized(name: str) -> Made:
    plain = PLAIN[name]().double()
    layer = weight_centralization(PLAIN[name]().double())
    assert type(layer).__name__ == name
    layer.load_state_dict(plain.state_dict(), strict=False)
    transposed = isinstance(plain, nn.modules.conv._ConvTransposeNd)
    with torch.no_grad():
        weight: Tensor = plain.weight  # type: ignore[assignment]
        dims = [dim for dim in range(weight.dim()) if dim != int(transposed)]
        weight.sub_(weight.mean(dims, keepdim=True))
    x = torch.randn(4, CHANNELS, *SPATIAL[0 if name == "CentralizedLinear" else int(name[-2])])

    def step(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        return _differentiated(plain, x, dy)

    return Made(layer, x.double(), torch.randn_like(plain(x.double())), step)
