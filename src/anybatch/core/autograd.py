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

from anybatch import backends
from anybatch.core.reduction_scope import Source
from anybatch.core.statistics import Statistics


class BackwardMemory(Protocol):
    """Replaces the two batch statistics of the backward pass by remembered ones."""

    def __call__(self, g: Tensor | None, psi: Tensor) -> tuple[Tensor | None, Tensor]:
        """Take mean(g) (None in the uncentred form) and mean(g z), give those to use."""


class Call(NamedTuple):
    """How one forward normalizes, and what its backward needs beside the input."""

    statistics: Statistics
    sizes: tuple[int, ...]
    eps: float
    memory: BackwardMemory | None
    source: Source | None = None


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    statistics: Statistics,
    eps: float,
    memory: BackwardMemory | None = None,
    source: Source | None = None,
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
        source: Whose values stand behind the statistics; None for all of the batch's own.

    Returns:
        A tensor of the shape, type and memory format of ``x``.
    """
    call = Call(statistics, sizes, eps, memory, source)
    y: Tensor = _Normalize.apply(x, weight, bias, call)  # type: ignore[no-untyped-call]
    return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        if x.numel() == 0:  # of one process of several
            return torch.empty_like(x)
        mean, var, r, d, *_ = call.statistics
        channels = x.shape[1]
        scale, shift = _scale(weight, r, channels, call), bias
        if d is not None:
            moved = _scale(weight, d, channels, call)
            shift = moved if bias is None or moved is None else moved + bias
        elif bias is not None and len(call.sizes) > 1:
            shift = bias.expand(len(call.sizes), channels)
        wide_mean, wide_var = _wide(mean, channels), backends.expand_groups(var, channels)
        return backends.affine(x, call.sizes, wide_mean, wide_var, scale, shift, call.eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight = ctx.saved_tensors
        dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
        return *gradients(dy, x, weight, ctx.call, ctx.needs_input_grad), None


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, call: Call, needs: tuple[bool, ...]
) -> Gradients:
    """The backward pass of `normalize`.

    Args:
        dy: Gradient of the output, in the type of ``x``.
        x: Input of the forward.
        weight: Its scale.
        call: How it normalized.
        needs: Which of input, weight and bias need a gradient.

    Returns:
        Gradients of input, weight and bias, None where not asked for.
    """
    backward = _one_pass if _is_exact(x, call) else _two_passes
    return backward(dy, x, weight, call, needs)


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True: anybatch layers have no second derivative in training mode; "
            "put them in evaluation mode, or use torch.nn.BatchNorm here"
        )


def _wide(table: Tensor | None, channels: int) -> Tensor | None:
    return None if table is None else backends.expand_groups(table, channels)


def _scale(weight: Tensor | None, table: Tensor | None, channels: int, call: Call) -> Tensor | None:
    """Product of a row and a table, either of which may be missing."""
    if table is not None:
        table = backends.expand_groups(table, channels)
        return table if weight is None else weight * table
    if weight is None or len(call.sizes) == 1:
        return weight
    return weight.expand(len(call.sizes), channels)


def _is_exact(x: Tensor, call: Call) -> bool:
    """Whether one group's own statistics, and they alone, normalize it."""
    mean, var, _, _, center, share, *_ = call.statistics
    own = (
        call.source is None
        and mean is not None
        and center is None
        and not isinstance(share, Tensor)
        and share == 1.0
    )
    return own and len(call.sizes) == 1 and call.memory is None and var.shape[-1] == x.shape[1]


def _one_pass(
    dy: Tensor, x: Tensor, weight: Tensor | None, call: Call, needs: tuple[bool, ...]
) -> Gradients:
    mean, var, r, d, *_ = call.statistics
    assert mean is not None
    scale = _scale(weight, r, x.shape[1], call)
    mask = (needs[0], needs[1], needs[2] or (needs[1] and d is not None))
    dx, dw, db = backends.exact_gradient(dy, x, mean, var, scale, call.eps, mask)
    if dw is not None and needs[1]:
        dw = dw if r is None else dw * r
        dw = dw if d is None or db is None else dw + db * d
    return dx if needs[0] else None, dw if needs[1] else None, db if needs[2] else None


def _two_passes(
    dy: Tensor, x: Tensor, weight: Tensor | None, call: Call, needs: tuple[bool, ...]
) -> Gradients:
    (mean, var, r, d, center, share, _, counted), sizes, eps, memory, source = call
    channels, columns = x.shape[1], var.shape[-1]
    center = mean if center is None else center
    wide_center = _wide(center, channels)
    inv = torch.rsqrt(var + backends.scalar(eps))
    wide_inv = backends.expand_groups(inv, channels)

    if x.numel():
        sum_dy, sum_dyz = backends.sums(dy, x, sizes, wide_center)
    else:
        sum_dy, sum_dyz = var.new_zeros(2, channels)
    if center is not None and mean is not None and center is not mean:
        sum_dyz = sum_dyz + sum_dy * backends.expand_groups(center - mean, channels)
    sum_dyz = sum_dyz * wide_inv

    dw = db = None
    if needs[1]:
        dw = sum_dyz if r is None else sum_dyz * backends.expand_groups(r, channels)
        dw = dw if d is None else dw + sum_dy * backends.expand_groups(d, channels)
        dw = dw if len(sizes) == 1 else dw.sum(0)
    if needs[2]:
        db = sum_dy if len(sizes) == 1 else sum_dy.sum(0)
    if not needs[0] and memory is None:
        return None, dw, db

    scale = _scale(weight, r, channels, call)
    if counted is None:
        count = backends.row_counts(sizes, x.numel() // (x.shape[0] * columns), var)
    else:
        count = counted.clamp(min=1) * (channels // columns)
    g = None if mean is None else _weighted_sum(sum_dy, scale, columns)
    psi = _weighted_sum(sum_dyz, scale, columns)
    if source is not None:
        g, total = source.sum(g, psi)
        assert total is not None
        psi = total
    g, psi = None if g is None else g / count, psi / count
    if memory is not None:
        g, psi = memory(g, psi)
    if not needs[0]:
        return None, dw, db

    on_dy = wide_inv if scale is None else wide_inv * scale
    share = share if isinstance(share, Tensor) else backends.scalar(share)
    on_x = backends.expand_groups(inv.square().mul_(psi).mul_(share).neg_(), channels)
    constant = None
    if g is not None:
        constant = backends.expand_groups((g * inv).mul_(share).neg_(), channels)
    dx = backends.gradient(dy, x, sizes, wide_center, on_dy, on_x, constant)
    if source is not None and source.mask is not None:
        dx = source.gradient(dx, backends.gradient(dy, x, sizes, None, on_dy, None, None))
    return dx, dw, db


def _weighted_sum(table: Tensor, scale: Tensor | None, columns: int) -> Tensor:
    return backends.pool_groups(table if scale is None else table * scale, columns)
