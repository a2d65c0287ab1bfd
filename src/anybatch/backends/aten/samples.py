"""Passes over a sample of an activation, and the gradient when statistics come from a sample.

A sample is the same for every channel: a `Box` of examples and pixels, or `Points`. Its place is
whole numbers, of which a slice is made, or tensors of them, from which a compiler's graph gathers
so that it holds for any place.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.backends.aten.passes import gradient, moments
from anybatch.backends.layout import is_channels_last

Place = int | Tensor
_MASK = 2**31 - 1
_MIXERS = ((15, 0x45EBCA6B), (13, 0x42B2AE35))  # shifts and odd factors


class Box(NamedTuple):
    """Adjacent examples, and a patch of each.

    Attributes:
        first: Where it begins, in examples and in each spatial dimension.
        sides: How far it reaches, the same.
    """

    first: tuple[Place, ...]
    sides: tuple[int, ...]


class Points(NamedTuple):
    """Single values.

    Attributes:
        where: Their examples and their place in each spatial dimension, ``(k,)`` each.
    """

    where: tuple[Tensor, ...]

    @property
    def index(self) -> Any:
        """What picks them out of an activation, of every channel: ``(k, C)``."""
        rows, *pixels = self.where
        return (rows, slice(None), *pixels)


Sample = Box | Points


def random_positions(key: Place, total: int, count: int, device: torch.device) -> Tensor:
    """The same ``count`` of ``total`` positions on every device, without repetition.

    Positions are those of the smallest values of a one-to-one hash of 31 bits.

    Args:
        key: Below ``2 ** 31``; another one gives other positions.
        total: Positions to choose from, below ``2 ** 31``.
        count: How many.
        device: Where they are wanted.

    Returns:
        Positions ``(count,)`` in ascending order.
    """
    if count == total:
        return torch.arange(total, device=device)
    order = (torch.arange(total, device=device) * 0x1E3779B1 + key) & _MASK
    for shift, factor in _MIXERS:
        order = ((order ^ (order >> shift)) * factor) & _MASK
    order = order ^ (order >> 16)
    return order.topk(count, largest=False).indices.sort().values


def take(x: Tensor, sample: Sample) -> Tensor:
    """The values of a sample: ``(n, C, ...)`` of a box, a view where it can be; ``(k, C)``."""
    if isinstance(sample, Points):
        return x[sample.index]
    for dim, first, side in _cuts(x, sample):
        if isinstance(first, Tensor):
            x = x.index_select(dim, first + torch.arange(side, device=x.device))
        else:
            x = x.narrow(dim, first, side)
    return x


def take_dense(x: Tensor, sample: Sample) -> Tensor:
    """The values of a sample, dense: ``(n, C, ...)`` of a box, ``(1, C, k)`` of points."""
    values = take(x, sample)
    # torch sums what is not dense in the type of the data: with a large mean that is too coarse.
    if isinstance(sample, Points):
        return values.t().contiguous().unsqueeze(0)
    if torch.compiler.is_compiling():
        return values.contiguous()
    if not values.is_contiguous() and not (values.dim() > 3 and is_channels_last(values)):
        return values.contiguous()
    return values


def sample_moments(x: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a sample: rows ``(C,)``."""
    values = take_dense(x, sample)
    return moments(values, (values.shape[0],))


def fixed_gradient(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradient and sums in one call, of a normalization by statistics that are constants.

    Args:
        dy: Gradient of the output, like ``x``.
        x: ``(N, C, ...)``, one group.
        mean: Mean ``(C,)``.
        var: Variance ``(C,)``.
        weight: Row ``(C,)`` or None.
        eps: Added to the variance.
        mask: Which of input, weight and bias need a gradient.

    Returns:
        Gradients of input, weight (``sum(dy * z)``) and bias (``sum(dy)``), None where not asked
        for.
    """
    weight = None if weight is None else weight.contiguous()  # whose strides torch does not read
    grads: tuple[Tensor | None, Tensor | None, Tensor | None]
    grads = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, var, None, None, False, eps, list(mask)
    )
    return grads


def put_gradient(
    dx: Tensor,
    dy: Tensor,
    x: Tensor,
    sample: Sample,
    center: Tensor,
    on_dy: Tensor,
    on_x: Tensor,
    constant: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """``dx`` with ``on_dy * dy + on_x * (x - center) + constant`` at a sample's positions.

    Args:
        dx: Gradient of the input so far; written where the sample's place is known.
        dy: Gradient of the output.
        x: Input ``(N, C, ...)``.
        sample: Where.
        center: Row ``(C,)``, as those that follow.
        on_dy: Factor of dy.
        on_x: Factor of x.
        constant: Added.
        valid: Positions ``(N, 1, ...)`` that are behind the statistics; None for all.
    """
    rows = (center, on_dy, on_x, constant)
    if isinstance(sample, Box) and any(isinstance(first, Tensor) for first in sample.first):
        everywhere = gradient(dy, x, (x.shape[0],), *rows)
        inside = _inside(x, sample)
        return torch.where(inside if valid is None else inside & valid, everywhere, dx)
    some = take(x, sample)
    new = gradient(take(dy, sample), some, (some.shape[0],), *rows)
    if valid is not None:
        new = torch.where(take(valid, sample), new, take(dx, sample))
    if isinstance(sample, Points):
        dx[sample.index] = new
    else:
        take(dx, sample).copy_(new)
    return dx


def _cuts(x: Tensor, box: Box) -> list[tuple[int, Place, int]]:
    """Dimension, begin and length of what a box cuts off."""
    dims = (0, *range(2, x.dim()))
    cuts = zip(dims, box.first, box.sides, strict=True)
    return [(dim, first, side) for dim, first, side in cuts if side != x.shape[dim]]


def _inside(x: Tensor, box: Box) -> Tensor:
    """Which positions are in a box, to be broadcast over ``x``."""
    inside = torch.ones((1,) * x.dim(), dtype=torch.bool, device=x.device)
    for dim, first, side in _cuts(x, box):
        distance = torch.arange(x.shape[dim], device=x.device) - first
        shape = [1] * x.dim()
        shape[dim] = -1
        inside = inside & ((distance >= 0) & (distance < side)).view(shape)
    return inside
