# mypy: disable-error-code="no-untyped-call"
"""Batches of cross-iteration batch normalization, whose loops serve small ones."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.backends.aten import patches
from anybatch.backends.native_memory import address_of
from anybatch.backends.numba import cross_iteration
from anybatch.backends.numba.arrays import KEPT, LIKE, read
from anybatch.backends.numba.backend import SERIAL
from anybatch.backends.numba.norm_batches import (
    Array,
    BackwardData,
    BatchLoops,
    ForwardData,
    Places,
    SavedBatch,
    Size,
)
from anybatch.backends.numba.rule_steps import RuleGradient, RuleLoops
from anybatch.backends.protocol import CrossIterationSpec, MethodSpec, NormCall, RuleState
from anybatch.backends.rule import AVERAGE, WINDOW, Part, RuleSet, rule


def obstacle(call: NormCall, x: Tensor) -> str | None:
    """Why the loops cannot serve a batch."""
    if not call.spec.windowed:
        return None
    if x.numel() // x.shape[0] * max(call.cut[2]) > SERIAL:
        return f"a normalization batch of more than {SERIAL} values: the loops have one thread"
    return None


def prepare(call: NormCall, x: Tensor) -> BatchLoops:
    """How batches of this shape and layout go through the loops."""
    spec = call.spec
    if not spec.windowed:
        return CountedLoops(call, x, MethodSpec())
    # All positions need torch's operators in between.
    values = math.prod(x.shape[2:]) * min(call.cut[2])
    return WindowLoops(call, x, len(spec.rings) == 3 or _points(spec, values) > 0)


@rule
def _window_mean(psi_mean: float) -> float:
    """The mean of ``mean(g * z)`` over the window, for the backward pass."""
    return psi_mean


_WEIGHTED = RuleSet(Part(uses=("batch_weight",)))  # a row of the batch's own share
_SLIDES = Part(_window_mean, (WINDOW,), windows=(AVERAGE,), counters=(False,))
_WINDOWED = _WEIGHTED._replace(backward=_SLIDES)


class CountedLoops(RuleLoops):
    """Batch normalization, which counts the step."""

    def run_forward(
        self, call: NormCall, data: ForwardData, size: Size, places: Places, given: Any
    ) -> SavedBatch:
        if call.update:
            call.spec.memory["step"].add_(1)
        return super().run_forward(call, data, size, places, None)


class WindowLoops(BatchLoops):
    """Runs of normalization batches in one compiled call; of all positions' gradients, in two."""

    def run_forward(
        self, call: NormCall, data: ForwardData, size: Size, places: Places, given: Any
    ) -> SavedBatch:
        _, _, x, *_ = data
        (batches, _, examples), channels, dtype = size, self.channels, self.kept
        values = examples * self.length
        conv, output, made = given
        spec, order = call.spec, 0 if conv is None else 1
        # Its first example: state knows the whole batch.
        first = (x - output.data_ptr()) // (output.nbytes // output.shape[0])
        if not made:
            bare = cross_iteration.nothing(LIKE[dtype].dtype)[0], (0, 0, 0, 0)
            made += bare if conv is None else _conv_arrays(spec, conv, output)
        (rings, counters), (fed, paces) = _arrays(spec), made
        points = _points(spec, values)
        own, applied = np.empty((batches, 2, 1, channels)), np.empty((batches, 3, 1, channels))
        how, arrays = (
            (call.update_weight, call.eps, call.update),
            (counters, rings, fed, first, paces),
        )
        settings = order, spec.tracks_window, points, spec.burn_in_steps
        averaged = spec.backward_window is not None
        state = places[2:], how, arrays, settings, averaged
        cross_iteration.cross_iteration_norm(LIKE[dtype], data, own, applied, *state)
        if call.update and order and not points:
            some = slice(first, first + examples)
            inputs, outputs = (t[some].to(dtype) for t in (conv.x, output))
            with torch.autocast("cpu", enabled=False):
                whole = patches.raw_gradient(conv.geometry, inputs, outputs)
            product = whole.contiguous().numpy()
            step = order, fed, rings, counters, spec.burn_in_steps
            cross_iteration.record(product, own[0], values, *step)
        if not averaged:
            return SavedBatch(applied, MethodSpec(_WEIGHTED))
        counters_of = (spec.memory["backward_step"],)
        averages = RuleState(windows=(spec.backward_window,), counters=counters_of)
        return SavedBatch(applied, MethodSpec(_WINDOWED, averages=averages))

    def run_backward(
        self, call: NormCall, data: BackwardData, kept: SavedBatch, tracked: Tensor
    ) -> None:
        assert kept.spec is not None
        RuleGradient(kept.spec, self.kept).run(call, data, kept, tracked)


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
