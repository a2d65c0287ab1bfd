# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled loops of cross-iteration batch normalization (cross-iteration-bn, section 3).

``feed`` is what the bound layer did, as in three dimensions: ``(input, rows, bias, taps, meetings,
sizes, groups)`` with the input ``(N, C_in, D, H, W)``, one row of weights an output channel, the
tables of `anybatch.kernels.patches` for each dimension, and the output's sizes. ``rings`` is the
window, a slot a step; see `CrossIterationBatchNorm`.
"""

import math

import numpy as np

from anybatch.kernels.fused.loops import (
    _count_batch,
    _fits,
    _gradient,
    _jit,
    _keep,
    _moments,
    _slide,
    _sums,
    _track,
    _unbiased,
    _write,
)

_CIRCLE = 2**31
ONE = (np.zeros((1, 1), np.int64), np.ones((1, 1)))  # taps and meetings of a missing dimension


def no_feed(dtype):
    """What stands for a feed, and for the window's gradients, in the naive form."""
    table, row = np.empty((0, 0), dtype), np.empty(0, dtype)
    taps, met = ONE[0], ONE[1].astype(dtype)
    shape = np.empty((0, 1, 1, 1, 1), dtype)
    feed = (shape, table, row, (taps,) * 3, (met,) * 3, (1, 1, 1), 1)
    cube = np.empty((0, 0, 0), dtype)
    return feed, (table, table, cube, cube), (0, 0, 0, 0)


