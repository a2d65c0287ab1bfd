"""Ghost batch normalization (Hoffer et al. 2017; four-things, section 3.2)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from anybatch.backends import as_counts, statistics_dtype
from anybatch.core.arguments import check_count
from anybatch.core.norm_batch import Batch
from anybatch.core.norm_layer import NormLayer, NormOptions
from anybatch.core.reduction_scope import active_group, sum_processes


class GhostBatchNorm(NormLayer):
    """Ghost batch normalization: small groups of a batch have statistics of their own.

    ::

        y = weight * (x - mean_g) / sqrt(var_g + eps) + bias

    for each group g of examples (four-things, equation 4). A batch of N is cut
    into ``ceil(N / ghost_size)`` groups as equal as can be: any batch size works.
    The running statistics move once a forward, each group weighing by its share
    of the examples; inference is that of batch normalization.

    Args:
        ghost_size: Examples in a group at most (default 32).
        example_weight: Share of an example's own statistics at inference; it gains
            as ghost_size falls (four-things, figure 4).

    Source: four-things, section 3.2, equation 4.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.GhostBatchNorm1d(4, ghost_size=4)
        >>> norm(torch.randn(9, 4)).shape  # groups of 3, 3 and 3
        torch.Size([9, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        ghost_size: int = 32,
        **common: Unpack[NormOptions],
    ) -> None:
        check_count("ghost_size", ghost_size)
        shared = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(*shared, **common)
        self.ghost_size = ghost_size

    @property
    def group_size(self) -> int:
        return self.ghost_size

    def track_batch(self, mean: Tensor | None, var: Tensor, batch: Batch) -> None:
        track_groups(self, mean, var, batch)

    def track_none(self, x: Tensor) -> None:
        track_no_groups(self, x)

    def own_arguments(self) -> Mapping[str, Any]:
        return {"ghost_size": self.ghost_size}


def track_groups(layer: NormLayer, mean: Tensor | None, var: Tensor, batch: Batch) -> None:
    """Track groups' statistics ``(g, C)``, each weighing by its share of the values.

    Groups with one value per channel have no variance to track and are left out.
    """
    assert mean is not None
    counts, together = batch.counts, active_group(layer.process_group) is not None
    if counts is None and not together and max(batch.sizes) * batch.values < 2:
        return
    if counts is None:
        counts = as_counts([size * batch.values for size in batch.sizes], var)
    mean, var = mean.view(-1, mean.shape[-1]), var.view(-1, var.shape[-1])
    counts = counts.view(-1, 1)
    tracked = counts > 1
    # Micro-batches of an optimizer step weigh by their examples, masked ones by their values.
    examples = batch.counts is None and not together
    weights = torch.where(tracked, counts, 0) / (batch.values if examples else 1)
    unbiased = var * (counts / (counts - 1).clamp(min=1))
    first = (torch.where(tracked, mean, 0) * weights).sum(0)
    second = (torch.where(tracked, unbiased, 0) * weights).sum(0)
    _track_sums(layer, first, second, weights.sum())


def _track_sums(layer: NormLayer, first: Tensor, second: Tensor, total: Tensor) -> None:
    """Track sums of means and variances that weigh `total` together, over all processes."""
    group = active_group(layer.process_group)
    if group is not None:
        sums = sum_processes(group, first, second, total)
        first, second, total = (table for table in sums if table is not None)
    some = total.clamp(min=1)
    nothing = total == 0  # of which no memory takes a trace
    _track_step(layer, first / some, (second / some).masked_fill(nothing, torch.nan), total)


def track_no_groups(layer: NormLayer, x: Tensor) -> None:
    """Take part in what processes track together, with an empty batch."""
    if active_group(layer.process_group) is not None:
        zeros = torch.zeros(3, x.shape[1], dtype=statistics_dtype(x), device=x.device)
        _track_sums(layer, zeros[0], zeros[1], zeros[2, 0])


def _track_step(layer: NormLayer, mean: Tensor, var: Tensor, weight: int | Tensor) -> None:
    """Track once for all micro-batches of an optimizer step, each weighing by its examples."""
    if layer.step is not None:
        first, var = layer.step.average("", mean, var, weight, True)
        assert first is not None
        mean = first
    layer.track(mean, var)


class GhostBatchNorm1d(GhostBatchNorm, dims=1): ...


class GhostBatchNorm2d(GhostBatchNorm, dims=2): ...


class GhostBatchNorm3d(GhostBatchNorm, dims=3): ...
