# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""The rules of the methods, a column of statistics at a time, and what they remember.

``own`` ``(2, G, C)`` holds the mean and variance of each group of examples and channel; ``used``
``(2 or 4, G, K)`` mean and variance to normalize by and, where there are four rows, r and d. A
column is a channel, or a group of ``C / K`` channels. While columns are decided on, side by side in
threads, state is only read; it moves afterwards.
"""

import math

import numpy as np

from anybatch.backends.kinds import MOMENTUM, RENORM, WINDOW
from anybatch.backends.numba.compile import inlined

# --- forward ----------------------------------------------------------------


@inlined
def choose(rule, old_mean, old_var, window, own, used, g, k, width):
    """Decide how a column, of so many channels, is normalized.

    `rule` is (kind, eps, first, second), with two numbers of the method: RENORM's limits of r and
    d, MOMENTUM's weight of the old averages, WINDOW's length (0 for none) and limit of r (0 for
    none). Rows and window are the method's memory.
    """
    kind, eps, first, second = rule
    mean, var = own[0, g, k], own[1, g, k]
    if width > 1:
        mean = var = 0.0
        for c in range(k * width, (k + 1) * width):
            mean += own[0, g, c] / width
        for c in range(k * width, (k + 1) * width):
            apart = own[0, g, c] - mean
            var += (own[1, g, c] + apart * apart) / width
    r, d = 1.0, 0.0
    if kind == RENORM:
        sigma = math.sqrt(old_var[k] + eps)
        r = min(max(math.sqrt(var + eps) / sigma, 1 / first), first)
        d = min(max((mean - old_mean[k]) / sigma, -second), second)
    elif kind == MOMENTUM and first > 0:  # momentum-bn eq. 8
        mean += first * (old_mean[k] - mean)
        var += first * (old_var[k] - var)
    elif kind == WINDOW:
        # The oldest place is empty where a step was not finite: no average yet.
        if first > 0 and (window.shape[0] < 2 or window[1, k] != 0):
            for step in range(1, window.shape[0]):
                var += window[step, k]
            var /= first
        if second > 0:  # moving-average-bn eq. 19
            r = min(max(math.sqrt((var + eps) / (old_var[k] + eps)), 1 / second), second)
    used[0, g, k], used[1, g, k] = mean, var
    if used.shape[0] > 2:
        used[2, g, k], used[3, g, k] = r, d


@inlined
def factors(used, g, k, c, weight, bias, eps):
    """Mean, scale and shift of a channel of a column."""
    scale, shift = np.float64(weight[c]), np.float64(bias[c])
    if used.shape[0] > 2:
        shift += scale * used[3, g, k]
        scale *= used[2, g, k]
    return used[0, g, k], scale / math.sqrt(used[1, g, k] + eps), shift


# --- backward ---------------------------------------------------------------


@inlined
def flow(rule, memory, sums, used, centers, weight, on, g, k, width, count):
    """From the two sums of a column's channels: their gradients, and the factors of dx.

    `sums` ``(2, G, C)`` become the gradients of bias and weight; `on` ``(3, G, C)`` takes the
    factors of dy and x, and the constant. `memory` holds averages of Psi; `rule` is (eps, share,
    whether centred, steps in the memory or 0, weight of its old average).
    """
    eps, share, centered, steps, old = rule
    inverse = 1 / math.sqrt(used[1, g, k] + eps)
    r, d = (used[2, g, k], used[3, g, k]) if used.shape[0] > 2 else (1.0, 0.0)
    apart = centers[g, k] - used[0, g, k]
    mean_g = psi = 0.0
    for c in range(k * width, (k + 1) * width):
        sum_dy = sums[0, g, c]
        sum_dyz = (sums[1, g, c] + apart * sum_dy) * inverse
        sums[1, g, c] = r * sum_dyz + d * sum_dy
        mean_g += weight[c] * r * sum_dy
        psi += weight[c] * r * sum_dyz
        on[0, g, c] = weight[c] * r * inverse
    mean_g /= count
    psi /= count
    if steps > 0:  # moving-average-bn eq. 13
        for step in range(1, memory.shape[0]):
            psi += memory[step, k]
        psi /= steps
    elif old > 0:
        psi += old * (memory[0, k] - psi)
    for c in range(k * width, (k + 1) * width):
        on[1, g, c] = -share * psi * inverse * inverse
        on[2, g, c] = -share * mean_g * inverse if centered else 0.0


# --- what is remembered -----------------------------------------------------


@inlined
def fits(value, state):
    """Whether a number is finite in the type of the state that is to hold it.

    ``math.isfinite`` is compiled to ``x - x == 0``; of an x that is itself a sum, reordering leaves
    0 of it.
    """
    return abs(state.dtype.type(value)) < np.inf


@inlined
def unbiased(var, count):
    """Bessel's correction."""
    return var * count / (count - 1) if count > 1 else var


@inlined
def count_batch(tracked, pace):
    """Count a batch; its weight in the running statistics (a negative one: the mean of all)."""
    tracked[()] += 1
    return pace if pace >= 0 else 1.0 / tracked[()]


@inlined
def track(c, mean, var, pace, running_mean, running_var):
    """Move running statistics towards finite ones."""
    if fits(var, running_var):
        running_mean[c] += pace * (mean - running_mean[c])
        running_var[c] += pace * (var - running_var[c])


@inlined
def track_groups(own, starts, values, pace, running_mean, running_var, tracked):
    """Track groups of examples, each weighing by its examples; those of one value count not."""
    total = 0
    for g in range(starts.shape[0] - 1):
        size = starts[g + 1] - starts[g]
        total += size if size * values > 1 else 0
    if total == 0:
        return
    pace, pooled = count_batch(tracked, pace), np.zeros((2, running_mean.shape[0]))
    for g in range(starts.shape[0] - 1):
        size = starts[g + 1] - starts[g]
        if size * values > 1:
            share = size / total
            of_var = unbiased(share, size * values)
            for c in range(running_mean.shape[0]):
                pooled[0, c] += own[0, g, c] * share
                pooled[1, c] += own[1, g, c] * of_var
    for c in range(running_mean.shape[0]):
        track(c, pooled[0, c], pooled[1, c], pace, running_mean, running_var)


@inlined
def slide(window, new, sums):
    """Push a step into a window where it is finite; `sums` become those with the step in it."""
    length = window.shape[0]
    sums[:] = new
    for k in range(1, length):
        for c in range(new.shape[0]):
            sums[c] += window[k, c]
    return length


@inlined
def keep(window, new):
    """Push a step into a window where it is finite."""
    for k in range(window.shape[0] - 1):
        for c in range(new.shape[0]):
            if fits(new[c], window):
                window[k, c] = window[k + 1, c]
    for c in range(new.shape[0]):
        if fits(new[c], window):
            window[window.shape[0] - 1, c] = new[c]
