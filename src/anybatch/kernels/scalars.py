"""Numbers as tensors.

An operator with a Python number first makes a tensor of it, which costs as much
as the operator itself on vectors of a few hundred channels. A 0-dim CPU tensor
works beside tensors of any device and does not change their type.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def scalar(value: float) -> Tensor:
    """A number as a 0-dim tensor, made once."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


INFINITY = scalar(float("inf"))
