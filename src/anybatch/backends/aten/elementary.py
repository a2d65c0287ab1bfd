"""Inference of each example by statistics of its own, in elementary operators.

Compilers fuse these, exporters know them, and transforms such as ``vmap`` and any batch size as
a symbol pass through. Autograd differentiates them.
"""

import torch
from torch import Tensor

from anybatch.backends.aten.passes import statistics_dtype
from anybatch.backends.aten.pooling import expand_groups


def example_moments(x: Tensor, centered: bool) -> tuple[Tensor | None, Tensor]:
    """Mean and biased variance of each example and channel, or None and the second moment.

    Args:
        x: ``(N, C, ...)``.
        centered: Whether the mean is subtracted.

    Returns:
        Two tables ``(N, C)``.
    """
    flat = (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)).to(statistics_dtype(x))
    if not centered:
        return None, flat.square().mean(2)
    mean = flat.mean(2, keepdim=True)
    return mean.squeeze(2), (flat - mean).square().mean(2)


def example_affine(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``weight * (x - mean) / sqrt(var + eps) + bias``, in the type of ``x``.

    Args:
        x: ``(N, C, ...)``.
        mean: Table ``(N, K)``, K dividing C; None is zero.
        var: Table ``(N, K)``.
        weight: Row ``(C,)``; None is one.
        bias: Row ``(C,)``; None is zero.
        eps: Added to the variance.

    Returns:
        A tensor like ``x``.
    """
    channels, spatial = x.shape[1], (1,) * (x.dim() - 2)

    def wide(table: Tensor) -> Tensor:
        rows: Tensor = expand_groups(table, channels).unflatten(1, (channels, *spatial))
        return rows

    scale = expand_groups(torch.rsqrt(var + eps), channels)
    scale = scale if weight is None else scale * weight
    centred = x if mean is None else x - wide(mean)
    y = centred * wide(scale)
    if bias is not None:
        y = y + bias.unflatten(0, (channels, *spatial))
    return y.to(x.dtype)
