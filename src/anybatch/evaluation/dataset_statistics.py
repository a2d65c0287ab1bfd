"""The mean and the spread of a dataset's channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anybatch.conversion.observe import tensors_in
from anybatch.evaluation.batches import Shown, reading


class DatasetStatistics(NamedTuple):
    """Mean and standard deviation of each channel.

    Attributes:
        mean: ``(C,)``.
        std: ``(C,)``, over all values (divided by their number).
    """

    mean: Tensor
    std: Tensor


def dataset_statistics(
    loader: Iterable[Any], *, key: int | str | None = None, progress: Shown = None
) -> DatasetStatistics:
    """Mean and standard deviation of each input channel over a dataset.

    They are those of all values at once, whatever the batches: batches are pooled in float64, with
    no difference of large numbers. `anybatch.VirtualDataset` draws its virtual examples with them.

    Args:
        loader: Gives batches: tensors ``(N, C, ...)``, or tuples, lists or mappings of which the
            first floating-point tensor counts.
        key: Position or name of the tensor that counts instead.
        progress: Show a bar (default None: where standard error is a terminal), or a
            function that is called with the batches done and their number.

    Returns:
        `DatasetStatistics`, a pair of mean and standard deviation.

    Raises:
        ValueError: For a loader without a value, a batch without such a tensor, or values that are
            not finite.

    Example:
        >>> mean, std = dataset_statistics([torch.zeros(2, 1), torch.ones(2, 1)])
        >>> mean, std
        (tensor([0.5000]), tensor([0.5000]))
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    with reading(loader, progress=progress, title="dataset statistics") as batches:
        for batch in batches:
            x = _channels(batch, key)
            if x.shape[1]:
                own_mean = x.mean(1)
                own_squares = (x - own_mean.unsqueeze(1)).square_().sum(1)
                total = count + x.shape[1]
                apart = own_mean - mean
                squares = squares + own_squares + apart.square() * (count * x.shape[1] / total)
                mean, count = mean + apart * (x.shape[1] / total), total
    if count == 0:
        raise ValueError("loader: it gave no value; give it anew, or with examples")
    std = (squares / count).sqrt()
    if not bool(std.isfinite().all()):
        bad = [int(channel) for channel in (~std.isfinite()).nonzero()]
        raise ValueError(f"loader: channels {bad} have values that are not finite")
    return DatasetStatistics(mean.float(), std.float())


def _channels(batch: Any, key: int | str | None) -> Tensor:
    """The values of each channel, ``(C, n)``, in float64."""
    if key is not None:
        found = batch[key]
    else:
        tensors = list(tensors_in(batch))
        found = next((t for t in tensors if t.is_floating_point()), None)
    if not isinstance(found, Tensor) or found.dim() < 2:
        kind = f"{type(batch).__name__} of {list(batch)}" if isinstance(batch, Mapping) else batch
        what = type(kind).__name__ if not isinstance(kind, str) else kind
        raise ValueError(
            f"loader: a batch ({what}) has no floating-point tensor (N, C, ...); say with key= "
            "which one counts"
        )
    return found.detach().cpu().double().movedim(1, 0).flatten(1)
