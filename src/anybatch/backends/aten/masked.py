"""Moments of the valid positions of an activation.

A mask is ``(N, 1, ...)``, true where a value counts, of the activation's spatial shape and the same
for every channel. How many count is known on the device alone: nothing here waits for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from anybatch.backends.aten.passes import moments, second_moment, statistics_dtype
from anybatch.backends.aten.pooling import row_counts
from anybatch.backends.aten.spread import on_examples


def masked_counts(mask: Tensor, sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """Valid values a channel: a number where there is one group, else a column ``(G, 1)``."""
    examples = mask.flatten(1).sum(1).to(like.dtype)
    if len(sizes) == 1:
        return examples.sum()
    return torch.stack([part.sum() for part in examples.split(sizes)]).unsqueeze(1)


def masked_moments(
    x: Tensor, sizes: tuple[int, ...], mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of the valid values of each group of examples and channel.

    Everything else is filled with a value near their mean, and the share of the filling taken out
    again: no large numbers are subtracted, whatever the mean.

    Args:
        x: ``(N, C, ...)``; values that are not valid may be anything.
        sizes: Examples in each group; they sum to N.
        mask: ``(N, 1, ...)``.

    Returns:
        Two tables ``(G, C)``, 0 where nothing is valid, and `masked_counts`.
    """
    if x.numel() == 0:
        return _nothing(x)
    mean, _ = moments(x.masked_fill(~mask, 0), sizes)
    counts = masked_counts(mask, sizes, mean)
    more = _places(x, sizes, mean) / counts.clamp(min=1)
    filling = (mean * more).to(x.dtype)
    mean, var = moments(torch.where(mask, x, on_examples(filling, x, sizes)), sizes)
    kept = filling.to(mean.dtype)
    mean = kept + (mean - kept) * more
    var = var * more - (mean - kept).square() * (1 - 1 / more)
    seen = counts > 0
    return mean * seen, (var.clamp_(min=0) * seen), counts


def masked_second_moment(x: Tensor, sizes: tuple[int, ...], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square of the valid values, and `masked_counts`."""
    if x.numel() == 0:
        return _nothing(x)[1:]
    square = second_moment(x.masked_fill(~mask, 0), sizes)
    counts = masked_counts(mask, sizes, square)
    return square * (_places(x, sizes, square) / counts.clamp(min=1)), counts


def all_counts(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Values a channel where all are valid, as `masked_counts` gives them."""
    like = torch.empty((), dtype=statistics_dtype(x), device=x.device)
    values = x.shape[2:].numel()
    return as_counts([size * values for size in sizes], like)


def as_counts(numbers: Sequence[int], like: Tensor) -> Tensor:
    """Values per channel of each group: a number of one group, else a column ``(G, 1)``."""
    if len(numbers) == 1:
        return like.new_full((), numbers[0])
    return torch.stack([like.new_full((1,), number) for number in numbers])


def _places(x: Tensor, sizes: tuple[int, ...], like: Tensor) -> Tensor:
    """Positions of each group, valid or not."""
    return row_counts(sizes, x.shape[2:].numel(), like)


def _nothing(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of no values."""
    zeros = torch.zeros(x.shape[1], dtype=statistics_dtype(x), device=x.device)
    return zeros, zeros.clone(), zeros.new_zeros(())
