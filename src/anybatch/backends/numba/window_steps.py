# mypy: disable-error-code="no-untyped-call"
"""Batches of cross-iteration batch normalization, whose loops serve small ones."""

from typing import Any

import numpy as np
from torch import Tensor

from anybatch.backends.aten import patches
from anybatch.backends.native_memory import address_of, running_addresses
from anybatch.backends.numba import cross_iteration, rule_steps
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
from anybatch.backends.protocol import CrossIterationSpec, MethodSpec, NormCall
from anybatch.backends.rule import Part, RuleSet


def obstacle(call: NormCall, x: Tensor) -> str | None:
    """Why the loops cannot serve a batch."""
    if not call.spec.windowed:
        return None
    if not x.is_contiguous():
        return "an input that is not contiguous: the loops of a window take no other"
    if x.numel() // x.shape[0] * max(call.cut[2]) > SERIAL:
        return f"a normalization batch of more than {SERIAL} values: the loops have one thread"
    return None


def prepare(call: NormCall, x: Tensor) -> Work:
    """How batches of this shape and layout go through the loops."""
    windowed = call.spec.windowed
    return work_for(call, x, _window_batch if windowed else _plain_batch, _backward_batch)


_BATCH_NORM = rule_steps.batches_of(MethodSpec())
# The same backward pass with a weight of the batch's own statistics, a row of the table.
_WEIGHTED_BACKWARD = rule_steps.batches_of(MethodSpec(RuleSet(Part(uses=("share",)))))[1]


def _plain_batch(
    call: NormCall, data: ForwardData, groups: int, state: tuple[Any, ...]
) -> SavedBatch:
    """Batch normalization, which counts the step."""
    if call.update:
        call.spec.memory["step"].add_(1)
    return _BATCH_NORM[0](call, data, groups, state[:3])


def _window_batch(
    call: NormCall, data: ForwardData, groups: int, state: tuple[Any, ...]
) -> SavedBatch:
    """One normalization batch, in one compiled call and what records it."""
    like, x, y, shape, _, _, weight, bias, *_ = data
    (examples, channels, length), spec = shape, call.spec
    mean, var, tracked, conv, output = state
    # Its first example: state knows the whole batch.
    first = (x - output.data_ptr()) // (output.nbytes // output.shape[0])
    rings, counters = _arrays(spec)
    fed, paces = cross_iteration.NO_FEED, None
    if conv is not None:
        fed, paces = _conv_arrays(spec, conv, output)
    order = 0 if conv is None else 1
    values, count = examples * length, spec.gradient_sample
    whole = call.update and order > 0 and (count is None or count >= values)
    own, used = cross_iteration.table(channels), np.empty((3, 1, channels))
    share = cross_iteration.cross_iteration_norm(
        *(like, x, y, shape, weight, bias),
        own,
        used[0, 0],
        used[1, 0],
        running_addresses((mean, var, tracked), mean.dtype, channels),
        call.pace,
        call.eps,
        call.update,
        counters,
        rings,
        fed,
        first,
        (order, spec.tracks_window, whole),
    )
    if call.update:
        if conv is not None:
            given = data, own[0], fed, paces, conv, output, first
            _write_slope(spec, (rings, counters), *given)
        cross_iteration.record(own, values, order, fed, rings, counters, spec.burn_in_steps)
    if spec.backward_window is not None and share > 0:
        share = 1.0
    used[2] = share
    return SavedBatch(used, share=share, own=False)


def _write_slope(
    spec: CrossIterationSpec,
    arrays: tuple[tuple[Array, ...], tuple[Array, ...]],
    data: ForwardData,
    means: Array,
    fed: Any,
    paces: Any,
    conv: patches.ConvCall,
    output: Tensor,
    first: int,
) -> None:
    """Write the gradient of the variance into the slot of this step."""
    (*_, patch_ring, slope_ring), counters = arrays
    like, x, _, (examples, channels, length), *_ = data
    count = spec.gradient_sample
    place, values = int(counters[1]), examples * length
    if count is None or count >= values:
        some = slice(first, first + examples)
        whole = patches.raw_gradient(conv.geometry, conv.x[some], output[some])
        product = whole.contiguous().numpy()
        cross_iteration.from_product(product, values, means, patch_ring, slope_ring, place)
        return
    groups, fan_in = patch_ring.shape[1:]
    room = groups, channels // groups, count, fan_in, output.dtype
    apart, seen = cross_iteration.workspace(*room)
    start = int(counters[0]) * count
    given = (fed, first, means, patch_ring, place, paces, start, apart, seen)
    cross_iteration.sample(like, x, (examples, channels, length), *given)
    cross_iteration.product(apart, seen, slope_ring[place])


def _arrays(spec: CrossIterationSpec) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Rings and counters as arrays of the same storage."""
    views, memory = spec.views, spec.memory
    if views.method_state is not memory:
        counters = tuple(memory[name].numpy() for name in ("step", "position", "entries"))
        rings = tuple(memory[name].numpy() for name in spec.rings)
        rings = rings if len(rings) > 3 else (*rings, *cross_iteration.NO_GRADIENTS)
        views.method_state, views.arrays = memory, (rings, counters)
    arrays: tuple[tuple[Array, ...], tuple[Array, ...]] = views.arrays
    return arrays


def _conv_arrays(spec: CrossIterationSpec, conv: patches.ConvCall, y: Tensor) -> tuple[Any, Any]:
    """A convolution's call as arrays of the compiled kernels, and the paces of points."""
    views, key = spec.views, (conv.x.shape, y.shape, conv.x.dtype)
    if views.key != key:
        views.key, views.tables = key, _tables(conv, y)
    taps, meetings, sizes, paces, missing, none = views.tables
    for one in (conv.x, conv.rows, conv.bias):  # that there is memory to read
        if one is not None:
            address_of(one, one.dtype, one.numel())
    x = conv.x.numpy()
    x = x.reshape(*x.shape[:2], *missing, *x.shape[2:]) if missing else x
    bias = none if conv.bias is None else cross_iteration.read(conv.bias)
    rows = cross_iteration.read(conv.rows.contiguous())
    return (x, rows, bias, taps, meetings, sizes, conv.geometry.groups), paces


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
        conv.rows.new_empty(0).numpy(),
    )


def _backward_batch(call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Any) -> None:
    """The backward of one normalization batch, in one compiled call."""
    spec = call.spec
    if kept.own:
        _BATCH_NORM[1](call, data, kept, tracked)
        return
    if kept.share == 0 or spec.backward_window is None:
        _WEIGHTED_BACKWARD(call, data, kept, tracked)
        return
    like, dy, x, dx, shape, _, _, weight, dw, db, *_ = data
    cross_iteration.windowed_backward(
        *(like, dy, x, dx, shape, weight, dw, db),
        *kept.used[:2, 0],
        call.eps,
        call.update,
        spec.backward_window.numpy(),
        spec.memory["backward_step"].numpy(),
    )
