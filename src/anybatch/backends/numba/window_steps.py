# mypy: disable-error-code="no-untyped-call"
"""Batches of cross-iteration batch normalization, whose loops serve small ones."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.aten import patches
from anybatch.backends.native_memory import address_of, running_addresses
from anybatch.backends.numba import cross_iteration, rule_steps
from anybatch.backends.numba.arrays import KEPT, LIKE, read
from anybatch.backends.numba.backend import SERIAL
from anybatch.backends.numba.norm_batches import (
    Array,
    BackwardData,
    ForwardData,
    SavedBatch,
    Work,
    work_for,
)
from anybatch.backends.numba.norm_batches import backward as backward
from anybatch.backends.numba.norm_batches import forward as forward
from anybatch.backends.numba.norm_batches import statistics as statistics
from anybatch.backends.protocol import CrossIterationSpec, MethodSpec, NormCall, RuleState
from anybatch.backends.rule import AVERAGE, WINDOW, Part, RuleSet, rule


def obstacle(call: NormCall, x: Tensor) -> str | None:
    """Why the loops cannot serve a batch."""
    if not call.spec.windowed:
        return None
    if x.numel() // x.shape[0] * max(call.cut[2]) > SERIAL:
        return f"a normalization batch of more than {SERIAL} values: the loops have one thread"
    return None


def prepare(call: NormCall, x: Tensor) -> Work:
    """How batches of this shape and layout go through the loops."""
    spec = call.spec
    if not spec.windowed:
        return work_for(call, x, _plain_batch, _backward_batch)
    # All positions need torch's operators in between.
    values = math.prod(x.shape[2:]) * min(call.cut[2])
    in_runs = len(spec.rings) == 3 or _points(spec, values) > 0
    return work_for(call, x, _window_batches, _backward_batch, in_runs)


_BATCH_NORM = rule_steps.RuleBatches(MethodSpec())


@rule
def _window_mean(psi_mean: float) -> float:
    """The mean of ``mean(g * z)`` over the window, for the backward pass."""
    return psi_mean


_WEIGHTED = RuleSet(Part(uses=("batch_weight",)))  # a row of the batch's own share
_SLIDES = Part(_window_mean, (WINDOW,), windows=(AVERAGE,), counters=(False,))
_WINDOWED = _WEIGHTED._replace(backward=_SLIDES)


def _plain_batch(
    call: NormCall, data: ForwardData, number: tuple[int, int], state: tuple[Any, ...]
) -> SavedBatch:
    """Batch normalization, which counts the step."""
    if call.update:
        call.spec.memory["step"].add_(1)
    return _BATCH_NORM.forward(call, data, number, state[:3])


def _window_batches(
    call: NormCall, data: ForwardData, number: tuple[int, int], state: tuple[Any, ...]
) -> SavedBatch:
    """A run of normalization batches in one compiled call; of all positions' gradients, two."""
    _, x, _, shape, last, *_ = data
    examples, length, channels = shape if last else (shape[0], shape[2], shape[1])
    mean, var, tracked, conv, output, made = state
    spec, order = call.spec, 0 if conv is None else 1
    # Its first example: state knows the whole batch.
    first = (x - output.data_ptr()) // (output.nbytes // output.shape[0])
    if not made:
        bare = cross_iteration.nothing(mean.numpy().dtype)[0], (0, 0, 0, 0)
        made += bare if conv is None else _conv_arrays(spec, conv, output)
    (rings, counters), (fed, paces) = _arrays(spec), made
    points = _points(spec, examples * length)
    own, applied = np.empty((number[0], 2, 1, channels)), np.empty((number[0], 3, 1, channels))
    running = running_addresses((mean, var, tracked), mean.dtype, channels)
    how, given = (call.update_weight, call.eps, call.update), (counters, rings, fed, first, paces)
    settings = order, spec.tracks_window, points, spec.burn_in_steps
    averaged = spec.backward_window is not None
    kept = LIKE[mean.dtype]
    cross_iteration.cross_iteration_norm(
        kept, data, own, applied, running, how, given, settings, averaged
    )
    if call.update and order and not points:
        some = slice(first, first + examples)
        inputs, outputs = (t[some].to(mean.dtype) for t in (conv.x, output))
        with torch.autocast("cpu", enabled=False):
            whole = patches.raw_gradient(conv.geometry, inputs, outputs)
        product = whole.contiguous().numpy()
        step = order, fed, rings, counters, spec.burn_in_steps
        cross_iteration.record(product, own[0], examples * length, *step)
    if not averaged:
        return SavedBatch(applied, MethodSpec(_WEIGHTED))
    averages = RuleState(windows=(spec.backward_window,), counters=(spec.memory["backward_step"],))
    return SavedBatch(applied, MethodSpec(_WINDOWED, averages=averages))


