"""The backend of torch's operators: every device, type and format, by statistics that core chose.

With ``m`` and ``v`` the mean and variance that a method chose, constants ``r``
and ``d``, and ``z = (x - m) / sqrt(v + eps)``::

    y  = weight * (r * z + d) + bias
    g  = weight * r * dy
    dx = (g - a * mean(g) - a * z_c * mean(g * z)) / sqrt(v + eps)

where ``z_c = (x - c) / sqrt(v + eps)``, ``c`` is the centre of the batch's
variance and ``a`` (`batch_weight`) is how much of the batch's own statistics is in ``m``
and ``v``: 1 in batch normalization, 1 - lambda in momentum batch normalization
(momentum-bn, equation 13), 0 for remembered statistics. Moving average batch
normalization puts averages over recent steps in the place of the two means
(moving-average-bn, equations 13 and 20).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anybatch.backends.aten import passes, pooling
from anybatch.backends.aten.scalars import scalar
from anybatch.backends.protocol import Gradients, Kernels, NormCall, Rows, Statistics


class AtenBackend:
    """Torch's own operators."""

    name = "aten"
    takes_relu: frozenset[str] = frozenset()
    takes_scopes: frozenset[str] = frozenset()

    def supports(self, call: NormCall, x: Tensor, rows: Rows) -> str | None:
        return None

    def memory_obstacle(self, x: Tensor, rows: Rows) -> str | None:
        return None

    def kernels(self, call: NormCall, x: Tensor) -> Kernels | None:
        return None

    def prepare(self, call: NormCall, x: Tensor) -> NormCall:
        return call

    def forward(
        self,
        call: NormCall,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        state: tuple[Any, ...],
        relu: bool,
    ) -> tuple[Tensor, tuple[Tensor | None, ...], Any]:
        if x.numel() == 0:  # of one process of several
            return torch.empty_like(x), (), None
        mean, var, r, d, *_ = _chosen(call)
        sizes, channels = call.cut[0], x.shape[1]
        scale, shift = _scale(weight, r, channels, sizes), bias
        if d is not None:
            moved = _scale(weight, d, channels, sizes)
            shift = moved if bias is None or moved is None else moved + bias
        elif bias is not None and len(sizes) > 1:
            shift = bias.expand(len(sizes), channels)
        wide_mean, wide_var = _wide(mean, channels), pooling.expand_groups(var, channels)
        return passes.affine(x, sizes, wide_mean, wide_var, scale, shift, call.eps), (), None

    def backward(
        self,
        call: NormCall,
        context: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        if call.formula is not None:
            return *call.formula.gradients(dy, x, weight, call, needs), None
        backward = _one_pass if _is_exact(x, call) else _two_passes
        return *backward(dy, x, weight, call, needs), None

    def statistics(self, call: NormCall, context: Any, like: Tensor) -> list[Statistics]:
        return [_chosen(call)]


def _chosen(call: NormCall) -> Statistics:
    assert call.statistics is not None
    return call.statistics


def _wide(table: Tensor | None, channels: int) -> Tensor | None:
    return None if table is None else pooling.expand_groups(table, channels)


def _scale(
    weight: Tensor | None, table: Tensor | None, channels: int, sizes: tuple[int, ...]
) -> Tensor | None:
    """Product of a row and a table, either of which may be missing."""
    if table is not None:
        table = pooling.expand_groups(table, channels)
        return table if weight is None else weight * table
    if weight is None or len(sizes) == 1:
        return weight
    return weight.expand(len(sizes), channels)


def _is_exact(x: Tensor, call: NormCall) -> bool:
    """Whether one group's own statistics, and they alone, normalize it."""
    mean, var, _, _, center, batch_weight, *_ = _chosen(call)
    own = (
        call.scope is None
        and mean is not None
        and center is None
        and not isinstance(batch_weight, Tensor)
        and batch_weight == 1.0
    )
    return own and len(call.cut[0]) == 1 and call.memory is None and var.shape[-1] == x.shape[1]


def _one_pass(
    dy: Tensor, x: Tensor, weight: Tensor | None, call: NormCall, needs: Sequence[bool]
) -> Gradients:
    mean, var, r, d, *_ = _chosen(call)
    assert mean is not None
    scale = _scale(weight, r, x.shape[1], call.cut[0])
    mask = (needs[0], needs[1], needs[2] or (needs[1] and d is not None))
    dx, dw, db = passes.exact_gradient(dy, x, mean, var, scale, call.eps, mask)
    if dw is not None and needs[1]:
        dw = dw if r is None else dw * r
        dw = dw if d is None or db is None else dw + db * d
    return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None


def _two_passes(
    dy: Tensor, x: Tensor, weight: Tensor | None, call: NormCall, needs: Sequence[bool]
) -> Gradients:
    mean, var, r, d, center, batch_weight, _, counted = _chosen(call)
    sizes, eps, memory, scope = call.cut[0], call.eps, call.memory, call.scope
    channels, num_statistics = x.shape[1], var.shape[-1]
    center = mean if center is None else center
    wide_center = _wide(center, channels)
    inv = torch.rsqrt(var + scalar(eps))
    wide_inv = pooling.expand_groups(inv, channels)

    if x.numel():
        sum_dy, sum_dyz = passes.sums(dy, x, sizes, wide_center)
    else:
        sum_dy, sum_dyz = var.new_zeros(2, channels)
    if center is not None and mean is not None and center is not mean:
        sum_dyz = sum_dyz + sum_dy * pooling.expand_groups(center - mean, channels)
    sum_dyz = sum_dyz * wide_inv

    dw = db = None
    if needs[1]:
        dw = sum_dyz if r is None else sum_dyz * pooling.expand_groups(r, channels)
        dw = dw if d is None else dw + sum_dy * pooling.expand_groups(d, channels)
        dw = dw if len(sizes) == 1 else dw.sum(0)
    if needs[2]:
        db = sum_dy if len(sizes) == 1 else sum_dy.sum(0)
    if not needs[0] and memory is None:
        return None, dw, db

    scale = _scale(weight, r, channels, sizes)
    if counted is None:
        count = pooling.row_counts(sizes, x.numel() // (x.shape[0] * num_statistics), var)
    else:
        count = counted.clamp(min=1) * (channels // num_statistics)
    g = None if mean is None else _weighted_sum(sum_dy, scale, num_statistics)
    psi = _weighted_sum(sum_dyz, scale, num_statistics)
    if scope is not None:
        g, total = scope.sum(g, psi)
        assert total is not None
        psi = total
    g, psi = None if g is None else g / count, psi / count
    if memory is not None:
        g, psi = memory(g, psi)
    if not needs[0]:
        return None, dw, db

    on_dy = wide_inv if scale is None else wide_inv * scale
    batch_weight = batch_weight if isinstance(batch_weight, Tensor) else scalar(batch_weight)
    on_x = pooling.expand_groups(inv.square().mul_(psi).mul_(batch_weight).neg_(), channels)
    constant = None
    if g is not None:
        constant = pooling.expand_groups((g * inv).mul_(batch_weight).neg_(), channels)
    dx = passes.gradient(dy, x, sizes, wide_center, on_dy, on_x, constant)
    if scope is not None and scope.mask is not None:
        dx = scope.gradient(dx, passes.gradient(dy, x, sizes, None, on_dy, None, None))
    return dx, dw, db


def _weighted_sum(table: Tensor, scale: Tensor | None, num_statistics: int) -> Tensor:
    return pooling.pool_groups(table if scale is None else table * scale, num_statistics)
