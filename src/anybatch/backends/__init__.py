"""The passes over an activation, and nothing else.

Every method of the library is ``moments -> rule -> affine`` forward and
``sums -> rule -> gradient`` backward. The four passes live here, one file a
backend; the rules, small arithmetic on ``(G, C)`` tables, live in the layers.
Kernels know nothing of layers, memories or methods.
"""

from anybatch.backends.aten.elementary import example_affine, example_moments
from anybatch.backends.aten.masked import (
    all_counts,
    masked_counts,
    masked_moments,
    masked_second_moment,
)
from anybatch.backends.aten.passes import (
    affine,
    exact_gradient,
    gradient,
    moments,
    second_moment,
    statistics_dtype,
    sums,
)
from anybatch.backends.aten.pooling import expand_groups, pool_channels, pool_groups, row_counts
from anybatch.backends.aten.samples import fixed_gradient, put_gradient, sample_moments, take_dense
from anybatch.backends.aten.scalars import is_finite, scalar
from anybatch.backends.numba import (
    cross_iteration_kernels,
    dense,
    fused_for,
    is_served,
    lies_last,
    row_kernels_for,
    sampled_kernels_for,
    spread_kernels,
    use_fused,
)
from anybatch.backends.torch_library import operators_for
from anybatch.backends.tracing import is_watched
from anybatch.backends.triton import WIDEST, launches_for

__all__ = [
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
    "is_finite",
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
