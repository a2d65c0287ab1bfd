"""Whole layers in compiled calls on a CPU (Numba, an extra).

Where a batch is small, calls cost more than arithmetic: a rule of thirty operators on vectors of
a hundred channels takes longer than the data do. Where it is large, memory is the limit, and a
channel is read once for its statistics and its output. So moments, rule, affine pass and state
are one call forward, and sums, rule and gradient one call backward, on torch's threads.

Numba is imported when the first batch that qualifies arrives. Where it is not
installed, or a batch does not qualify, the ATen passes serve.
"""

import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from anybatch.backends.tracing import is_watched

_PLAIN = (Tensor, torch.nn.Parameter)
_TYPES = (torch.float32, torch.float64)
SERIAL = 2**16  # values at a time, above which torch's threads win where the loops have none
_choice = os.environ.get("ANYBATCH_FUSED", "auto")


def use_fused(choice: str) -> None:
    """Choose whether batches take compiled kernels, Numba's on a CPU and Triton's on a GPU.

    Args:
        choice: "auto" where they are installed and nothing traces the call; "always" also in what
            ``torch.compile`` and ``torch.export`` make of a network in training mode, as operators;
            "never". The environment variable ``ANYBATCH_FUSED`` gives the choice at the start.

    Raises:
        ValueError: For another choice.
    """
    global _choice
    if choice not in ("auto", "never", "always"):
        raise ValueError(f"choice={choice!r}: give 'auto', 'always' or 'never'")
    _choice = choice


def fused_for(x: Tensor, *rows: Tensor | None, serial: int = 0) -> ModuleType | None:
    """The compiled kernels, where they can serve a batch.

    Args:
        x: The batch.
        rows: Parameters and running statistics of the layer, None where it has none.
        serial: Where the loops have one thread and serve contiguous batches alone, the values that
            they take at a time; else 0.

    Returns:
        The module of the kernels, or None: another device or layout, rows that are missing or of
        another type, a compiler, tracer or transform at work, no Numba, or a large batch
        without threads.
    """
    if not is_served(x, rows):
        return None
    large = x.numel() > SERIAL
    if not x.is_contiguous() and (serial or not lies_last(x)):
        return None
    kernels = None if serial > SERIAL else _kernels()
    return None if kernels is None or (large and kernels.without_threads()) else kernels


def row_kernels_for(x: Tensor) -> ModuleType | None:
    """The compiled kernels of rows, where they can serve a weight or its gradient.

    Args:
        x: Of any shape; a row is all that belongs to an index of the first dimension.

    Returns:
        Their module, or None: another device or type, rows with gaps or one in another, a compiler,
        tracer or transform at work, no Numba.
    """
    if type(x) not in _PLAIN or not _is_memory(x) or not _is_dense(x):
        return None
    return _row_kernels() if x.numel() and _kernels() is not None else None


@lru_cache(maxsize=1)
def _row_kernels() -> ModuleType:
    from anybatch.backends.numba import centralize as rows

    return rows


def is_served(x: Tensor, rows: tuple[Tensor | None, ...]) -> bool:
    """Whether a batch and all rows of its layer are memory of one type to read and write."""
    if type(x) is not Tensor or not _is_memory(x):
        return False
    dtype, channels = x.dtype, x.shape[1]
    for row in rows:
        if row is None or row.dtype is not dtype or type(row) not in _PLAIN or not row.is_cpu:
            return False
        if row.numel() != channels or not row.is_contiguous() or row.is_neg():
            return False
    return True


def _is_memory(x: Tensor) -> bool:
    """Whether a tensor's numbers are in memory as they are, and nothing watches."""
    if _choice == "never" or is_watched() or not x.is_cpu or x.dtype not in _TYPES:
        return False
    return not (x.is_neg() or x._is_zerotensor())


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor is without gaps, its last dimension innermost or, of a map, its channels."""
    return x.is_contiguous() or (x.dim() > 3 and lies_last(x))


def lies_last(x: Tensor) -> bool:
    """Whether the channels of a batch are innermost in memory, without gaps."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor, last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor without gaps in memory, whose channels lie first or last, of a type if given."""
    if dtype is not None and x.dtype != dtype:
        x = x.to(dtype)
    if x.is_neg():
        x = x.resolve_neg()
    if not last:
        return x.contiguous()
    return x if lies_last(x) else x.movedim(1, -1).contiguous().movedim(-1, 1)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from anybatch.backends.numba import loops
    except ImportError:
        return None
    return loops


@lru_cache(maxsize=1)
def cross_iteration_kernels() -> ModuleType:
    """The compiled kernels of cross-iteration batch normalization, where `fused_for` gave some."""
    from anybatch.backends.numba import cross_iteration

    return cross_iteration


@lru_cache(maxsize=1)
def spread_kernels() -> ModuleType:
    """The compiled kernels of other spreads, where `fused_for` gave some."""
    from anybatch.backends.numba import spread

    return spread


def sampled_kernels_for(x: Tensor, *rows: Tensor | None) -> ModuleType | None:
    """The compiled kernels of batch normalization sampling, where they can serve a batch.

    Args:
        x: The batch, of any size.
        rows: Parameters and running statistics of the layer, None where it has none.

    Returns:
        Their module, or None: another device or layout, rows that are missing or of another type, a
        compiler, tracer or transform at work, no Numba.
    """
    if not is_served(x, rows) or not _is_dense(x):
        return None
    return None if _kernels() is None else _sampled_kernels()


@lru_cache(maxsize=1)
def _sampled_kernels() -> ModuleType:
    from anybatch.backends.numba import sampled

    return sampled
