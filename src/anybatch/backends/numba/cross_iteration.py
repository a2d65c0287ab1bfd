# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled loops of cross-iteration batch normalization (cross-iteration-bn, section 3).

``feed`` is what the bound layer did, as in three dimensions: ``(input, rows, bias, taps, meetings,
sizes, groups)`` with the input ``(N, C_in, D, H, W)``, one row of weights an output channel, the
tables of `anybatch.backends.aten.patches` for each dimension, and the output's sizes. ``rings``
is the window, a slot a step; see `CrossIterationBatchNorm`.
"""

import math

import numpy as np
import torch

from anybatch.backends.numba.arrays import array_at, running_at
from anybatch.backends.numba.arrays import read as read
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.passes import plane_gradient, plane_moments, plane_sums, plane_write
from anybatch.backends.numba.rules import count_batch, fits, keep, slide, track, unbiased

_CIRCLE = 2**31
ONE = (
    np.zeros((1, 1), np.int64),
    np.ones((1, 1), np.float32),
)  # taps and meetings of a missing dimension


# What stands for a feed and for the window's gradients in the naive form.
_TABLE, _CUBE = np.empty((0, 0), np.float32), np.empty((0, 0, 0), np.float32)
NO_FEED = (
    np.empty((0, 1, 1, 1, 1), np.float32),
    _TABLE,
    np.empty(0, np.float32),
    (ONE[0],) * 3,
    (ONE[1],) * 3,
    (1, 1, 1),
    1,
)
NO_GRADIENTS = (_TABLE, _TABLE, _CUBE, _CUBE)


def table(channels):
    """Room for a batch's own means and variances."""
    return np.empty((2, channels))


def workspace(groups, outputs, count, fan_in, dtype):
    """Room for a sample's outputs and patches, aligned as torch's, so that products round alike."""
    return (
        torch.empty(shape, dtype=dtype).numpy()
        for shape in ((groups, outputs, count), (groups, count, fan_in))
    )


def product(apart, seen, slope):
    """Write a sample's gradient of the variance: by torch, lest a second BLAS start threads."""
    one, other, out = (torch.from_numpy(array) for array in (apart, seen, slope))
    if len(apart) == 1:
        torch.mm(one[0], other[0], out=out)
    else:
        torch.bmm(one, other, out=out.view(*apart.shape[:2], -1))


@inlined
def _mean_patch(feed, first, examples, patches, place):
    """Write the mean patch of each channel group into a slot, ``(groups, fan_in)``."""
    inputs, _, _, taps, meetings, _, groups = feed
    channels, depth, height, width = inputs.shape[1:]
    k0, k1, k2 = taps[0].shape[1], taps[1].shape[1], taps[2].shape[1]
    m0, m1, m2 = meetings
    total = np.empty((depth, height, width), inputs.dtype)
    in_width = np.empty((depth, height, k2), inputs.dtype)
    in_height = np.empty((depth, k1, k2), inputs.dtype)
    per_group = channels // groups
    for c in range(channels):
        total[:] = 0
        for i in range(first, first + examples):
            for d in range(depth):
                for h in range(height):
                    for w in range(width):
                        total[d, h, w] += inputs[i, c, d, h, w]
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


@jit
def sample(like, x, shape, feed, first, means, patches, place, paces, start, apart, seen):
    """Write outputs and patches, minus their means, at the next points of the covering sequence.

    ``apart`` is ``(groups, outputs / groups, points)``, times 2 / points; ``seen`` is ``(groups,
    points, fan_in)``: their product is the gradient of the variance. That of the mean, the mean of
    these patches, is in the slot afterwards.
    """
    inputs, _, _, taps, _, sizes, _ = feed
    t0, t1, t2 = taps
    x, examples = array_at(x, shape, like), shape[0]
    groups, out_group, count = apart.shape
    per_group = inputs.shape[1] // groups
    k0, k1, k2 = t0.shape[1], t1.shape[1], t2.shape[1]
    height, width = inputs.shape[3], inputs.shape[4]
    at = np.zeros(4, np.int64)
    offsets = np.empty(k0 * k1 * k2, np.int64)
    flat_inputs = inputs.reshape(inputs.shape[0], inputs.shape[1], -1)
    for s in range(count):
        number = (start + s) % _CIRCLE
        for j in range(4):
            size = examples if j == 0 else sizes[j - 1]
            part = np.float32((paces[j] * number) % _CIRCLE) / np.float32(_CIRCLE)
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
        example = first + at[0]
        for g in range(groups):
            for i in range(out_group):
                o = g * out_group + i
                apart[g, i, s] = 2 * (x[at[0], o, flat] - means[o]) / count
            f = 0
            for c in range(g * per_group, (g + 1) * per_group):
                for tap in range(offsets.shape[0]):
                    value = seen.dtype.type(0)
                    if inside or offsets[tap] >= 0:
                        value = flat_inputs[example, c, offsets[tap]]
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


