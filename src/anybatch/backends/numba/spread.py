# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled loops of L1 and range batch normalization, for batches of any size.

The variance is the square of another spread: the mean absolute deviation, or the range. Either
one's derivative by a value depends only on whether the value is `low` or less, `high` or more: the
mean twice for L1, the smallest and the largest value for the range. So both have one backward.

Tensors are given as to `anybatch.backends.numba.forward_loops`, with a single group of examples.
"""

import math

import numpy as np

from anybatch.backends.numba.arrays import array_at, cut_at, running_at
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.low_precision import number
from anybatch.backends.numba.passes import (
    channel_sums,
    in_rows,
    plane_moments,
    plane_write,
    row_layout,
    row_moments,
    row_write,
    settle,
)
from anybatch.backends.numba.rules import count_batch, fits, track
from anybatch.backends.numba.spread_passes import (
    plane_deviation,
    plane_ends,
    plane_gradient,
    plane_sums,
    plane_total,
    row_deviations,
    row_ends,
    row_gradient,
    row_sums,
)
from anybatch.backends.numba.threads import fork

L1, RANGE = 0, 1  # which spread
KINDS = {"l1": L1, "range": RANGE}
_L1 = math.sqrt(math.pi / 2)
_PLACES = 64  # of a plane, whose ends are found side by side


def ends(like, channels):
    """Room for the values at which spreads move."""
    return np.empty((2, channels), like.dtype)


# --- forward ----------------------------------------------------------------


@inlined
def _range(low, high, mean, count, applied):
    """Range of values over that of as many normal ones; nan where they are not all finite.

    `applied` is what takes statistics.
    """
    if not fits(mean, applied):
        return np.nan
    return (np.float64(high) - np.float64(low)) / math.sqrt(2 * math.log(count))


@inlined
def _remember(applied, ends, c, mean, spread, low, high):
    """Keep what a channel is normalized by, and the ends at which its spread moves with a value."""
    applied[0, 0, c], applied[1, 0, c] = mean, spread * spread
    ends[0, c], ends[1, c] = low, high


@inlined
def _forward_planes(part, parts, kind, x, y, weight, bias, applied, ends, eps):
    """Statistics and output of some channels, each while it is in cache."""
    channels, count, dtype = x.shape[1], x.shape[0] * x.shape[2], ends.dtype.type
    lows, highs = np.empty(_PLACES, ends.dtype), np.empty(_PLACES, ends.dtype)
    for c in range(channels * part // parts, channels * (part + 1) // parts):
        if kind == L1:
            mean, _ = plane_moments(x, c, 0, x.shape[0], True)
            spread = _L1 * plane_deviation(x, c, mean) / count
            low = high = dtype(mean)
        else:
            shift = np.float64(number(x[0, c, 0], x))
            mean = shift + plane_total(x, c, shift) / count
            low, high = plane_ends(x, c, lows, highs)
            spread = _range(low, high, mean, count, applied)
        _remember(applied, ends, c, mean, spread, low, high)
        scale = weight[c] / math.sqrt(applied[1, 0, c] + eps)
        plane_write(x, y, c, 0, x.shape[0], mean, scale, bias[c])


@inlined
def _forward_rows(parts, kind, x, y, shape, weight, bias, applied, ends, eps):
    """Statistics and output of all channels."""
    repeats, channels, inner = shape
    count, dtype, period = x.shape[0] // channels, ends.dtype.type, repeats * channels * inner
    table = np.empty((3, repeats, channels, inner), ends.dtype)
    for c in range(channels):
        table[0, :, c] = x[c * inner]
    rows, sums = table.reshape(3, -1), np.zeros((parts, 2, period))
    if kind == L1:
        fork(row_moments, parts, (x, 0, x.shape[0], rows[0], sums))
        total = channel_sums(sums, shape)
        for c in range(channels):
            away = np.float64(table[0, 0, c, 0])
            applied[0, 0, c], _ = settle(total[0, c], total[1, c], count, away, True)
            table[0, :, c] = applied[0, 0, c]
        sums[:] = 0
        fork(row_deviations, parts, (x, 0, x.shape[0], rows[0], sums))
        total = channel_sums(sums, shape)
        for c in range(channels):
            mean = applied[0, 0, c]
            _remember(applied, ends, c, mean, _L1 * total[0, c] / count, dtype(mean), dtype(mean))
    else:
        places = np.empty((parts, 2, period), ends.dtype)
        places[:, 0], places[:, 1] = np.inf, -np.inf
        fork(row_ends, parts, (x, 0, x.shape[0], rows[0], sums, places))
        total, found = channel_sums(sums, shape), places.reshape(parts, 2, repeats, channels, inner)
        for c in range(channels):
            mean = np.float64(table[0, 0, c, 0]) + total[0, c] / count
            low, high = found[:, 0, :, c].min(), found[:, 1, :, c].max()
            spread = _range(low, high, mean, count, applied)
            _remember(applied, ends, c, mean, spread, low, high)
    for c in range(channels):
        table[0, :, c] = applied[0, 0, c]
        table[1, :, c] = weight[c] / math.sqrt(applied[1, 0, c] + eps)
        table[2, :, c] = bias[c]
    fork(row_write, parts, (x, y, 0, x.shape[0], rows))


@jit
def spread_forward(kind, data, applied, ends, running, update_weight, eps, update):
    """Normalize a batch by a spread, and track it if it is to `update`.

    Args:
        kind: L1 or RANGE.
        data: The batch, see `ForwardData`.
        applied: Takes mean and squared spread, ``(2, 1, C)``.
        ends: Takes the ends at or beyond which the spread moves with a value, ``(2, C)``; of the
            type of parameters and state.
        running: Running mean, running variance, batches tracked.
        update_weight: Of the newest batch in running statistics, see `NormCall`.
        eps: Added to the squared spread.
        update: Whether state may change.
    """
    like, cut, x, y, weight, bias, parts, _, _ = data
    shape, last, starts = cut_at(cut)
    channels = shape[2] if last else shape[1]
    x, y = array_at(x, shape, like), array_at(y, shape, like)
    weight, bias = array_at(weight, channels, ends), array_at(bias, channels, ends)
    rest = (weight, bias, applied, ends, eps)
    if not in_rows(x, last):
        fork(_forward_planes, parts, (kind, x, y, *rest))
    else:
        period, inner, _ = row_layout(x, last, starts)
        places = (period // (channels * inner), channels, inner)
        _forward_rows(parts, kind, x.reshape(-1), y.reshape(-1), places, *rest)
    if update:
        running_mean, running_var, tracked = running_at(running, channels, ends)
        update_weight = count_batch(tracked, update_weight)
        for c in range(channels):
            track(c, applied[0, 0, c], applied[1, 0, c], update_weight, running_mean, running_var)


# --- backward ---------------------------------------------------------------


@inlined
def _flow(kind, eps, weight, var, count, sums):
    """From a channel's sums: gradient of its weight, and the four factors of dx.

    They are those of dy, of one, and of values at its lower and its upper end.
    """
    sum_dy, sum_dyx, below, above = sums
    mean_dy = sum_dy / count
    inverse = 1 / math.sqrt(var + eps)
    dw, on_dy = sum_dyx * inverse, weight * inverse
    on_spread = -on_dy * inverse * dw * math.sqrt(var)
    constant = -on_dy * mean_dy
    if kind == L1:
        step = _L1 * on_spread / count
        return dw, on_dy, constant - step * (above - below) / count, -step, step
    step = on_spread / math.sqrt(2 * math.log(count))
    return dw, on_dy, constant, -step / max(below, 1), step / max(above, 1)


@inlined
def _backward_planes(part, parts, kind, dy, x, dx, weight, dw, db, wanted, applied, ends, eps):
    """Sums and gradient of some channels, each while it is in cache."""
    channels, count = x.shape[1], x.shape[0] * x.shape[2]
    for c in range(channels * part // parts, channels * (part + 1) // parts):
        low, high = ends[0, c], ends[1, c]
        total, product, below, above = plane_sums(dy, x, c, applied[0, 0, c], low, high)
        db[c] = total
        sums, var = (total, product, below, above), applied[1, 0, c]
        dw[c], on_dy, constant, on_low, on_high = _flow(kind, eps, weight[c], var, count, sums)
        if wanted:
            plane_gradient(dy, x, dx, c, on_dy, constant, low, high, on_low, on_high, ends)


@inlined
def _backward_rows(parts, kind, dy, x, dx, shape, weight, dw, db, wanted, applied, ends, eps):
    """Sums and gradient of all channels."""
    repeats, channels, inner = shape
    count, period = x.shape[0] // channels, repeats * channels * inner
    table, sums = np.empty((7, repeats, channels, inner), ends.dtype), np.zeros((parts, 2, period))
    counts = np.zeros((parts, 2, period), ends.dtype)
    for c in range(channels):
        table[0, :, c], table[1, :, c], table[2, :, c] = applied[0, 0, c], ends[0, c], ends[1, c]
    rows = table.reshape(7, -1)
    fork(row_sums, parts, (dy, x, 0, x.shape[0], rows, sums, counts))
    total, beyond = channel_sums(sums, shape), channel_sums(counts, shape)
    for c in range(channels):
        db[c] = total[0, c]
        rounded = np.float64(table[0, 0, c, 0]) - applied[0, 0, c]
        product = total[1, c] + rounded * total[0, c]
        of_c, var = (total[0, c], product, beyond[0, c], beyond[1, c]), applied[1, 0, c]
        dw[c], on_dy, constant, on_low, on_high = _flow(kind, eps, weight[c], var, count, of_c)
        table[3, :, c], table[4, :, c] = on_dy, constant
        table[5, :, c], table[6, :, c] = on_low, on_high
    if wanted:
        fork(row_gradient, parts, (dy, x, dx, 0, x.shape[0], rows))


@jit
def spread_backward(kind, data, applied, ends, eps):
    """Gradients of `spread_forward`.

    Args:
        kind: L1 or RANGE.
        data: The batch, see `BackwardData`.
        applied: What it was normalized by.
        ends: Of `spread_forward`.
        eps: Added to the squared spread.
    """
    like, cut, dy, x, dx, weight, dw, db, wanted, parts, _, _, _ = data
    shape, last, starts = cut_at(cut)
    channels = shape[2] if last else shape[1]
    dy, x, dx = array_at(dy, shape, like), array_at(x, shape, like), array_at(dx, shape, like)
    weight = array_at(weight, channels, ends)
    dw, db = array_at(dw, channels, ends), array_at(db, channels, ends)
    rest = (weight, dw, db, wanted, applied, ends, eps)
    if not in_rows(x, last):
        fork(_backward_planes, parts, (kind, dy, x, dx, *rest))
    else:
        period, inner, _ = row_layout(x, last, starts)
        places = (period // (channels * inner), channels, inner)
        flat = (dy.reshape(-1), x.reshape(-1), dx.reshape(-1))
        _backward_rows(parts, kind, *flat, places, *rest)
