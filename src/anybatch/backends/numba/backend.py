"""The backend of compiled loops on a CPU: a call for each run of equal normalization batches."""

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anybatch.backends import choice
from anybatch.backends.layout import PLAIN_TYPES, is_channels_last, is_dense
from anybatch.backends.protocol import Kernels, NormCall, Rows, Statistics
from anybatch.backends.tracing import is_traced

TYPES = (torch.float32, torch.float64)
LOW = (torch.bfloat16, torch.float16)  # of activations, with float32 for all else
_ACTIVATIONS = (*TYPES, *LOW)
SERIAL = 2**16  # values at a time, above which torch's threads win where the loops have none
_STEPS = {
    "rule": "rule_steps",
    "spread": "spread_steps",
    "sample": "sample_steps",
    "window": "window_steps",
}


def _steps(call: NormCall) -> ModuleType:
    steps = steps_of(call.spec.family)
    assert steps is not None
    return steps


@lru_cache(maxsize=8)
def steps_of(family: str) -> ModuleType | None:
    """The module that drives the loops of a family of kernels; None without Numba."""
    try:
        return import_module(f"anybatch.backends.numba.{_STEPS[family]}")
    except ImportError:
        return None


def memory_obstacle(x: Tensor, rows: Rows) -> str | None:
    """Why a batch and the rows of its layer are not memory of one type to read and write."""
    if type(x) is not Tensor:
        return f"an input of class {type(x).__name__}, not torch.Tensor"
    obstacle = tensor_obstacle(x, _ACTIVATIONS)
    if obstacle is not None or not rows:
        return obstacle
    dtype, channels = torch.float32 if x.dtype in LOW else x.dtype, x.shape[1]
    for row in rows:
        if row is None:
            return "no weight and bias, or no running statistics"
        if row.dtype is not dtype or type(row) not in PLAIN_TYPES or not row.is_cpu:
            return f"weight, bias or running statistics are not plain CPU tensors of {dtype}"
        if row.numel() != channels or not row.is_contiguous() or row.is_neg():
            return f"weight, bias or running statistics are not {channels} contiguous values"
    return None


def tensor_obstacle(x: Tensor, types: tuple[torch.dtype, ...] = TYPES) -> str | None:
    """Why a tensor's numbers are not in memory as they are, or something watches."""
    if choice.selected == "never":
        return "use_fused('never')"
    if is_traced():
        return "a compiler, tracer or transform has to see torch's operators"
    if not x.is_cpu:
        return f"an input on {x.device.type}, not the CPU"
    if x.dtype not in types:
        return f"an input of {x.dtype}, not of {', '.join(map(str, types))}"
    if x.is_neg() or x._is_zerotensor():
        return "an input that torch has not computed yet (negated, or zeros without memory)"
    return None


def layout_obstacle(x: Tensor, family: str) -> str | None:
    """Why the loops of a family do not take a layout, or so large a batch."""
    if family == "sample":
        return None if is_dense(x) else "an input with gaps in memory"
    if not x.is_contiguous() and not is_channels_last(x):
        return "an input with gaps in memory"
    if x.numel() > SERIAL and (loops := steps_of("rule")) is not None and loops.without_threads():
        return f"an input of more than {SERIAL} values where the loops have no threads"
    return None


def row_kernels_for(x: Tensor) -> ModuleType | None:
    """The compiled kernels of rows, where they can serve a weight or its gradient.

    Args:
        x: Of any shape; a row is all that belongs to an index of the first dimension.

    Returns:
        Their module, or None: another device or type, rows with gaps or one in another, a compiler,
        tracer or transform at work, no Numba.
    """
    if type(x) not in PLAIN_TYPES or tensor_obstacle(x) is not None or not is_dense(x):
        return None
    return _row_kernels() if x.numel() else None


@lru_cache(maxsize=1)
def _converts_float16() -> bool:
    from anybatch.backends.numba.low_precision import converts_float16

    return converts_float16()


@lru_cache(maxsize=1)
def _row_kernels() -> ModuleType | None:
    try:
        from anybatch.backends.numba import centralize
    except ImportError:
        return None
    return centralize


class NumbaBackend:
    """Compiled loops of a CPU."""

    name = "numba"
    takes_relu = frozenset({"rule", "sample"})
    takes_scopes = frozenset({"rule"})
    memory_obstacle = staticmethod(memory_obstacle)

    def supports(self, call: NormCall, x: Tensor, rows: Rows) -> str | None:
        obstacle = memory_obstacle(x, rows)
        obstacle = obstacle or layout_obstacle(x, call.spec.family)
        if obstacle is None and steps_of(call.spec.family) is None:
            obstacle = "numba is not installed"
        if obstacle is None and x.dtype is torch.float16 and not _converts_float16():
            obstacle = "a processor without conversions of float16"
        return obstacle or _steps(call).obstacle(call, x)

    def kernels(self, call: NormCall, x: Tensor) -> Kernels | None:
        return None

    def prepare(self, call: NormCall, x: Tensor) -> NormCall:
        call = call._replace(last=not x.is_contiguous())
        return call._replace(work=_steps(call).prepare(call, x))

    def forward(self, call: NormCall, *args: Any) -> Any:
        return call.work.forward(call, *args)

    def backward(self, call: NormCall, *args: Any) -> Any:
        return call.work.backward(call, *args)

    def statistics(self, call: NormCall, context: Any, like: Tensor) -> list[Statistics]:
        found: list[Statistics] = call.work.statistics(context, like)
        return found
