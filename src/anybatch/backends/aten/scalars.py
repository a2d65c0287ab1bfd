"""Numbers as tensors.

An operator with a Python number first makes a tensor of it, which costs as much
as the operator itself on vectors of a few hundred channels. A 0-dim CPU tensor
works beside tensors of any device and does not change their type.
"""

from functools import lru_cache

import torch
from torch import Tensor


def scalar(value: float) -> Tensor:
    """A number as a 0-dim tensor, made once."""
    return _make(value) if torch.compiler.is_compiling() else _keep(value)


def _make(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=1024)
def _keep(value: float) -> Tensor:
    with torch.inference_mode(False):
        return _make(value)


INFINITY = scalar(float("inf"))
