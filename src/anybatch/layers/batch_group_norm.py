"""Batch-group normalization (four-things, section 3.4)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from anybatch.core.arguments import check_count
from anybatch.core.norm_batch import Batch
from anybatch.core.norm_layer import NormLayer, NormOptions
from anybatch.layers.ghost_batch_norm import track_groups, track_no_groups


class BatchGroupNorm(NormLayer):
    """Batch-group normalization: groups of channels *and* of examples share statistics.

    ::

        y = weight * (x - mean_gk) / sqrt(var_gk + eps) + bias

    for each group g of `examples_per_group` examples and k of ``num_features /
    num_groups`` neighbouring channels. With one example a group it is group
    normalization, with one channel a group ghost batch normalization. For
    batches of 2 and little more; it works at 1.

    At inference an example's own statistics are mixed with the running ones by
    `example_weight` (four-things, equation 3), first and second moments then
    averaged over each channel group.

    Args:
        num_features: Channels C, a multiple of num_groups.
        num_groups: Channel groups (default 32).
        examples_per_group: Examples in a group at most (default 2).
        example_weight: Share of an example's own statistics at inference (default
            None: ``1 / examples_per_group``).

    Raises:
        ValueError: For an argument out of range, channels that the groups do not
            divide, or an input of another shape.
        TypeError: For an input that is not floating point.

    Source: four-things, sections 3.1 and 3.4.

    Example:
        >>> import torch, anybatch
        >>> norm = anybatch.BatchGroupNorm2d(64)
        >>> norm(torch.randn(2, 64, 5, 5)).shape
        torch.Size([2, 64, 5, 5])
    """

    def __init__(  # type: ignore[misc]  # example_weight has another default here
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        num_groups: int = 32,
        examples_per_group: int = 2,
        example_weight: float | None = None,
        **common: Unpack[NormOptions],
    ) -> None:
        check_count("num_features", num_features)
        check_count("num_groups", num_groups)
        check_count("examples_per_group", examples_per_group)
        if num_features % num_groups:
            divisors = [k for k in range(1, num_features + 1) if num_features % k == 0]
            raise ValueError(
                f"num_groups={num_groups} does not divide num_features={num_features}: "
                f"give one of {', '.join(map(str, divisors))}"
            )
        shared = (num_features, eps, momentum, affine, track_running_stats, device, dtype)
        weight = 1 / examples_per_group if example_weight is None else example_weight
        super().__init__(*shared, example_weight=weight, **common)
        self.num_groups, self.examples_per_group = num_groups, examples_per_group

    @property
    def group_size(self) -> int:
        return self.examples_per_group

    @property
    def num_statistics(self) -> int:
        return self.num_groups

    def track_batch(self, mean: Tensor | None, var: Tensor, batch: Batch) -> None:
        track_groups(self, mean, var, batch)

    def track_none(self, x: Tensor) -> None:
        track_no_groups(self, x)

    def own_arguments(self) -> Mapping[str, Any]:
        return {"num_groups": self.num_groups, "examples_per_group": self.examples_per_group}


class BatchGroupNorm1d(BatchGroupNorm, dims=1): ...


class BatchGroupNorm2d(BatchGroupNorm, dims=2): ...


class BatchGroupNorm3d(BatchGroupNorm, dims=3): ...
