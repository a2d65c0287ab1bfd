"""Arithmetic on tables of statistics: pooling rows (examples) and columns (channels).

A table of statistics has one row per group of examples and one column per
channel; where there is one group, it is that row, ``(C,)``. Pooling follows Chan,
Golub and LeVeque (1979): the variance of a union is the mean of the variances plus
the variance of the means. No second moment is ever subtracted from another, so a
large mean costs no precision.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from anybatch.backends.aten.scalars import scalar


def runs(sizes: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Cut ``sizes`` into runs of equal groups.

    Args:
        sizes: Examples in each group, in order.

    Yields:
        ``(first_example, first_group, groups, examples_per_group)`` of each run.
        A batch cut as evenly as possible has at most two.
    """
    example = group = 0
    while group < len(sizes):
        end = group
        while end < len(sizes) and sizes[end] == sizes[group]:
            end += 1
        yield example, group, end - group, sizes[group]
        example += (end - group) * sizes[group]
        group = end


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pool_rows(mean: Tensor, var: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Pool per-example statistics ``(N, C)`` into per-group ones ``(G, C)``."""
    means, variances = [], []
    for example, _, groups, size in runs(sizes):
        stop = example + groups * size
        part = mean[example:stop].unflatten(0, (groups, size))
        pooled = part.mean(1)
        spread = (part - pooled.unsqueeze(1)).square()
        variances.append(spread.add_(var[example:stop].unflatten(0, (groups, size))).mean(1))
        means.append(pooled)
    return _join(means), _join(variances)


def pool_channels(mean: Tensor, var: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Pool per-channel statistics ``(..., C)`` into channel-group ones ``(..., num_groups)``."""
    mean, var = mean.unflatten(-1, (num_groups, -1)), var.unflatten(-1, (num_groups, -1))
    pooled = mean.mean(-1)
    return pooled, (var + (mean - pooled.unsqueeze(-1)).square()).mean(-1)


def pool_groups(table: Tensor, num_groups: int) -> Tensor:
    """Sum a table ``(..., C)`` over each channel group: ``(..., num_groups)``."""
    if num_groups == table.shape[-1]:
        return table
    pooled: Tensor = table.unflatten(-1, (num_groups, -1)).sum(-1)
    return pooled


def expand_groups(table: Tensor, num_features: int) -> Tensor:
    """Repeat each channel group's value ``(..., K)`` for its channels: ``(..., num_features)``."""
    if table.shape[-1] == num_features:
        return table
    return table.repeat_interleave(num_features // table.shape[-1], -1, output_size=num_features)


def expand_rows(table: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Repeat each group's row ``(G, C)`` for its examples: ``(N, C)``."""
    parts = []
    for _, group, groups, size in runs(sizes):
        rows = table[group : group + groups].unsqueeze(1)
        parts.append(rows.expand(groups, size, table.shape[1]).flatten(0, 1))
    return _join(parts)


def row_counts(sizes: tuple[int, ...], per_example: int, like: Tensor) -> Tensor:
    """Number of values behind each row's statistics.

    Args:
        sizes: Examples in each group.
        per_example: Values an example gives to one statistic.
        like: Gives device and dtype.

    Returns:
        One number where all groups are equal, else a column ``(G, 1)``.
    """
    if min(sizes) == max(sizes):
        return scalar(float(sizes[0] * per_example))
    parts = [like.new_full((n, 1), size * per_example) for _, _, n, size in runs(sizes)]
    return _join(parts)
