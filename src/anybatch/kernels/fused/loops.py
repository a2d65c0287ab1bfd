# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The compiled loops. Arrays ``x``, ``y``, ``dy`` and ``dx`` are ``(N, C, L)``.

Every kernel goes over the channels once forward (statistics, rule, output) and
once backward (sums, rule, gradient), while a channel's values are in cache.
"""

import math

import numpy as np
from numba import njit

from anybatch.kernels.fused.arrays import read as read

# Arrays are taken out of tuples before the loops: doing so counts references.
# Sums may be reordered, so that they run in vector registers; nan and inf keep their meaning.
_jit = njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

BATCH, SMA, EMA = 0, 1, 2
KINDS = {"batch": BATCH, "sma": SMA, "ema": EMA}
NO_WINDOW = np.empty((0, 0), np.float32)
NO_COUNT = np.zeros((), np.int64)
_EMPTY = np.empty(0)


def rows(length, number):
    """Rows of statistics, and an empty one for those that a method does not have."""
    return (*np.empty((number, length)), _EMPTY)


@_jit
def _moments(x, c):
    """Mean and biased variance of a channel, in two passes."""
    n, _, length = x.shape
    total = 0.0
    for i in range(n):
        for k in range(length):
            total += x[i, c, k]
    mean = total / (n * length)
    squares = 0.0
    for i in range(n):
        for k in range(length):
            offset = x[i, c, k] - mean
            squares += offset * offset
    return mean, squares / (n * length)


@_jit
def _second_moment(x, c):
    n, _, length = x.shape
    total = 0.0
    for i in range(n):
        for k in range(length):
            value = np.float64(x[i, c, k])
            total += value * value
    return total / (n * length)


@_jit
def _write(x, y, c, mean, scale, shift):
    """Write y = (x - mean) * scale + shift."""
    n, _, length = x.shape
    dtype = x.dtype.type
    mean, scale, shift = dtype(mean), dtype(scale), dtype(shift)
    for i in range(n):
        for k in range(length):
            y[i, c, k] = (x[i, c, k] - mean) * scale + shift


@_jit
def _sums(dy, x, c, center):
    """Return sum(dy) and sum(dy * (x - center))."""
    n, _, length = x.shape
    first = second = 0.0
    for i in range(n):
        for k in range(length):
            first += dy[i, c, k]
            second += dy[i, c, k] * (x[i, c, k] - center)
    return first, second


@_jit
def _gradient(dy, x, dx, c, center, on_dy, on_x, constant):
    """Write dx = on_dy * dy + on_x * (x - center) + constant."""
    n, _, length = x.shape
    dtype = x.dtype.type
    center, on_dy, on_x, constant = dtype(center), dtype(on_dy), dtype(on_x), dtype(constant)
    for i in range(n):
        for k in range(length):
            dx[i, c, k] = on_dy * dy[i, c, k] + on_x * (x[i, c, k] - center) + constant


@_jit
def _count_batch(tracked, pace):
    """Count a batch; its weight in the running statistics (a negative one: the mean of all)."""
    tracked[()] += 1
    return pace if pace >= 0 else 1.0 / tracked[()]


@_jit
def _fits(value, state):
    """Whether a number is finite in the type of the state that is to hold it."""
    return math.isfinite(state.dtype.type(value))


@_jit
def _track(c, mean, var, pace, running_mean, running_var):
    if _fits(var, running_var):
        running_mean[c] += pace * (mean - running_mean[c])
        running_var[c] += pace * (var - running_var[c])


@_jit
def _unbiased(var, count):
    return var * count / (count - 1) if count > 1 else var


@_jit
def batch_norm(x, y, weight, bias, means, variances, running, pace, eps, update):
    """Batch normalization; `running` is (mean, variance, batches seen)."""
    count = x.shape[0] * x.shape[2]
    running_mean, running_var, tracked = running
    pace = _count_batch(tracked, pace) if update else pace
    for c in range(x.shape[1]):
        mean, var = _moments(x, c)
        means[c], variances[c] = mean, var
        if update:
            _track(c, mean, _unbiased(var, count), pace, running_mean, running_var)
        _write(x, y, c, mean, weight[c] / math.sqrt(var + eps), bias[c])


@_jit
def renorm(x, y, weight, bias, means, variances, rs, ds, running, pace, eps, update, step, limits):
    """Batch renormalization; `limits` is (max_r, max_d, warmup_steps, smooth)."""
    count = x.shape[0] * x.shape[2]
    running_mean, running_var, tracked = running
    now = step[()] + 1
    if limits[3] > 0 and limits[2] > 0:
        opened = min(now / limits[2], 1.0)
    else:
        opened = 1.0 if now > limits[2] else 0.0
    max_r, max_d = 1 + opened * (limits[0] - 1), opened * limits[1]
    if update:
        pace = _count_batch(tracked, pace)
        step[()] = now
    for c in range(x.shape[1]):
        mean, var = _moments(x, c)
        sigma, running_sigma = math.sqrt(var + eps), math.sqrt(running_var[c] + eps)
        r = min(max(sigma / running_sigma, 1 / max_r), max_r)
        d = min(max((mean - running_mean[c]) / running_sigma, -max_d), max_d)
        means[c], variances[c], rs[c], ds[c] = mean, var, r, d
        if update:
            _track(c, mean, _unbiased(var, count), pace, running_mean, running_var)
        _write(x, y, c, mean, weight[c] * r / sigma, weight[c] * d + bias[c])


@_jit
def momentum_norm(
    x, y, weight, bias, means, variances, centers, running, pace, eps, update, memory, keep
):
    """Momentum batch normalization; `memory` is (mean, variance, batches seen whole)."""
    count = x.shape[0] * x.shape[2]
    running_mean, running_var, tracked = running
    old_mean, old_var, seen = memory
    if seen[()] == 0:
        keep = 0.0
    if update:
        pace = _count_batch(tracked, pace)
    whole = True
    for c in range(x.shape[1]):
        mean, var = _moments(x, c)
        used_mean, used_var = mean, var
        if keep > 0:  # momentum-bn eq. 8
            used_mean = mean + keep * (old_mean[c] - mean)
            used_var = var + keep * (old_var[c] - var)
        means[c], variances[c], centers[c] = used_mean, used_var, mean
        if update:
            if _fits(used_var, old_var):
                old_mean[c], old_var[c] = used_mean, used_var
            else:
                whole = False
            _track(c, mean, _unbiased(var, count), pace, running_mean, running_var)
        _write(x, y, c, used_mean, weight[c] / math.sqrt(used_var + eps), bias[c])
    if update and whole:
        seen[()] += 1
    return keep


@_jit
def _slide(window, new, sums):
    """Push a step into a window where it is finite; `sums` become those with the step in it."""
    length = window.shape[0]
    sums[:] = new
    for k in range(1, length):
        for c in range(new.shape[0]):
            sums[c] += window[k, c]
    return length


@_jit
def _keep(window, new):
    for k in range(window.shape[0] - 1):
        for c in range(new.shape[0]):
            if _fits(new[c], window):
                window[k, c] = window[k + 1, c]
    for c in range(new.shape[0]):
        if _fits(new[c], window):
            window[window.shape[0] - 1, c] = new[c]


@_jit
def moving_average_norm(
    x, y, weight, bias, variances, rs, running, pace, eps, update, step, window, length, settings
):
    """Uncentred moving average batch normalization.

    `settings` is (forward statistics, warm-up steps, renorm warm-up steps, clip). Whether the
    averages are still the batch's own is returned.
    """
    _, running_var, tracked = running  # the uncentred form has no mean
    now = step[()] + 1
    warming = now < max(length + 1, settings[1])
    plain = settings[0] != EMA or now <= max(settings[2], settings[1])
    if update:
        pace = _count_batch(tracked, pace)
        step[()] = now
    channels = x.shape[1]
    new, average = np.empty(channels), np.empty(channels)
    for c in range(channels):
        new[c] = _second_moment(x, c)
    average[:] = new
    if settings[0] != BATCH:
        _slide(window, new, average)
        for c in range(channels):  # an empty place: a step that was not finite
            alone = warming or (length > 1 and window[1, c] == 0)
            average[c] = new[c] if alone else average[c] / length
        if update:
            _keep(window, new)
    for c in range(channels):
        used, r = average[c], 1.0
        if not plain:  # moving-average-bn eq. 19
            ratio = math.sqrt((used + eps) / (running_var[c] + eps))
            r = min(max(ratio, 1 / settings[3]), settings[3])
        variances[c], rs[c] = used, r
        if update and _fits(used, running_var):
            running_var[c] += pace * (used - running_var[c])
        _write(x, y, c, 0.0, weight[c] * r / math.sqrt(used + eps), bias[c])
    return warming


@_jit
def group_norm(x, y, weight, bias, means, variances, running, pace, eps, update):
    """Batch-group normalization of one group of examples; a column a channel group."""
    channels, columns = x.shape[1], means.shape[0]
    width, count = channels // columns, x.shape[0] * x.shape[2]
    update = update and count > 1
    running_mean, running_var, tracked = running
    pace = _count_batch(tracked, pace) if update else pace
    own = np.empty((2, channels))
    for c in range(channels):
        own[0, c], own[1, c] = _moments(x, c)
        if update:
            var = _unbiased(own[1, c], count)
            _track(c, own[0, c], var, pace, running_mean, running_var)
    for k in range(columns):
        mean = own[0, k * width : (k + 1) * width].mean()
        var = 0.0
        for c in range(k * width, (k + 1) * width):
            var += (own[1, c] + (own[0, c] - mean) ** 2) / width
        means[k], variances[k] = mean, var
        for c in range(k * width, (k + 1) * width):
            _write(x, y, c, mean, weight[c] / math.sqrt(var + eps), bias[c])


@_jit
def backward(dy, x, dx, weight, dw, db, means, variances, centers, rs, ds, share, eps):
    """Gradients of the centred methods; columns of statistics may be groups of channels.

    `rs` and `ds` are empty for 1 and 0, `centers` is empty for the means.
    """
    channels, columns = x.shape[1], means.shape[0]
    width = channels // columns
    count = x.shape[0] * x.shape[2] * width
    renormed, apart = rs.shape[0] > 0, centers.shape[0] > 0
    for k in range(columns):
        mean, inverse = means[k], 1 / math.sqrt(variances[k] + eps)
        center = centers[k] if apart else mean
        r, d = (rs[k], ds[k]) if renormed else (1.0, 0.0)
        g = psi = 0.0
        for c in range(k * width, (k + 1) * width):
            sum_dy, sum_dyz = _sums(dy, x, c, center)
            sum_dyz = (sum_dyz + (center - mean) * sum_dy) * inverse
            dw[c], db[c] = r * sum_dyz + d * sum_dy, sum_dy
            g += weight[c] * r * sum_dy / count
            psi += weight[c] * r * sum_dyz / count
        on_x, constant = -share * psi * inverse * inverse, -share * g * inverse
        for c in range(k * width, (k + 1) * width):
            _gradient(dy, x, dx, c, center, weight[c] * r * inverse, on_x, constant)


@_jit
def moving_average_backward(
    dy, x, dx, weight, dw, db, variances, rs, own, eps, update, kind, memory, count, pace
):
    """Gradients of the uncentred moving average form (moving-average-bn eq. 13 and 20).

    `memory` is the window of Psi, its exponential average as a window of one, or empty.
    """
    channels, values = x.shape[1], x.shape[0] * x.shape[2]
    psi, average = np.empty(channels), np.empty(channels)
    for c in range(channels):
        db[c], second = _sums(dy, x, c, 0.0)
        dw[c] = rs[c] * second / math.sqrt(variances[c] + eps)
        psi[c] = weight[c] * dw[c] / values
    average[:] = psi
    if kind == SMA:
        _slide(memory, psi, average)
        average /= min(count[()] + 1, memory.shape[0])
        if update:
            _keep(memory, psi)
    elif kind == EMA:
        old = 0.0 if count[()] == 0 else 1 - pace
        for c in range(channels):
            average[c] = psi[c] + old * (memory[0, c] - psi[c])
            if update and _fits(psi[c], memory):
                memory[0, c] = average[c]
    if kind != BATCH and update:
        count[()] += 1
    for c in range(channels):
        inverse = 1 / math.sqrt(variances[c] + eps)
        used = psi[c] if own else average[c]
        _gradient(dy, x, dx, c, 0.0, weight[c] * rs[c] * inverse, -used * inverse * inverse, 0.0)
