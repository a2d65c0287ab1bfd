"""A layer's batch on a GPU: its normalization batches one after the other."""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from anybatch.backends.protocol import Cut, NormCall, iter_norm_batches
from anybatch.backends.triton import launch


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    call: NormCall,
    block_counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalize a batch, and remember it.

    Args:
        x: Input, dense, channels first or last.
        weight: Scale.
        bias: Shift.
        running: Running mean, running variance, batches tracked.
        call: How.
        block_counter: A whole number on the device that is 0, and is again; None for a new one.

    Returns:
        The output, and the statistics used, ``(rows, groups, K)``, see `MethodSpec`.
    """
    spec, num_statistics, channels = call.spec, call.num_statistics, x.shape[1]
    groups = len(call.cut[0])
    with _on(x):
        y, applied = torch.empty_like(x), weight.new_empty(spec.rows, groups, num_statistics)
        own = applied if num_statistics == channels else weight.new_empty(2, groups, channels)
        tensors = (x, y, weight, bias, applied, own, running, _zero(x, block_counter), spec)
        for step in steps_of(x, call):
            launch.forward(*tensors, *step, call.update_weight, call.eps, call.update)
    return y, applied


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    applied: Tensor,
    tracked: Tensor,
    call: NormCall,
    wanted: bool,
    block_counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward`.

    Args:
        dy: Gradient of the output, as ``x`` in type and memory.
        x: Input.
        weight: Scale.
        applied: Statistics of the forward.
        tracked: Batches tracked.
        call: How.
        wanted: Whether the input needs a gradient.
        block_counter: A whole number on the device that is 0, and is again; None for a new one.

    Returns:
        Gradients of the input, empty where it is not wanted, and of shift and scale, ``(2, C)``.
    """
    groups = applied.shape[1]
    with _on(x):
        dx = torch.empty_like(x) if wanted else x.new_empty(0)
        slopes = weight.new_empty((2, groups, *weight.shape) if groups > 1 else (2, *weight.shape))
        state = (applied, slopes, tracked, _zero(x, block_counter), call.spec)
        update_weight, eps, update = call.update_weight, call.eps, call.update
        for step in steps_of(x, call):
            launch.backward(dy, x, dx, weight, *state, *step, update_weight, eps, update, wanted)
    return dx, slopes if groups == 1 else slopes.sum(1)


def _zero(x: Tensor, block_counter: Tensor | None) -> Tensor:
    return x.new_zeros((), dtype=torch.int64) if block_counter is None else block_counter


def steps_of(x: Tensor, call: NormCall) -> tuple[tuple[launch.Layout, int, int], ...]:
    """The layout of each normalization batch of a batch, its first example and first group."""
    values, num_statistics = x.shape[2:].numel(), call.num_statistics
    return _steps(call.cut, call.last, x.shape[1], values, x.element_size(), num_statistics)


@lru_cache(maxsize=256)
def _steps(
    cut: Cut, last: bool, channels: int, values: int, itemsize: int, num_statistics: int
) -> tuple[tuple[launch.Layout, int, int], ...]:
    width, long = channels // num_statistics, launch.needs_long(sum(cut[0]) * channels * values)
    return tuple(
        (launch.Layout(last, channels, values, itemsize, sizes, width, long), first, group)
        for first, group, _, sizes in iter_norm_batches(cut)
    )


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """The device of a tensor, to launch on."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)
