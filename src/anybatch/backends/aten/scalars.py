"""Numbers as tensors.

An operator with a Python number first makes a tensor of it, which costs as much
as the operator itself on vectors of a few hundred channels. A 0-dim CPU tensor
works beside tensors of any device and does not change their type.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from anybatch.backends.tracing import is_traced


def scalar(value: float) -> Tensor:
    """A number as a 0-dim tensor, made once for all calls that nothing traces."""
    return _make(value) if is_traced() else _keep(value)


def _make(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=1024)
def _keep(value: float) -> Tensor:
    with torch.inference_mode(False):
        return _make(value)


def is_finite(table: Tensor) -> Tensor:
    """Where a table of values above 0 is finite, in one operator; false for NaN too."""
    return torch.lt(table, scalar(math.inf))
