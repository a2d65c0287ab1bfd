"""Whole layers in one launch on a GPU (Triton, which comes with torch's CUDA builds).

A rule of thirty operators is thirty launches, each of which takes longer than the arithmetic of a
thousand channels. So moments, rule, affine pass and state are one launch forward, and sums, rule
and gradient one launch backward, where a group's columns are within a program's reach; elsewhere
three, with the rule in the second.

Triton is imported when the first batch that qualifies arrives. Where it is not installed, or a
batch does not qualify, the ATen passes serve.
"""

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from anybatch.kernels import fused
from anybatch.kernels.triton.recipe import AVERAGES, MOMENTUM, PLAIN, RENORM, WINDOW, Recipe

__all__ = [
    "AVERAGES",
    "MOMENTUM",
    "PLAIN",
    "RENORM",
    "WIDEST",
    "WINDOW",
    "Recipe",
    "launches_for",
]

WIDEST = 256  # channels in a group of channels, at most
_DEVICES = ("cuda",)  # the tests' interpreter is on a CPU
_TYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


def launches_for(x: Tensor, state: Tensor | None, *parameters: Tensor | None) -> ModuleType | None:
    """The GPU kernels, where they can serve a batch.

    Args:
        x: The batch, of any floating type.
        state: A running statistic.
        *parameters: Scale and shift of the layer.

    Returns:
        The module that launches them, or None: another device or layout, state or parameters of
        another type than the batch's statistics, a compiler, tracer or transform at work, no
        Triton.
    """
    if x.device.type not in _DEVICES or state is None:
        return None
    if fused._choice == "never" or type(x) is not Tensor or fused.is_watched() or x.is_neg():
        return None
    if _TYPES.get(x.dtype) != state.dtype or x.device != state.device:
        return None
    if not all(p is not None and _is_row(p, state) for p in parameters):
        return None
    if not (x.is_contiguous() or fused.lies_last(x)):
        return None
    return _kernels() if x.device.type != "cuda" or _is_able(x.device) else None


def _is_row(parameter: Tensor, state: Tensor) -> bool:
    """Whether a parameter is numbers side by side, of the type and place of the state."""
    plain = type(parameter) in (Tensor, torch.nn.Parameter) and parameter.is_contiguous()
    return plain and parameter.dtype == state.dtype and parameter.device == state.device


@lru_cache(maxsize=64)
def _is_able(device: torch.device) -> bool:
    """Whether a device is one that the kernels were written for: Ampere and later."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from anybatch.kernels.triton import launch
    except ImportError:
        return None
    return launch
