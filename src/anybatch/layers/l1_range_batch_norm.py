"""Batch normalization by other spreads: L1 (Wu et al. 2018) and range (Banner et al. 2018)."""

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from anybatch import backends
from anybatch.backends.aten import recorded, spread
from anybatch.backends.protocol import Formula, Gradients, NormCall, Spec, SpreadSpec, Statistics
from anybatch.core.activation_checkpointing import hooks_on_saved
from anybatch.core.grouping import Partition
from anybatch.core.norm_batch import Batch, Moments
from anybatch.core.norm_layer import NormLayer
from anybatch.core.reduction_scope import ReductionScope

_L1 = math.sqrt(math.pi / 2)


class _Values(NamedTuple):
    """The values behind spreads.

    Attributes:
        x: ``(N, C, ...)``.
        sizes: Examples in each group.
        mean: Of each group and channel.
        counts: Values a channel behind each, a number or ``(G, 1)``.
        source: Which of ``x`` they are, and of which processes.
    """

    x: Tensor
    sizes: tuple[int, ...]
    mean: Tensor
    counts: Tensor
    source: ReductionScope

    @classmethod
    def of(cls, x: Tensor, sizes: tuple[int, ...], source: ReductionScope | None) -> "_Values":
        """Those of a batch; where the source is None, all."""
        source = ReductionScope() if source is None else source
        mean, _, counts = source.moments(x, sizes, True)
        assert mean is not None
        return cls(x, sizes, mean, counts, source)

    def total(self, table: Tensor) -> Tensor:
        """Sum of a table over all processes."""
        (summed,) = self.source.sum(table)
        assert summed is not None
        return summed

    def on_examples(self, table: Tensor) -> Tensor:
        """A table of groups, to be broadcast over the values."""
        return spread.on_examples(table.expand_as(self.mean), self.x, self.sizes)


class SpreadNorm(NormLayer):
    """A batch norm whose variance is the square of another spread."""

    pools: ClassVar[bool] = False
    spread_name: ClassVar[str]

    @staticmethod
    def spread(values: _Values) -> Tensor:
        """The spread of each group and channel, in the place of a standard deviation."""
        raise NotImplementedError

    @staticmethod
    def marks(values: _Values) -> Tensor:
        """Marks of values that the spread grows with (1), falls with (2), or both (3): uint8."""
        raise NotImplementedError

    @staticmethod
    def slope(values: _Values, marks: Tensor) -> Tensor:
        """Derivative of the spread by each value; 0 by those that do not contribute to it."""
        raise NotImplementedError

    def rule(self, mean: Tensor | None, var: Tensor, batch: Batch, update: bool) -> Statistics:
        assert mean is not None
        if update:
            self.track(mean, var)
        return Statistics(mean, var)

    def _moments(self, x: Tensor, sizes: tuple[int, ...], source: ReductionScope | None) -> Moments:
        values = _Values.of(x, sizes, source)
        counts = None if source is None else values.counts
        return Moments(values.mean, self.spread(values).square(), counts)

    def method_spec(self, x: Tensor, cut: Partition) -> Spec | str:
        if hooks_on_saved():
            return (
                "hooks on saved tensors: the loops find the values that move it by the saved input"
            )
        return SpreadSpec(self.spread_name)

    def formula(self, x: Tensor, cut: Partition, source: ReductionScope | None) -> Formula | None:
        marks = None
        if x.requires_grad and hooks_on_saved():
            with torch.no_grad():
                marks = _pack(self.marks(_Values.of(x, cut.sizes, source)))
        return _SpreadFormula(type(self), marks)


