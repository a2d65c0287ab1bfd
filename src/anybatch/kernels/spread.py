"""Passes for spreads other than the standard deviation: mean absolute deviation and range.

Tables are ``(G, C)``, or ``(C,)`` where there is one group, as in `anybatch.kernels.aten`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from anybatch.kernels.aten import statistics_dtype
from anybatch.kernels.pooling import expand_rows


def on_examples(table: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """A table of groups as rows of their examples, to be broadcast over ``x``."""
    rows = expand_rows(table, sizes) if len(sizes) > 1 else table.unsqueeze(0)
    return rows.view(*rows.shape, *(1,) * (x.dim() - 2))


def group_sums(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Sum of each group and channel."""
    return _reduce(x, sizes, Tensor.sum)


def mean_deviation(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
    """Mean of ``abs(x - mean)`` of each group and channel."""
    offset = x.to(statistics_dtype(x)) - on_examples(mean, x, sizes)
    return group_sums(offset.abs_(), sizes) / _counts(x, sizes, mean)


def deviation_signs(x: Tensor, sizes: tuple[int, ...], mean: Tensor) -> Tensor:
    """Derivative of `mean_deviation` by each value, the mean's part included."""
    signs = (x.to(statistics_dtype(x)) - on_examples(mean, x, sizes)).sign()
    count = _counts(x, sizes, mean)
    balance = on_examples(group_sums(signs, sizes) / count, x, sizes)
    return (signs - balance) / (on_examples(count, x, sizes) if count.dim() else count)


def value_range(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Largest minus smallest value of each group and channel."""
    values = x.to(statistics_dtype(x))
    return _reduce(values, sizes, Tensor.amax) - _reduce(values, sizes, Tensor.amin)


def range_ends(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Derivative of `value_range` by each value; equal ends share it."""
    values = x.to(statistics_dtype(x))
    found = torch.zeros_like(values)
    for extreme, sign in ((Tensor.amax, 1), (Tensor.amin, -1)):
        end = on_examples(_reduce(values, sizes, extreme), x, sizes)
        hits = (values == end).to(values.dtype)
        found += sign * hits / on_examples(group_sums(hits, sizes), x, sizes)
    return found


def _reduce(x: Tensor, sizes: tuple[int, ...], how: Callable[..., Tensor]) -> Tensor:
    dims = tuple(range(2, x.dim()))
    rows = how(x, dims) if dims else x
    parts = [how(part, 0) for part in rows.split(sizes)]
    return parts[0] if len(parts) == 1 else torch.stack(parts)


def _counts(x: Tensor, sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """Values behind each row, a number or a table."""
    values = x.numel() // (x.shape[0] * x.shape[1])
    if len(set(sizes)) == 1:
        return like.new_full((), sizes[0] * values)
    column = torch.stack([like.new_full((), size * values) for size in sizes])
    return column.unsqueeze(1).expand(len(sizes), x.shape[1])
