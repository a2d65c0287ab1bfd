"""The passes over an activation, and nothing else.

Every method of the library is ``moments -> rule -> affine`` forward and
``sums -> rule -> gradient`` backward. The four passes live here, one file a
backend; the rules, small arithmetic on ``(G, C)`` tables, live in the layers.
Kernels know nothing of layers, memories or methods.
"""

from anybatch.kernels.aten import (
    affine,
    exact_gradient,
    gradient,
    moments,
    second_moment,
    statistics_dtype,
    sums,
)
from anybatch.kernels.elementary import example_affine, example_moments
from anybatch.kernels.fused import (
    cross_iteration_kernels,
    dense,
    fused_for,
    is_served,
    is_watched,
    lies_last,
    row_kernels_for,
    sampled_kernels_for,
    spread_kernels,
    use_fused,
)
from anybatch.kernels.masked import (
    all_counts,
    masked_counts,
    masked_moments,
    masked_second_moment,
)
from anybatch.kernels.operators import operators_for
from anybatch.kernels.pooling import expand_groups, pool_channels, pool_groups, row_counts
from anybatch.kernels.samples import fixed_gradient, put_gradient, sample_moments, take_dense
from anybatch.kernels.scalars import INFINITY, scalar
from anybatch.kernels.triton import WIDEST, launches_for

__all__ = [
    "INFINITY",
    "WIDEST",
    "affine",
    "all_counts",
    "cross_iteration_kernels",
    "dense",
    "exact_gradient",
    "example_affine",
    "example_moments",
    "expand_groups",
    "fixed_gradient",
    "fused_for",
    "gradient",
    "is_served",
    "is_watched",
    "launches_for",
    "lies_last",
    "masked_counts",
    "masked_moments",
    "masked_second_moment",
    "moments",
    "operators_for",
    "pool_channels",
    "pool_groups",
    "put_gradient",
    "row_counts",
    "row_kernels_for",
    "sample_moments",
    "sampled_kernels_for",
    "scalar",
    "second_moment",
    "spread_kernels",
    "statistics_dtype",
    "sums",
    "take_dense",
    "use_fused",
]
