# mypy: disable-error-code="no-untyped-def, no-untyped-call, attr-defined"
"""The compiled loops of batch normalization sampling, for batches of any size.

Statistics come from a few values, so that forward is one pass over the data, and backward another
that writes the gradient as if statistics were constants and sums what passes through them; the
sample is written again at the end.

Tensors are given by their addresses (`anybatch.backends.numba.arrays`). Activations ``x``, ``y``,
``dy`` and ``dx`` are planes ``(N * C, L)`` of the contiguous format, or rows ``(N * L, C)`` where a
channel's values are not side by side. A sample is a table of runs ``(R, 3)``
of adjacent pixels: example, first pixel, length. A second, empty table is none.
"""

import math

import numpy as np

from anybatch.backends.numba.arrays import array_at, running_at
from anybatch.backends.numba.compile import inlined, jit
from anybatch.backends.numba.rules import count_batch, track, unbiased
from anybatch.backends.numba.sampled_passes import (
    WIDE,
    planes_affine,
    planes_backward,
    planes_correct,
    planes_statistics,
    rows_affine,
    rows_backward,
    rows_correct,
    rows_moments,
)
from anybatch.backends.numba.threads import fork


@inlined
def _decide(
    table, shares, count, weight, bias, running, update_weight, eps, update, stats, scales, shifts
):
    """The rule of all channels: statistics, running statistics, scale and shift."""
    running_mean, running_var, tracked = running
    update_weight = count_batch(tracked, update_weight) if update else update_weight
    for c in range(weight.shape[0]):
        mean, var = table[0, c], table[1, c]
        if shares[1] > 0:  # bn-sampling eq. 4
            mean = shares[0] * mean + shares[1] * table[2, c]
            var = shares[0] * var + shares[1] * table[3, c]
        stats[0, c], stats[1, c] = mean, var
        if update:
            track(c, mean, unbiased(var, count), update_weight, running_mean, running_var)
        scales[c], shifts[c] = weight[c] / math.sqrt(var + eps), bias[c]


@inlined
def _combine(sums, planes, weight, stats, table, shares, counts, eps, dw, db, work):
    """Sums over everything, and the factors of both samples' correction, into `work`."""
    channels = weight.shape[0]
    for c in range(channels):
        first = second = 0.0
        if planes:
            for p in range(c, sums.shape[0], channels):
                first += sums[p, 0, 0]
                second += sums[p, 1, 0]
        else:
            for b in range(sums.shape[0]):
                for w in range(c, sums.shape[2], channels):
                    first += sums[b, 0, w]
                    second += sums[b, 1, w]
        inverse = 1 / math.sqrt(stats[1, c] + eps)
        # Means are rounded to the type of the data where they are subtracted: so are the sums'.
        second += (work[0, c] - stats[0, c]) * first
        dw[c], db[c] = second * inverse, first
        for s in range(2):
            if shares[s] > 0:
                factor = -weight[c] * inverse * shares[s] / counts[s]
                work[1 + 3 * s, c] = table[2 * s, c]
                work[2 + 3 * s, c] = factor * inverse * dw[c]
                work[3 + 3 * s, c] = factor * db[c]


