# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled loops of cross-iteration batch normalization (cross-iteration-bn, section 3).

``feed`` is what the bound layer did, as in three dimensions: ``(input, shape, last, rows, bias,
taps, meetings, sizes, groups)`` with the input flat, its shape ``(C_in, D, H, W)`` and whether
channels are last in memory, one row of weights an output channel, the tables of
`anybatch.backends.aten.patches` for each dimension, and the output's sizes. ``rings`` is the
window, a slot a step; see `CrossIterationBatchNorm`.
"""

import math
from functools import cache

import numpy as np

from anybatch.backends.numba.arrays import array_at, cut_at, running_at
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.low_precision import number
from anybatch.backends.numba.passes import (
    channel_sums,
    plane_moments,
    plane_write,
    row_layout,
    row_moments,
    row_write,
    settle,
    write_shifts,
)
from anybatch.backends.numba.rules import count_batch, fits, track, unbiased

_CIRCLE = 2**31
# Taps and meetings of a missing dimension.
ONE = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32)


def no_parameter(dims, dtype):
    """An empty parameter of so many dimensions, read-only as parameters are given."""
    array = np.empty((0,) * dims, dtype)
    array.setflags(write=False)
    return array


@cache
def nothing(dtype):
    """Empty arrays in place of a feed and of the window's gradients, for the naive form.

    They have the types of those that are there, so that one function is compiled for all.
    """
    row, table, cube = (np.empty((0,) * dims, dtype) for dims in (1, 2, 3))
    rows, bias, meetings = no_parameter(2, dtype), no_parameter(1, dtype), ONE[1].astype(dtype)
    feed = row, (1, 1, 1, 1), False, rows, bias, (ONE[0],) * 3, (meetings,) * 3, (1, 1, 1), 1
    return feed, (table, table, cube, cube)


@inlined
def _mean_patch(feed, first, examples, patches, place):
    """Write the mean patch of each channel group into a slot, ``(groups, fan_in)``."""
    inputs, (channels, depth, height, width), last, _, _, taps, meetings, _, groups = feed
    positions = depth * height * width
    ahead, apart = (1, channels) if last else (positions, 1)  # to the next channel, and position
    k0, k1, k2 = taps[0].shape[1], taps[1].shape[1], taps[2].shape[1]
    m0, m1, m2 = meetings
    total = np.empty((depth, height, width), inputs.dtype)
    in_width = np.empty((depth, height, k2), inputs.dtype)
    in_height = np.empty((depth, k1, k2), inputs.dtype)
    per_group = channels // groups
    for c in range(channels):
        total[:] = 0
        flat = total.reshape(-1)
        for i in range(first, first + examples):
            start = i * channels * positions + c * ahead
            for k in range(positions):
                flat[k] += inputs[start + k * apart]
        for d in range(depth):
            for h in range(height):
                for k in range(k2):
                    value = inputs.dtype.type(0)
                    for w in range(width):
                        value += total[d, h, w] * m2[k, w]
                    in_width[d, h, k] = value
        in_height[:] = 0
        for d in range(depth):
            for j in range(k1):
                for h in range(height):
                    for k in range(k2):
                        in_height[d, j, k] += in_width[d, h, k] * m1[j, h]
        at = (c % per_group) * k0 * k1 * k2
        for i in range(k0):
            for j in range(k1):
                for k in range(k2):
                    value = 0.0
                    for d in range(depth):
                        value += in_height[d, j, k] * m0[i, d]
                    tap = (i * k1 + j) * k2 + k
                    patches[place, c // per_group, at + tap] = value / examples


@inlined
def _sample(x, last, feed, first, means, patches, slopes, place, paces, start, count):
    """Write the gradients of the statistics, from the next points of the covering sequence.

    That of the mean is the points' mean patch, that of the variance twice the mean product of
    outputs and patches, both minus their means.
    """
    inputs, (channels, depth, height, width), fed_last, _, _, taps, _, sizes, groups = feed
    t0, t1, t2 = taps
    examples, positions = x.shape[0], depth * height * width
    out_group, per_group = means.shape[0] // groups, channels // groups
    ahead, between = (1, channels) if fed_last else (positions, 1)
    k0, k1, k2 = t0.shape[1], t1.shape[1], t2.shape[1]
    at, offsets = np.zeros(4, np.int64), np.empty(k0 * k1 * k2, np.int64)
    apart = np.empty((groups, count, out_group), inputs.dtype)
    seen = np.empty((groups, count, patches.shape[2]), inputs.dtype)
    for s in range(count):
        point = (start + s) % _CIRCLE
        for j in range(4):
            size = examples if j == 0 else sizes[j - 1]
            part = np.float32((paces[j] * point) % _CIRCLE) / np.float32(_CIRCLE)
            at[j] = min(int(np.float32(part * np.float32(size))), size - 1)
        inside = True
        for a in range(k0):
            d = t0[at[1], a]
            for b in range(k1):
                h = t1[at[2], b]
                for e in range(k2):
                    w = t2[at[3], e]
                    met = d >= 0 and h >= 0 and w >= 0
                    inside = inside and met
                    offsets[(a * k1 + b) * k2 + e] = (d * height + h) * width + w if met else -1
        flat = (at[1] * sizes[1] + at[2]) * sizes[2] + at[3]
        example = (first + at[0]) * channels * positions
        for g in range(groups):
            for i in range(out_group):
                o = g * out_group + i
                value = number(x[at[0], flat, o] if last else x[at[0], o, flat], x)
                apart[g, s, i] = 2 * (value - means[o]) / count
            f = 0
            for c in range(g * per_group, (g + 1) * per_group):
                for tap in range(offsets.shape[0]):
                    value = seen.dtype.type(0)
                    if inside or offsets[tap] >= 0:
                        value = inputs[example + c * ahead + offsets[tap] * between]
                    seen[g, s, f] = value
                    f += 1
    for g in range(groups):
        for f in range(seen.shape[2]):
            total = seen.dtype.type(0)
            for s in range(count):
                total += seen[g, s, f]
            patches[place, g, f] = total / count
        for s in range(count):
            for f in range(seen.shape[2]):
                seen[g, s, f] -= patches[place, g, f]
        for i in range(out_group):
            slope = slopes[place, g * out_group + i]
            slope[:] = 0
            for s in range(0, count - 3, 4):  # four at a time: fewer reads and writes of the sum
                one, two, three, four = seen[g, s], seen[g, s + 1], seen[g, s + 2], seen[g, s + 3]
                a, b = apart[g, s, i], apart[g, s + 1, i]
                c, d = apart[g, s + 2, i], apart[g, s + 3, i]
                for f in range(slope.shape[0]):
                    slope[f] += (a * one[f] + b * two[f]) + (c * three[f] + d * four[f])
            for s in range(count // 4 * 4, count):
                one, a = seen[g, s], apart[g, s, i]
                for f in range(slope.shape[0]):
                    slope[f] += a * one[f]


@inlined
def _product(rows, c, gradients, slot, row):
    """Weights of a channel times a gradient of its statistics, in their own type."""
    total = rows.dtype.type(0)
    for k in range(rows.shape[1]):
        total += rows[c, k] * gradients[slot, row, k]
    return np.float64(total)


@inlined
def _compensate(feed, rings, counters, moved):
    """Compute the compensation of earlier steps for the change of weights (eq. 7, 8)."""
    _, _, _, mean_bases, var_bases, mean_gradients, var_gradients = rings
    _, _, _, rows, _, _, _, _, groups = feed
    _, position, entries = counters
    slots, channels = mean_bases.shape
    for c in range(channels):
        g = c // (channels // groups)
        for age in range(1, entries[()] + 1):
            slot = (position[()] - age) % slots
            shift = _product(rows, c, mean_gradients, slot, g) - mean_bases[slot, c]
            change = _product(rows, c, var_gradients, slot, c) - var_bases[slot, c]
            moved[0, slot, c], moved[1, slot, c] = shift, change - shift * shift


@inlined
def _record(own, values, order, feed, rings, counters, burn_in):
    """Write a step's statistics into its slot, and count it if it is finite and counts."""
    own = own[:, 0]
    step, position, entries = counters
    ring_mean, ring_var, ring_values, mean_base, var_base, mean_gradient, var_gradient = rings
    slots, channels = ring_mean.shape
    place = position[()]
    step[()] += 1
    finite = True
    for c in range(channels):
        finite = finite and fits(own[1, c], ring_var)
    if order > 0:
        _, _, _, rows, bias, _, _, _, groups = feed
        for c in range(channels):
            of_mean = _product(rows, c, mean_gradient, place, c // (channels // groups))
            of_var = _product(rows, c, var_gradient, place, c)
            mean_base[place, c], var_base[place, c] = of_mean, of_var
            finite = finite and fits(of_var, var_base) and fits(of_mean, var_base)
            if bias.shape[0]:
                own[0, c] -= bias[c]
        if not finite:
            mean_base[place] = 0
            var_base[place] = 0
            mean_gradient[place] = 0
            var_gradient[place] = 0
    if finite:
        for c in range(channels):  # an array's assignment compiles what it would say of shapes
            ring_mean[place, c], ring_var[place, c] = own[0, c], own[1, c]
        ring_values[place] = values
        if step[()] > burn_in:
            position[()] = (place + 1) % slots
            entries[()] = min(entries[()] + 1, slots - 1)


@inlined
def _normalize(x, y, last, starts, own, applied, moved, rows_of, how, given, settings):
    """Normalize one normalization batch and record its step; return its share of the window."""
    weight, bias, running_mean, running_var, tracked = rows_of
    update_weight, eps, update = how
    counters, rings, feed, first, paces = given
    order, window_runs, points, burn_in = settings
    _, position, entries = counters
    ring_mean, ring_var, ring_values, _, _, mean_gradient, var_gradient = rings
    feed_bias = feed[4]
    biased = feed_bias.shape[0] > 0
    slots, channels = ring_mean.shape
    values = x.shape[0] * x.shape[1 if last else 2]
    flat, period, total_of = x.reshape(-1), row_layout(x, last, starts)[0], own[:, 0]
    on = np.empty((3, period // channels, channels), weight.dtype)
    if last:
        sums = np.zeros((1, 2, period))
        shift = on[0].reshape(-1, channels, 1)
        write_shifts(flat, np.empty(0, np.bool_), 0, x.size, shift)
        row_moments(0, 1, flat, 0, x.size, on[0].reshape(-1), sums)
        total_of = channel_sums(sums, shift.shape)
    for c in range(channels):
        if last:
            away = np.float64(on[0, 0, c])
            own[0, 0, c], own[1, 0, c] = settle(total_of[0, c], total_of[1, c], values, away, True)
        else:
            own[0, 0, c], own[1, 0, c] = plane_moments(x, c, 0, x.shape[0], True)
    place, known = position[()], entries[()]
    total = np.float64(values)
    for age in range(1, known + 1):
        total += ring_values[(place - age) % slots]
    tracks = update and values > 1
    if tracks:
        update_weight = count_batch(tracked, update_weight)
    earlier = np.empty((2, slots))
    for c in range(channels):
        mean = own[0, 0, c] * values
        for age in range(1, known + 1):
            slot = (place - age) % slots
            past_mean, past_var = np.float64(ring_mean[slot, c]), np.float64(ring_var[slot, c])
            if order > 0:
                past_mean += moved[0, slot, c] + (feed_bias[c] if biased else 0.0)
                past_var = max(past_var + moved[1, slot, c], 0.0)  # eq. 10
            earlier[0, age], earlier[1, age] = past_mean, past_var
            mean += past_mean * ring_values[slot]
        mean /= total
        var = (own[1, 0, c] + (own[0, 0, c] - mean) ** 2) * values
        for age in range(1, known + 1):
            spread = earlier[1, age] + (earlier[0, age] - mean) ** 2
            var += spread * ring_values[(place - age) % slots]
        var /= total
        if total <= 1:  # one value, and nothing remembered
            mean, var = np.float64(running_mean[c]), np.float64(running_var[c])
        applied[0, 0, c], applied[1, 0, c] = mean, var
        if tracks and window_runs:
            track(c, mean, unbiased(var, total), update_weight, running_mean, running_var)
        elif tracks:
            spread = unbiased(own[1, 0, c], values)
            track(c, own[0, 0, c], spread, update_weight, running_mean, running_var)
        scale = weight[c] / math.sqrt(var + eps)
        if last:
            on[0, :, c], on[1, :, c], on[2, :, c] = mean, scale, bias[c]
        else:
            plane_write(x, y, c, 0, x.shape[0], mean, scale, bias[c])
    if last:
        row_write(0, 1, flat, y.reshape(-1), 0, x.size, on.reshape(3, -1))
    if update and order > 0 and points == 0:
        _mean_patch(feed, first, x.shape[0], mean_gradient, place)
    elif update:
        if order > 0:
            where = place, paces, counters[0][()] * points, points
            _sample(x, last, feed, first, own[0, 0], mean_gradient, var_gradient, *where)
        _record(own, values, order, feed, rings, counters, burn_in)
        for c in range(channels):
            moved[0, place, c] = moved[1, place, c] = 0  # this step is of today's weights
    return values / total if total > 1 else 0.0


@jit
def cross_iteration_norm(kept, data, own, applied, running, how, given, settings, whole_share):
    """Normalize equal normalization batches in turn by cross-iteration batch normalization.

    Args:
        kept: An empty array of the type of parameters and state.
        data: The first of them, see `ForwardData`.
        own: Takes their own statistics, ``(B, 2, 1, C)``.
        applied: Takes those of the window and the batch's share in them, ``(B, 3, 1, C)``.
        running: Running mean, variance and number of batches.
        how: Weight of the new running statistics, number added to variances, whether state moves.
        given: Counters, rings, feed, the first example in it, and paces of points.
        settings: Order; whether running statistics follow the window; points of a sample for the
            gradients of statistics, 0 for all positions: then the caller writes the gradient of the
            variance, and records the step; steps before the window is used.
        whole_share: Whether the backward statistics are of the window too: the share is 1.
    """
    like, cut, x, y, weight, bias, _, _, _ = data
    shape, last, starts = cut_at(cut)
    channels, size = shape[2] if last else shape[1], shape[0] * shape[1] * shape[2] * like.itemsize
    rows_of = (
        array_at(weight, channels, kept),
        array_at(bias, channels, kept),
        *running_at(running, channels, kept),
    )
    counters, rings, feed, first, paces = given
    moved = np.empty((2, *rings[0].shape))
    if settings[0] > 0:
        _compensate(feed, rings, counters, moved)
    for b in range(own.shape[0]):
        at = b * size
        inputs, outputs = array_at(x + at, shape, like), array_at(y + at, shape, like)
        here = counters, rings, feed, first + b * shape[0], paces
        places = own[b], applied[b], moved
        share = _normalize(inputs, outputs, last, starts, *places, rows_of, how, here, settings)
        applied[b, 2] = 1.0 if whole_share and share > 0 else share


@jit
def record(product, own, values, order, feed, rings, counters, burn_in):
    """The gradient of the variance from the whole convolution weight gradient; record the step."""
    patches, slopes, place = rings[5], rings[6], counters[1][()]
    width = slopes.shape[1] // patches.shape[1]
    for c in range(slopes.shape[1]):
        for k in range(slopes.shape[2]):
            away = own[0, 0, c] * patches[place, c // width, k]
            slopes[place, c, k] = 2 * (product[c, k] / values - away)
    _record(own, values, order, feed, rings, counters, burn_in)
