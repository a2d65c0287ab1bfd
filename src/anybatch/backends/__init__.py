"""The backends: passes over an activation, forward and backward.

Every method is ``moments -> rule -> affine`` forward and ``sums -> rule -> gradient`` backward.
`aten` has the passes as torch operators, and layers run their rules between them. `numba` and
`triton` have passes and rules in compiled kernels.
"""

from anybatch.backends.aten.elementary import example_affine, example_moments
from anybatch.backends.aten.masked import (
    all_counts,
    as_counts,
    masked_counts,
    masked_moments,
    masked_second_moment,
)
from anybatch.backends.aten.passes import (
    LOW_PRECISION,
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
from anybatch.backends.choice import use_fused
from anybatch.backends.layout import dense, is_channels_last, is_plain, rows
from anybatch.backends.numba.backend import row_kernels_for
from anybatch.backends.registry import ATEN, BACKENDS
from anybatch.backends.tracing import is_traced

__all__ = [
    "ATEN",
    "BACKENDS",
    "LOW_PRECISION",
    "affine",
    "all_counts",
    "as_counts",
    "dense",
    "exact_gradient",
    "example_affine",
    "example_moments",
    "expand_groups",
    "fixed_gradient",
    "gradient",
    "is_channels_last",
    "is_finite",
    "is_plain",
    "is_traced",
    "masked_counts",
    "masked_moments",
    "masked_second_moment",
    "moments",
    "pool_channels",
    "pool_groups",
    "put_gradient",
    "row_counts",
    "row_kernels_for",
    "rows",
    "sample_moments",
    "scalar",
    "second_moment",
    "statistics_dtype",
    "sums",
    "take_dense",
    "use_fused",
]