class _SpreadFormula(NamedTuple):
    """The gradient of a norm by another spread.

    Attributes:
        kind: The layer's class.
        marks: Packed marks of the input, where backward may get one with other last bits.
    """

    kind: type[SpreadNorm]
    marks: Tensor | None = None

    def gradients(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, call: NormCall, needs: Sequence[bool]
    ) -> Gradients:
        return _gradients(dy, x, weight, self, call, needs)

    def moments(self, x: Tensor, call: NormCall) -> tuple[Tensor, Tensor]:
        """Mean and squared spread, by operators that autograd records."""
        sizes, source = call.cut[0], ReductionScope() if call.scope is None else call.scope
        mean, _ = recorded.moments(x, sizes, source.mask)
        mean = mean[0] if len(sizes) == 1 else mean
        with torch.no_grad():
            counts = _Values.of(x.detach(), sizes, source).counts
        return mean, self.kind.spread(_Values(x, sizes, mean, counts, source)).square()


def _pack(marks: Tensor) -> Tensor:
    """Marks as two bits each."""
    flat = marks.flatten()
    fours = F.pad(flat, (0, -flat.shape[0] % 4)).view(-1, 4)
    return fours[:, 0] | fours[:, 1] << 2 | fours[:, 2] << 4 | fours[:, 3] << 6


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The marks that `_pack` was given, of a shape."""
    fours = torch.stack([packed >> bits & 3 for bits in (0, 2, 4, 6)], 1)
    return fours.flatten()[: shape.numel()].view(shape)


def _gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    formula: _SpreadFormula,
    call: NormCall,
    needs: Sequence[bool],
) -> Gradients:
    """The backward pass, see `anybatch.backends.aten.backend`."""
    assert call.statistics is not None
    mean, var, _, _, _, batch_weight, *_ = call.statistics
    assert mean is not None
    sizes, eps, source = call.cut[0], call.eps, call.scope
    kind, packed = formula
    inv = torch.rsqrt(var + backends.scalar(eps))
    if x.numel():
        total, moment = backends.sums(dy, x, sizes, mean)
    else:
        total, moment = var.new_zeros(2, *var.shape)
    moment = moment * inv
    dx = dw = db = None
    if needs[0]:
        on_dy = inv if weight is None else inv * weight
        # Own statistics: at inference those used are a mixture of them and the running ones.
        own = _Values.of(x, sizes, source)
        own_spread, count = kind.spread(own), own.counts.clamp(min=1)
        all_dy, all_moment = own.source.sum(total, moment)
        assert all_dy is not None and all_moment is not None
        on_var = on_dy * inv * all_moment * batch_weight * -0.5
        constant = (2 * on_var * (own.mean - mean) - on_dy * batch_weight * all_dy) / count
        marks = kind.marks(own) if packed is None else _unpack(packed, x.shape)
        inner = kind.slope(own, marks).mul_(own.on_examples(2 * on_var * own_spread))
        inner.add_(own.on_examples(constant))
        if own.source.mask is not None:
            inner = inner.masked_fill(~own.source.mask, 0)
        dx = inner.addcmul_(dy, own.on_examples(on_dy)).to(x.dtype)
    if needs[1]:
        dw = moment if len(sizes) == 1 else moment.sum(0)
    if needs[2]:
        db = total if len(sizes) == 1 else total.sum(0)
    return dx, dw, db


class L1BatchNorm(SpreadNorm):
    """Batch normalization by the mean absolute deviation.

    ::

        s = sqrt(pi / 2) * mean(abs(x - mean))
        y = weight * (x - mean) / sqrt(s ** 2 + eps) + bias

    For normal values s is the standard deviation; it takes no squares, which is cheaper on hardware
    that lacks fast ones. The gradient is exact. ``running_var`` holds averages of s ** 2, so that
    inference is that of batch normalization.

    Args:
        eps: Added to the squared spread (default 1e-5).

    Source: Wu et al., L1-norm batch normalization for efficient training of deep neural networks,
    2018; a baseline of bn-sampling (section 2).

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.L1BatchNorm1d(1, affine=False)
        >>> y = norm(torch.tensor([[1.0], [-1.0]]))
        >>> round(y[0].item(), 3)  # 1 / sqrt(pi / 2)
        0.798
    """

    spread_name: ClassVar[str] = "l1"

    @staticmethod
    def spread(values: _Values) -> Tensor:
        x, sizes, mean, counts, source = values
        sums = spread.deviation_sums(x, sizes, mean, source.mask)
        return _L1 * values.total(sums) / counts.clamp(min=1)

    @staticmethod
    def marks(values: _Values) -> Tensor:
        x, sizes, mean, _, source = values
        signs = spread.deviation_signs(x, sizes, mean, source.mask)
        return (signs > 0).byte() + (signs < 0).byte() * 2

    @staticmethod
    def slope(values: _Values, marks: Tensor) -> Tensor:
        sizes, counts = values.sizes, values.counts.clamp(min=1)
        signs = (marks == 1).to(values.mean.dtype) - (marks == 2).to(values.mean.dtype)
        balance = values.total(spread.group_sums(signs, sizes)) / counts  # by way of the mean
        return _L1 * (signs - values.on_examples(balance)) / values.on_examples(counts)


class RangeBatchNorm(SpreadNorm):
    """Batch normalization by the range of the values.

    ::

        s = (max(x - mean) - min(x - mean)) / sqrt(2 * ln(n))
        y = weight * (x - mean) / sqrt(s ** 2 + eps) + bias

    for n values a channel. For normal values s is up to twice the standard deviation, which the
    weight makes up for. The gradient is exact; equal extremes share theirs. ``running_var`` holds
    averages of s ** 2, so that inference is that of batch normalization.

    Args:
        eps: Added to the squared spread (default 1e-5).

    Source: Banner et al., Scalable methods for 8-bit training of neural networks, 2018; a baseline
    of bn-sampling (section 2).

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.RangeBatchNorm1d(1, affine=False)
        >>> y = norm(torch.tensor([[1.0], [-1.0]]))
        >>> round(y[0].item(), 3)  # sqrt(2 * ln(2)) / 2
        0.589
    """

    spread_name: ClassVar[str] = "range"

    @staticmethod
    def spread(values: _Values) -> Tensor:
        high, low = _ends(values)
        some = values.counts > 0
        return torch.where(some, high - low, 0) * _range_factors(values.counts)

    @staticmethod
    def marks(values: _Values) -> Tensor:
        x, sizes, _, _, source = values
        high, low = (spread.hits(x, sizes, end, source.mask) for end in _ends(values))
        return high.byte() + low.byte() * 2

    @staticmethod
    def slope(values: _Values, marks: Tensor) -> Tensor:
        found = torch.zeros_like(values.x, dtype=values.mean.dtype)
        for bit, sign in ((1, 1), (2, -1)):
            hits = (marks & bit != 0).to(values.mean.dtype)
            many = values.total(spread.group_sums(hits, values.sizes)).clamp(min=1)
            found += sign * hits / values.on_examples(many)  # equal ends share it
        return found * values.on_examples(_range_factors(values.counts))


def _ends(values: _Values) -> tuple[Tensor, Tensor]:
    """Largest and smallest value of each group and channel, over all processes."""
    x, sizes, _, _, source = values
    ends = torch.stack(
        [spread.largest(x, sizes, source.mask), spread.largest(-x, sizes, source.mask)]
    )
    high, negative_low = source.largest(ends)
    return high, -negative_low


def _range_factors(counts: Tensor) -> Tensor:
    """1 / sqrt(2 ln n); 0 for one value, whose range is 0."""
    logs = counts.clamp(min=1).log()
    return torch.where(logs > 0, (2 * logs).rsqrt(), 0)


class L1BatchNorm1d(L1BatchNorm, dims=1): ...


class L1BatchNorm2d(L1BatchNorm, dims=2): ...


class L1BatchNorm3d(L1BatchNorm, dims=3): ...


class RangeBatchNorm1d(RangeBatchNorm, dims=1): ...


class RangeBatchNorm2d(RangeBatchNorm, dims=2): ...


class RangeBatchNorm3d(RangeBatchNorm, dims=3): ...