def _points(spec: CrossIterationSpec, values: int) -> int:
    """Points that gradients of statistics are taken at; 0 for all positions."""
    points = spec.gradient_sample or 0
    return points if points < values else 0


def _arrays(spec: CrossIterationSpec) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Rings and counters as arrays of the same storage."""
    views, memory = spec.views, spec.memory
    if views.method_state is not memory:
        counters = tuple(memory[name].numpy() for name in ("step", "position", "entries"))
        rings = tuple(memory[name].numpy() for name in spec.rings)
        rings = rings if len(rings) > 3 else (*rings, *cross_iteration.nothing(rings[0].dtype)[1])
        views.method_state, views.arrays = memory, (rings, counters)
    arrays: tuple[tuple[Array, ...], tuple[Array, ...]] = views.arrays
    return arrays


def _conv_arrays(spec: CrossIterationSpec, conv: patches.ConvCall, y: Tensor) -> tuple[Any, Any]:
    """A convolution's call as arrays of the compiled kernels, and the paces of points."""
    for one in (conv.x, conv.rows, conv.bias):  # that there is memory to read
        if one is not None:
            address_of(one, one.dtype, one.numel())
    dtype = KEPT[y.dtype]
    if conv.x.dtype is not dtype or conv.rows.dtype is not dtype:
        conv = conv._replace(x=conv.x.to(dtype), rows=conv.rows.to(dtype))
    views, key = spec.views, (conv.x.shape, y.shape, conv.x.dtype)
    if views.key != key:
        views.key, views.tables = key, _tables(conv, y)
    taps, meetings, sizes, paces, missing, none = views.tables
    x, last = conv.x, not conv.x.is_contiguous()
    flat = (x.movedim(1, -1) if last else x).reshape(-1).numpy()
    shape = x.shape[1], *missing, *x.shape[2:]
    bias = none if conv.bias is None else read(conv.bias.to(dtype))
    rows = read(conv.rows.contiguous())
    return (flat, shape, last, rows, bias, taps, meetings, sizes, conv.geometry.groups), paces


def _tables(conv: patches.ConvCall, y: Tensor) -> tuple[Any, ...]:
    """A geometry's taps, meetings, output sizes and paces of points, as in three dimensions."""
    geometry, dims, one = conv.geometry, len(conv.geometry.kernel), cross_iteration.ONE
    missing = 3 - dims
    pairs = [patches.tables(geometry, dim, conv.x, y) for dim in range(dims)]
    arrays = [(one[0], one[1].astype(conv.x.numpy().dtype))] * missing
    arrays += [(taps.numpy(), met.numpy()) for taps, met in pairs]
    paces = patches.PACES[1 + dims]
    return (
        tuple(taps for taps, _ in arrays),
        tuple(met for _, met in arrays),
        (*(1,) * missing, *y.shape[2:]),
        (paces[0], *(0,) * missing, *paces[1:]),
        (1,) * missing,
        cross_iteration.no_parameter(1, conv.x.numpy().dtype),
    )


def _backward_batch(call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Any) -> None:
    """The backward of a run of normalization batches, in one compiled call."""
    assert kept.spec is not None
    rule_steps.RuleBatches(kept.spec).backward(call, data, kept, tracked)