@inlined
def _wide(channels, rows):
    """How many rows of few channels are taken as one."""
    take = max(WIDE // channels, 1)
    while rows % take:
        take -= 1
    return take


@inlined
def _wider(rows, take):
    """Rows, so many taken as one."""
    return rows.reshape(rows.shape[0] // take, take * rows.shape[1])


@inlined
def _cast(row, take, like):
    """Repeat a per-channel row `take` times, in the type of `like`."""
    channels = row.shape[0]
    table = np.empty(take * channels, like.dtype)
    for t in range(take):
        for c in range(channels):
            table[t * channels + c] = row[c]
    return table


@inlined
def _map_at(address, shape, like):
    """Planes or rows; none of them at address 0."""
    return array_at(address, (0 if address == 0 else shape[0], shape[1]), like)


@jit
def sampled_forward(kept, data, sample, running, update_weight, eps, update, parts, table, stats):
    """The whole forward, into ``table`` and ``stats``, which `sampled_backward` needs.

    Args:
        kept: An empty array of the type of parameters and state.
        data: An empty array of the type of activations; input; output, to be written; shape of both
            and whether they are planes; whether a ReLU follows; what is added before it, or 0;
            scale; shift.
        sample: Tables of runs, their shares, their counts, and L.
        running: Running mean, variance and number of batches.
        update_weight: Of the newest batch in running statistics, see `NormCall`.
        eps: Added to the variance.
        update: Whether state may change.
        parts: Threads.
        table: Takes mean and variance of both samples, ``(4, C)``.
        stats: Takes those to normalize by, ``(2, C)``.
    """
    like, x, y, shape, planes, relu, added, weight, bias = data
    runs, shares, counts, length = sample
    channels = stats.shape[1]
    x, y, added = array_at(x, shape, like), array_at(y, shape, like), _map_at(added, shape, like)
    weight, bias = array_at(weight, channels, kept), array_at(bias, channels, kept)
    running = running_at(running, channels, kept)
    if planes:
        fork(planes_statistics, parts, (x, channels, length, runs[0], runs[1], table))
    else:
        for s in range(2):
            if runs[s].shape[0] > 0:
                rows_moments(parts, x, length, runs[s], kept, table[2 * s], table[2 * s + 1])
    scales, shifts, count = np.empty(channels), np.empty(channels), counts[0] + counts[1]
    how, made = (weight, bias, running, update_weight, eps, update), (stats, scales, shifts)
    _decide(table, shares, count, *how, *made)
    if planes:
        on = _cast(stats[0], 1, kept), _cast(scales, 1, kept), _cast(shifts, 1, kept)
        fork(planes_affine, parts, (x, y, relu, added, *on))
    else:
        take = _wide(channels, x.shape[0])
        for c in range(channels):
            shifts[c] -= stats[0, c] * scales[c]
        wide = _wider(x, take), _wider(y, take), relu, _wider(added, take)
        fork(rows_affine, parts, (*wide, _cast(scales, take, kept), _cast(shifts, take, kept)))


@jit
def sampled_backward(kept, data, sample, stats, table, eps, parts):
    """The whole backward.

    Args:
        kept: An empty array of the type of parameters and state.
        data: An empty array of the type of activations; gradient of the output; input; gradient of
            the input, to be written; shape of the three and whether they are planes; whether a
            ReLU followed; its output, or 0; gradient of what was added before it, to be written, or
            0; scale; gradients of scale and shift, to be written.
        sample: As of `sampled_forward`.
        stats: Of `sampled_forward`.
        table: Of `sampled_forward`.
        eps: Added to the variance.
        parts: Threads.
    """
    like, dy, x, dx, shape, planes, relu, y, g, weight, dw, db = data
    runs, shares, counts, length = sample
    channels, work = stats.shape[1], np.zeros((7, stats.shape[1]))
    dy, x, dx = array_at(dy, shape, like), array_at(x, shape, like), array_at(dx, shape, like)
    y, g = _map_at(y, shape, like), _map_at(g, shape, like)
    weight = array_at(weight, channels, kept)
    dw, db = array_at(dw, channels, kept), array_at(db, channels, kept)
    wanted = np.empty(channels)
    for c in range(channels):
        wanted[c] = weight[c] / math.sqrt(stats[1, c] + eps)
    mean, scales = _cast(stats[0], 1, kept), _cast(wanted, 1, kept)
    for c in range(channels):  # an array's assignment compiles what it would say of shapes
        work[0, c] = mean[c]
    if planes:
        sums = np.empty((x.shape[0], 2, 1))
        fork(planes_backward, parts, (dy, x, dx, relu, y, g, mean, scales, sums))
    else:
        take = _wide(channels, x.shape[0])
        rows = x.shape[0] // take
        sums = np.empty((min(8 * parts, rows) if parts > 1 else 1, 2, take * channels))
        wide = _wider(dy, take), _wider(x, take), _wider(dx, take), relu, _wider(y, take)
        tiled = _cast(mean, take, kept), _cast(scales, take, kept)
        fork(rows_backward, parts, (*wide, _wider(g, take), *tiled, sums))
    _combine(sums, planes, weight, stats, table, shares, counts, eps, dw, db, work)
    for s in range(2):
        if shares[s] > 0:
            factors = np.empty((4, channels), kept.dtype)
            for c in range(channels):
                factors[0, c], factors[1, c] = work[1 + 3 * s, c], scales[c]
                factors[2, c], factors[3, c] = work[2 + 3 * s, c], work[3 + 3 * s, c]
            if planes:
                fork(planes_correct, parts, (dy, x, dx, relu, y, length, runs[s], factors))
            else:
                fork(rows_correct, parts, (dy, x, dx, relu, y, length, runs[s], factors))


def box_runs(first, sides, spatial):
    """The runs of a box of examples and pixels.

    Args:
        first: Where it begins, in examples and each spatial dimension.
        sides: How far it reaches.
        spatial: Shape of a map.
    """
    pixels = np.arange(math.prod(spatial)).reshape(spatial)
    patch = pixels[tuple(slice(a, a + n) for a, n in zip(first[1:], sides[1:], strict=True))]
    patch = patch.reshape(-1)
    breaks = np.flatnonzero(np.diff(patch) != 1) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(patch)])))
    examples = np.arange(first[0], first[0] + sides[0])
    table = np.empty((len(examples), len(starts), 3), np.int64)
    table[:, :, 0], table[:, :, 1], table[:, :, 2] = examples[:, None], patch[starts], lengths
    return table.reshape(-1, 3)


def point_runs(where, spatial):
    """The runs of single values, of the example and the pixel of each."""
    rows, *pixels = where
    flat = np.ravel_multi_index(tuple(pixels), spatial) if pixels else np.zeros_like(rows)
    return np.stack([rows, flat, np.ones_like(rows)], 1).astype(np.int64)


NO_RUNS = np.empty((0, 3), np.int64)
