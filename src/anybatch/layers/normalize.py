"""The one autograd function that all methods share.

With ``m`` and ``v`` the mean and variance that a method chose, constants ``r``
and ``d``, and ``z = (x - m) / sqrt(v + eps)``::

    y  = weight * (r * z + d) + bias
    g  = weight * r * dy
    dx = (g - a * mean(g) - a * z_c * mean(g * z)) / sqrt(v + eps)

where ``z_c = (x - c) / sqrt(v + eps)``, ``c`` is the centre of the batch's
variance and ``a`` (`share`) is how much of the batch's own statistics is in ``m``
and ``v``: 1 in batch normalization, 1 - lambda in momentum batch normalization
(momentum-bn, equation 13), 0 for remembered statistics. Moving average batch
normalization puts averages over recent steps in the place of the two means
(moving-average-bn, equations 13 and 20).
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anybatch import kernels


class Statistics(NamedTuple):
    """What a rule decided: how each group of examples is normalized.

    Tables have one row per group of examples and one column per channel group.

    Attributes:
        mean: Mean to subtract; None for none (the uncentred form).
        var: Variance, or second moment in the uncentred form.
        r: Factor on the normalized value; None for 1. No gradient passes it.
        d: Constant added to it; None for 0. No gradient passes it.
        center: Centre of the variance whose gradient flows; None is `mean`.
        share: Part of the batch's own statistics in `mean` and `var`.
        own: Whether the backward statistics are the batch's own, ``(g, 1)``; None
            where the method does not ask.
    """

    mean: Tensor | None
    var: Tensor
    r: Tensor | None = None
    d: Tensor | None = None
    center: Tensor | None = None
    share: float | Tensor = 1.0
    own: Tensor | None = None


class BackwardMemory(Protocol):
    """Replaces the two batch statistics of the backward pass by remembered ones."""

    def __call__(self, g: Tensor | None, psi: Tensor) -> tuple[Tensor | None, Tensor]:
        """Take mean(g) (None in the uncentred form) and mean(g z), give those to use."""


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    statistics: Statistics,
    eps: float,
    memory: BackwardMemory | None = None,
) -> Tensor:
    """Normalize ``x`` by given statistics, with the gradient that belongs to them.

    Args:
        x: ``(N, C, ...)``.
        weight: Scale, ``(C,)`` or None.
        bias: Shift, ``(C,)`` or None.
        sizes: Examples in each group; they sum to N.
        statistics: See `Statistics`.
        eps: Added to the variance.
        memory: Averages of the backward statistics, or None for the batch's own.

    Returns:
        A tensor of the shape, type and memory format of ``x``.
    """
    mean, var, r, d, center, share, _ = statistics
    y: Tensor = _Normalize.apply(
        x, weight, bias, mean, var, r, d, center, share, sizes, eps, memory
    )  # type: ignore[no-untyped-call]
    return y


class _Call(NamedTuple):
    """What one forward leaves for its backward."""

    x: Tensor
    weight: Tensor | None
    statistics: Statistics
    sizes: tuple[int, ...]
    eps: float
    memory: BackwardMemory | None


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
_Needs = tuple[bool, bool, bool]


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor,
        r: Tensor | None,
        d: Tensor | None,
        center: Tensor | None,
        share: float | Tensor,
        sizes: tuple[int, ...],
        eps: float,
        memory: BackwardMemory | None,
    ) -> Tensor:
        shared = share if isinstance(share, Tensor) else None
        ctx.save_for_backward(x, weight, mean, var, r, d, center, shared)
        ctx.share = share if shared is None else None
        ctx.sizes, ctx.eps, ctx.memory = sizes, eps, memory
        channels, groups = x.shape[1], len(sizes)
        scale = _scale(weight, r, channels, groups)
        shift = None if bias is None else bias.expand(groups, channels)
        if d is not None:
            moved = _scale(weight, d, channels, groups)
            shift = moved if shift is None else moved + shift
        return kernels.affine(
            x, sizes, _wide(mean, channels), _wide(var, channels), scale, shift, eps
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, r, d, center, shared = ctx.saved_tensors
        share = ctx.share if shared is None else shared
        statistics = Statistics(mean, var, r, d, center, share)
        call = _Call(x, weight, statistics, ctx.sizes, ctx.eps, ctx.memory)
        backward = _one_pass if _is_exact(call) else _two_passes
        return *backward(dy.to(x.dtype), call, ctx.needs_input_grad[:3]), *(None,) * 9


def _wide(table: Tensor | None, channels: int) -> Tensor | None:
    return None if table is None else kernels.expand_groups(table, channels)


def _scale(
    weight: Tensor | None, table: Tensor | None, channels: int, groups: int
) -> Tensor | None:
    """Product ``(G, C)`` of a row and a table, either of which may be missing."""
    table = _wide(table, channels)
    if weight is None:
        return table
    return weight.expand(groups, channels) if table is None else weight * table


def _is_exact(call: _Call) -> bool:
    """Whether one group's own statistics, and they alone, normalize it."""
    mean, var, _, _, center, share, _ = call.statistics
    own = mean is not None and center is None and not isinstance(share, Tensor) and share == 1.0
    return own and len(call.sizes) == 1 and call.memory is None and var.shape[1] == call.x.shape[1]


