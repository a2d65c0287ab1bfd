"""Memory for large outputs in huge pages.

An allocator hands tensors of tens of megabytes out as fresh pages of 4 KiB, each of which the
system maps and clears when it is first written: for outputs that leave the cache, this takes
longer than the arithmetic. Linux gives 2 MiB at a time to memory that asks for it.
"""

import ctypes
import sys
from typing import Any

import torch
from torch import Tensor

_HUGE = 2**21  # bytes of a page
_LARGE = 2 * _HUGE  # bytes of a tensor, from which on one whole page at least is in it
_MADV_HUGEPAGE = 14


def _find() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise


_advise = _find()


def empty_like(x: Tensor) -> Tensor:
    """An uninitialized tensor like ``x``, a large one in huge pages if the system has some."""
    y = torch.empty_like(x)
    size = y.numel() * y.element_size()
    if size >= _LARGE and _advise is not None:
        begin, end = y.data_ptr(), y.data_ptr() + size
        first, last = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
        if last > first:
            _advise(first, last - first, _MADV_HUGEPAGE)  # a refusal changes nothing
    return y
