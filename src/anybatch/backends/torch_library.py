"""Whole layers as operators of torch: ``anybatch::normalize`` and ``anybatch::normalize_backward``.

The kernels of a CPU and of a GPU write memory that torch does not see them write. What traces a
call (a compiler, an export) must not run them, and has to know what they give and what they change.
So they are operators of ``torch.library`` too, whose schemas name what is written, and which answer
for tensors without data. Arguments are those of `Recipe` and `Course`, one by one.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from anybatch.backends import numba as fused
from anybatch.backends import triton
from anybatch.backends.protocol import Course, Recipe

_CUT = "int[] sizes, int[] groups, int[] batches, int columns, float pace, float eps, bool update"
_SCHEMAS = (
    "normalize(Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
    "Tensor(b!) running_var, Tensor(c!) num_batches_tracked, Tensor(d!)? mean, Tensor(e!)? var, "
    "Tensor(f!)? window, Tensor(g!)? counter, Tensor? keep, int kind, float[] numbers, "
    f"int[] steps, bool smooth, {_CUT}) -> (Tensor, Tensor)",
    "normalize_backward(Tensor dy, Tensor x, Tensor weight, Tensor used, "
    "Tensor num_batches_tracked, Tensor(a!)? psi, Tensor(b!)? psi_counter, int kind, int averages, "
    f"{_CUT}, bool wanted) -> (Tensor, Tensor)",
)
_library = torch.library.Library("anybatch", "DEF")
for _schema in _SCHEMAS:
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    _library.define(_schema, tags=tags)


def operators_for(x: Tensor, *rows: Tensor | None) -> bool:
    """Whether the operators can serve a batch that a compiler looks at.

    Args:
        x: The batch, of any floating type.
        rows: Parameters and running statistics of the layer, None where it has none.

    Returns:
        Whether they were asked for, and kernels can serve batches of this kind.
    """
    if fused._choice != "always" or not torch.compiler.is_compiling():
        return False
    if not (x.is_contiguous() or fused.lies_last(x)):
        return False
    if _is_launched(x):
        dtype = triton._TYPES.get(x.dtype)
    else:
        dtype = x.dtype if x.dtype in fused._TYPES else None
    for row in rows:
        if row is None or row.dtype != dtype or row.device != x.device or not row.is_contiguous():
            return False
    return _is_there(x.device.type)


def _is_there(device: str) -> bool:
    """Whether there are kernels for a kind of device."""
    if triton.launches_on(torch.device(device)) is not None:
        return True
    return device == "cpu" and fused._kernels() is not None


# What `torch.compiler.assume_constant_result` does, but for loading the compiler.
vars(_is_there)["_dynamo_marked_constant"] = True


def _normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    window: Tensor | None,
    counter: Tensor | None,
    keep: Tensor | None,
    kind: int,
    numbers: list[float],
    steps: list[int],
    smooth: bool,
    *how: Any,
) -> tuple[Tensor, Tensor]:
    (first, second), (length, warmup, renorm_warmup) = numbers, steps
    told = (kind, (first, second), (length, warmup, renorm_warmup), smooth)
    x, last = _dense(x)
    course = _course(Recipe(*told, mean, var, window, counter, keep), how, last)
    running = running_mean, running_var, num_batches_tracked
    y, used = _run(x).forward(x, weight, bias, running, course)
    return y, used


def _normalize_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    used: Tensor,
    num_batches_tracked: Tensor,
    psi: Tensor | None,
    psi_counter: Tensor | None,
    kind: int,
    averages: int,
    *how: Any,
) -> tuple[Tensor, Tensor]:
    *cut, wanted = how
    x, last = _dense(x)
    dy = fused.dense(dy, last, x.dtype)
    course = _course(Recipe(kind, averages=averages, psi=psi, psi_counter=psi_counter), cut, last)
    dx, slopes = _run(x).backward(dy, x, weight, used, num_batches_tracked, course, wanted)
    return dx, slopes


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """A batch without gaps in memory, and whether it is to be read with its channels last."""
    if x.shape[2:].numel() == 1 or x.is_contiguous():
        return x.contiguous(), x.shape[2:].numel() == 1
    return (x, True) if fused.lies_last(x) else (x.contiguous(), False)


def _course(recipe: Recipe, how: Any, last: bool) -> Course:
    sizes, groups, batches, columns, *rest = how
    return Course(recipe, (tuple(sizes), tuple(groups), tuple(batches)), columns, last, *rest)


def _run(x: Tensor) -> ModuleType:
    """What serves batches on a device."""
    if _is_launched(x):
        from anybatch.backends.triton import steps as launches

        return launches
    from anybatch.backends.numba import steps as loops

    return loops


def _is_launched(x: Tensor) -> bool:
    return x.device.type in triton._DEVICES


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    (kind, *_), (sizes, *_), columns = rest[9:], rest[13:], rest[16]
    dtype = weight.dtype if _is_launched(x) else torch.float64
    rows = Recipe(kind).rows
    return torch.empty_like(_dense(x)[0]), x.new_empty(rows, len(sizes), columns, dtype=dtype)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(_dense(x)[0]) if rest[-1] else x.new_empty(0)
    return dx, weight.new_empty(2, *weight.shape)


torch.library.register_fake("anybatch::normalize", _fake, lib=_library)
torch.library.register_fake("anybatch::normalize_backward", _fake_backward, lib=_library)
for _device in ("CPU", "CUDA"):
    _library.impl("normalize", _normalize, _device)
    _library.impl("normalize_backward", _normalize_backward, _device)
