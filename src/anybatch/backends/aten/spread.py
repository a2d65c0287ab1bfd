"""Passes for spreads other than the standard deviation: mean absolute deviation and range.

Tables are ``(G, C)``, or ``(C,)`` where there is one group, as in `anybatch.backends.aten.passes`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from anybatch.backends.aten.passes import statistics_dtype
from anybatch.backends.aten.pooling import expand_rows


def on_examples(table: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A table of groups as rows of their examples, to be broadcast over ``x``."""
    rows = expand_rows(table, sizes) if len(sizes) > 1 else table.unsqueeze(0)
    return rows.view(*rows.shape, *(1,) * (x.dim() - 2))


def group_sums(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sum of each group and channel."""
    return _reduce(x, sizes, Tensor.sum)


def deviation_sums(
    x: Tensor, sizes: tuple[int, ...], mean: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Sum of ``abs(x - mean)`` of each group and channel."""
    offset = (x.to(statistics_dtype(x)) - on_examples(mean, x, sizes)).abs_()
    return group_sums(_zeroed(offset, valid), sizes)


def deviation_signs(
    x: Tensor, sizes: tuple[int, ...], mean: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Signs of ``x - mean``, 0 where a value is not valid."""
    signs = (x.to(statistics_dtype(x)) - on_examples(mean, x, sizes)).sign()
    return _zeroed(signs, valid)


def largest(x: Tensor, sizes: tuple[int, ...], valid: Tensor | None = None) -> Tensor:
    """Largest valid value of each group and channel; minus infinity where there is none."""
    values = x.to(statistics_dtype(x))
    if valid is not None:
        values = values.masked_fill(~valid, -torch.inf)
    if x.numel() == 0:
        return values.new_full((x.shape[1],), -torch.inf)
    return _reduce(values, sizes, Tensor.amax)


def hits(x: Tensor, sizes: tuple[int, ...], end: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 where a valid value is its group's ``end``, else 0."""
    values = x.to(statistics_dtype(x))
    return _zeroed((values == on_examples(end, x, sizes)).to(values.dtype), valid)


def _zeroed(values: Tensor, valid: Tensor | None) -> Tensor:
    return values if valid is None else values.masked_fill(~valid, 0)


def _reduce(x: Tensor, sizes: tuple[int, ...], how: Callable[..., Tensor]) -> Tensor:
    dims = tuple(range(2, x.dim()))
    rows = how(x, dims) if dims else x
    parts = [how(part, 0) for part in rows.split(sizes)]
    return parts[0] if len(parts) == 1 else torch.stack(parts)