def _one_pass(dy: Tensor, call: _Call, needs: _Needs) -> _Gradients:
    mean, var, r, d = call.statistics[:4]
    assert mean is not None
    scale = _scale(call.weight, r, call.x.shape[1], 1)
    row = None if scale is None else scale[0]
    mask = (needs[0], needs[1], needs[2] or (needs[1] and d is not None))
    dx, dw, db = kernels.exact_gradient(dy, call.x, mean[0], var[0], row, call.eps, mask)
    if needs[1] and r is not None:
        dw = dw * r[0]
    if needs[1] and d is not None:
        dw = dw + db * d[0]
    return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None


def _two_passes(dy: Tensor, call: _Call, needs: _Needs) -> _Gradients:
    x, weight, (mean, var, r, d, center, share, _), sizes, eps, memory = call
    channels, columns = x.shape[1], var.shape[1]
    center = mean if center is None else center
    wide_center = _wide(center, channels)
    inv = torch.rsqrt(var + eps)
    wide_inv = kernels.expand_groups(inv, channels)

    sum_dy, sum_dyz = kernels.sums(dy, x, sizes, wide_center)
    if center is not mean:
        sum_dyz = sum_dyz + sum_dy * kernels.expand_groups(center - mean, channels)
    sum_dyz = sum_dyz * wide_inv

    dw = _weight_gradient(sum_dy, sum_dyz, _wide(r, channels), _wide(d, channels))
    dw, db = dw if needs[1] else None, sum_dy.sum(0) if needs[2] else None
    if not needs[0] and memory is None:
        return None, dw, db

    scale = _scale(weight, r, channels, len(sizes))
    count = kernels.row_counts(sizes, x[0, 0].numel() * (channels // columns), var)
    g = None if mean is None else _mean_gradient(sum_dy, scale, columns, count)
    psi = _mean_gradient(sum_dyz, scale, columns, count)
    if memory is not None:
        g, psi = memory(g, psi)
    if not needs[0]:
        return None, dw, db

    on_dy = wide_inv if scale is None else wide_inv * scale
    on_x = kernels.expand_groups(psi * inv.square() * share, channels).neg()
    constant = None if g is None else kernels.expand_groups(g * inv * share, channels).neg()
    return kernels.gradient(dy, x, sizes, wide_center, on_dy, on_x, constant), dw, db


def _weight_gradient(
    sum_dy: Tensor, sum_dyz: Tensor, r: Tensor | None, d: Tensor | None
) -> Tensor:
    table = sum_dyz if r is None else sum_dyz * r
    return (table if d is None else table + sum_dy * d).sum(0)


def _mean_gradient(
    table: Tensor, scale: Tensor | None, columns: int, count: int | Tensor
) -> Tensor:
    return kernels.pool_groups(table if scale is None else table * scale, columns) / count
