"""Normalization by operators that autograd records, as functions of the input alone.

For second derivatives, batched gradients, forward-mode derivatives and the transforms of
``torch.func``, which cannot look into an autograd function. With statistics ``m`` and ``v`` that a
method chose, the batch's own ``m_B`` and ``v_B``, their share ``a`` in them, and ``sg`` for a
constant::

    e   = m_B - sg(m_B)
    m'  = m + a * e
    v'  = v + a * (v_B - sg(v_B) + 2 * sg(m_B - m) * e + (1 - a) * e ** 2)
    y   = weight * (r * (x - m') / sqrt(v' + eps) + d) + bias

The values are those of `anybatch.backends.aten.backend`, and so is the first derivative. The last
two terms belong to a mixture of statistics about the mixed mean: 0 where ``m`` is ``m_B``, absent
where the variance has a centre of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anybatch.backends.aten.pooling import expand_groups, expand_rows, pool_channels, pool_rows
from anybatch.backends.protocol import Gradients, NormCall, Statistics


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is at work."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def obstacle(call: NormCall) -> str | None:
    """Why a call has no such form; None if it has one."""
    if call.memory is not None:
        return "its backward pass averages gradients over steps"
    if call.scope is not None and call.scope.group is not None:
        return "its statistics come from several processes"
    if call.formula is not None and call.formula.moments is None:
        return "its gradient is an estimate from a sample"
    return None


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, call: NormCall) -> Tensor:
    """Normalize by chosen statistics.

    Args:
        x: ``(N, C, ...)``.
        weight: Scale, ``(C,)`` or None.
        bias: Shift, ``(C,)`` or None.
        call: With statistics, and without an `obstacle`.

    Returns:
        A tensor of the shape and type of ``x``.
    """
    assert call.statistics is not None
    sizes, chosen, channels = call.cut[0], call.statistics, x.shape[1]
    values = x.to(chosen.var.dtype)
    mean, var = _with_slopes(chosen, *own_moments(values, call))

    def on_examples(table: Tensor) -> Tensor:
        """A table as rows of examples, to be broadcast over positions."""
        rows = expand_groups(table.reshape(-1, table.shape[-1]), channels)
        rows = rows if rows.shape[0] == 1 else expand_rows(rows, sizes)
        return rows.reshape(rows.shape[0], channels, *(1,) * (x.dim() - 2))

    y = values if mean is None else values - on_examples(mean)
    y = y * on_examples(torch.rsqrt(var + call.eps))
    if chosen.r is not None:
        y = y * on_examples(chosen.r)
    if chosen.d is not None:
        y = y + on_examples(chosen.d)
    if weight is not None:
        y = y * on_examples(weight)
    if bias is not None:
        y = y + on_examples(bias)
    return y.to(x.dtype)


def _with_slopes(
    chosen: Statistics, own_mean: Tensor | None, own_var: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The chosen mean and variance, as functions of the input."""
    mean, var, _, _, center, batch_weight, *_ = chosen
    var_slope = own_var - own_var.detach()
    if mean is None or own_mean is None:
        return None, var + batch_weight * var_slope
    mean_slope = own_mean - own_mean.detach()
    if center is None:
        apart = (own_mean - mean).detach()
        var_slope = var_slope + 2 * apart * mean_slope + (1 - batch_weight) * mean_slope.square()
    return mean + batch_weight * mean_slope, var + batch_weight * var_slope


def own_moments(x: Tensor, call: NormCall) -> tuple[Tensor | None, Tensor]:
    """The batch's own mean (None in the uncentred form) and variance, in the shape of the chosen.

    Args:
        x: ``(N, C, ...)``, of the type of the statistics.
        call: See `normalize`.
    """
    assert call.statistics is not None
    sizes, like = call.cut[0], call.statistics.var
    if call.formula is not None:
        assert call.formula.moments is not None
        mean, var = call.formula.moments(x, call)
        return mean, var
    mean, var = moments(x, sizes, None if call.scope is None else call.scope.mask)
    if call.statistics.mean is None:
        var = var + mean.square()
        return None, var[0] if like.dim() == 1 else var
    if like.shape[-1] != x.shape[1]:
        mean, var = pool_channels(mean, var, like.shape[-1])
    return (mean[0], var[0]) if like.dim() == 1 else (mean, var)


def moments(x: Tensor, sizes: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group of examples and channel: tables ``(G, C)``."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    if mask is None:
        mean = flat.mean(2, keepdim=True)
        return pool_rows(mean.squeeze(2), (flat - mean).square().mean(2), sizes)
    valid = (mask.flatten(2) if mask.dim() > 2 else mask.unsqueeze(2)).to(x.dtype)

    def group_means(table: Tensor) -> Tensor:
        sums = [part.sum(0) for part in (table * valid).sum(2).split(sizes)]
        counts = [part.sum(0).clamp(min=1) for part in valid.sum(2).split(sizes)]
        return torch.stack(sums) / torch.stack(counts)

    means = group_means(flat)
    return means, group_means((flat - expand_rows(means, sizes).unsqueeze(2)).square())


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, call: NormCall, needs: Sequence[bool]
) -> Gradients:
    """The backward pass; where autograd records it, it can be differentiated again.

    Args:
        dy: Gradient of the output, in the type of ``x``; perhaps one of a batch of gradients.
        x: The batch.
        weight: Scale.
        call: See `normalize`.
        needs: Which of input, scale and shift need a gradient.
    """
    recorded = torch.is_grad_enabled()
    if not recorded:
        x = x.detach().requires_grad_(needs[0])
        weight = None if weight is None else weight.detach().requires_grad_(needs[1])
    wanted = [t for t, need in zip((x, weight), needs, strict=False) if need and t is not None]
    found = []
    if wanted:
        with torch.enable_grad():
            y = normalize(x, weight, None, call)
        found = list(torch.autograd.grad(y, wanted, dy, create_graph=recorded))
    dx = found.pop(0) if needs[0] else None
    dw = found.pop(0) if needs[1] and weight is not None else None
    if not needs[2]:
        return dx, dw, None
    dims = [0, *range(2, x.dim())]
    return dx, dw, dy.to(x.dtype if weight is None else weight.dtype).sum(dims)
