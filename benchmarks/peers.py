"""Layers to stand beside: torch's, and batch normalizations as trainers' and papers' code has them.

All are written here from the equations, in the way that such code usually is: a line an equation,
each a tensor operator.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

EPS = 1e-5
Channels = (0, 2, 3)


class LoopedGhostNorm(nn.Module):
    """Ghost batch norm as a loop over chunks."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.norm, self.size = nn.BatchNorm2d(channels), size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.split(self.size)])


class _Eager(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("var", torch.ones(1, channels, 1, 1))

    def follow(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics."""
        with torch.no_grad():
            self.mean.lerp_(mean.to(self.mean.dtype), 0.1)
            self.var.lerp_(var.to(self.var.dtype), 0.1)


class EagerNorm(_Eager):
    """Batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, Channels, correction=0, keepdim=True)
        self.follow(mean, var)
        return self.weight * ((x - mean) * torch.rsqrt(var + EPS)) + self.bias


class EagerRenorm(_Eager):
    """Batch renormalization, past its warm-up."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(Channels, keepdim=True)
        sigma = torch.sqrt(x.var(Channels, unbiased=False, keepdim=True) + EPS)
        running = torch.sqrt(self.var + EPS)
        r = (sigma.detach() / running).clamp(1 / 3, 3)
        d = ((mean.detach() - self.mean) / running).clamp(-5, 5)
        self.follow(mean, sigma**2)
        return self.weight * ((x - mean) / sigma * r + d) + self.bias


class EagerMovingAverageNorm(_Eager):
    """Moving average batch norm: windows of 16, an operator a line, means a dimension at a time."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("squares", torch.ones(16, channels))
        self.register_buffer("products", torch.zeros(16, channels))
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return _MovingAverage.apply(x, self.weight, self.bias, self)


def _mean(x: Tensor) -> Tensor:
    return x.mean(3).mean(2).mean(0)


class _MovingAverage(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: EagerMovingAverageNorm
    ) -> Tensor:
        layer.squares[layer.step % 16].copy_(_mean(x * x))
        var = layer.squares.mean(0).view_as(layer.var)
        z = x / (var + EPS).sqrt()
        r = ((var + EPS).sqrt() / (layer.var + EPS).sqrt()).clamp(1 / 5, 5)
        layer.var.copy_(0.98 * layer.var + 0.02 * var)
        ctx.layer, ctx.at = layer, layer.step % 16
        ctx.save_for_backward(z, var, weight, r)
        return weight * (r * z) + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, var, weight, r = ctx.saved_tensors
        y, g = r * z, dy * weight * r
        ctx.layer.products[ctx.at].copy_(_mean(g * z))
        psi = ctx.layer.products.mean(0).view_as(var)
        dx = (g - z * psi) / (var + EPS).sqrt()
        dw = (dy * y).sum(3).sum(2).sum(0).view_as(weight)
        db = dy.sum(3).sum(2).sum(0).view_as(weight)
        return dx, dw, db, None


class SynchronizedNorm(nn.SyncBatchNorm):
    """torch's synchronized batch norm in a group of one: its kernels and collectives, no waiting.

    By itself it calls plain batch norm where there is one process.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        if not dist.is_initialized():
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.modules._functions import SyncBatchNorm

        state = (self.weight, self.bias, self.running_mean, self.running_var)
        y: Tensor = SyncBatchNorm.apply(x, *state, self.eps, 0.1, dist.group.WORLD, 1)
        return y


def peers(channels: int, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What makes each of them, by name; in the type of the data where they take no other.

    Args:
        channels: Of the data.
        batch: Its examples; the loop has up to 16 chunks.
        device: Where; synchronizing layers are for CUDA alone.
        dtype: Of the data.
    """
    found: dict[str, Any] = {
        "nn.GroupNorm": lambda: nn.GroupNorm(math.gcd(32, channels), channels).to(dtype),
        "ghost, a loop": lambda: LoopedGhostNorm(channels, max(batch // 16, 1)),
        "eager BN": lambda: EagerNorm(channels).to(dtype),
        "eager MABN": lambda: EagerMovingAverageNorm(channels).to(dtype),
        "eager BRN": lambda: EagerRenorm(channels).to(dtype),
        "compiled BN": lambda: EagerNorm(channels).to(dtype),
    }
    if device.type == "cuda":
        found["nn.SyncBatchNorm"] = lambda: SynchronizedNorm(channels)
    return found
