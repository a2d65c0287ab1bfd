"""The mean and the spread of a dataset's channels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from anybatch.conversion.observe import tensors_in
from anybatch.evaluation.batches import Shown, reading
from anybatch.evaluation.population_moments import Pool


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
        >>> import torch
        >>> mean, std = dataset_statistics([torch.zeros(2, 1), torch.ones(2, 1)])
        >>> mean, std
        (tensor([0.5000]), tensor([0.5000]))
    """
    pool: Pool | None = None
    with reading(loader, progress=progress, title="dataset statistics") as batches:
        for batch in batches:
            x = _channels(batch, key)
            pool = Pool.empty(x.shape[1]) if pool is None else pool
            pool.add(x)
    if pool is None or not pool.count:
        raise ValueError("loader: it gave no value; give it anew, or with examples")
    std = (pool.m2 / pool.count).sqrt()
    if not bool(std.isfinite().all()):
        bad = [int(channel) for channel in (~std.isfinite()).nonzero()]
        raise ValueError(f"loader: channels {bad} have values that are not finite")
    return DatasetStatistics(pool.mean.float(), std.float())


def _channels(batch: Any, key: int | str | None) -> Tensor:
    """The tensor ``(N, C, ...)`` of a batch that counts."""
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
    return found.cpu()
