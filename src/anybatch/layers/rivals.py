"""Batch normalization by other spreads: L1 (Wu et al. 2018) and range (Banner et al. 2018)."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from anybatch import kernels
from anybatch.kernels import spread
from anybatch.layers.base import Batch, NormLayer
from anybatch.layers.normalize import BackwardMemory, refuse_second_derivative
from anybatch.layers.partition import Partition
from anybatch.layers.statistics import Statistics

_L1 = math.sqrt(math.pi / 2)


class _SpreadNorm(NormLayer):
    """A batch norm whose variance is the square of another spread."""

    pools: ClassVar[bool] = False

    @staticmethod
    def spread(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
        """The spread of each group and channel, in the place of a standard deviation."""
        raise NotImplementedError

    @staticmethod
    def slope(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
        """Derivative of the spread by each value."""
        raise NotImplementedError

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        assert mean is not None
        if update:
            self.track(mean, var)
        return Statistics(mean, var)

    def _moments(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor | None, Tensor]:
        mean, _ = kernels.moments(x, sizes)
        return mean, self.spread(x, sizes, mean).square()

    def _apply_statistics(
        self, x: Tensor, cut: Partition, chosen: Statistics, memory: BackwardMemory | None
    ) -> Tensor:
        weight, bias = self._parameters_like(chosen.var)
        call = _Call(chosen, cut.sizes, self.eps, type(self))
        y: Tensor = _Normalize.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]
        return y


class _Call(NamedTuple):
    """How one forward normalizes, and what its backward needs beside the input."""

    statistics: Statistics
    sizes: tuple[int, ...]
    eps: float
    kind: type[_SpreadNorm]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        mean, var = call.statistics[:2]
        rows = len(call.sizes)
        scale, shift = (
            t if t is None or rows == 1 else t.expand(rows, t.shape[0]) for t in (weight, bias)
        )
        return kernels.affine(x, call.sizes, mean, var, scale, shift, call.eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        (mean, var, *_), sizes, eps, kind = ctx.call
        share, needs = ctx.call.statistics.share, ctx.needs_input_grad
        dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
        inv = torch.rsqrt(var + kernels.scalar(eps))
        total, moment = kernels.sums(dy, x, sizes, mean)
        moment = moment * inv
        dx = dw = db = None
        if needs[0]:
            on_dy = inv if weight is None else inv * weight
            # Own statistics: at inference those used are a mixture of them and the running ones.
            own, _ = kernels.moments(x, sizes)
            own_spread = kind.spread(x, sizes, own)
            values = x.numel() // (x.shape[0] * x.shape[1])
            count = kernels.row_counts(sizes, values, var)
            on_var = on_dy * inv * moment * share * -0.5
            constant = (2 * on_var * (own - mean) - on_dy * share * total) / count
            slope = kind.slope(x, sizes, own)
            slope.mul_(spread.on_examples(2 * on_var * own_spread, x, sizes))
            slope.add_(spread.on_examples(constant, x, sizes))
            dx = slope.addcmul_(dy, spread.on_examples(on_dy, x, sizes)).to(x.dtype)
        if needs[1]:
            dw = moment if len(sizes) == 1 else moment.sum(0)
        if needs[2]:
            db = total if len(sizes) == 1 else total.sum(0)
        return dx, dw, db, None


class _L1BatchNorm(_SpreadNorm):
    """Batch normalization by the mean absolute deviation.

    ::

        s = sqrt(pi / 2) * mean(abs(x - mean))
        y = weight * (x - mean) / sqrt(s ** 2 + eps) + bias

    For normal values s is the standard deviation; it takes no squares, which is cheaper on hardware
    that lacks fast ones. The gradient is exact. ``running_var`` holds averages of s ** 2, so that
    inference is that of batch normalization.

    Args:
        num_features: Channels C.
        eps: Added to the squared spread (default 1e-5).
        momentum: Weight of the newest batch in the running statistics (default
            0.1); None averages over all batches.
        affine: Learn weight and bias (default True).
        track_running_stats: Keep running statistics (default True).
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
        norm_batch_size: Normalize in successive batches of so many examples.
        example_weight: Share of an example's own statistics at inference.

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d.

    Raises:
        ValueError: For an argument out of range or an input of another shape.
        TypeError: For an input that is not floating point.

    Source: Wu et al., L1-norm batch normalization for efficient training of deep neural networks,
    2018; a baseline of bn-sampling (section 2).

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.L1BatchNorm1d(1, affine=False)
        >>> y = norm(torch.tensor([[1.0], [-1.0]]))
        >>> round(y[0].item(), 3)  # 1 / sqrt(pi / 2)
        0.798
    """

    @staticmethod
    def spread(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
        return _L1 * spread.mean_deviation(x, sizes, mean)

    @staticmethod
    def slope(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
        return _L1 * spread.deviation_signs(x, sizes, mean)


class _RangeBatchNorm(_SpreadNorm):
    """Batch normalization by the range of the values.

    ::

        s = (max(x - mean) - min(x - mean)) / sqrt(2 * ln(n))
        y = weight * (x - mean) / sqrt(s ** 2 + eps) + bias

    for n values a channel. For normal values s is up to twice the standard deviation, which the
    weight makes up for. The gradient is exact; equal extremes share theirs. ``running_var`` holds
    averages of s ** 2, so that inference is that of batch normalization.

    Args:
        num_features: Channels C.
        eps: Added to the squared spread (default 1e-5).
        momentum: Weight of the newest batch in the running statistics (default
            0.1); None averages over all batches.
        affine: Learn weight and bias (default True).
        track_running_stats: Keep running statistics (default True).
        device: Of parameters and state.
        dtype: Of parameters and state (float16 and bfloat16 give float32).
        norm_batch_size: Normalize in successive batches of so many examples.
        example_weight: Share of an example's own statistics at inference.

    Shape:
        Input and output ``(N, C)`` or ``(N, C, L)`` in 1d, ``(N, C, H, W)`` in 2d,
        ``(N, C, D, H, W)`` in 3d.

    Raises:
        ValueError: For an argument out of range or an input of another shape.
        TypeError: For an input that is not floating point.

    Source: Banner et al., Scalable methods for 8-bit training of neural networks, 2018; a baseline
    of bn-sampling (section 2).

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.RangeBatchNorm1d(1, affine=False)
        >>> y = norm(torch.tensor([[1.0], [-1.0]]))
        >>> round(y[0].item(), 3)  # sqrt(2 * ln(2)) / 2
        0.589
    """

    @staticmethod
    def spread(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
        return spread.value_range(x, sizes) * _range_factors(x, sizes, mean)

    @staticmethod
    def slope(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
        factors = _range_factors(x, sizes, mean)
        if factors.dim():
            factors = spread.on_examples(factors.expand_as(mean), x, sizes)
        return spread.range_ends(x, sizes) * factors


def _range_factors(x: Tensor, sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """1 / sqrt(2 ln n), a number or a column; 0 for one value, whose range is 0."""
    values = x.numel() // (x.shape[0] * x.shape[1])
    logs = [math.log(size * values) for size in sizes]
    factors = [1 / math.sqrt(2 * log) if log else 0.0 for log in logs]
    if len(set(factors)) == 1:
        return kernels.scalar(factors[0])
    return torch.stack([like.new_full((1,), factor) for factor in factors])


class L1BatchNorm1d(_L1BatchNorm):
    __doc__ = _L1BatchNorm.__doc__
    dims = 1


class L1BatchNorm2d(_L1BatchNorm):
    __doc__ = _L1BatchNorm.__doc__
    dims = 2


class L1BatchNorm3d(_L1BatchNorm):
    __doc__ = _L1BatchNorm.__doc__
    dims = 3


class RangeBatchNorm1d(_RangeBatchNorm):
    __doc__ = _RangeBatchNorm.__doc__
    dims = 1


class RangeBatchNorm2d(_RangeBatchNorm):
    __doc__ = _RangeBatchNorm.__doc__
    dims = 2


class RangeBatchNorm3d(_RangeBatchNorm):
    __doc__ = _RangeBatchNorm.__doc__
    dims = 3
