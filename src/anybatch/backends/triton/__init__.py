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
from torch.nn import Parameter

from anybatch.backends import numba as fused
from anybatch.backends.tracing import is_watched

__all__ = ["WIDEST", "launches_for"]

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
    device = x.device
    if device.type not in _DEVICES or state is None or fused._choice == "never":
        return None
    dtype = state.dtype
    if type(x) is not Tensor or _TYPES.get(x.dtype) != dtype or state.device != device:
        return None
    for p in parameters:  # numbers side by side
        if type(p) is not Parameter and type(p) is not Tensor:
            return None
        if p.dtype != dtype or p.device != device or not p.is_contiguous():
            return None
    if is_watched() or x.is_neg() or not (x.is_contiguous() or fused.lies_last(x)):
        return None
    return launches_on(device)


def launches_on(device: torch.device) -> ModuleType | None:
    """The module that launches the GPU kernels, where a device is one of theirs."""
    if device.type not in _DEVICES or (device.type == "cuda" and not _is_able(device)):
        return None
    return _kernels()


@lru_cache(maxsize=64)
def _is_able(device: torch.device) -> bool:
    """Whether a device is one that the kernels were written for: Ampere and later."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from anybatch.backends.triton import steps
    except ImportError:
        return None
    return steps
