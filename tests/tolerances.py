"""How close two computations of the same thing must be, from where their difference comes."""

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, expected: Tensor) -> float:
    """Largest allowed difference.

    In float64 both sides do the same few hundred sums, whose rounding stays below
    1e-9 of the largest value. In float32 the rounding of a statistic, 6e-8 of it, is
    magnified by the conditioning of a normalization (a few hundred where two values
    of a channel nearly coincide) and carried along by memories: 1e-4 of the largest value.

    Args:
        dtype: Of the computation under test.
        expected: The float64 result.

    Returns:
        An absolute difference.
    """
    relative = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return relative * max(scale, 1.0)
