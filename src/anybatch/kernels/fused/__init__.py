"""Whole layers in one compiled call, for small batches on a CPU (Numba, an extra).

A batch of two is so little work that calls cost more than arithmetic: a rule of
thirty operators on vectors of a hundred channels takes longer than the data do.
Here moments, rule, affine pass and state are one call forward, and sums, rule
and gradient one call backward. The rules are those of the layers, channel by
channel; sums run in float64.

Numba is imported when the first batch that qualifies arrives. Where it is not
installed, or a batch does not qualify, the ATen passes serve.
"""

import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

LARGEST = 2**16  # values in a batch; from there on torch's parallel passes win
_choice = os.environ.get("ANYBATCH_FUSED", "auto")


def use_fused(choice: str) -> None:
    """Choose whether small CPU batches take the compiled path.

    Args:
        choice: "auto" where Numba is installed, "never" otherwise. The environment
            variable ``ANYBATCH_FUSED`` gives the choice at the start.

    Raises:
        ValueError: For another choice.
    """
    global _choice
    if choice not in ("auto", "never"):
        raise ValueError(f"choice={choice!r}: give 'auto' or 'never'")
    _choice = choice


def fused_for(x: Tensor, state: Tensor | None, weight: Tensor | None) -> ModuleType | None:
    """The compiled kernels, where they can serve a batch.

    Args:
        x: The batch.
        state: A running statistic.
        weight: Scale of the layer.

    Returns:
        The module of the kernels, or None: another device or layout, a larger batch,
        types that differ, a tracing compiler or transform, no Numba.
    """
    if _choice == "never" or state is None or weight is None:
        return None
    plain = x.device.type == "cpu" and type(x) is Tensor and x.numel() <= LARGEST
    if not plain or not x.is_contiguous() or not x.dtype == state.dtype == weight.dtype:
        return None
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    return _kernels()


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    try:
        from anybatch.kernels.fused import loops
    except ImportError:
        return None
    return loops