@jit
def from_product(product, values, means, patches, slopes, place):
    """Write the gradient of the variance, from the whole convolution weight gradient."""
    _, channels, fan_in = slopes.shape
    width = channels // patches.shape[1]
    for c in range(channels):
        for k in range(fan_in):
            slopes[place, c, k] = 2 * (
                product[c, k] / values - means[c] * patches[place, c // width, k]
            )


@inlined
def _product(rows, c, gradients, slot, row):
    """Weights of a channel times a gradient of its statistics, in their own type."""
    total = rows.dtype.type(0)
    for k in range(rows.shape[1]):
        total += rows[c, k] * gradients[slot, row, k]
    return np.float64(total)


@inlined
def _moved(rows, c, g, slot, mean_gradients, var_gradients, mean_bases, var_bases):
    """How far an earlier step's mean and variance move to today's weights (eq. 7, 8)."""
    shift = _product(rows, c, mean_gradients, slot, g) - mean_bases[slot, c]
    change = _product(rows, c, var_gradients, slot, c) - var_bases[slot, c]
    return shift, change - shift * shift


@jit
def cross_iteration_norm(
    like,
    x,
    y,
    shape,
    weight,
    bias,
    own,
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
    settings,
):
    """Cross-iteration batch normalization of one batch; this step's share is returned.

    `own` takes the batch's own means and variances. `settings` is (order, whether running
    statistics follow the window, whether to write the mean patch of all positions into the slot).
    """
    order, window_runs, whole = settings
    _, position, entries = counters
    ring_mean, ring_var, ring_values, mean_base, var_base, mean_gradient, var_gradient = rings
    _, rows, feed_bias, _, _, _, groups = feed
    biased, width = feed_bias.shape[0] > 0, ring_mean.shape[1] // groups
    slots, channels = ring_mean.shape
    x, y = array_at(x, shape, like), array_at(y, shape, like)
    weight, bias = array_at(weight, channels, like), array_at(bias, channels, like)
    running_mean, running_var, tracked = running_at(running, channels, like)
    values = x.shape[0] * x.shape[2]
    place, known = position[()], entries[()]
    total = np.float64(values)
    for age in range(1, known + 1):
        total += ring_values[(place - age) % slots]
    tracks = update and values > 1
    if tracks:
        pace = count_batch(tracked, pace)
    earlier = np.empty((2, slots))
    for c in range(channels):
        own[0, c], own[1, c] = plane_moments(x, c, 0, x.shape[0], True)
        mean = own[0, c] * values
        for age in range(1, known + 1):
            slot = (place - age) % slots
            past_mean, past_var = np.float64(ring_mean[slot, c]), np.float64(ring_var[slot, c])
            if order > 0:
                shift, change = _moved(
                    rows, c, c // width, slot, mean_gradient, var_gradient, mean_base, var_base
                )
                past_mean += shift + (feed_bias[c] if biased else 0.0)
                past_var = max(past_var + change, 0.0)  # eq. 10
            earlier[0, age], earlier[1, age] = past_mean, past_var
            mean += past_mean * ring_values[slot]
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
            track(c, mean, unbiased(var, total), pace, running_mean, running_var)
        elif tracks:
            track(c, own[0, c], unbiased(own[1, c], values), pace, running_mean, running_var)
        plane_write(x, y, c, 0, x.shape[0], mean, weight[c] / math.sqrt(var + eps), bias[c])
    if whole:
        _mean_patch(feed, first, x.shape[0], mean_gradient, place)
    return values / total if total > 1 else 0.0


@jit
def record(own, values, order, feed, rings, counters, burn_in):
    """Write a step's statistics into its slot, and count it if it is finite and counts."""
    step, position, entries = counters
    ring_mean, ring_var, ring_values, mean_base, var_base, mean_gradient, var_gradient = rings
    slots, channels = ring_mean.shape
    place = position[()]
    step[()] += 1
    finite = True
    for c in range(channels):
        finite = finite and fits(own[1, c], ring_var)
    if order > 0:
        _, rows, bias, _, _, _, groups = feed
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
        ring_mean[place] = own[0]
        ring_var[place] = own[1]
        ring_values[place] = values
        if step[()] > burn_in:
            position[()] = (place + 1) % slots
            entries[()] = min(entries[()] + 1, slots - 1)


@jit
def windowed_backward(
    like, dy, x, dx, shape, weight, dw, db, means, variances, eps, update, window, count
):
    """Gradients with the mean of g * z averaged over a window; see `slide_mean`."""
    channels, values = shape[1], shape[0] * shape[2]
    dy, x, dx = array_at(dy, shape, like), array_at(x, shape, like), array_at(dx, shape, like)
    weight = array_at(weight, channels, like)
    dw, db = array_at(dw, channels, like), array_at(db, channels, like)
    psi, average = np.empty(channels), np.empty(channels)
    for c in range(channels):
        db[c], second = plane_sums(dy, x, c, 0, x.shape[0], means[c])
        dw[c] = second / math.sqrt(variances[c] + eps)
        psi[c] = weight[c] * dw[c] / values
    slide(window, psi, average)
    average /= min(count[()] + 1, window.shape[0])
    if update:
        keep(window, psi)
        count[()] += 1
    for c in range(channels):
        inverse = 1 / math.sqrt(variances[c] + eps)
        on_x, constant = -average[c] * inverse * inverse, -weight[c] * db[c] / values * inverse
        scale = weight[c] * inverse
        plane_gradient(dy, x, dx, c, 0, x.shape[0], means[c], scale, on_x, constant)