@_jit
def _mean_patch(feed, first, examples, patch):
    """Write the mean patch of each channel group, ``(groups, fan_in)``."""
    inputs, _, _, taps, meetings, _, groups = feed
    channels, depth, height, width = inputs.shape[1:]
    k0, k1, k2 = taps[0].shape[1], taps[1].shape[1], taps[2].shape[1]
    m0, m1, m2 = meetings
    total = np.empty((depth, height, width))
    in_width = np.empty((depth, height, k2))
    in_height = np.empty((depth, k1, k2))
    per_group = channels // groups
    for c in range(channels):
        total[:] = 0.0
        for i in range(first, first + examples):
            for d in range(depth):
                for h in range(height):
                    for w in range(width):
                        total[d, h, w] += inputs[i, c, d, h, w]
        for d in range(depth):
            for h in range(height):
                for k in range(k2):
                    value = 0.0
                    for w in range(width):
                        value += total[d, h, w] * m2[k, w]
                    in_width[d, h, k] = value
        in_height[:] = 0.0
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
                    patch[c // per_group, at + (i * k1 + j) * k2 + k] = value / examples


@_jit
def _sampled_slope(x, feed, first, mean, patch, paces, start, count, slope):
    """Write the gradient of the variance, from the next points of the covering sequence."""
    inputs, _, _, taps, _, sizes, groups = feed
    t0, t1, t2 = taps
    examples, outputs, _ = x.shape
    per_group, out_group = inputs.shape[1] // groups, outputs // groups
    k0, k1, k2 = t0.shape[1], t1.shape[1], t2.shape[1]
    seen = np.empty((groups, slope.shape[1]), slope.dtype)
    slope[:] = 0
    for s in range(count):
        number = (start + s) % _CIRCLE
        place = np.zeros(4, np.int64)
        for j in range(4):
            size = examples if j == 0 else sizes[j - 1]
            part = np.float32((paces[j] * number) % _CIRCLE) / np.float32(_CIRCLE)
            place[j] = min(int(np.float32(part * np.float32(size))), size - 1)
        at = (place[1] * sizes[1] + place[2]) * sizes[2] + place[3]
        for g in range(groups):
            f = 0
            for c in range(g * per_group, (g + 1) * per_group):
                for a in range(k0):
                    d = t0[place[1], a]
                    for b in range(k1):
                        h = t1[place[2], b]
                        for e in range(k2):
                            w = t2[place[3], e]
                            value = 0.0
                            if d >= 0 and h >= 0 and w >= 0:
                                value = inputs[first + place[0], c, d, h, w]
                            seen[g, f] = value - patch[g, f]
                            f += 1
        for o in range(outputs):
            apart = slope.dtype.type(2 * (x[place[0], o, at] - mean[o]) / count)
            g = o // out_group
            for f in range(slope.shape[1]):
                slope[o, f] += apart * seen[g, f]


@_jit
def _compensated(c, slot, feed, rings, order):
    """One channel's mean and variance of an earlier step at today's weights (eq. 7, 8, 10)."""
    means, variances, _, mean_bases, var_bases, mean_gradients, var_gradients = rings
    mean, var = np.float64(means[slot, c]), np.float64(variances[slot, c])
    if order == 0:
        return mean, var
    _, rows, bias, _, _, _, groups = feed
    g = c // (means.shape[1] // groups)
    of_mean = of_var = 0.0
    for k in range(rows.shape[1]):
        of_mean += rows[c, k] * mean_gradients[slot, g, k]
        of_var += rows[c, k] * var_gradients[slot, c, k]
    shift = of_mean - mean_bases[slot, c]
    var += of_var - var_bases[slot, c] - shift * shift
    mean += shift
    if bias.shape[0]:
        mean += bias[c]
    return mean, max(var, 0.0)


@_jit
def cross_iteration_norm(
    x,
    y,
    weight,
    bias,
    means,
    variances,
    running,
    pace,
    eps,
    update,
    counters,
    rings,
    feed,
    first,
    product,
    settings,
    paces,
):
    """Cross-iteration batch normalization of one batch; this step's share is returned.

    `settings` is (order, positions in a gradient's sample, burn-in steps, whether running
    statistics follow the window). `product` is the whole convolution weight gradient, or empty.
    """
    order, sample, burn_in, window_runs = settings
    step, position, entries = counters
    ring_mean, ring_var, ring_values, mean_base, var_base, mean_gradient, var_gradient = rings
    running_mean, running_var, tracked = running
    slots, channels = ring_mean.shape
    values = x.shape[0] * x.shape[2]
    place, known = position[()], entries[()]
    total = np.float64(values)
    for age in range(1, known + 1):
        total += ring_values[(place - age) % slots]
    tracks = update and values > 1
    if tracks:
        pace = _count_batch(tracked, pace)
    own = np.empty((2, channels))
    earlier = np.empty((2, slots))
    share = values / total if total > 1 else 0.0
    for c in range(channels):
        own[0, c], own[1, c] = _moments(x, c)
        mean = own[0, c] * values
        for age in range(1, known + 1):
            slot = (place - age) % slots
            earlier[0, age], earlier[1, age] = _compensated(c, slot, feed, rings, order)
            mean += earlier[0, age] * ring_values[slot]
        mean /= total
        var = (own[1, c] + (own[0, c] - mean) ** 2) * values
        for age in range(1, known + 1):
            spread = earlier[1, age] + (earlier[0, age] - mean) ** 2
            var += spread * ring_values[(place - age) % slots]
        var /= total
        if total <= 1:  # one value, and nothing remembered
            mean, var = np.float64(running_mean[c]), np.float64(running_var[c])
        means[c], variances[c] = mean, var
        if tracks and window_runs:
            _track(c, mean, _unbiased(var, total), pace, running_mean, running_var)
        elif tracks:
            _track(c, own[0, c], _unbiased(own[1, c], values), pace, running_mean, running_var)
        _write(x, y, c, mean, weight[c] / math.sqrt(var + eps), bias[c])
    if not update:
        return share
    step[()] += 1
    finite = True
    for c in range(channels):
        finite = finite and _fits(own[1, c], ring_var)
    if order > 0 and finite:
        _, rows, feed_bias, _, _, _, groups = feed
        patch = np.empty(mean_gradient.shape[1:], ring_mean.dtype)
        _mean_patch(feed, first, x.shape[0], patch)
        slope = np.empty(var_gradient.shape[1:], ring_mean.dtype)
        if product.shape[0]:
            for c in range(channels):
                g = c // (channels // groups)
                for k in range(slope.shape[1]):
                    slope[c, k] = 2 * (product[c, k] / values - own[0, c] * patch[g, k])
        else:
            start = (step[()] - 1) * sample
            _sampled_slope(x, feed, first, own[0], patch, paces, start, sample, slope)
        bases = np.zeros((2, channels))
        for c in range(channels):
            g = c // (channels // groups)
            of_mean = of_var = 0.0
            for k in range(slope.shape[1]):
                of_mean += rows[c, k] * patch[g, k]
                of_var += rows[c, k] * slope[c, k]
            bases[0, c], bases[1, c] = of_mean, of_var
            finite = finite and _fits(of_var, var_base) and _fits(of_mean, var_base)
        if finite:
            mean_gradient[place] = patch
            var_gradient[place] = slope
            mean_base[place] = bases[0]
            var_base[place] = bases[1]
            if feed_bias.shape[0]:
                for c in range(channels):
                    own[0, c] -= feed_bias[c]
    if finite:
        ring_mean[place] = own[0]
        ring_var[place] = own[1]
        ring_values[place] = values
        if step[()] > burn_in:
            position[()] = (place + 1) % slots
            entries[()] = min(known + 1, slots - 1)
    return share


@_jit
def windowed_backward(dy, x, dx, weight, dw, db, means, variances, eps, update, window, count):
    """Gradients with both backward statistics averaged over a window; see `slide_mean`."""
    channels, values = x.shape[1], x.shape[0] * x.shape[2]
    both, average = np.empty(2 * channels), np.empty(2 * channels)
    for c in range(channels):
        inverse = 1 / math.sqrt(variances[c] + eps)
        db[c], second = _sums(dy, x, c, means[c])
        dw[c] = second * inverse
        both[c], both[channels + c] = weight[c] * db[c] / values, weight[c] * dw[c] / values
    _slide(window, both, average)
    average /= min(count[()] + 1, window.shape[0])
    if update:
        for c in range(channels):  # a channel enters with both or not at all
            if not (_fits(both[c], window) and _fits(both[channels + c], window)):
                both[c] = both[channels + c] = np.nan
        _keep(window, both)
        count[()] += 1
    for c in range(channels):
        inverse = 1 / math.sqrt(variances[c] + eps)
        on_x, constant = -average[channels + c] * inverse * inverse, -average[c] * inverse
        _gradient(dy, x, dx, c, means[c], weight[c] * inverse, on_x, constant)
